"""Slow weights and their momentum on the host, and on a device while a cycle ends.

Between syncs a step is RAdam's. In one with a sync parameters move bucket by bucket, by the same
kernels: a bucket's slow weights are copied to the device before, and back after, while others are
on their way. The bits are those of slow weights that stay on the device.

``step()`` returns when they are back. So nobody who reads them has anything to wait for, and no
copy runs into memory that was freed or is being read: between steps they are tensors of the host
like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.scaling import Scaling
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import new_state, without_slow_weight
from ..state.tensors import DTensor, is_capturing, on_accelerator
from .algorithms import Algorithm, Member, is_at_rest, members
from .dispatch import Dispatcher
from .interrupts import Deferred
from .native import Groups, State
from .python_step import NewState

HOST = torch.device("cpu")
PARTS = ("slow_param", "slow_residual", "outer_momentum_buffer")  # of a state, that live there
BUCKET = 64 << 20  # bytes of parameters that move at a time; those of the next are on their way
ALIGNMENT = 256
MOST_STEPS = 2**24  # a float32 counts no further

Measure = Callable[[Dispatcher, Scaling], Scaling]


class _Skipped(Exception):
    """Nothing is to move in this step."""


class Count(NamedTuple):
    """A parameter's steps, and the tensor that counts them as it was then."""

    step: Tensor
    version: int
    steps: int


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
        self._runs: list[range] = []
        self._buckets: list[Dispatcher] = []
        # By the id of a parameter, as far as the host has followed them; no parameter is referred
        # to, weakly or not: torch would not swap its memory.
        self._counts: dict[int, Count] = {}

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
        movers = _movers(param_groups)
        for member in movers:
            _check(member)
        bare = self._bare
        try:
            bare.collect(param_groups, state, make_state)
            slow = {m.param: self._slow_weight(m, param_groups, state) for m in movers}
            counts = {m.param: self._count(m.param, state) for m in movers}
            ends = any((counts[m.param] + 1) % hypers[m.group].k == 0 for m in movers)
            with Deferred():
                if ends:
                    self._step_in_buckets(
                        param_groups, state, make_state, hypers, scaling, measure, slow
                    )
                else:
                    bare.launch(hypers, scaling, _deciding(measure))
                self._commit(movers, param_groups, state, slow, counts)
        except _Skipped:
            pass
        finally:
            bare.release()

    def settle(self, state: State) -> None:
        """Bring slow weights that were loaded or copied back to the host."""
        for param, its in state.items():
            for name in PARTS:
                if name in its:
                    its[name] = _on_host(its[name], param)

    def _count(self, param: Tensor, state: State) -> int:
        """How often it has moved. Waits for its device where somebody else has counted since."""
        step = state.get(param, {}).get("step", 0)
        known = self._counts.get(id(param))
        if known is not None and known.step is step and known.version == step._version:
            return known.steps
        return min(int(step), MOST_STEPS)

    def _slow_weight(self, member: Member, param_groups: Groups, state: State) -> dict[str, Tensor]:
        """Its slow weight and momentum on the host: what there is, and made new what is lacking."""
        param, group, _ = member
        known = state.get(param, {})
        if param in self._whole.unmoved:
            known = without_slow_weight(known)
        format = self._algorithm.format_of(param, param_groups[group])
        streams = self._algorithm.streams_of(param_groups[group])
        names = [part.name for part in format.parts(streams[2:]) if part.name in PARTS]
        if any(name not in known for name in names):
            with torch.inference_mode(False):  # what is made in it could not be written outside
                known = {**known, **new_state(format, param, known, streams[2:])}
        return {name: _on_host(known[name], param) for name in names}

    def _commit(
        self,
        movers: Sequence[Member],
        param_groups: Groups,
        state: State,
        slow: dict[Tensor, dict[str, Tensor]],
        counts: dict[Tensor, int],
    ) -> None:
        unmoved = self._whole.unmoved
        ids = {id(param) for param, _, _ in members(param_groups)}
        self._counts = {key: its for key, its in self._counts.items() if key in ids}
        for param, group, _ in movers:
            is_new = "slow_param" not in state[param] or param in unmoved
            state[param].update(slow[param])
            if is_new and is_at_rest(param_groups[group]):
                unmoved.add(param)
            else:
                unmoved.discard(param)
            step = state[param]["step"]
            steps = min(counts[param] + 1, MOST_STEPS)
            self._counts[id(param)] = Count(step, step._version, steps)

    # --- a step with a sync ----------------------------------------------------------------------

    def _step_in_buckets(
        self,
        param_groups: Groups,
        state: State,
        make_state: NewState,
        hypers: Sequence[Hyperparameters],
        scaling: Scaling,
        measure: Measure | None,
        slow: dict[Tensor, dict[str, Tensor]],
    ) -> None:
        bare = self._bare
        bare.rehearse()
        try:
            scaling = _deciding(measure)(bare, scaling)
            self._cut(param_groups)
            taken: set[Tensor] = set()
            parts = [_part_of(param_groups, run, taken) for run in self._runs]
            rooms = _Rooms()
            for i, part in enumerate(parts):
                rooms.furnish(i, [p for group in part for p in group["params"]], slow)
            staged = [rooms.tensors(i) for i in range(len(parts))]
            for part, bucket, its in zip(parts, self._buckets, staged, strict=True):
                beside = {
                    p: {**state.get(p, {}), **its.get(p, {})} for g in part for p in g["params"]
                }
                bucket.collect(part, beside, make_state)  # all of it, before anything moves
        except BaseException:
            bare.undo()
            for bucket in self._buckets:
                bucket.release()
            raise
        transfers = Transfers(rooms.devices())
        try:
            for i, bucket in enumerate(self._buckets):
                for j in (0, 1) if i == 0 else (i + 1,):
                    if j < len(staged):
                        transfers.fetch(j, _pairs(slow, staged[j]))
                transfers.arrived(i)
                bucket.launch(hypers, scaling)
                transfers.bring_back(i, _pairs(staged[i], slow))
        finally:
            transfers.finish()
            for bucket in self._buckets:
                bucket.release()

    def _cut(self, param_groups: Groups) -> None:
        """Parameters into runs of neighbours, each of which moves at once; the same whichever of
        them have gradients, so that launchers' tables last."""
        runs: list[range] = []
        begin = size = end = 0
        for param, _, _ in members(param_groups):
            size += _size([param])
            end += 1
            if size >= BUCKET:
                runs.append(range(begin, end))
                begin, size = end, 0
        if begin < end:
            runs.append(range(begin, end))
        if runs != self._runs:
            self._runs = runs
            self._buckets = [self._whole.at(run.start) for run in runs]


