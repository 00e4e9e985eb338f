"""Checkpoints of other packages' optimizers, in the form that ours load: what differs between them
in names and in what a number means. ``docs/migration.md`` has where their formulas differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from .lookahead import Lookahead
from .ranger import Ranger
from .state import formats
from .state.checkpoint import LOOKAHEAD, check_kind, parameters
from .state.hyperparameters import check_lookahead
from .state.tensors import is_count, shown
from .step.optimizer import FusedOptimizer

State = dict[str, Any]
Group = dict[str, Any]

# What schedulers and trainers add to a group, and what means the same here or nothing.
_NEUTRAL = {"params", "param_names", "initial_lr", "min_lr", "max_lr", "lr_scale", "base_momentum"}
_NEUTRAL |= {"max_momentum", "foreach", "fused", "capturable", "differentiable", "maximize"}


class Source(NamedTuple):
    """A kind of optimizer that a group of a checkpoint can be of.

    Attributes:
        name: in error messages.
        marks: a group of it has these keys.
        group: the group in our keys; it may raise ValueError.
        drops: keys of its groups that mean nothing here.
        slow: what it calls the slow weight; None: it has none.
        ignored: of its state, what is left out.
        counts_groups: its groups count the steps, not its parameters.
        is_debiased: its moments are divided by ``1 - beta ** step``.
        is_complete: a key that is neither dropped, neutral nor translated is refused, as other
            optimizers of its package have the same marks.
    """

    name: str
    marks: frozenset[str]
    group: Callable[[Group], Group]
    drops: frozenset[str] = frozenset()
    slow: str | None = None
    ignored: frozenset[str] = frozenset()
    counts_groups: bool = False
    is_debiased: bool = False
    is_complete: bool = False


def _same(group: Group) -> Group:
    return {}


def _rectified_as_torch(group: Group) -> Group:
    return {"rho_threshold": 5.0}


def _lookahead(group: Group) -> Group:
    return {"lookahead_k": group["k"], "lookahead_alpha": group["alpha"]}


def _lessw2020(group: Group) -> Group:
    threshold = {"rho_threshold": float(group["N_sma_threshhold"])}
    return {**_lookahead(group), **threshold, "decoupled_weight_decay": True}


def _pytorch_optimizer(group: Group) -> Group:
    for key in ("adanorm", "adam_debias"):
        if group.get(key):
            raise ValueError(f"it was made with {key}=True, which there is not here")
    if group["fixed_decay"] and group["weight_decay"]:
        raise ValueError(
            "it was made with fixed_decay=True, a weight decay that no learning rate scales, and "
            "here one always does: set fixed_decay to False in the group, and weight_decay to that "
            "divided by the learning rate"
        )
    lookahead = _lookahead(group) if "alpha" in group else {}
    decoupled = {"decoupled_weight_decay": bool(group["weight_decouple"])}
    return {**lookahead, **decoupled, "rho_threshold": 5.0}


def _optimi(group: Group) -> Group:
    new: Group = {"betas": (group["beta1"], group["beta2"]), "rho_threshold": 5.0}
    new["decoupled_weight_decay"] = bool(group["decouple_wd"] or group["decouple_lr"])
    if group["decouple_lr"]:  # the parameter times 1 - lr / max_lr * weight_decay
        new["weight_decay"] = group["weight_decay"] / group["max_lr"]
    return {**(_lookahead(group) if "alpha" in group else {}), **new}


_LOOKAHEAD_KEYS = frozenset({"k", "alpha", "step_counter"})
_OPTIMI_KEYS = frozenset(
    {"beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "kahan_sum", "triton"}
    | {"gradient_release", "setup", "step"}
)
_PYTORCH_OPTIMIZER_KEYS = frozenset(
    {"weight_decouple", "fixed_decay", "adanorm", "adanorm_r", "adam_debias", "step"}
)

_OURS = Source("ranger_cuda", frozenset({"rho_threshold"}), _same)
# The first whose marks a group has.
SOURCES = (
    _OURS,
    Source(
        "lessw2020's Ranger",
        frozenset({"N_sma_threshhold", "k", "alpha"}),
        _lessw2020,
        drops=_LOOKAHEAD_KEYS | {"N_sma_threshhold"},
        slow="slow_buffer",
    ),
    Source(
        "optimi",
        frozenset({"beta1", "beta2", "decouple_wd", "decouple_lr"}),
        _optimi,
        drops=_LOOKAHEAD_KEYS | _OPTIMI_KEYS,
        slow="la_param",
        ignored=frozenset({"kahan_comp", "group"}),
        counts_groups=True,
        is_debiased=True,
    ),
    Source(
        "pytorch-optimizer",
        frozenset({"weight_decouple", "fixed_decay", "betas", "eps"}),
        _pytorch_optimizer,
        drops=_LOOKAHEAD_KEYS | _PYTORCH_OPTIMIZER_KEYS,
        slow="slow_buffer",
        counts_groups=True,
        is_complete=True,
    ),
    Source(
        "torch.optim.Adam",
        frozenset({"amsgrad", "betas", "eps"}),
        _same,
        drops=frozenset({"amsgrad"}),
        ignored=frozenset({"max_exp_avg_sq"}),
    ),
    Source(
        "torch.optim.RAdam",
        frozenset({"decoupled_weight_decay", "betas", "eps"}),
        _rectified_as_torch,
    ),
    Source(
        "RAdam",
        frozenset({"betas", "eps", "weight_decay"}),
        _same,
        drops=frozenset({"buffer"}),
        is_complete=True,
    ),
)
_KNOWN = (
    "RAdam, Adam and AdamW of torch; Ranger, RAdam and Lookahead of pytorch-optimizer; Ranger, "
)
_KNOWN += "RAdam, Adam and AdamW of optimi; lessw2020's Ranger; timm's Lookahead; and ranger_cuda's"


def convert_checkpoint(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Another package's checkpoint as one that ``optimizer.load_state_dict`` takes.

    Training goes on as it did there, as far as the formulas agree (``docs/migration.md``): moments,
    step counts, slow weights and the place in the Lookahead cycle are taken over, and so are the
    hyperparameters, in the names and meanings that they have here. What a checkpoint does not say
    stays as ``optimizer`` has it: ``k`` and ``alpha`` of pytorch-optimizer's Lookahead, and whether
    releases of Adam that did not save it decoupled their weight decay. ::

        optimizer = ranger_cuda.Ranger(model.parameters())
        optimizer.load_state_dict(ranger_cuda.convert_checkpoint(torch.load(path), optimizer))

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned. It may be one of
            ``torch.optim``'s RAdam, Adam or AdamW (``max_exp_avg_sq``, of ``amsgrad=True``, is left
            out); pytorch-optimizer's Ranger, RAdam or Lookahead; optimi's Ranger, RAdam, Adam or
            AdamW (``kahan_comp`` is left out); lessw2020's Ranger; timm's RAdam or Lookahead; or
            this package's, whose state and groups are returned as they are. It is not changed.
        optimizer: a :class:`Ranger`, a :class:`RAdam`, or a :class:`Lookahead` around any
            optimizer, with as many groups and parameters. It is only looked at. Where Lookahead is
            around another package's optimizer, the state of that one is not converted.

    Returns:
        A new dict in ``torch.optim``'s format. Its tensors may be those of ``state_dict``:
        ``load_state_dict`` copies them.

    Raises:
        TypeError: ``optimizer`` is not of this package.
        ValueError: the checkpoint is of a kind that is not known, or was made with an option that
            has no counterpart here, or does not fit the optimizer; the message says which.
        RuntimeError: the memory of a tensor in it was given back.
    """
    check_target(optimizer)
    check_kind(state_dict, Mapping, "it")
    found = _unwrapped(state_dict) if "lookahead_state" in state_dict else dict(state_dict)
    parameters(found, optimizer.param_groups)
    inner = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    state = dict(found["state"])
    groups = []
    for i, saved in enumerate(found["param_groups"]):
        group = {**saved}
        counts = _take_cycles(group, saved["params"], state)
        try:
            group, changed = _converted(group, state, isinstance(inner, FusedOptimizer))
            state |= changed
            period = group.get("lookahead_k", optimizer.param_groups[i].get("lookahead_k"))
            if counts:
                check_lookahead(period, group.get("lookahead_alpha", 0.5))
            for key, count in counts.items():
                state[key] = _with_cycle(state[key], count, period, optimizer)
        except ValueError as error:
            raise ValueError(f"checkpoint, parameter group {i}: {error}") from error
        groups.append(group)
    return {**found, "state": state, "param_groups": groups}


