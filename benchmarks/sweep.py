"""Which block size, chunk and loads in flight of csrc/cuda/tables.h are fastest on this GPU.

    python -m benchmarks sweep --out FILE.json

Builds the extension once for each, in parallel, then times them in turn on the same optimizer and
the same memory: only its launcher is made anew, by another build.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import ranger_cuda
from ranger_cuda.backends import support

from .clocks import CYCLE, attempt, capture, copy_bandwidth, free_memory, gpu_state, stopwatch
from .contestants import PACKAGES, RANGER_BYTES
from .machine import environment
from .on_gpu.commands import ROOT, cmake
from .race import give
from .result_file import save
from .step import verify
from .workloads import PLACED, WORKLOADS, Placed, random_tensors

sys.path.insert(0, str(ROOT / "tests"))

from targets import load

SMALL = 2**26  # parameters; below it the host may be slower than the GPU
TO_VERIFY = [(3, 5), (8193,), (70_001,)]


class Choice(NamedTuple):
    """What tables.h is compiled with."""

    threads: int
    chunk: int
    packs: int
    blocks: int

    @property
    def macros(self) -> str:
        """As a compiler takes them; both, for host and device share the tables."""
        return " ".join(f"-DRANGER_CUDA_{k.upper()}={v}" for k, v in self._asdict().items())

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, chunk {self.chunk}, {self.packs} packs, {self.blocks} blocks"
        )


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Build, time, print; 1 if any build failed or returns other bits than the reference."""
    args = arguments(parser, argv)
    device = torch.device(args.device)
    choices = [
        Choice(*drawn)
        for drawn in itertools.product(args.threads, args.chunks, args.packs, args.blocks)
    ]
    folder = args.builds or Path(tempfile.mkdtemp(prefix="ranger_sweep_"))
    begun = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        failures = list(pool.map(lambda c: build(c, folder, args.architectures), choices))
    print(f"{len(choices)} builds in {time.monotonic() - begun:.0f} s, in {folder}", flush=True)
    result: dict[str, Any] = {
        "environment": environment(device, PACKAGES),
        "gpu_before": gpu_state(device),
    }
    result["arguments"] = vars(args)
    result["failed_builds"] = {
        str(c): why for c, why in zip(choices, failures, strict=True) if why is not None
    }
    for name, why in result["failed_builds"].items():
        print(f"{name}: {why}")
    built = [c for c in choices if str(c) not in result["failed_builds"]]
    modules = {choice: load(binary_of(choice, folder)) for choice in built}
    result["verified"] = {str(c): verified(module, device) for c, module in modules.items()}
    result["copy"] = copy_bandwidth(device)
    result["workloads"] = {}
    for name in args.workloads:
        rows: dict[Choice, dict[str, Any]] = {choice: {"samples": []} for choice in modules}
        result["workloads"][name] = {str(choice): row for choice, row in rows.items()}
        for _ in time_builds(name, modules, rows, device, args.rounds):
            save(result, args.out)
        free_memory()
        print(as_table(name, rows, result["copy"]), flush=True)
    result["gpu_after"] = gpu_state(device)
    save(result, args.out)
    wrong = {name: why for name, why in result["verified"].items() if why != "yes"}
    for name, why in wrong.items():
        print(f"WRONG {name}: {why}")
    return 1 if wrong or result["failed_builds"] else 0


def arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    numbers = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--threads", default=[256], **numbers)
    parser.add_argument("--chunks", default=[2048, 8192, 32768], **numbers)
    parser.add_argument("--packs", default=[1, 2], **numbers)
    parser.add_argument("--blocks", default=[3, 4, 5], **numbers)
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["2.5e8", "1000 x 1024"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--architectures", default="90-real", help="as for CMake")
    parser.add_argument("--builds", type=Path, help="where to build, and what is there is taken")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="builds at once")
    parser.add_argument("--device", default="cuda", help="cpu: to try this script out")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args(argv)


# --- builds ---------------------------------------------------------------------------------------


