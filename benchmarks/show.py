"""What a result says: its tables, its promises, and what is worse than in an older one.

python -m benchmarks show FILE.json
python -m benchmarks show FILE.json --check --compare OLD.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import compare, promises, tables
from .result_file import load


def main(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Print it; 1 if what ``--check`` and ``--compare`` ask for does not hold."""
    parser.add_argument("result", type=Path, help="a file that `step --out` has written")
    add_options(parser)
    args = parser.parse_args(argv)
    result = load(args.result)
    print(tables.heading(result))
    for name, found in result["workloads"].items():
        print(tables.workload(name, found, result.get("copy")))
    return conclude(result, args.check, args.compare and load(args.compare))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of every command that ends with a result."""
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="exit 1 if anything is worse than there"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a promise is not kept")


def conclude(result: dict[str, Any], check: bool, old: dict[str, Any] | None) -> int:
    """Print the promises, and the comparison if there is an old result; 1 if one of them fails."""
    judged = promises.judged(result)
    print("\n".join(["\npromises", *(line for _, line in judged)]))
    failed = check and not all(kept for kept, _ in judged)
    if old:
        worse = compare.regressions(old, result)
        notes = compare.surroundings(old, result)
        print("\n".join(["\nworse than the old result", *(worse or ["  nothing"]), *notes]))
        failed = failed or bool(worse)
    return int(failed)
