"""Time of ``optimizer.step()`` on a GPU against the peers and the GPU's own copy bandwidth.

    python benchmarks/gpu_step_time.py                    # measure, print tables
    python benchmarks/gpu_step_time.py --out FILE.json    # and keep everything

See benchmarks/README.md for the method.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import ranger_cuda
from contestants import (
    CONTESTANTS,
    Contestant,
    Step,
    contestants_on,
    step_of,
)
from step_time import CYCLE, OURS, check_moved, environment, judge, run, verify
from workloads import FLAT, GPU_DEFAULT, WORKLOADS, random_tensors

MOST_TENSORS_TO_COMPILE = 100
SAMPLE_MS = 10.0  # of several cycles, where one is shorter
SLOW_SECONDS = 0.5  # a cycle that takes longer needs no lead-in to have its memory to itself
BYTES_OF_A_CONTESTANT = 20  # for a parameter: itself, three states, and temporaries
CAPTURED = 1000  # tensors from which on a replayed CUDA graph is worth a look
TRITON = "ranger triton"
LARGE = ["1e9", "2.5e8", "64 x 1024^2"]
# (who, other, workloads; None: all): at most this fraction of the other's time.
PROMISES: list[tuple[str, str, list[str] | None, float]] = [
    (OURS, "torch AdamW fused", LARGE, 1.0),
    (OURS, "torch AdamW fused", ["1000 x 1024"], 0.1),
    (OURS, "torch AdamW fused", ["resnet50", "vit-l/16", "gpt2", "llama-1b"], 0.9),
    ("radam", "torch AdamW fused", LARGE, 0.93),
    (TRITON, OURS, LARGE, 1.1),
    (TRITON, "optimi Ranger", None, 1.0),
    (TRITON, "flashoptim AdamW float32", None, 1.0),
    (TRITON, "flashoptim AdamW 8-bit", None, 1.0),
]
OF_COPY = ("1e9", 0.97)  # ours reaches this fraction of a copy's bandwidth
GPU_STATE = "pstate,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def main() -> int:
    """Measure what is asked for; 1 if our step is wrong, or cannot be measured, somewhere."""
    args = arguments()
    device = torch.device(args.device)
    end = time.monotonic() + args.limit
    result: dict[str, Any] = {"environment": environment(device), "workloads": {}}
    result["arguments"] = {name: str(value) for name, value in vars(args).items()}
    result["gpu_before"] = gpu_state(device)
    result["copy"] = copy_bandwidth(device)
    print(f"copy: {result['copy']}", flush=True)
    for name in args.workloads or GPU_DEFAULT:
        if time.monotonic() > end:
            result["workloads"][name] = {"missing": f"no time left of --limit {args.limit:.0f}"}
            print(f"\n{name}: {result['workloads'][name]['missing']}", flush=True)
            continue
        found = result["workloads"][name] = measure(name, device, args)
        found["gpu"] = gpu_state(device)
        print(as_table(name, found, result["copy"]), flush=True)
        save(result, args.out)
    result["copy_after"] = copy_bandwidth(device)
    result["gpu_after"] = gpu_state(device)
    result["promises"] = promises(result)
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
        "--limit", type=float, default=1e9, help="seconds; starts no workload after"
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


def save(result: dict[str, Any], out: Path | None) -> None:
    """Keep what there is so far."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def right(found: dict[str, Any]) -> bool:
    """Whether a workload was reached, and our step verified and measured."""
    return "missing" in found or (
        found["verified"] == "yes" and "ms" in found["rows"].get(OURS, {})
    )


# --- one workload ---------------------------------------------------------------------------------


class Runner:
    """A contestant, warmed up, and its samples.

    Args:
        contestant: who.
        gradients: shared by all.
        flat: whether the parameters are neighbours in one buffer.
        compile_limit: seconds, where ``step`` is compiled.
    """

    def __init__(
        self, contestant: Contestant, gradients: list[Tensor], flat: bool, compile_limit: int
    ) -> None:
        self.name = contestant.name
        self.device = gradients[0].device
        with time_limit(compile_limit if contestant.compiled else 0):
            self.step, self.cycle_seconds = self._warm_up(contestant, gradients, flat)
        cycles = SAMPLE_MS * 1e-3 / max(self.cycle_seconds, 1e-9)
        self.cycles = min(max(math.ceil(cycles), 1), 20)
        self.seconds = 0.0  # spent on samples

    def _warm_up(
        self, contestant: Contestant, gradients: list[Tensor], flat: bool
    ) -> tuple[Step, float]:
        """Past the rectification boundary and two syncs; the second cycle tells the time."""
        shapes = [tuple(gradient.shape) for gradient in gradients]
        params = [Parameter(t) for t in random_tensors(shapes, self.device, flat)]
        before = [param.detach().flatten()[:8].clone() for param in params]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        step = step_of(contestant, contestant.build(params))
        for _ in range(2):
            begun = time.perf_counter()
            for _ in range(CYCLE):
                step()
            wait(self.device)
            seconds = time.perf_counter() - begun
        check_moved(contestant, params, before)
        return step, seconds

    def sample(self) -> tuple[float, float]:
        """Milliseconds of a step: on the device's clock, and until its calls have returned."""
        entered = time.perf_counter()
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
        self.seconds += time.perf_counter() - entered
        return ms, host * 1e3 / CYCLE


