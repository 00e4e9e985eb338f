"""Lookahead's cycle around another optimizer's step: what it may move, and the pull after it."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import support
from ..backends.support import BackendName
from ..state.checkpoint import is_step_tensor, step_tensor
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import new_state, without_slow_weight
from ..state.tensors import check_param, check_state, is_capturing, local
from .algorithms import LOOKAHEAD, Member, is_at_rest, members
from .dispatch import Dispatcher
from .native import Groups
from .offload import PARTS, OffloadedPull, check, on_host
from .python_step import check_count


class Cycle(NamedTuple):
    """What the pull after an inner step goes by, as it was found before it."""

    groups: list[dict[str, Any]]  # what joins them meanwhile moves from the next step on
    hypers: list[Hyperparameters]
    may_move: list[bool]  # for each parameter
    any_may_move: bool  # those that get a gradient meanwhile
    first: dict[Tensor, dict[str, Tensor]]  # the slow weights of parameters that have none
    offloaded: OffloadedPull | None = None  # what pulls, where slow weights are on the host


def begin(
    dispatcher: Dispatcher,
    backend: BackendName | None,
    param_groups: Groups,
    state: Any,
    any_may_move: bool,
    offloaded: OffloadedPull | None = None,
) -> Cycle:
    """What the inner step may move, with the slow weights of those that have none. Raises what
    would keep the pull from being made.

    Args:
        any_may_move: the inner step calls a closure, which makes the gradients.
        offloaded: what pulls, where slow weights are on the host.
    """
    groups = [{**group, "params": [*group["params"]]} for group in param_groups]
    hypers = [interpolation(group) for group in groups]
    found = list(members(groups))
    may_move = [
        param.grad is not None or (any_may_move and param.requires_grad) for param, _, _ in found
    ]
    unmoved = dispatcher.unmoved
    lacking = [
        (param, group, name)
        for (param, group, name), moves in zip(found, may_move, strict=True)
        if moves and (param in unmoved or _lacks(state.get(param, {}), groups[group]))
    ]
    if lacking and is_capturing():
        raise RuntimeError(
            "slow weights made in a capture would be made anew at every replay of the CUDA "
            "graph: take a step with lr above 0 before the capture"
        )
    for param, _, name in lacking:
        check_param(param, name)
        support.choose(backend, local(param), name)
    with torch.inference_mode(False):  # what is made in it could not be written outside
        first = {
            param: _what_lacks(param, groups[group], state.get(param, {}), param in unmoved)
            for param, group, _ in lacking
        }
    if offloaded is not None:
        movers = [member for member, moves in zip(found, may_move, strict=True) if moves]
        for member in movers:
            _check_offloaded(member, groups, {**state.get(member.param, {})})
        check(movers)
        for param, slow in first.items():
            first[param] = {name: on_host(value, param) for name, value in slow.items()}
        return Cycle(groups, hypers, may_move, any_may_move, first, offloaded)
    if first:  # as if they were there
        state = {param: {**state.get(param, {})} for param, _, _ in found}
        for param, slow in first.items():
            state[param].update(slow)
    try:
        # What does not fit, or cannot be had, raises before the inner optimizer's step.
        dispatcher.collect(groups, state, new_count, may_move)
        if first:
            dispatcher.rehearse()
    finally:
        dispatcher.release()
    return Cycle(groups, hypers, may_move, any_may_move, first)


def pull(dispatcher: Dispatcher, state: Any, cycle: Cycle) -> None:
    """Count a step of the parameters that moved, and interpolate where a cycle ends."""
    moved = commit(dispatcher, state, cycle)
    if cycle.offloaded is not None:
        cycle.offloaded.step(cycle.groups, state, new_count, cycle.hypers, moved)
    else:
        dispatcher.step(cycle.groups, state, new_count, cycle.hypers, moved=moved)


def commit(dispatcher: Dispatcher, state: Any, cycle: Cycle) -> list[bool]:
    """Give parameters that moved the slow weights of before. Returns for each whether it moved."""
    moved = cycle.may_move
    if cycle.any_may_move:
        moved = [
            may_move and param.grad is not None
            for (param, _, _), may_move in zip(members(cycle.groups), moved, strict=True)
        ]
    unmoved = dispatcher.unmoved
    for (param, group, _), moves in zip(members(cycle.groups), moved, strict=True):
        if moves and param in cycle.first:
            # Not before: an empty state is how optimizers know a parameter's first step.
            state[param].update(cycle.first[param])
            if "slow_param" not in cycle.first[param]:
                continue
            if is_at_rest(cycle.groups[group]):
                unmoved.add(param)
            else:
                unmoved.discard(param)
    return moved


def _check_offloaded(member: Member, groups: Groups, state: dict[str, Any]) -> None:
    check_param(member.param, member.name)
    format = LOOKAHEAD.format_for(member.param, groups[member.group], state)
    parts = [part for part in format.parts(LOOKAHEAD.streams) if part.name in state]
    check_state(member.param, state, parts, member.name, PARTS)
    check_count(state, LOOKAHEAD.step_name, member.name)


def _lacks(state: dict[str, Any], group: dict[str, Any]) -> bool:
    streams = filter(None, LOOKAHEAD.streams_of(group))
    return any(stream not in state for stream in streams)


def _what_lacks(
    param: Tensor, group: dict[str, Any], state: dict[str, Any], is_unmoved: bool
) -> dict[str, Tensor]:
    """The slow weight, which may have to be made anew, and its momentum."""
    if is_unmoved:
        state = without_slow_weight(state)
    format = LOOKAHEAD.format_of(param, group)
    new = new_state(format, param, state, LOOKAHEAD.streams_of(group))
    beside = {part.name for part in format.param.rest}  # the inner optimizer's to make
    return {name: value for name, value in new.items() if name not in beside}


def new_count(
    param: Tensor, group: dict[str, Any], state: dict[str, Any], step_device: torch.device
) -> dict[str, Any]:
    """The step count of a parameter, where ``state`` has none."""
    count = state.get("lookahead_step", 0.0)
    if is_step_tensor(count, step_device):
        return {}
    return {"lookahead_step": step_tensor(count, step_device)}


def interpolation(group: dict[str, Any]) -> Hyperparameters:
    """A group's Lookahead, as the rule takes it; what RAdam alone reads is neutral."""
    return Hyperparameters(
        lr=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=1.0,
        weight_decay=0.0,
        rho_threshold=4.0,
        alpha=float(group["lookahead_alpha"]),
        outer_momentum=float(group["outer_momentum"]),
        low=-math.inf,
        high=math.inf,
        k=operator.index(group["lookahead_k"]),
        max_grad_norm=math.inf,
        decoupled_weight_decay=False,
        maximize=False,
        outer_nesterov=bool(group["outer_nesterov"]),
        # Another package's may be anything; nothing of its is rounded stochastically.
        seed=operator.index(group["seed"]) if "weight_rounding" in group else 0,
    )
