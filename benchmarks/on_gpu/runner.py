"""Everything that a machine with a GPU can say of this clone, in one command.

    python3 -m benchmarks gpu                          # all but the sweep
    python3 -m benchmarks gpu --only tests benchmark   # some stages
    python3 -m benchmarks gpu --wheels DIR             # with the peers' wheels, offline

Where a command may take ten minutes at most, three of under nine each:

    python3 -m benchmarks gpu --only environment build benchmark
    python3 -m benchmarks gpu --only environment build tests sanitizer --pytest="-m gpu"
    python3 -m benchmarks gpu --only environment sweep

Builds the extension into the clone, installs nothing. Every stage has a time limit, and none stops
a later one. What they found so far is always in the output folder ($OUT or benchmarks/results/),
also where this is terminated: ``summary.json``, ``step-time.json``, ``sweep.json`` and
``logs.tar.gz``. Exits with 0 if all that were asked for passed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import shlex
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from ..result_file import save
from . import stages
from .commands import ROOT, Commands, Result
from .stages import SANITIZERS, Job
from .summary import headline, summary

Stage = Callable[[Job], Result]
# Those that run at the same time; the benchmark has the machine to itself.
STAGES: tuple[dict[str, Stage], ...] = (
    {"environment": stages.environment},
    {"build": stages.build},
    {
        "tests": stages.tests,
        **{
            f"sanitizer-{tool.name}": functools.partial(stages.sanitizer, tool=tool)
            for tool in SANITIZERS
        },
    },
    {"benchmark": stages.benchmark},
    {"sweep": stages.sweep},
)
# Seconds of each stage.
LIMITS = {
    "environment": 40.0,
    "build": 100.0,
    "tests": 390.0,
    "sanitizer": 390.0,
    "benchmark": 390.0,
    "sweep": 490.0,
}
DEFAULT = [name for name in LIMITS if name != "sweep"]


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Run the stages, keep and print what they found; 0 if all passed."""
    args = arguments(parser, argv)
    begun = time.monotonic()
    commands = Commands(args.out, args.wheels)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, commands.stop)
    results: dict[str, Result] = {}
    try:
        for together in STAGES:
            chosen = {n: f for n, f in together.items() if n.split("-")[0] in args.only}
            if not chosen or commands.stopped_by is not None:
                continue
            with ThreadPoolExecutor(len(chosen)) as pool:
                started: dict[Future[Result], str] = {}
                for name, stage in chosen.items():
                    end = time.monotonic() + args.limits[name.split("-")[0]]
                    started[pool.submit(attempt, stage, Job(commands, args, end))] = name
                for future in as_completed(started):
                    name = started[future]
                    results[name] = future.result()
                    print(headline(name, results[name]), flush=True)
                    whole = {"seconds": round(time.monotonic() - begun, 1), "stages": results}
                    save(whole, args.out / "summary.json")
                    commands.pack_logs()
    finally:
        commands.clean_up()
    print("\n".join(summary(results)))
    print(f"\n{time.monotonic() - begun:.0f} s; everything is in {args.out}")
    if commands.stopped_by is not None:
        return 128 + commands.stopped_by
    return 0 if all(result["state"] != "failed" for result in results.values()) else 1


def arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=DEFAULT, metavar="STAGE")
    today = datetime.date.today().isoformat()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results" / f"gpu-{today}")
    parser.add_argument("--out", type=Path, default=out, help="a folder (default: %(default)s)")
    wheels = os.environ.get("WHEELS")
    parser.add_argument("--wheels", type=Path, default=wheels, help="a folder, to measure with")
    parser.add_argument("--architectures", help="as CMake takes them (default: this GPU's)")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    for name in ("pytest", "benchmark", "sweep"):
        more = f"more for {name}, in one string: --{name}='...'"
        parser.add_argument(f"--{name}", type=shlex.split, default=[], metavar="ARGS", help=more)
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("STAGE", "S")}
    parser.add_argument("--limit", help="seconds of a stage", **pair)  # type: ignore[arg-type]
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.wheels = args.wheels and Path(args.wheels).resolve()
    args.limits = {**LIMITS, **{stage: float(seconds) for stage, seconds in args.limit}}
    return args


def attempt(stage: Stage, job: Job) -> Result:
    """A stage's result, even if the stage itself breaks."""
    try:
        return stage(job)
    except Exception as error:
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"}
