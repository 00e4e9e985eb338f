"""Time of ``optimizer.step()`` on a GPU against the peers and the GPU's own copy bandwidth.

    python benchmarks/gpu_step_time.py                    # measure, print tables
    python benchmarks/gpu_step_time.py --out FILE.json    # and keep everything

See benchmarks/README.md for the method.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter

import ranger_cuda
from contestants import CONTESTANTS, Contestant, contestants_on
from gpu_device import (
    attempt,
    capture,
    copy_bandwidth,
    fits,
    free_memory,
    gpu_state,
    stopwatch,
)
from gpu_report import TRITON, as_table, promises
from gpu_runner import Runner, Samples, in_short, note_details
from result_file import save
from step_time import ADAMW, CYCLE, OURS, environment, give, verify
from workloads import GPU_DEFAULT, PLACED, WORKLOADS, Placed, random_tensors

MOST_TENSORS_TO_COMPILE = 100
# Elements up to which new gradients are measured, too: beyond, a step waits for memory.
MOST_TO_RENEW = 2**25
NO_TIME = "no time left of --limit"
CAPTURED = 1000  # tensors from which on a replayed CUDA graph is worth a look


def main() -> int:
    """Measure what is asked for; 1 if our step is wrong, or cannot be measured, somewhere."""
    args = arguments()
    device = torch.device(args.device)
    result: dict[str, Any] = {"environment": environment(device), "workloads": {}}
    result["arguments"] = {name: str(value) for name, value in vars(args).items()}
    args.end = time.monotonic() + args.limit
    result["gpu_before"] = gpu_state(device)
    result["copy"] = copy_bandwidth(device)
    print(f"copy: {result['copy']}", flush=True)
    chosen = [c for c in contestants_on(device) if c.name not in args.skip]
    # What matters most is measured on all workloads first: a run that ends early has it.
    for turn in sorted({contestant.turn for contestant in chosen}):
        for name in args.workloads or GPU_DEFAULT:
            found = result["workloads"].setdefault(name, {})
            measure(name, found, device, args, chosen, turn)
            result["promises"] = promises(result)
            print(as_table(name, found, turn, result["copy"]), flush=True)
            save(result, args.out)
    result["copy_after"] = copy_bandwidth(device)
    result["gpu_after"] = gpu_state(device)
    print("\n".join(["\npromises", *result["promises"]]))
    save(result, args.out)
    return 0 if all(right(found) for found in result["workloads"].values()) else 1


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu: to try this script out")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="CONTESTANT")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each contestant")
    parser.add_argument("--seconds", type=float, default=1.0, help="of sampling a contestant")
    parser.add_argument("--compile-limit", type=int, default=45, help="seconds for a torch.compile")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="seconds; starts no contestant after"
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


def right(found: dict[str, Any]) -> bool:
    """Whether a workload was reached, and our step verified and measured."""
    if "missing" in found:
        return True
    ours = found["rows"].get(OURS, {})
    return found["verified"] == "yes" and ("ms" in ours or ours.get("missing") == NO_TIME)


# --- one workload ---------------------------------------------------------------------------------


def measure(
    name: str,
    found: dict[str, Any],
    device: torch.device,
    args: argparse.Namespace,
    chosen: list[Contestant],
    turn: int,
) -> None:
    """One workload: our step verified once, then the contestants of this turn timed.

    Args:
        found: what is known of the workload; added to. What a later turn's contestants are compared
            with is measured again beside them, and kept under "again".
    """
    shapes = WORKLOADS[name]
    racing = [c for c in chosen if c.turn == turn]
    reasons = {c.name: obstacle(c, len(shapes), args) for c in racing}
    if "missing" in found or all(reasons.values()):
        if "rows" in found:
            found["rows"] |= {who: {"missing": why, "turn": turn} for who, why in reasons.items()}
        else:
            found.setdefault("missing", next(iter(reasons.values())))
        return
    if "verified" not in found:
        found |= {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}
        found["verified"] = verified(name, device)
        free_memory()
    beside = [c for c in chosen if c.turn < turn and c.name in (OURS, ADAMW)]
    together = fits(found["parameters"] * len(beside + racing), device)
    gc.disable()
    try:
        rows = Race(name, device, args, beside + racing).run(together)
    finally:
        gc.enable()
    free_memory()
    if beside:
        again = {contestant.name: rows.pop(contestant.name) for contestant in beside}
        found.setdefault("again", {})[str(turn)] = again
    for row in rows.values():
        row["turn"] = turn
    found.setdefault("rows", {}).update(rows)
    built = "all at once" if together else "one at a time, twice"
    found.setdefault("built", {})[str(turn)] = built
    if turn == 0 and len(shapes) >= CAPTURED and device.type == "cuda":
        found["graph"] = replays(name, device)
        free_memory()
    found["gpu"] = gpu_state(device)


def obstacle(contestant: Contestant, tensors: int, args: argparse.Namespace) -> str | None:
    """Why not to begin with a contestant; None: do."""
    if contestant.compiled and tensors > MOST_TENSORS_TO_COMPILE:
        return f"compiling a step over {tensors} tensors takes too long"
    return NO_TIME if time.monotonic() > args.end else None


class Race:
    """A workload's contestants and what is known of them."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        args: argparse.Namespace,
        chosen: list[Contestant],
    ) -> None:
        shapes, self.placed = WORKLOADS[name], PLACED.get(name, Placed())
        self.gradients = random_tensors(shapes, device, self.placed.gradients)
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
        if together:
            self._interleaved()
        else:
            self._one_at_a_time()
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

    def _interleaved(self) -> None:
        runners = [runner for runner in map(self._start, self.chosen) if runner is not None]
        kinds = ("kept", "fresh") if self.parameters <= MOST_TO_RENEW else ("kept",)
        for _ in range(self.args.rounds):
            for kind in kinds:
                for runner in runners:
                    self._take(runner, self.args.rounds, kind)
        for runner in runners:
            note_details(self.rows[runner.name], runner)

    def _one_at_a_time(self) -> None:
        """Everyone twice; who is compiled once, for that takes long."""
        for turn in range(2):
            for contestant in self.chosen:
                once = contestant.compiled
                if turn == 1 and (once or "missing" in self.rows[contestant.name]):
                    continue
                runner = self._start(contestant)
                if runner is not None:
                    rounds = self.args.rounds
                    rounds = rounds if once or turn == 1 else math.ceil(rounds / 2)
                    for _ in range(rounds):
                        self._take(runner, rounds)
                    if turn == 0:
                        note_details(self.rows[contestant.name], runner)
                del runner
                free_memory()

    def _start(self, contestant: Contestant) -> Runner | None:
        row = self.rows[contestant.name]
        reason = obstacle(contestant, len(self.gradients), self.args)
        if reason is not None:
            row["missing"] = reason
            return None
        limit = self.args.compile_limit
        lanes = self.placed.params
        return attempt(row, lambda: Runner(contestant, self.gradients, lanes, limit))

    def _take(self, runner: Runner, most: int, kind: str = "kept") -> None:
        """One sample, unless there are two already and the time for them is used up."""
        row, taken = self.rows[runner.name], self.samples[kind][runner.name]
        enough = len(taken) >= 2 and runner.seconds[kind] >= self.args.seconds
        if "missing" in row or len(taken) >= most or enough:
            return
        sample = attempt(row, lambda: runner.sample(kind))
        if sample is not None:
            taken.append(sample)


