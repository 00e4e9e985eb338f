"""Time of ``optimizer.step()`` on a CPU against the peers, side by side in one run.

    python benchmarks/step_time.py                  # measure, print a table
    python benchmarks/step_time.py --out FILE.json  # and keep it
    python benchmarks/step_time.py --check          # fail where a promise is not kept

See benchmarks/README.md for the method; gpu_step_time.py is for GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import ranger_cuda
from contestants import CONTESTANTS, Contestant, Step, contestants_on, step_of
from machine import processor
from result_file import save
from workloads import CPU_DEFAULT, PLACED, WORKLOADS, Placed, Shapes, random_tensors

OURS = "ranger"
ADAMW = "torch AdamW fused"
CYCLE = 6  # Lookahead's period: every sample has as many syncs as every other
WARM_UP = 2 * CYCLE  # past the rectification boundary, and two syncs
# Elements up to which new gradients are measured, too: beyond, a step waits for memory.
MOST_TO_RENEW = 2**23
MOST_TENSORS_TO_COMPILE = 200  # torch.compile takes over eight minutes for a step over 1,000

# (workload, other): at most this fraction of the other's time.
PROMISES = {
    ("64 x 1024^2", ADAMW): 1.0,
    ("64 x 1024^2", "optimi Ranger"): 1 / 2,
    ("64 x 1024^2", "pytorch-optimizer Ranger"): 1 / 4,
    ("1000 x 64^2", ADAMW): 1 / 2,
    ("1000 x 1", ADAMW): 1 / 4.5,
}


def main() -> int:
    """Measure what is asked for; 1 if ``--check`` finds a promise that is not kept."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    result: dict[str, Any] = {"environment": environment(device), "workloads": {}}
    for name in args.workloads or CPU_DEFAULT:
        result["workloads"][name] = measure(name, device, args)
        print(as_table(name, result["workloads"][name]), flush=True)
    save(result, args.out)
    if args.compare:
        print(comparison(json.loads(args.compare.read_text()), result))
    return check(result) if args.check else 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="CONTESTANT")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contestant")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--compare", type=Path, help="an older result to compare with")
    parser.add_argument("--check", action="store_true", help="exit 1 if a promise is not kept")
    return parser.parse_args()


class Ready(NamedTuple):
    """A contestant, warmed up."""

    step: Step
    params: list[Parameter]


def measure(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One workload: every contestant verified, warmed up, then timed in turn."""
    shapes, placed = WORKLOADS[name], PLACED.get(name, Placed())
    verify(shapes[: len(shapes) // 20 + 1], device, placed)
    gradients = random_tensors(shapes, device, placed.gradients)
    ready: dict[str, Ready] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contestant in contestants_on(device):
        if contestant.name in args.skip:
            continue
        if contestant.compiled and len(shapes) > MOST_TENSORS_TO_COMPILE:
            reason = f"compiling a step over {len(shapes)} tensors takes too long"
            rows[contestant.name] = {"missing": reason}
            continue
        try:
            ready[contestant.name] = prepare(contestant, gradients, placed.params)
        except (ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            rows[contestant.name] = {"missing": f"{reason} (pip install {contestant.package})"}
            continue
        rows[contestant.name] = {"bytes_allocated": allocated(ready[contestant.name].step)}
    kept: dict[str, list[float]] = {name: [] for name in ready}
    fresh: dict[str, list[float]] = {name: [] for name in ready}
    gc.collect()
    gc.disable()
    for _ in range(args.rounds):
        for name, runner in ready.items():
            kept[name].append(sample(runner))
        if sum(map(math.prod, shapes)) <= MOST_TO_RENEW:
            for name, runner in ready.items():
                fresh[name].append(sample(runner, gradients))
    gc.enable()
    for name in ready:
        rows[name] |= in_short(name, kept)
        if fresh[name]:
            rows[name]["fresh"] = in_short(name, fresh)
    return rows


def in_short(name: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Median, quartiles and ratios of a contestant's samples."""
    low, middle, high = quantiles(samples[name], n=4)
    return {"ms": middle, "ms_quartiles": [low, high], **ratios(name, samples)}


def ratios(name: str, samples: dict[str, list[float]]) -> dict[str, float]:
    """Round by round: our time over a contestant's, and its over that of torch's fused AdamW."""
    found = {}
    for key, above, below in (("ratio", OURS, name), ("of_adamw", name, ADAMW)):
        pairs = list(zip(samples.get(above, []), samples.get(below, []), strict=False))
        if pairs:
            found[key] = median(a / b for a, b in pairs)
    return found


def prepare(
    contestant: Contestant, gradients: list[torch.Tensor], lanes: Sequence[int] | None = None
) -> Ready:
    """Build, warm up, and see that the steps did something finite."""
    shapes = [tuple(gradient.shape) for gradient in gradients]
    params = [Parameter(t) for t in random_tensors(shapes, gradients[0].device, lanes)]
    before = [param.detach().flatten()[:8].clone() for param in params]
    give(params, gradients)
    step = step_of(contestant, contestant.build(params))
    for _ in range(WARM_UP):
        step()
    check_moved(contestant, params, before)
    return Ready(step, params)


def check_moved(
    contestant: Contestant, params: list[Parameter], before: list[torch.Tensor]
) -> None:
    """Raise unless every parameter is finite and its first elements are not what they were."""
    for param, old in zip(params, before, strict=True):
        if torch.equal(param.detach().flatten()[:8], old) or not bool(param.isfinite().all()):
            raise AssertionError(f"{contestant.name} left a parameter unchanged or not finite")


def verify(
    shapes: Shapes, device: torch.device, placed: Placed, backend: str | None = None
) -> None:
    """What is timed is right: the bits of the reference after every step of a cycle and more.

    Args:
        backend: default: the native one of ``device``.
    """
    backend = backend or device.type
    values = random_tensors(shapes, device, placed.params)
    sets = [[Parameter(value) for value in values], [Parameter(value.clone()) for value in values]]
    fast = ranger_cuda.Ranger(sets[0], backend=backend)
    reference = ranger_cuda.Ranger(sets[1], backend="reference")
    for _ in range(WARM_UP + 1):
        gradients = random_tensors(shapes, device, placed.gradients)
        for a, b, gradient in zip(*sets, gradients, strict=True):
            a.grad = b.grad = gradient
        fast.step()
        reference.step()
        if not all(torch.equal(a, b) for a, b in zip(*sets, strict=True)):
            raise AssertionError(f"the step of backend={backend!r} differs from the reference")


def sample(runner: Ready, to_renew: list[torch.Tensor] | None = None) -> float:
    """Milliseconds of one step, over a whole Lookahead cycle; one before it brings the contestant's
    own memory back into the caches, from which the one before drove it out.

    Args:
        to_renew: gradients, of which each step is given copies; None: it has those of before.
    """
    seconds = []
    for _ in range(2 * CYCLE):
        if to_renew is not None:
            renew(runner.params, to_renew)
        begun = time.perf_counter()
        runner.step()
        seconds.append(time.perf_counter() - begun)
    if to_renew is not None:
        give(runner.params, to_renew)
    return sum(seconds[CYCLE:]) * 1e3 / CYCLE


def give(params: list[Parameter], gradients: list[torch.Tensor]) -> None:
    """Gradients that all contestants share."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def renew(params: list[Parameter], gradients: list[torch.Tensor]) -> None:
    """New gradient tensors, made as a backward pass makes them after ``zero_grad``."""
    for param in params:
        param.grad = None
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()


def allocated(step: Step) -> int:
    """Bytes of tensor memory that a whole cycle of steps asks for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(CYCLE):
            step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "packages": {contestant.package: installed(contestant) for contestant in CONTESTANTS},
    }


