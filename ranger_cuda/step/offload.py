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
from ..backends.scaling import NO_SCALING, Scaling
from ..state.checkpoint import CPU, is_step_tensor
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import SLOW_PARTS, new_state, without_slow_weight
from ..state.tensors import DTensor, check_state, is_capturing, on_accelerator
from .algorithms import LOOKAHEAD, Algorithm, Member, Name, is_at_rest, members
from .dispatch import Dispatcher
from .interrupts import Deferred
from .native import Groups, State
from .python_step import ON_HOST, NewState

PARTS = (*SLOW_PARTS, "outer_momentum_buffer")  # of a state, that live there
BUCKET = 64 << 20  # bytes of parameters that move at a time; those of the next are on their way
ALIGNMENT = 256
MOST_STEPS = 2**24  # a float32 counts no further

SlowWeights = dict[Tensor, dict[str, Tensor]]  # and what belongs to them, of each parameter
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

    def of(self, param: Tensor, state: State) -> int:
        """Waits for the parameter's device where somebody else has counted since."""
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
        movers = [m for m in first_of_each(param_groups) if m.param.grad is not None]
        check(movers)
        bare, buckets = self._bare, self._buckets
        measure = _deciding(measure)
        try:
            bare.collect(param_groups, state, make_state)
            slow = {m.param: self._slow_weight(m, param_groups, state) for m in movers}
            counts = {m.param: self._counts.of(m.param, state) for m in movers}
            ends = any((counts[m.param] + 1) % hypers[m.group].k == 0 for m in movers)
            with Deferred():
                if not ends:
                    bare.launch(hypers, scaling, measure)
                else:
                    try:
                        bare.rehearse()
                        scaling = measure(bare, scaling)
                        buckets.collect(param_groups, state, make_state, slow)
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
        first: dict[Tensor, Member] = {}
        firsts = []
        for member, moves in zip(members(param_groups), moved, strict=True):
            firsts.append(moves and member.param not in first)
            if moves:
                first.setdefault(member.param, member)
        counts = {param: self._counts.of(param, state) for param in first}
        ends = any((counts[m.param] + 1) % hypers[m.group].k == 0 for m in first.values())
        with torch.inference_mode(False):  # state made in it could not be written outside
            for param, group, name in first.values():
                its = state[param]
                count = its.get(LOOKAHEAD.step_name)
                if ends or not (isinstance(count, Tensor) and is_step_tensor(count, count.device)):
                    on_host_too = support.choose(self._backend, param, name) in ON_HOST
                    device = CPU if on_host_too else param.device
                    its.update(make_state(param, param_groups[group], its, device))
        if ends:
            slow = {m.param: self._slow_weight(m, param_groups, state) for m in first.values()}
            try:
                self._buckets.collect(param_groups, state, make_state, slow, firsts)
                self._buckets.launch(hypers)
            finally:
                self._buckets.release()
        else:
            with torch.no_grad():
                for param in first:
                    state[param][LOOKAHEAD.step_name].add_(1.0)
        self._counts.have_moved(counts, param_groups, state)

    def _slow_weight(self, member: Member, param_groups: Groups, state: State) -> dict[str, Tensor]:
        param, group, _ = member
        names = PARTS if param_groups[group].get("outer_momentum") else PARTS[:-1]
        its = {name: on_host(state[param][name], param) for name in names if name in state[param]}
        state[param].update(its)
        return its