def build(choice: Choice, folder: Path, architectures: str) -> str | None:
    """Build one, in a folder of its own; None, or why it failed."""
    at = folder / "-".join(map(str, choice))
    if list(at.glob("_C*.so")):
        return None
    settings = {"RANGER_CUDA_ARCHITECTURES": architectures, "RANGER_BACKENDS": "cuda"}
    settings |= {f"CMAKE_{language}_FLAGS": choice.macros for language in ("CXX", "CUDA")}
    at.mkdir(parents=True, exist_ok=True)
    with (at / "build.log").open("w") as log:
        for command in cmake(at, settings):
            if (
                subprocess.run(
                    command,
                    env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                ).returncode
                != 0
            ):
                log.flush()
                return (at / "build.log").read_text()[-500:]
    return None


def binary_of(choice: Choice, folder: Path) -> Path:
    """What :func:`build` made."""
    (binary,) = (folder / "-".join(map(str, choice))).glob("_C*.so")
    return binary


def use(module: ModuleType) -> None:
    """Let every launcher that is made from now on be of this build."""
    support.extension = lambda: module


def verified(module: ModuleType, device: torch.device) -> str:
    """ "yes", or in what this build's step fails."""
    use(module)
    row: dict[str, Any] = {}
    attempt(row, lambda: verify(TO_VERIFY, device, Placed()))
    return row.get("missing", "yes")


# --- times ----------------------------------------------------------------------------------------


class Bench:
    """A workload's optimizer, which every build steps in turn.

    Small workloads are replayed as CUDA graphs of a whole cycle: a step by itself would tell the
    host's time, which is the same for all.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        shapes, placed = WORKLOADS[name], PLACED.get(name, Placed())
        params = [Parameter(t) for t in random_tensors(shapes, device, placed.params)]
        give(params, random_tensors(shapes, device, placed.gradients))
        self.device = device
        self.parameters = sum(map(math.prod, shapes))
        self.small = self.parameters < SMALL
        self.optimizer = ranger_cuda.Ranger(params, lr=1e-3, backend=device.type)

    def sample(self, module: ModuleType) -> float:
        """Milliseconds of a step, averaged over Lookahead's cycle."""
        use(module)
        self.optimizer._dispatcher.reset()
        if self.small and self.device.type == "cuda":
            cycle = capture(self.optimizer.step, self.device, CYCLE).replay
        else:
            cycle = self._cycle
        cycle()
        cycle()
        cycles = 50 if self.small else 2
        elapsed = stopwatch(self.device)
        for _ in range(cycles):
            cycle()
        return elapsed() / (cycles * CYCLE)

    def _cycle(self) -> None:
        for _ in range(CYCLE):
            self.optimizer.step()


def time_builds(
    name: str,
    modules: dict[Choice, ModuleType],
    rows: dict[Choice, dict[str, Any]],
    device: torch.device,
    rounds: int,
) -> Iterator[None]:
    """Each build's samples and their median into ``rows``; yields after every round."""
    bench = Bench(name, device)
    for _ in range(rounds):
        for choice, module in modules.items():
            if "missing" not in rows[choice]:
                taken = attempt(rows[choice], functools.partial(bench.sample, module))
                if taken is not None:
                    rows[choice]["samples"].append(taken)
        for row in rows.values():
            if row["samples"]:
                row["ms"] = median(row["samples"])
                row["gb_per_s"] = RANGER_BYTES * bench.parameters / row["ms"] / 1e6
        yield


def as_table(name: str, rows: dict[Choice, dict[str, Any]], copy: dict[str, Any]) -> str:
    """The fastest first."""
    lines = [f"\n{name}: step, ms [min, max]; of copy"]
    for choice, row in sorted(rows.items(), key=lambda item: item[1].get("ms", math.inf)):
        if "ms" not in row:
            lines.append(f"  {choice!s:<36} not measured: {row.get('missing')}")
            continue
        lines.append(
            f"  {choice!s:<36} {row['ms']:.4f} [{min(row['samples']):.4f}, "
            f"{max(row['samples']):.4f}] {row['gb_per_s'] / copy['gb_per_s']:7.1%}"
        )
    return "\n".join(lines)