def measure(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One workload: our step verified, then everyone timed in turn."""
    shapes = WORKLOADS[name]
    found: dict[str, Any] = {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}
    found["verified"] = verified(name, device)
    free_memory()
    chosen = [c for c in contestants_on(device) if c.name not in args.skip]
    together = fits(found["parameters"] * len(chosen), device)
    found["built"] = "all at once" if together else "one at a time, twice"
    gc.disable()
    try:
        found["rows"] = Race(name, device, args, chosen).run(together)
    finally:
        gc.enable()
    free_memory()
    if len(shapes) >= CAPTURED and device.type == "cuda":
        found["graph"] = replays(name, device)
        free_memory()
    return found


class Race:
    """A workload's contestants and what is known of them."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        args: argparse.Namespace,
        chosen: list[Contestant],
    ) -> None:
        shapes, self.flat = WORKLOADS[name], name in FLAT
        # One element more in front: where gradients are neighbours, too, they lie differently
        # from the parameters.
        self.gradients = random_tensors([(1,), *shapes], device, self.flat)[1:]
        self.args = args
        self.chosen = chosen
        self.rows: dict[str, dict[str, Any]] = {c.name: {} for c in chosen}
        self.samples: dict[str, list[tuple[float, float]]] = {c.name: [] for c in chosen}

    def run(self, together: bool) -> dict[str, dict[str, Any]]:
        """The rows of the table.

        Args:
            together: all contestants fit into memory at once.
        """
        if together:
            self._interleaved()
        else:
            self._one_at_a_time()
        parameters = sum(gradient.numel() for gradient in self.gradients)
        for contestant in self.chosen:
            note_samples(self.rows[contestant.name], contestant, self.samples, parameters)
        return self.rows

    def _interleaved(self) -> None:
        runners = [runner for runner in map(self._start, self.chosen) if runner is not None]
        for _ in range(self.args.rounds):
            for runner in runners:
                self._take(runner, self.args.rounds)
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
        if contestant.compiled and len(self.gradients) > MOST_TENSORS_TO_COMPILE:
            row["missing"] = f"compiling a step over {len(self.gradients)} tensors takes too long"
            return None
        limit = self.args.compile_limit
        return attempt(row, lambda: Runner(contestant, self.gradients, self.flat, limit))

    def _take(self, runner: Runner, most: int) -> None:
        """One sample, unless there are two already and the time for them is used up."""
        row, taken = self.rows[runner.name], self.samples[runner.name]
        enough = len(taken) >= 2 and runner.seconds >= self.args.seconds
        if "missing" in row or len(taken) >= most or enough:
            return
        sample = attempt(row, runner.sample)
        if sample is not None:
            taken.append(sample)