class Buckets:
    """Parameters that move bucket by bucket, each with its slow weights, which are on the host.

    Args:
        whole: what would move all of them, beside slow weights on their own device.
    """

    def __init__(self, whole: Dispatcher) -> None:
        self._whole = whole
        self._runs: list[range] = []
        self._buckets: list[Dispatcher] = []
        self._transfers = Transfers(())
        self._slow: SlowWeights = {}
        self._staged: list[SlowWeights] = []

    def collect(
        self,
        param_groups: Groups,
        state: State,
        make_state: NewState,
        slow: SlowWeights,
        moved: Sequence[bool] | None = None,
    ) -> None:
        """As :meth:`Dispatcher.collect`, all of it before anything moves.

        Args:
            slow: of each parameter that moves, its slow weight and momentum.
        """
        self._cut(param_groups)
        taken: set[Tensor] = set()
        parts = [_part_of(param_groups, run, taken) for run in self._runs]
        rooms = _Rooms()
        for i, part in enumerate(parts):
            rooms.furnish(i, [p for group in part for p in group["params"]], slow)
        self._slow = slow
        self._staged = [rooms.tensors(i) for i in range(len(parts))]
        for run, part, its, bucket in zip(
            self._runs, parts, self._staged, self._buckets, strict=True
        ):
            beside = {
                m.param: {**state.get(m.param, {}), **its.get(m.param, {})} for m in members(part)
            }
            may_move = None if moved is None else [*moved[run.start : run.stop]]
            bucket.collect(part, beside, make_state, may_move)
        for bucket in self._buckets:  # so much is there, and free for one launch after the other
            for device, size in bucket.scratch_sizes().items():
                torch.empty(size, dtype=torch.uint8, device=device)
        self._transfers = Transfers({param.device for its in self._staged for param in its})

    def launch(self, hypers: Sequence[Hyperparameters], scaling: Scaling = NO_SCALING) -> None:
        """Move what was collected. It is over, and slow weights are back, when this returns."""
        staged, transfers = self._staged, self._transfers
        try:
            for i, bucket in enumerate(self._buckets):
                for j in (0, 1) if i == 0 else (i + 1,):
                    if j < len(staged):
                        transfers.fetch(j, _pairs(self._slow, staged[j]))
                transfers.arrived(i)
                bucket.launch(hypers, scaling)
                transfers.bring_back(i, _pairs(staged[i], self._slow))
        finally:
            transfers.finish()

    def release(self) -> None:
        """Let go of what was collected, and of the devices' memory."""
        self._slow, self._staged = {}, []
        self._transfers = Transfers(())
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


def first_of_each(param_groups: Groups) -> list[Member]:
    """Every parameter once, where it is named first."""
    found: dict[Tensor, Member] = {}
    for member in members(param_groups):
        found.setdefault(member.param, member)
    return list(found.values())


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


def _part_of(param_groups: Groups, run: range, taken: set[Tensor]) -> list[dict[str, Any]]:
    """The groups with no more than these parameters. One that is named again moves only once:
    nothing is in its place."""
    part: list[dict[str, Any]] = [{**g, "params": [], "param_names": []} for g in param_groups]
    for member in itertools.islice(members(param_groups), run.start, run.stop):
        nobody = member.param in taken
        its = part[member.group]
        its["params"].append(torch.empty(0, device="cpu") if nobody else member.param)
        its["param_names"].append(Name(member.name))
        taken.add(member.param)
    return part


def _pairs(source: SlowWeights, to: SlowWeights) -> list[tuple[Tensor, Tensor]]:
    both = source.keys() & to.keys()
    return [(source[param][name], to[param][name]) for param in both for name in to[param]]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in tensors)


class _Rooms:
    """Memory of devices for slow weights: two rooms of each, which buckets have in turn."""

    def __init__(self) -> None:
        self._wanted: list[SlowWeights] = []
        self._sizes: dict[tuple[torch.device, int], int] = {}
        self._memory: dict[tuple[torch.device, int], Tensor] = {}

    def furnish(self, i: int, params: Sequence[Tensor], slow: SlowWeights) -> None:
        """Let bucket ``i``, the next, have room for the slow weights of these."""
        wanted = {param: slow[param] for param in params if param in slow}
        self._wanted.append(wanted)
        for device in {param.device for param in wanted}:
            size = _size(t for p, its in wanted.items() if p.device == device for t in its.values())
            key = device, i % 2
            self._sizes[key] = max(self._sizes.get(key, 0), size)

    def tensors(self, i: int) -> SlowWeights:
        """What bucket ``i`` moves its parameters with."""
        begin = {device: 0 for device, _ in self._sizes}
        staged: SlowWeights = {}
        for param, its in self._wanted[i].items():
            staged[param] = {}
            for name, value in its.items():
                key = param.device, i % 2
                if key not in self._memory:
                    size = self._sizes[key]
                    self._memory[key] = torch.empty(size, dtype=torch.uint8, device=param.device)
                size = value.numel() * value.itemsize
                memory = self._memory[key][begin[param.device] :][:size].view(value.dtype)
                dense = torch.empty_like(value, device="meta").stride()
                staged[param][name] = memory.as_strided(value.shape, dense)
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
