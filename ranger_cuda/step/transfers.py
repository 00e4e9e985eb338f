"""Slow weights on their way between the host and devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SlowWeights = dict[Tensor, dict[str, Tensor]]  # and what belongs to them, of each parameter
ALIGNMENT = 256


def size_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes of a room they take."""
    return sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in tensors)


class Rooms:
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
            size = size_of(
                t for p, its in wanted.items() if p.device == device for t in its.values()
            )
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
                begin[param.device] += size_of([value])
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
