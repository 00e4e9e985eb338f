"""The command line: ``python -m ranger_cuda info`` and ``python -m ranger_cuda train``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the one
that is asked for is imported, so that ``info`` works where ``train``'s extras are missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .errors import CommandError
from .interrupt import QuickExit

SUBCOMMANDS = {
    "info": "what was built, what runs here, and why something does not",
    "train": "train a small GPT with Ranger and others, side by side on the same batches",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except CommandError as error:
        if os.environ.get("RANK", "0") == "0":  # of all that torchrun started
            print(f"python -m ranger_cuda {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ranger_cuda")
    parser.description = "Ranger (RAdam + Lookahead) as one fused step for PyTorch."
    parser.add_argument("--version", action="version", version=f"ranger_cuda {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    module = None
    for name, summary in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if argv[:1] == [name]:
            with QuickExit():
                module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    assert module is not None  # argparse has refused every other first argument
    return module.run(args)