def check_target(optimizer: Any) -> None:
    """Raise unless ``optimizer`` is one that checkpoints are converted for."""
    if not isinstance(optimizer, (FusedOptimizer, Lookahead)):
        raise TypeError(
            "checkpoints are converted for Ranger, RAdam and Lookahead of ranger_cuda, not for "
            f"{type(optimizer).__name__}"
        )


def _converted(
    group: Group, states: Mapping[Any, Any], is_ours: bool
) -> tuple[Group, dict[Any, State]]:
    """A group, and the states of its parameters that have any.

    Args:
        is_ours: whether it is to be loaded into an optimizer of this package; of another one's,
            only what Lookahead keeps is converted.
    """
    given = {key: states[key] for key in group["params"] if states.get(key)}
    if not is_ours:
        theirs = {name for state in given.values() for name in state} & {"slow_buffer", "la_param"}
        if theirs:
            raise ValueError(
                f"its state has {_list(theirs)}: a Ranger's. Load it into ranger_cuda.Ranger, or "
                "Lookahead around ranger_cuda.RAdam"
            )
        return group, given
    source = _source(group)
    if source is _OURS:
        return group, given
    kept = {key: value for key, value in group.items() if key not in source.drops}
    rest = kept.keys() - _NEUTRAL - {"lr", "betas", "eps", "weight_decay"}
    if source.is_complete and rest:
        raise ValueError(
            f"it is of an optimizer of {source.name} with {_list(rest)}, which is not known. What "
            f"is: {_KNOWN}"
        )
    translated = {**kept, **source.group(group)}
    return translated, {key: _state(key, value, source, group) for key, value in given.items()}


