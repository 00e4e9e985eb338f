"""State that is replaced, reordered or incomplete, and groups that change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gradients import give_all
from .registry import OURS, operation
from .world import Draw, Side

# --- state --------------------------------------------------------------------------------------


@operation()
def state_tensors_are_replaced(side: Side, draw: Draw) -> None:
    every = draw.random() < 0.5
    for state, name, value in list(side.states()):
        if every or draw.random() < 0.2:
            state[name] = draw.laid_out(value) if value.dim() else value.clone()


@operation()
def state_changes_in_place(side: Side, draw: Draw) -> bool:
    moments = [value for _, name, value in side.states() if name in ("exp_avg", "slow_param")]
    if moments:
        draw.choice(moments).mul_(draw.choice([0, 0.5, -1]))
    return bool(moments)


@operation()
def state_is_reordered(side: Side, draw: Draw) -> None:
    for param in side.grouped():
        items = list(side.state_of(param).items())
        draw.shuffle(items)
        if items:
            side.optimizer.state[param] = dict(items)
    if draw.random() < 0.5:
        items = list(side.optimizer.state.items())
        items.reverse()
        side.optimizer.state.clear()
        side.optimizer.state.update(items)


@operation()
def state_is_another_dict(side: Side, draw: Draw) -> None:
    side.optimizer.state = defaultdict(dict, side.optimizer.state)


@operation(5)
def state_loses_an_entry(side: Side, draw: Draw) -> bool:
    return lose(side, draw, 1)


@operation(1)
def state_loses_entries(side: Side, draw: Draw) -> bool:
    return lose(side, draw, draw.randrange(2, 9))


def lose(side: Side, draw: Draw, number: int) -> bool:
    entries = [
        (state, name) for state, name, _ in side.states() if name in side.variant.state_names
    ]
    for state, name in draw.sample(entries, min(number, len(entries))):
        del state[name]
    return bool(entries)


@operation(4)
def step_is_counted_otherwise(side: Side, draw: Draw) -> bool:
    """As checkpoints of other versions count: a number, or a tensor of another kind."""
    kinds = [int, float, torch.tensor, lambda n: torch.tensor(n, dtype=torch.float64)]
    return recount(side, draw, kinds)


@operation(1)
def step_is_counted_in_another_shape(side: Side, draw: Draw) -> bool:
    return recount(side, draw, [lambda n: torch.tensor([float(n)])])


def recount(side: Side, draw: Draw, kinds: list[Callable[[int], Any]]) -> bool:
    name = side.variant.step_name
    states = [s for p in side.grouped() if isinstance((s := side.state_of(p)).get(name), Tensor)]
    if states:
        state = draw.choice(states)
        state[name] = draw.choice(kinds)(int(state[name]))
    return bool(states)


@operation()
def state_of_one_is_cleared(side: Side, draw: Draw) -> None:
    param = draw.choice(side.grouped())
    if draw.random() < 0.5:
        side.optimizer.state.pop(param, None)
    else:
        side.optimizer.state[param] = {}


@operation(1)
def all_state_is_cleared(side: Side, draw: Draw) -> None:
    side.optimizer.state.clear()


@operation()
def state_gets_an_entry_of_the_users(side: Side, draw: Draw) -> bool:
    states = [s for p in side.grouped() if (s := side.state_of(p))]
    if states:
        values = [1, None, "note"] if side.variant.is_ours else [1, None]  # torch loads no strings
        value = draw.choice(values) if draw.random() < 0.5 else draw.tensor([3])
        draw.choice(states)["users"] = value
    return bool(states)


@operation(2, OURS)
def states_share_memory(side: Side, draw: Draw) -> bool:
    """Two state tensors of a parameter are one, or one lies where the parameter does."""
    names = [name for name in ("exp_avg", "slow_param") if not side.variant.is_apart(name)]
    found = [
        (state, name)
        for param in side.grouped()
        for name in names
        if name in (state := side.state_of(param)) and "exp_avg_sq" in state
    ]
    if not found:
        return False
    state, name = draw.choice(found)
    state[name] = state["exp_avg_sq"] if draw.random() < 0.5 else state["exp_avg_sq"].detach()
    return True


# --- groups -------------------------------------------------------------------------------------


@operation(6)
def hyperparameters_change(side: Side, draw: Draw) -> None:
    values: dict[str, list[Any]] = {
        "lr": [0.0, 0.01, 0.1, torch.tensor(0.02), torch.tensor([0.03], dtype=torch.float64)],
        "betas": [(0.9, 0.999), (0.0, 0.5), (0.95, 0.9999)],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0.0, 0.1],
        "maximize": [False, True],
    }
    if side.variant.is_ours:
        values |= {
            "decoupled_weight_decay": [False, True],
            "rho_threshold": [4, 5.0, float("inf")],
            # A norm is taken, and nothing clipped by its last places, which backends may differ in.
            "max_grad_norm": [None, 1e300],
            "bounds": [None, (-1.0, 0.5), (None, 2)],
            "weight_rounding": ["exact", "nearest"],
        }
    else:
        values["lr"] = values["lr"][:3]
    if side.variant.has_slow:
        values["lookahead_k"] = [1, 2, 3, 6]
        values["lookahead_alpha"] = [0, 0.3, 0.5, 1]
    group = draw.choice(side.optimizer.param_groups)
    if side.centralizes:
        values["centralize"] = [None, "conv", "all"]
    for name in draw.sample(list(values), draw.randrange(1, 4)):
        group[name] = draw.choice(values[name])


@operation()
def group_is_added(side: Side, draw: Draw) -> bool:
    if len(side.grouped()) > 9:
        return False
    if isinstance(side.optimizer.param_groups, tuple):
        side.optimizer.param_groups = list(side.optimizer.param_groups)
    params = [side.new_param(draw) for _ in range(draw.randrange(1, 3))]
    side.optimizer.add_param_group({"params": params, "lr": 0.03})
    return True


@operation()
def parameter_leaves(side: Side, draw: Draw) -> bool:
    """Its state may stay behind."""
    if len(side.grouped()) < 3:
        return False
    param = draw.choice(side.grouped())
    for group in side.optimizer.param_groups:
        kind = type(group["params"])
        group["params"] = kind(p for p in group["params"] if p is not param)
    if draw.random() < 0.5:
        side.optimizer.state.pop(param, None)
    return True


@operation()
def parameter_comes_back(side: Side, draw: Draw) -> bool:
    gone = [p for p in side.params if p not in set(side.grouped())]
    if not gone or len(side.grouped()) > 9:
        return False
    group = draw.choice(side.optimizer.param_groups)
    group["params"] = [*group["params"], draw.choice(gone)]
    return True


@operation()
def parameters_are_reordered(side: Side, draw: Draw) -> None:
    group = draw.choice(side.optimizer.param_groups)
    params = list(group["params"])
    draw.shuffle(params)
    if isinstance(group["params"], list):
        group["params"][:] = params
    else:
        group["params"] = tuple(params)


@operation()
def groups_are_reordered(side: Side, draw: Draw) -> None:
    groups = side.optimizer.param_groups
    side.optimizer.param_groups = type(groups)(reversed(groups))


@operation()
def parameter_changes_groups(side: Side, draw: Draw) -> bool:
    groups = side.optimizer.param_groups
    if len(groups) < 2:
        return False
    param = draw.choice(side.grouped())
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not param]
    group = draw.choice(groups)
    group["params"] = [param, *group["params"]]
    return True


@operation(2)
def parameter_is_named_twice(side: Side, draw: Draw) -> bool:
    """In its group or another; it moves once."""
    if not side.variant.is_ours or sum(len(g["params"]) for g in side.optimizer.param_groups) > 10:
        return False
    group = draw.choice(side.optimizer.param_groups)
    group["params"] = [*group["params"], draw.choice(side.grouped())]
    return True


@operation()
def groups_are_a_tuple_or_a_list(side: Side, draw: Draw) -> None:
    groups = side.optimizer.param_groups
    side.optimizer.param_groups = list(groups) if isinstance(groups, tuple) else tuple(groups)


@operation()
def params_are_a_tuple_or_a_list(side: Side, draw: Draw) -> None:
    group = draw.choice(side.optimizer.param_groups)
    kind = list if isinstance(group["params"], tuple) else tuple
    group["params"] = kind(group["params"])


@operation()
def group_is_another_dict(side: Side, draw: Draw) -> None:
    groups = list(side.optimizer.param_groups)
    i = draw.randrange(len(groups))
    groups[i] = dict(reversed(groups[i].items()))
    side.optimizer.param_groups = type(side.optimizer.param_groups)(groups)


@operation(1)
def a_step_moves_nothing(side: Side, draw: Draw) -> None:
    """No parameter has a gradient, and then all have."""
    side.optimizer.zero_grad()
    side.step()
    give_all(side, draw)
    side.step()
