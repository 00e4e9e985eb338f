"""The command line: see ``--help``."""

from __future__ import annotations

import argparse
import sys
import warnings

from .registry import EVERY, OPERATIONS
from .runner import Sequence, play, report, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m operations", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="random sequences")
    running.add_argument("variant", choices=EVERY)
    running.add_argument("--seed", type=int, default=0, help="of the first sequence")
    running.add_argument("--operations", type=int, default=2000)
    running.add_argument("--without", default="", help="operations to leave out, with commas")
    running.add_argument("--go-on", action="store_true", help="list all kinds of failures")
    playing = verbs.add_parser("play", help="one sequence, or that of a seed")
    playing.add_argument("sequence", nargs="+", help="variant, seed, and operations if not all")
    for verb in (running, playing):
        verb.add_argument("--backend", help="of the first twin, in place of the fastest")
    verbs.add_parser("list", help="the operations")
    given = parser.parse_args()

    warnings.simplefilter("ignore")
    if given.verb == "list":
        for name, op in OPERATIONS.items():
            print(f"{op.weight:3} {name}")
        return 0
    if given.verb == "run":
        without = given.without.split(",")
        return run(
            given.variant,
            given.seed,
            given.operations,
            without,
            given.backend,
            go_on=given.go_on,
        )
    words = given.sequence
    if len(words) > 2:
        sequence = Sequence.parse(words, given.backend)
    else:
        sequence = Sequence.drawn(words[0], int(words[1]), backend=given.backend)
    _, failure = play(sequence)
    if failure is None:
        print("nothing failed")
        return 0
    print(report(sequence, failure), failure.trace, sep="\n")
    return 1


sys.exit(main())
