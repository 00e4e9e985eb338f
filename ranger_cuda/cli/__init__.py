"""The command line: ``python -m ranger_cuda info`` and ``python -m ranger_cuda train``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the one
that is asked for is imported, so that ``info`` works where ``train``'s extras are missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .errors import CommandError

SUBCOMMANDS = {
    "info": "what was built, what runs here, and why something does not",
    "train": "train a small GPT with Ranger and others, side by side on the same batches",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m ranger_cuda", description=__doc__)
    parser.description = "Ranger (RAdam + Lookahead) as one fused step for PyTorch."
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    module = None
    for name, summary in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if argv[:1] == [name]:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    assert module is not None  # argparse has refused every other first argument
    try:
        return module.run(args)
    except CommandError as error:
        print(f"python -m ranger_cuda {args.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
