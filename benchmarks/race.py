"""Contestants side by side: each warmed up, then timed in turns, round after round."""

from __future__ import annotations

import gc
import math
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .clocks import CYCLE, allocated, attempt, free_memory, stopwatch, time_limit, wait
from .contestants import ADAMW, OURS, Contestant
from .workloads import PLACED, WORKLOADS, Placed, random_tensors

SAMPLE_MS = 10.0  # of several cycles, where one is shorter
SLOW_SECONDS = 0.5  # a cycle that takes longer needs no lead-in to have its memory to itself
# Elements up to which new gradients are measured, too: beyond, a step waits for memory.
MOST_TO_RENEW = {"cpu": 2**23, "cuda": 2**25}
NO_TIME = "no time left of --limit"
# Of each contestant, milliseconds by the device's and by the host's clock.
Samples = dict[str, list[tuple[float, float]]]


class Runner:
    """A contestant, warmed up, and its samples.

    Args:
        contestant: who.
        gradients: shared by all of its dtype.
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
        self.kinds = ("kept",) if contestant.captured else ("kept", "fresh")
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
        values = random_tensors(shapes, self.device, lanes, contestant.dtype)
        self.params = [Parameter(value) for value in values]
        before = [param.detach().flatten()[:8].clone() for param in self.params]
        give(self.params, self.gradients)
        self.step = contestant.build(self.params)
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
        for _ in range(2 * CYCLE):  # one cycle untimed
            renew(self.params, self.gradients)
            elapsed = stopwatch(self.device)
            begun = time.perf_counter()
            self.step()
            host.append((time.perf_counter() - begun) * 1e3)
            ms.append(elapsed())
        give(self.params, self.gradients)
        return sum(ms[CYCLE:]) / CYCLE, sum(host[CYCLE:]) / CYCLE

    def details(self) -> dict[str, Any]:
        """What is not a sample: memory that a cycle allocates, and our steps one by one."""
        row: dict[str, Any] = {"bytes_allocated": allocated(self.step, self.device)}
        if self.name == OURS and self.device.type == "cuda":
            row["ms_of_cycle"] = self._steps_of_a_cycle()
        return row

    def _steps_of_a_cycle(self) -> list[float]:
        """Milliseconds of each step of a cycle; the last of them syncs."""
        cycles = []
        for _ in range(5):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(CYCLE + 1)]
            events[0].record()
            for event in events[1:]:
                self.step()
                event.record()
            wait(self.device)
            cycles.append([a.elapsed_time(b) for a, b in pairwise(events)])
        return [median(step) for step in zip(*cycles, strict=True)]


def check_moved(contestant: Contestant, params: list[Parameter], before: list[Tensor]) -> None:
    """Raise unless all is finite and every parameter moved; of rounded ones, any."""
    moved = [
        not torch.equal(param.detach().flatten()[:8], old)
        for param, old in zip(params, before, strict=True)
    ]
    enough = all(moved) if contestant.dtype == torch.float32 else any(moved)
    if not enough or not all(bool(param.isfinite().all()) for param in params):
        raise AssertionError(f"{contestant.name} left a parameter unchanged or not finite")


def give(params: list[Parameter], gradients: list[Tensor]) -> None:
    """Gradients that all contestants share."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def renew(params: list[Parameter], gradients: list[Tensor]) -> None:
    """New gradient tensors, made as a backward pass makes them after ``zero_grad``."""
    for param in params:
        param.grad = None
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()


class Race:
    """A workload's contestants and what is known of them."""

    def __init__(
        self, name: str, device: torch.device, args: Namespace, chosen: list[Contestant]
    ) -> None:
        shapes, self.placed = WORKLOADS[name], PLACED.get(name, Placed())
        self.gradients = {
            dtype: random_tensors(shapes, device, self.placed.gradients, dtype)
            for dtype in {contestant.dtype for contestant in chosen}
        }
        self.device = device
        self.parameters = sum(map(math.prod, shapes))
        self.args = args
        self.chosen = chosen
        self.rows: dict[str, dict[str, Any]] = {c.name: {} for c in chosen}
        self.samples: dict[str, Samples] = {
            kind: {c.name: [] for c in chosen} for kind in ("kept", "fresh")
        }

    def run(self, together: bool) -> dict[str, dict[str, Any]]:
        """The rows of the table.

        Args:
            together: all contestants fit into memory at once.
        """
        rounds = self.args.rounds
        gc.collect()
        gc.disable()
        try:
            if together:
                self._time(self.chosen, rounds)
            for half in range(0 if together else 2):
                for contestant in self.chosen:
                    if not contestant.compiled:
                        self._time([contestant], (rounds + 1 - half) // 2)
                    elif half == 0:  # once, for it takes long
                        self._time([contestant], rounds)
                    free_memory()
        finally:
            gc.enable()
        for contestant in self.chosen:
            who, row = contestant.name, self.rows[contestant.name]
            if "missing" in row or not self.samples["kept"][who]:
                continue
            row |= in_short(who, self.samples["kept"])
            if contestant.bytes_per_parameter is not None:
                row["gb_per_s"] = contestant.bytes_per_parameter * self.parameters / row["ms"] / 1e6
            if self.samples["fresh"][who]:
                row["fresh"] = in_short(who, self.samples["fresh"])
        return self.rows

    def _time(self, chosen: list[Contestant], rounds: int) -> None:
        """Samples of those who have not failed yet; two at least, then while there is time."""
        going = [contestant for contestant in chosen if "missing" not in self.rows[contestant.name]]
        runners = [runner for runner in map(self._start, going) if runner is not None]
        renewed = self.parameters <= MOST_TO_RENEW[self.device.type]
        for _ in range(rounds):
            for kind in ("kept", "fresh") if renewed else ("kept",):
                for runner in [runner for runner in runners if kind in runner.kinds]:
                    row, taken = self.rows[runner.name], self.samples[kind][runner.name]
                    enough = len(taken) >= 2 and runner.seconds[kind] >= self.args.seconds
                    if "missing" not in row and not enough:
                        sample = attempt(row, lambda r=runner, k=kind: r.sample(k))
                        taken += [] if sample is None else [sample]
        for runner in runners:
            if "missing" not in (row := self.rows[runner.name]):
                row |= attempt(row, runner.details) or {}

    def _start(self, contestant: Contestant) -> Runner | None:
        row = self.rows[contestant.name]
        if time.monotonic() > self.args.end:
            if not self.samples["kept"][contestant.name]:
                row["missing"] = NO_TIME
            return None
        gradients, limit = self.gradients[contestant.dtype], self.args.compile_limit
        return attempt(row, lambda: Runner(contestant, gradients, self.placed.params, limit))


def in_short(who: str, samples: Samples) -> dict[str, Any]:
    """Medians and quartiles of a contestant's samples and ratios.

    Ratios are taken round by round: our time over a contestant's, and its over that of torch's
    fused AdamW.
    """
    device, host = ([sample[i] for sample in samples[who]] for i in range(2))
    row = {**spread("ms", device), **spread("host_ms", host), "samples": device}
    for key, above, below in (("ratio", OURS, who), ("of_adamw", who, ADAMW)):
        pairs = zip(samples.get(above, []), samples.get(below, []), strict=False)
        row |= spread(key, [mine / its for (mine, _), (its, _) in pairs])
    return row


def spread(key: str, values: list[float]) -> dict[str, Any]:
    """Median and quartiles, if there are any."""
    if not values:
        return {}
    # Inclusive: nothing beyond what was measured. A single value is its own quartiles.
    values = values if len(values) > 1 else values * 2
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {key: middle, f"{key}_quartiles": [low, high]}