def attempt(row: dict[str, Any], call: Callable[[], Any]) -> Any:
    """What ``call`` returns; if it fails, None and the reason in ``row``."""
    try:
        return call()
    except (Exception, OutOfTime) as error:  # whatever a peer's package raises
        lines = str(error).strip().splitlines()
        row["missing"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    gc.collect()
    return None


def verified(name: str, device: torch.device) -> str:
    """ "yes", or in what our step fails, by one backend or the other."""
    shapes = WORKLOADS[name][: len(WORKLOADS[name]) // 20 + 1]
    reasons: list[str] = []
    for backend in ("cuda", "triton") if device.type == "cuda" else (device.type,):
        row: dict[str, Any] = {}
        if backend == "triton" and ranger_cuda.support.obstacle(backend):
            continue  # its row of the table says so

        def check(backend: str = backend) -> None:
            verify(shapes, device, name in FLAT, backend)

        attempt(row, check)
        reasons += row.values()
    return "; ".join(reasons) or "yes"


def promises(result: dict[str, Any]) -> list[str]:
    """Each promise on each workload that was reached, and whether it was kept."""
    lines = []
    for name, found in result["workloads"].items():
        rows = found.get("rows", {})
        for who, other, where, limit in PROMISES:
            if where is not None and name not in where:
                continue
            if not {who, other} <= rows.keys():
                continue
            pairs = zip(*(rows[x].get("samples", []) for x in (who, other)), strict=False)
            ratios = [mine / its for mine, its in pairs]
            value = median(ratios) if ratios else None
            lines.append(judge(f"{name}: time of {who} against {other}", value, limit)[1])
        if name == OF_COPY[0] and "gb_per_s" in rows.get(OURS, {}):
            value = result["copy"]["gb_per_s"] / rows[OURS]["gb_per_s"]
            lines.append(judge(f"{name}: time against a copy's", value, 1 / OF_COPY[1])[1])
    return lines


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


def note_samples(
    row: dict[str, Any],
    contestant: Contestant,
    samples: dict[str, list[tuple[float, float]]],
    parameters: int,
) -> None:
    """Medians and extremes; the ratio is ours over theirs, round by round."""
    taken = samples[contestant.name]
    if not taken or "missing" in row:
        return
    device_ms, host_ms = ([sample[i] for sample in taken] for i in range(2))
    row["ms"], row["ms_range"] = median(device_ms), [min(device_ms), max(device_ms)]
    row["host_ms"], row["host_ms_range"] = median(host_ms), [min(host_ms), max(host_ms)]
    row["samples"] = device_ms
    ours = [sample[0] for sample in samples.get(OURS, [])]
    if ours:
        row["ratio"] = median(a / b for a, b in zip(ours, device_ms, strict=False))
    if contestant.bytes_per_parameter is not None:
        row["gb_per_s"] = contestant.bytes_per_parameter * parameters / row["ms"] / 1e6


def replays(name: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """A step captured as a CUDA graph and replayed: nothing of Python, little of the driver."""
    builds: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
        OURS: lambda p: ranger_cuda.Ranger(p, backend="cuda"),
        TRITON: lambda p: ranger_cuda.Ranger(p, backend="triton"),
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, capturable=True),
    }
    rows: dict[str, dict[str, Any]] = {who: {} for who in builds}
    for who, build in builds.items():

        def replay(who: str = who, build: Any = build) -> None:
            params = [Parameter(t) for t in random_tensors(WORKLOADS[name], device, name in FLAT)]
            for param in params:
                param.grad = torch.randn_like(param)
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


def capture(step: Step, device: torch.device, steps: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of ``steps`` steps, after a cycle on a side stream as captures want it."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(CYCLE):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step()
    return graph


# --- the device -----------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Starts on an idle device; called, it waits, and returns the milliseconds."""
    wait(device)
    if device.type != "cuda":
        begun = time.perf_counter()
        return lambda: (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def elapsed() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def copy_bandwidth(device: torch.device) -> dict[str, Any]:
    """Bytes read and written by a copy within the device, over buffers that no cache holds.

    By ``cudaMemcpy``, which is the baseline, and by a kernel that scales.
    """
    size = 2**28 if device.type == "cuda" else 2**20  # float32 elements: 1 GiB
    pairs = [(torch.randn(size, device=device), torch.empty(size, device=device)) for _ in range(3)]
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "memcpy": lambda source, target: target.copy_(source),
        "kernel": lambda source, target: torch.mul(source, 2.0, out=target),
    }
    for name, call in calls.items():
        samples = []
        for _ in range(12):
            elapsed = stopwatch(device)
            for source, target in pairs:
                call(source, target)
            samples.append(len(pairs) * size * 8 / elapsed() / 1e6)
        taken = samples[2:]  # the clocks have risen by then
        found[name] = {"gb_per_s": median(taken), "range": [min(taken), max(taken)]}
    del pairs
    free_memory()
    return {"gb_per_s": found["memcpy"]["gb_per_s"], **found}


def fits(parameters: int, device: torch.device) -> bool:
    """Whether this many may be there at once, with all that belongs to them."""
    if device.type != "cuda":
        return parameters < 2**28
    return parameters * BYTES_OF_A_CONTESTANT < 0.6 * torch.cuda.mem_get_info(device)[0]


def free_memory() -> None:
    """Give back everything that nobody holds."""
    torch._dynamo.reset()  # its guards hold optimizers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_state(device: torch.device) -> str | None:
    """Clocks, power and temperature now."""
    if device.type != "cuda":
        return None
    return run("nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv,noheader")


# From BaseException, for torch.compile wraps every other in one of its own.
class OutOfTime(BaseException):
    """A time limit was reached."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime within, if it takes longer; 0: no limit."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every five seconds: what is raised within a callback of C is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- for a person ---------------------------------------------------------------------------------


def as_table(name: str, found: dict[str, Any], copy: dict[str, Any]) -> str:
    """One workload; the factor is the other's time over ours."""
    lines = [
        f"\n{name}: {found['tensors']} tensors, {found['parameters']:,} parameters; "
        f"verified: {found['verified']}; {found['gpu']}",
        f"  {'':<26} {'step, ms':>9} [min, max]; host, ms; over ours; of copy; bytes allocated",
    ]
    for who, row in found["rows"].items():
        if "ms" not in row:
            lines.append(f"  {who:<26} not measured: {row.get('missing')}")
            continue
        low, high = row["ms_range"]
        of_copy = row["gb_per_s"] / copy["gb_per_s"] if "gb_per_s" in row else math.nan
        lines.append(
            f"  {who:<26} {row['ms']:9.4f} [{low:.4f}, {high:.4f}] {row['host_ms']:9.4f}"
            f"{1 / row.get('ratio', math.nan):8.2f} x {of_copy:7.1%}"
            f" {row.get('bytes_allocated', -1):>14,} B"
        )
    for who, row in found.get("graph", {}).items():
        shown = f"{row['ms']:9.4f} {row['ms_range']}" if "ms" in row else row["missing"]
        lines.append(f"  {who + ', CUDA graph':<26} {shown}")
    cycle = found["rows"].get(OURS, {}).get("ms_of_cycle")
    if cycle:
        lines.append(f"  {OURS}, step by step: {', '.join(f'{ms:.4f}' for ms in cycle)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