def _deciding(measure: Measure | None) -> Measure:
    """Whether a step moves anything is known on the host, which counts along."""

    def decide(found: Dispatcher, scaling: Scaling) -> Scaling:
        if measure is not None:
            scaling = measure(found, scaling)
        if scaling.found_inf is not None and scaling.found_inf.item() != 0.0:
            raise _Skipped
        return scaling._replace(found_inf=None)

    return decide


def _movers(param_groups: Groups) -> list[Member]:
    """Who has a gradient, each once."""
    found: dict[Tensor, Member] = {}
    for member in members(param_groups):
        if member.param.grad is not None:
            found.setdefault(member.param, member)
    return list(found.values())


def _check(member: Member) -> None:
    if isinstance(member.param, DTensor):
        raise RuntimeError(
            f"{member.name} is a DTensor, and slow_device keeps those of plain tensors only: leave "
            "it None, or let FSDP2 keep the state on the host (CPUOffloadPolicy)"
        )
    if on_accelerator(member.param) and is_capturing():
        raise RuntimeError(
            "a step with slow_device cannot be captured in a CUDA graph: the host decides whether "
            "slow weights are needed"
        )


def _on_host(value: Tensor, param: Tensor) -> Tensor:
    """The same on the host, where devices copy it without waiting."""
    if not on_accelerator(param):
        return value
    can_pin = torch.accelerator.is_available()
    if value.device == HOST and (value.is_pinned() or not can_pin):
        return value
    return torch.empty_like(value, device=HOST, pin_memory=can_pin).copy_(value)


