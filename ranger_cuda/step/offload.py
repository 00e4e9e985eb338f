"""Slow weights and their momentum on the host, and on a device while a cycle ends.

Between syncs a step is RAdam's. In one with a sync parameters move bucket by bucket, by the same
kernels: a bucket's slow weights are copied to the device before, and back after, while others are
on their way. The bits are those of slow weights that stay on the device.

``step()`` returns when they are back. So nobody who reads them has anything to wait for, and no
copy runs into memory that was freed or is being read: between steps they are tensors of the host
like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import support
from ..backends.scaling import Scaling
from ..state.checkpoint import CPU, is_step_tensor
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import SLOW_PARTS, new_state, without_slow_weight
from ..state.tensors import DTensor, check_state, is_capturing, on_accelerator
from .algorithms import LOOKAHEAD, Algorithm, Member, is_at_rest, members
from .buckets import Buckets
from .dispatch import Dispatcher
from .interrupts import Deferred
from .native import Groups, State
from .python_step import NewState, device_of_count
from .transfers import SlowWeights

PARTS = (*SLOW_PARTS, "outer_momentum_buffer")  # of a state, that live there
MOST_STEPS = 2**24  # a float32 counts no further

Measure = Callable[[Dispatcher, Scaling], Scaling]


class _Skipped(Exception):
    """Nothing is to move in this step."""


class Count(NamedTuple):
    """A parameter's steps, and the tensor that counts them as it was then."""

    step: Tensor
    version: int
    steps: int


class Counts:
    """How often parameters have moved, which the host follows where it would have to wait for it.
    Whoever writes to a count on a device, past what torch notices (``.data``, a collective), has
    it read again by ``load_state_dict``.

    By their ids: no parameter is referred to, weakly or not, or torch would not swap its memory.
    """

    def __init__(self, name: str) -> None:
        self._name = name  # of the state that counts
        self._known: dict[int, Count] = {}

    def of(self, movers: Iterable[Member], state: State) -> dict[Tensor, int]:
        """Waits for a parameter's device where somebody else has counted since."""
        return {param: self._of(param, state) for param, _, _ in movers}

    def _of(self, param: Tensor, state: State) -> int:
        step = state.get(param, {}).get(self._name, 0)
        known = self._known.get(id(param))
        if known is not None and known.step is step and known.version == step._version:
            return known.steps
        return min(int(step), MOST_STEPS)

    def have_moved(self, before: dict[Tensor, int], param_groups: Groups, state: State) -> None:
        """That these have, once more than before."""
        ids = {id(param) for param, _, _ in members(param_groups)}
        self._known = {key: its for key, its in self._known.items() if key in ids}
        for param, steps in before.items():
            step = state[param][self._name]
            if on_accelerator(step) and not step.is_inference():  # others are read when needed
                self._known[id(param)] = Count(step, step._version, min(steps + 1, MOST_STEPS))


class Offload:
    """Steps of an optimizer whose slow weights are on the host.

    Args:
        whole: what moves parameters beside slow weights on their own device.

    Attributes:
        moving: what is done to parameters while no cycle ends.
    """

    def __init__(self, algorithm: Algorithm, backend: str | None, whole: Dispatcher) -> None:
        self._algorithm = algorithm
        streams = (*algorithm.streams[:2], None, None)
        self.moving = algorithm._replace(streams=streams)
        self._bare = Dispatcher(self.moving, backend)
        self._whole = whole
        self._buckets = Buckets(whole)
        self._counts = Counts(algorithm.step_name)

    def step(
        self,
        param_groups: Groups,
        state: State,
        make_state: NewState,
        hypers: Sequence[Hyperparameters],
        scaling: Scaling,
        measure: Measure | None,
    ) -> None:
        """As :meth:`Dispatcher.collect` and ``launch``, one after the other.

        Raises:
            RuntimeError, ValueError: as they do; a DTensor, or a capture under way. Nothing has
                been changed then.
        """
        movers = each_once(m for m in members(param_groups) if m.param.grad is not None)
        bare, buckets = self._bare, self._buckets
        measure = _deciding(measure)
        try:
            bare.collect(param_groups, state, make_state)
            check(movers)
            slow = {m.param: self._slow_weight(m, param_groups, state) for m in movers}
            counts = self._counts.of(movers, state)
            ends = cycle_ends(movers, counts, hypers)
            with Deferred():
                if not ends:
                    bare.launch(hypers, scaling, measure)
                else:
                    try:
                        bare.rehearse()
                        scaling = measure(bare, scaling)
                        buckets.collect(param_groups, state, make_state, slow, by_gradients=True)
                    except BaseException:
                        bare.undo()
                        raise
                    buckets.launch(hypers, scaling)
                self._commit(movers, param_groups, state, slow)
                self._counts.have_moved(counts, param_groups, state)
        except _Skipped:
            pass
        finally:
            buckets.release()
            bare.release()

    def _slow_weight(self, member: Member, param_groups: Groups, state: State) -> dict[str, Tensor]:
        """Its slow weight and momentum on the host: what there is, and made new what is lacking."""
        param, group, name = member
        known = state.get(param, {})
        if param in self._whole.unmoved:
            known = without_slow_weight(known)
        format = self._algorithm.format_of(param, param_groups[group])
        streams = self._algorithm.streams_of(param_groups[group])[2:]
        parts = [part for part in format.parts(streams) if part.name in PARTS]
        if any(part.name not in known for part in parts):
            with torch.inference_mode(False):  # what is made in it could not be written outside
                known = {**known, **new_state(format, param, known, streams)}
        check_state(param, known, parts, name, PARTS)
        return {part.name: on_host(known[part.name], param) for part in parts}

    def _commit(
        self,
        movers: Sequence[Member],
        param_groups: Groups,
        state: State,
        slow: SlowWeights,
    ) -> None:
        unmoved = self._whole.unmoved
        for param, group, _ in movers:
            is_new = "slow_param" not in state[param] or param in unmoved
            state[param].update(slow[param])
            if is_new and is_at_rest(param_groups[group]):
                unmoved.add(param)
            else:
                unmoved.discard(param)