def verified(name: str, device: torch.device) -> str:
    """ "yes", or in what our step fails, by one backend or the other."""
    shapes = WORKLOADS[name][: len(WORKLOADS[name]) // 20 + 1]
    reasons: list[str] = []
    for backend in ("cuda", "triton") if device.type == "cuda" else (device.type,):
        row: dict[str, Any] = {}
        if backend == "triton" and ranger_cuda.backends.support.obstacle(backend):
            continue  # its row of the table says so

        def check(backend: str = backend) -> None:
            verify(shapes, device, PLACED.get(name, Placed()), backend)

        attempt(row, check)
        reasons += row.values()
    return "; ".join(reasons) or "yes"


def replays(name: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """A step captured as a CUDA graph and replayed: nothing of Python, little of the driver."""
    builds: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
        OURS: lambda p: ranger_cuda.Ranger(p, backend="cuda"),
        TRITON: lambda p: ranger_cuda.Ranger(p, backend="triton"),
        ADAMW: lambda p: torch.optim.AdamW(p, fused=True, capturable=True),
    }
    shapes = WORKLOADS[name]
    rows: dict[str, dict[str, Any]] = {who: {} for who in builds}
    for who, build in builds.items():

        def replay(who: str = who, build: Any = build) -> None:
            placed = PLACED.get(name, Placed())
            params = [Parameter(t) for t in random_tensors(shapes, device, placed.params)]
            give(params, random_tensors(shapes, device, placed.gradients))
            optimizer = build(params)  # its state is the graph's, too
            graph = capture(optimizer.step, device)
            samples, host = [], []
            for _ in range(10):
                for _ in range(CYCLE):
                    graph.replay()
                elapsed = stopwatch(device)
                begun = time.perf_counter()
                for _ in range(10 * CYCLE):
                    graph.replay()
                host.append((time.perf_counter() - begun) * 1e3 / (10 * CYCLE))
                samples.append(elapsed() / (10 * CYCLE))
            rows[who] = {"ms": median(samples), "ms_range": [min(samples), max(samples)]}
            rows[who]["host_ms"] = median(host)

        attempt(rows[who], replay)
    return rows


if __name__ == "__main__":
    sys.exit(main())
