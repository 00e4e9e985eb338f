"""A contestant on a GPU, ready to be timed, and what is timed of it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from contestants import Contestant, Step, step_of
from gpu_device import attempt, stopwatch, time_limit, wait
from step_time import CYCLE, OURS, check_moved, give, ratios, renew
from workloads import random_tensors

SAMPLE_MS = 10.0  # of several cycles, where one is shorter
SLOW_SECONDS = 0.5  # a cycle that takes longer needs no lead-in to have its memory to itself
# Of each contestant, milliseconds by the device's and by the host's clock.
Samples = dict[str, list[tuple[float, float]]]


class Runner:
    """A contestant, warmed up, and its samples.

    Args:
        contestant: who.
        gradients: shared by all.
        lanes: where the parameters start, as of random_tensors().
        compile_limit: seconds, where ``step`` is compiled.
    """

    def __init__(
        self,
        contestant: Contestant,
        gradients: list[Tensor],
        lanes: Sequence[int] | None,
        compile_limit: int,
    ) -> None:
        self.name = contestant.name
        self.gradients = gradients
        self.device = gradients[0].device
        with time_limit(compile_limit if contestant.compiled else 0):
            self._warm_up(contestant, lanes)
        cycles = SAMPLE_MS * 1e-3 / max(self.cycle_seconds, 1e-9)
        self.cycles = min(max(math.ceil(cycles), 1), 20)
        self.seconds: dict[str, float] = defaultdict(float)  # spent on samples

    def _warm_up(self, contestant: Contestant, lanes: Sequence[int] | None) -> None:
        """Past the rectification boundary and two syncs; the second cycle tells the time."""
        shapes = [tuple(gradient.shape) for gradient in self.gradients]
        self.params = [Parameter(t) for t in random_tensors(shapes, self.device, lanes)]
        before = [param.detach().flatten()[:8].clone() for param in self.params]
        give(self.params, self.gradients)
        self.step: Step = step_of(contestant, contestant.build(self.params))
        for _ in range(2):
            begun = time.perf_counter()
            for _ in range(CYCLE):
                self.step()
            wait(self.device)
            self.cycle_seconds = time.perf_counter() - begun
        check_moved(contestant, self.params, before)

    def sample(self, kind: str) -> tuple[float, float]:
        """Milliseconds of a step: on the device's clock, and until its calls have returned.

        Args:
            kind: of gradients: "kept" from step to step, or "fresh" in each.
        """
        entered = time.perf_counter()
        taken = self._sample_kept() if kind == "kept" else self._sample_fresh()
        self.seconds[kind] += time.perf_counter() - entered
        return taken

    def _sample_kept(self) -> tuple[float, float]:
        if self.cycle_seconds < SLOW_SECONDS:
            for _ in range(CYCLE):  # brings its own memory back into the caches
                self.step()
        elapsed = stopwatch(self.device)
        begun = time.perf_counter()
        for _ in range(CYCLE):
            self.step()
        host = time.perf_counter() - begun  # nothing was queued before
        for _ in range(CYCLE * (self.cycles - 1)):
            self.step()
        ms = elapsed() / (CYCLE * self.cycles)
        return ms, host * 1e3 / CYCLE

    def _sample_fresh(self) -> tuple[float, float]:
        """Each step by itself, on an idle device, for its gradients are made before."""
        ms, host = [], []
        for _ in range(2 * CYCLE):  # as in step_time.py, one cycle untimed
            renew(self.params, self.gradients)
            elapsed = stopwatch(self.device)
            begun = time.perf_counter()
            self.step()
            host.append((time.perf_counter() - begun) * 1e3)
            ms.append(elapsed())
        give(self.params, self.gradients)
        return sum(ms[CYCLE:]) / CYCLE, sum(host[CYCLE:]) / CYCLE


def in_short(who: str, samples: Samples) -> dict[str, Any]:
    """Medians, extremes and ratios of a contestant's samples."""
    device, host = ([sample[i] for sample in samples[who]] for i in range(2))
    row = {"ms": median(device), "ms_range": [min(device), max(device)]}
    row |= {"host_ms": median(host), "host_ms_range": [min(host), max(host)], "samples": device}
    return row | ratios(who, {name: [ms for ms, _ in taken] for name, taken in samples.items()})


def note_details(row: dict[str, Any], runner: Runner) -> None:
    """What is not a sample: memory that a cycle allocates, and our steps one by one."""
    if runner.device.type != "cuda" or "missing" in row:
        return

    def details() -> None:
        key = "allocated_bytes.all.allocated"
        before = torch.cuda.memory_stats(runner.device)[key]
        for _ in range(CYCLE):
            runner.step()
        row["bytes_allocated"] = torch.cuda.memory_stats(runner.device)[key] - before
        if runner.name == OURS:
            row["ms_of_cycle"] = steps_of_a_cycle(runner)

    attempt(row, details)


def steps_of_a_cycle(runner: Runner) -> list[float]:
    """Milliseconds of each step of a cycle; the last of them syncs."""
    cycles = []
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(CYCLE + 1)]
        events[0].record()
        for event in events[1:]:
            runner.step()
            event.record()
        wait(runner.device)
        cycles.append([a.elapsed_time(b) for a, b in pairwise(events)])
    return [median(step) for step in zip(*cycles, strict=True)]
