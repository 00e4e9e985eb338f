"""``python -m benchmarks.experiments``: run them, and draw what came out."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from . import EXPERIMENTS

_EPILOG = """\
Each experiment prints a table and leaves NAME.jsonl, a line a finished job, and NAME.png in --out.
Ctrl-C loses the jobs under way; the same command goes on from the others. All together take about
95 minutes on two CPU cores; --quick tries everything in two minutes.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the finished jobs.", file=sys.stderr)
        return 130


def _main(argv: list[str] | None) -> int:
    needed = ("rich", "matplotlib", "mlxtend", "scipy")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return _error(
            f"this needs {', '.join(missing)}, not installed here: pip install "
            f'{" ".join(missing)} (or, in the clone, pip install -e ".[experiments]")'
        )
    from rich.console import Console

    from ranger_cuda.cli.errors import CommandError

    from .runner import carry_out, module
    from .store import UnusableError

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description="What the papers on RAdam and Lookahead show, shown again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = "; ".join(f"{name}: {module(name).TITLE}" for name in EXPERIMENTS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {titles}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/experiments"),
        metavar="DIR",
        help="folder for the results (default: %(default)s); those of --quick go to quick in it",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes, of one thread each (default: one a core)",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--fresh", action="store_true", help="forget the finished jobs in --out")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(EXPERIMENTS)):
        parser.error(f"no experiment {', '.join(unknown)}; choose from {', '.join(EXPERIMENTS)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is below 1")
    out = args.out / "quick" if args.quick else args.out
    console = Console()
    try:
        for name in args.names or EXPERIMENTS:
            carry_out(name, out, args.jobs, args.quick, args.fresh, console)
    except (UnusableError, CommandError) as error:
        return _error(str(error))
    except BrokenProcessPool:
        return _error(
            "a process was killed (for memory?); the finished jobs are saved, and the same command "
            "goes on from there, if need be with fewer --jobs"
        )
    except OSError as error:
        return _error(f"cannot use {error.filename or out}: {error.strerror}; try another --out")
    return 0


def _error(reason: str) -> int:
    print(f"python -m benchmarks.experiments: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