def _source(group: Group) -> Source:
    """What kind of optimizer a group is of."""
    if "momentum_decay" not in group:  # NAdam's, which is like RAdam's otherwise
        for source in SOURCES:
            if source.marks <= group.keys():
                return source
    raise ValueError(
        f"it has {_list(group.keys() - _NEUTRAL)}, which is no optimizer's that is known. What is: "
        + _KNOWN
    )


def _state(key: Any, state: State, source: Source, group: Group) -> State:
    """A parameter's state in our names and meaning."""
    counted = group if source.counts_groups and "step" not in state else state
    new = {"step": counted.get("step"), **state}
    if source.slow in new:
        new["slow_param"] = new.pop(source.slow)
    for name in source.ignored:
        new.pop(name, None)
    wanted = {"step", *formats.MOMENTS}
    unknown = {name for name, value in new.items() if isinstance(value, Tensor)}
    unknown -= wanted | set(LOOKAHEAD)
    are_there = all(isinstance(new.get(name), Tensor) for name in formats.MOMENTS)
    if unknown or not are_there:
        raise ValueError(
            f"the state of parameter {key} has {_list(state)}; {source.name} has 'step', 'exp_avg' "
            f"and 'exp_avg_sq'. What is known: {_KNOWN}"
        )
    if not is_count(new["step"]):
        raise ValueError(
            f"'step' of parameter {key} is {shown(new['step'])}, but it counts steps: a whole "
            "number, at least 0"
        )
    if source.is_debiased and (step := int(new["step"])):
        for name, beta in zip(formats.MOMENTS, (group["beta1"], group["beta2"]), strict=True):
            new[name] = new[name] * (1 - beta**step)
    return new


# --- Lookahead around an optimizer ----------------------------------------------------------------


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of pytorch-optimizer's Lookahead, which has two, as timm's, which has one."""
    base: Any = state_dict.get("base_optimizer")
    slow: Any = state_dict["lookahead_state"]
    for value, name in ((base, "'base_optimizer'"), (slow, "'lookahead_state'")):
        check_kind(value, dict, name)
    for name, kind in (("state", dict), ("param_groups", (list, tuple))):
        check_kind(base.get(name), kind, f"{name!r} of 'base_optimizer'")
    state = dict(base["state"])
    groups = []
    for i, group in enumerate(base["param_groups"]):
        check_kind(group, dict, f"parameter group {i}")
        group = dict(group)
        group["lookahead_step"] = group.pop("counter", 0)
        groups.append(group)
        for j, key in enumerate(group.get("params", ())):
            kept = slow.get((i, j), {})
            for name, why in (
                ("slow_momentum", "pullback_momentum='pullback'"),
                ("backup_params", "the slow weights swapped in"),
            ):
                if name in kept:
                    raise ValueError(
                        f"checkpoint: it was saved with {why}, which has no counterpart here"
                    )
            if "slow_params" in kept and state.get(key):
                state[key] = {**state[key], "lookahead_slow_buff": kept["slow_params"]}
    return {**base, "state": state, "param_groups": groups}


def _take_cycles(group: Group, keys: Iterable[Any], states: dict[Any, Any]) -> dict[Any, int]:
    """Take out of a group and its states what timm's Lookahead keeps there, slow weights under our
    name. Returns the steps that Lookahead counted, of each parameter that has a state."""
    if "lookahead_step" not in group:
        return {}
    count = group.pop("lookahead_step")
    if not is_count(count):
        raise ValueError(f"checkpoint: 'lookahead_step' is {shown(count)}, but it counts steps")
    counts = {}
    for key in keys:
        if states.get(key):
            state = dict(states[key])
            if "lookahead_slow_buff" in state:
                state["slow_param"] = state.pop("lookahead_slow_buff")
            states[key] = state
            counts[key] = int(count)
    return counts


def _with_cycle(state: State, count: int, period: Any, optimizer: Optimizer) -> State:
    """A state with the place in Lookahead's cycle."""
    if isinstance(optimizer, Lookahead):
        return {**state, "lookahead_step": count}
    if isinstance(optimizer, Ranger) and (int(state["step"]) - count) % int(period):
        raise ValueError(
            f"Lookahead counted {count} steps where the optimizer inside of it counted "
            f"{int(state['step'])}, and Ranger's cycles of {period} steps follow from the latter: "
            "load it into Lookahead around ranger_cuda.RAdam"
        )
    return state


def _list(names: Iterable[Any]) -> str:
    return ", ".join(sorted(repr(name) for name in names))