class OffloadedPull:
    """The pull after another optimizer's step, of slow weights that are on the host.

    Args:
        backend: what the user asked for, or None.
        whole: what pulls parameters to slow weights on their own device.
    """

    def __init__(self, backend: str | None, whole: Dispatcher) -> None:
        self._backend = backend
        self._buckets = Buckets(whole)
        self._counts = Counts(LOOKAHEAD.step_name)

    def step(
        self,
        param_groups: Groups,
        state: State,
        make_state: NewState,
        hypers: Sequence[Hyperparameters],
        moved: Sequence[bool],
    ) -> None:
        """As :meth:`Dispatcher.step` of what moved."""
        movers = each_once(itertools.compress(members(param_groups), moved))
        counts = self._counts.of(movers, state)
        ends = cycle_ends(movers, counts, hypers)
        with torch.inference_mode(False):  # state made in it could not be written outside
            for param, group, name in movers:
                its = state[param]
                count = its.get(LOOKAHEAD.step_name)
                if ends or not (isinstance(count, Tensor) and is_step_tensor(count, count.device)):
                    device = device_of_count(support.choose(self._backend, param, name), param)
                    its.update(make_state(param, param_groups[group], its, device))
        if ends:
            slow = {m.param: self._slow_weight(m, param_groups, state) for m in movers}
            try:
                self._buckets.collect(param_groups, state, make_state, slow, by_gradients=False)
                self._buckets.launch(hypers)
            finally:
                self._buckets.release()
        else:
            with torch.no_grad():
                for param, _, _ in movers:
                    state[param][LOOKAHEAD.step_name].add_(1.0)
        self._counts.have_moved(counts, param_groups, state)

    def _slow_weight(self, member: Member, param_groups: Groups, state: State) -> dict[str, Tensor]:
        param, group, _ = member
        names = PARTS if param_groups[group].get("outer_momentum") else PARTS[:-1]
        its = {name: on_host(state[param][name], param) for name in names if name in state[param]}
        state[param].update(its)
        return its


def _deciding(measure: Measure | None) -> Measure:
    """Whether a step moves anything is known on the host, which counts along."""

    def decide(found: Dispatcher, scaling: Scaling) -> Scaling:
        if measure is not None:
            scaling = measure(found, scaling)
        if scaling.found_inf is not None and scaling.found_inf.item() != 0.0:
            raise _Skipped
        return scaling._replace(found_inf=None)

    return decide


def each_once(found: Iterable[Member]) -> list[Member]:
    """Every parameter where it is named first."""
    first: dict[Tensor, Member] = {}
    for member in found:
        first.setdefault(member.param, member)
    return list(first.values())


def cycle_ends(
    movers: Iterable[Member], counts: dict[Tensor, int], hypers: Sequence[Hyperparameters]
) -> bool:
    """Whether the next step of any ends a cycle."""
    return any((counts[m.param] + 1) % hypers[m.group].k == 0 for m in movers)


def is_away(param_groups: Groups) -> bool:
    """Whether any parameter is on another device than its slow weight."""
    return any(on_accelerator(param) for group in param_groups for param in group["params"])


def check(movers: Iterable[Member]) -> None:
    """Raise if slow weights of these cannot be on the host."""
    if is_capturing():
        raise RuntimeError(
            "a step with slow_device cannot be captured in a CUDA graph: the host decides whether "
            "slow weights are needed"
        )
    for param, _, name in movers:
        if isinstance(param, DTensor):
            raise RuntimeError(
                f"{name} is a DTensor, and slow_device keeps slow weights of plain tensors only: "
                "leave it None, or let FSDP2 keep the state on the host (CPUOffloadPolicy)"
            )
        kind = param.device.type
        if kind != "cpu" and not hasattr(torch.get_device_module(kind), "Stream"):
            raise RuntimeError(
                f"{name} is on {param.device}, which has no streams for slow_device to copy on; "
                "leave it None"
            )


def settle(param: Tensor, state: dict[str, Any]) -> None:
    """Bring a slow weight that was loaded or copied to the host."""
    for name in PARTS:
        if isinstance(state.get(name), Tensor):
            state[name] = on_host(state[name], param)


def on_host(value: Tensor, param: Tensor) -> Tensor:
    """The same on the host, where devices copy it without waiting, and steps can write to it."""
    if value.is_inference() and not torch.is_inference_mode_enabled():
        value = value.clone()
    if not on_accelerator(param):
        return value
    can_pin = torch.accelerator.is_available()
    if value.device == CPU and (value.is_pinned() or not can_pin):
        return value
    with torch.inference_mode(False):  # what is made in it could not be written outside
        return torch.empty_like(value, device=CPU, pin_memory=can_pin).copy_(value)


def check_device(slow_device: Any) -> None:
    """Raise unless slow weights can be there."""
    if slow_device is not None and torch.device(slow_device) != CPU:
        raise ValueError(
            f"Invalid slow_device value: {slow_device!r}; slow weights are beside their parameters "
            '(None) or on the host ("cpu")'
        )
