"""Parameters that move bucket by bucket, while their slow weights are on a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.scaling import NO_SCALING, Scaling
from ..state.hyperparameters import Hyperparameters
from .algorithms import Name, members
from .dispatch import Dispatcher
from .native import Groups, State
from .python_step import NewState
from .transfers import Rooms, SlowWeights, Transfers, size_of

BUCKET = 64 << 20  # bytes of parameters that move at a time; those of the next are on their way


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
        *,
        by_gradients: bool,
    ) -> None:
        """As :meth:`Dispatcher.collect`, all of it before anything moves.

        Args:
            slow: of each parameter that moves, its slow weight and momentum.
            by_gradients: whether the rule reads those; they say then which parameters move.
        """
        self._cut(param_groups)
        taken: set[Tensor] = set()
        parts = [_part_of(param_groups, run, taken) for run in self._runs]
        rooms = Rooms()
        for i, part in enumerate(parts):
            rooms.furnish(i, [p for group in part for p in group["params"]], slow)
        self._slow = slow
        self._staged = [rooms.tensors(i) for i in range(len(parts))]
        for part, its, bucket in zip(parts, self._staged, self._buckets, strict=True):
            beside = {
                m.param: {**state.get(m.param, {}), **its.get(m.param, {})} for m in members(part)
            }
            moved = None if by_gradients else [m.param in slow for m in members(part)]
            bucket.collect(part, beside, make_state, moved)
        for bucket in self._buckets:
            bucket.try_memory()
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
            size += size_of([param])
            end += 1
            if size >= BUCKET:
                runs.append(range(begin, end))
                begin, size = end, 0
        if begin < end:
            runs.append(range(begin, end))
        if runs != self._runs:
            self._runs = runs
            self._buckets = [self._whole.at(run.start) for run in runs]


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
