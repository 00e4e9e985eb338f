"""Checkpoints, copies, and conversions of the model with the state brought along."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .gradients import give_plain
from .registry import operation
from .world import Draw, Side


def make_whole(side: Side, draw: Draw) -> None:
    """What no checkpoint could hold: state half there, or of a parameter that no group names."""
    if side.variant.is_ours:  # tensors that it does not know are refused
        for state in side.optimizer.state.values():
            if isinstance(state.get("users"), Tensor):
                del state["users"]
    names = set(side.variant.state_names) - {"residual", "master"}
    states = [s for p in side.grouped() if (s := side.state_of(p))]
    if any(not names <= s.keys() for s in states):
        give_plain(side, draw)
        side.step()
    grouped = set(side.grouped())
    for param in [p for p in side.optimizer.state if p not in grouped]:
        del side.optimizer.state[param]


def groups_for(side: Side, params: dict[Tensor, Tensor]) -> list[dict[str, Any]]:
    return [{"params": [params[p] for p in g["params"]]} for g in side.optimizer.param_groups]


def name_once(side: Side) -> None:
    """Constructors take no parameter twice."""
    seen: set[Tensor] = set()
    for group in side.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if not (p in seen or seen.add(p))]


@operation()
def own_state_is_loaded(side: Side, draw: Draw) -> None:
    make_whole(side, draw)
    state = side.optimizer.state_dict()
    side.optimizer.load_state_dict(copy.deepcopy(state) if draw.random() < 0.5 else state)


@operation()
def own_state_is_loaded_into_a_new_optimizer(side: Side, draw: Draw) -> None:
    make_whole(side, draw)
    name_once(side)
    groups = groups_for(side, {p: p for p in side.grouped()})
    new = side.variant.build(groups, side.backend)
    buffer = io.BytesIO()
    torch.save(side.optimizer.state_dict(), buffer)
    buffer.seek(0)
    new.load_state_dict(torch.load(buffer))
    side.optimizer = new


@operation()
def a_checkpoint_is_kept(side: Side, draw: Draw) -> None:
    make_whole(side, draw)
    params = [list(g["params"]) for g in side.optimizer.param_groups]
    side.saved = {"params": params, "state": copy.deepcopy(side.optimizer.state_dict())}


@operation()
def a_kept_checkpoint_is_loaded(side: Side, draw: Draw) -> bool:
    """If the groups are as they were; parameters go on as they are."""
    params = [list(g["params"]) for g in side.optimizer.param_groups]
    if side.saved is None or not same_objects(side.saved["params"], params):
        return False
    make_whole(side, draw)
    side.optimizer.load_state_dict(side.saved["state"])
    return True


def same_objects(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return [[id(p) for p in part] for part in a] == [[id(p) for p in part] for part in b]


@operation()
def a_checkpoint_of_torch_is_loaded(side: Side, draw: Draw) -> None:
    make_whole(side, draw)
    name_once(side)
    clones: dict[Tensor, Tensor] = {
        p: Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        for p in side.grouped()
    }
    groups = [g for g in groups_for(side, clones) if g["params"]]
    if len(groups) < len(side.optimizer.param_groups):
        side.optimizer.param_groups = [g for g in side.optimizer.param_groups if g["params"]]
    kinds = [torch.optim.AdamW, torch.optim.RAdam] if side.variant.is_ours else [torch.optim.AdamW]
    other = draw.choice(kinds)(groups, lr=0.02)
    for clone in clones.values():
        clone.grad = draw.tensor(clone.shape, clone.dtype) if draw.random() < 0.8 else None
    for _ in range(draw.randrange(4)):
        other.step()
    side.optimizer.load_state_dict(other.state_dict())


@operation(2)
def all_is_copied(side: Side, draw: Draw) -> None:
    """Optimizer and parameters together; a copied parameter has no gradient."""
    side.optimizer, side.params = copy.deepcopy((side.optimizer, side.params))
    side.saved = None


@operation(2)
def all_is_pickled(side: Side, draw: Draw) -> None:
    side.optimizer, side.params = pickle.loads(pickle.dumps((side.optimizer, side.params)))
    side.saved = None


@operation()
def the_model_is_converted(side: Side, draw: Draw) -> None:
    """Some of the parameters, and then the state as the error message says."""
    make_whole(side, draw)
    real = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    wanted = {False: draw.choice(real), True: draw.choice([torch.complex64, torch.complex128])}
    for param in side.grouped():
        # torch's own leave the state of complex parameters behind.
        if draw.random() < 0.6 and (side.variant.is_ours or not param.is_complex()):
            param.grad = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                param.data = param.data.to(wanted[param.is_complex()])
    side.optimizer.load_state_dict(side.optimizer.state_dict())