def installed(contestant: Contestant) -> str | None:
    """The version of a contestant's package."""
    try:
        return version(contestant.package)
    except PackageNotFoundError:
        return None


def run(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def as_table(name: str, rows: dict[str, dict[str, Any]]) -> str:
    """One workload for a person; the factor is the other's time over ours."""
    lines = [
        f"\n{name}: step time, median [quartiles]; how much faster {OURS} is; time over that of "
        f"{ADAMW}; bytes allocated"
    ]
    for contestant, row in rows.items():
        if "missing" in row:
            lines.append(f"  {contestant:<26} not measured: {row['missing']}")
            continue
        lines.append(f"{as_line(contestant, row)}  {row['bytes_allocated']:>12,} B")
        if "fresh" in row:
            lines.append(as_line("  new gradients", row["fresh"]))
    return "\n".join(lines)


def as_line(who: str, row: dict[str, Any]) -> str:
    """A contestant's times and ratios."""
    low, high = row["ms_quartiles"]
    return (
        f"  {who:<26} {row['ms']:9.3f} ms [{low:.3f}, {high:.3f}]"
        f"{1 / row.get('ratio', math.nan):8.2f} x {row.get('of_adamw', math.nan):7.3f}"
    )


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Each median against an older result's; meaningful on the same machine only."""
    lines = ["\nagainst the older result: new / old"]
    for name, rows in new["workloads"].items():
        for contestant, row in rows.items():
            before = old["workloads"].get(name, {}).get(contestant, {}).get("ms")
            if before and "ms" in row:
                lines.append(f"  {name:<14} {contestant:<26} {row['ms'] / before:6.3f}")
    return "\n".join(lines)


def check(result: dict[str, Any]) -> int:
    """Print each promise and whether it was kept."""
    broken = 0
    print("\npromises")
    promises: list[tuple[str, float | None, float]] = []
    for (name, other), limit in PROMISES.items():
        ratio = result["workloads"].get(name, {}).get(other, {}).get("ratio")
        promises.append((f"{name}: time against {other}", ratio, limit))
    for name, rows in result["workloads"].items():
        promises.append((f"{name}: bytes allocated in a cycle", rows[OURS]["bytes_allocated"], 0))
    for what, value, limit in promises:
        kept, line = judge(what, value, limit)
        broken += not kept
        print(line)
    return 1 if broken else 0


def judge(what: str, value: float | None, limit: float) -> tuple[bool, str]:
    """Whether a promise is kept, and a line that says so."""
    kept = value is not None and value <= limit
    shown = "not measured" if value is None else f"{value:.3f}"
    return kept, f"  {'kept  ' if kept else 'BROKEN'} {what}: {shown}, at most {limit:.3f}"


if __name__ == "__main__":
    sys.exit(main())