def _part_of(param_groups: Groups, run: range, taken: set[Tensor]) -> list[dict[str, Any]]:
    """The groups with no more than these parameters. One that is named again moves only once:
    nothing is in its place."""
    part = []
    at = 0
    for group in param_groups:
        its = slice(max(run.start - at, 0), max(run.stop - at, 0))
        params = [torch.empty(0) if param in taken else param for param in group["params"][its]]
        names = group.get("param_names")
        part.append({**group, "params": params, "param_names": names and names[its]})
        taken.update(params)
        at += len(group["params"])
    return part


def _pairs(
    source: dict[Tensor, dict[str, Tensor]], to: dict[Tensor, dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    both = source.keys() & to.keys()
    return [(source[param][name], to[param][name]) for param in both for name in to[param]]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in tensors)


class _Rooms:
    """Memory of devices for slow weights: two rooms of each, which buckets have in turn."""

    def __init__(self) -> None:
        self._wanted: list[dict[Tensor, dict[str, Tensor]]] = []
        self._sizes: dict[tuple[torch.device, int], int] = {}
        self._memory: dict[tuple[torch.device, int], Tensor] = {}

    def furnish(
        self, i: int, params: Sequence[Tensor], slow: dict[Tensor, dict[str, Tensor]]
    ) -> None:
        """Let bucket ``i``, the next, have room for the slow weights of these."""
        wanted = {param: slow[param] for param in params if param in slow}
        self._wanted.append(wanted)
        for device in {param.device for param in wanted}:
            size = _size(t for p, its in wanted.items() if p.device == device for t in its.values())
            key = device, i % 2
            self._sizes[key] = max(self._sizes.get(key, 0), size)

    def devices(self) -> set[torch.device]:
        """Those of all parameters."""
        return {device for device, _ in self._sizes}

    def tensors(self, i: int) -> dict[Tensor, dict[str, Tensor]]:
        """What bucket ``i`` moves its parameters with."""
        begin = dict.fromkeys(self.devices(), 0)
        staged: dict[Tensor, dict[str, Tensor]] = {}
        for param, its in self._wanted[i].items():
            staged[param] = {}
            for name, value in its.items():
                key = param.device, i % 2
                if key not in self._memory:
                    size = self._sizes[key]
                    self._memory[key] = torch.empty(size, dtype=torch.uint8, device=param.device)
                size = value.numel() * value.itemsize
                memory = self._memory[key][begin[param.device] :][:size].view(value.dtype)
                staged[param][name] = memory.as_strided(value.shape, value.stride())
                begin[param.device] += _size([value])
        return staged


class Transfers:
    """Copies between host and devices beside what these compute.

    A device has a stream for each direction. What waits for what: a bucket's launch for its slow
    weights, their way back for the launch, and those that come next into its room for that.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._lanes = [_Lane(device) for device in devices if device.type != "cpu"]

    def fetch(self, i: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have the slow weights of bucket ``i`` copied to its room."""
        for lane in self._lanes:
            lane.fetch(i, [pair for pair in pairs if pair[1].device == lane.device])
        _copy([pair for pair in pairs if pair[1].device.type == "cpu"])

    def arrived(self, i: int) -> None:
        """Let what is launched from now on find them there."""
        for lane in self._lanes:
            lane.current().wait_event(lane.there[i])

    def bring_back(self, i: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have them copied back when what was launched until now is done."""
        for lane in self._lanes:
            lane.bring_back(i, [pair for pair in pairs if pair[0].device == lane.device])
        _copy([pair for pair in pairs if pair[0].device.type == "cpu"])

    def finish(self) -> None:
        """Wait until all are back."""
        for lane in self._lanes:
            lane.into.synchronize()
            lane.back.synchronize()


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for source, to in pairs:
        to.copy_(source, non_blocking=True)


class _Lane:
    """The streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self.into = self._module.Stream(device)
        self.back = self._module.Stream(device)
        self.there: dict[int, Any] = {}
        self._left: dict[int, Any] = {}
        self.into.wait_stream(self.current())  # which may use the rooms' memory still

    def current(self) -> Any:
        return self._module.current_stream(self.device)

    def fetch(self, i: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if i - 2 in self._left:
            self.into.wait_event(self._left[i - 2])  # which had the room before
        with self._module.stream(self.into):
            _copy(pairs)
        self.there[i] = self.into.record_event()

    def bring_back(self, i: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.back.wait_event(self.current().record_event())
        with self._module.stream(self.back):
            _copy(pairs)
        self._left[i] = self.back.record_event()
