"""The flags of ``train``."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

import torch

from ..state.formats import STATE_DTYPES, WEIGHT_ROUNDINGS
from .gpt import SHAPES
from .optimizers import OPTIMIZERS
from .settings import DEFAULTS, DTYPES, EVERY_OPTIMIZER, NARROW, PARALLEL

DEFAULT_OUT = "ranger_train"

_EPILOG = """\
The results go to --out: checkpoint.pt, summary.json, history.csv and loss.png. A folder that
has a run already is left alone unless --resume or --overwrite says what to do with it.
Ctrl-C finishes the current step and saves; --resume then goes on where it stopped, with the
same bits as if nothing had happened. It needs no other flag: the settings come from the checkpoint.

On several processes: torchrun --nproc-per-node 2 -m ranger_cuda train --parallel fsdp. A batch is
cut into --slices, whose gradients are added in the same order on any number of ranks that divides
it, so that a run may go on with --resume on more ranks or fewer: with the same bits, but for
torch's AdamW, whose fused CPU step rounds by where in memory an element lies.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the flags. A flag that is not given leaves nothing behind, so that a resume
    can tell what was asked for from what is merely the default."""
    parser.argument_default = argparse.SUPPRESS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG

    def add(group: Any, flag: str, about: str, **options: Any) -> None:
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        if isinstance(default, list):
            default = " ".join(default)
        group.add_argument(
            flag,
            help=about + (f" (default: {default})" if default is not None else ""),
            **options,
        )

    model = parser.add_argument_group("what to train")
    sizes = ", ".join(f"{name} {shape.layers}x{shape.width}" for name, shape in SHAPES.items())
    add(model, "--model", f"size, in layers x width: {sizes}", choices=SHAPES)
    for flag in ("layers", "heads", "width", "context"):
        add(model, f"--{flag}", "instead of the model's own", type=_positive, metavar="N")
    about = "text to learn: a file, a folder, or 'stdlib' for the source of Python's own library"
    add(model, "--data", about, metavar="PATH")
    add(model, "--max-bytes", "read no more text than this", type=_positive, metavar="N")

    how = parser.add_argument_group("how to train")
    about = "one or more of: " + ", ".join(f"{key} ({o.what})" for key, o in OPTIMIZERS.items())
    add(how, "--optimizers", about, nargs="+", choices=OPTIMIZERS, metavar="NAME")
    rates = ", ".join(f"{name} {choice.lr:g}" for name, choice in OPTIMIZERS.items())
    about = f"for all, or for some as NAME=LR (default: {rates})"
    add(how, "--lr", about, nargs="+", type=_learning_rate, action=_CollectRates, metavar="LR")
    add(how, "--steps", "may be raised on --resume", type=_positive, metavar="N")
    add(how, "--batch-size", "windows of text a step", type=_positive, metavar="N")
    add(how, "--seed", "of the weights and the batches", type=_seed, metavar="N")
    add(how, "--device", "cpu, cuda, cuda:1, ..., or auto", type=_device)
    about = f"of the CPU (default: 1 up to a width of {NARROW}, else PyTorch's choice)"
    add(how, "--threads", about, type=_positive, metavar="N")

    add(how, "--dtype", "of the model", choices=DTYPES)
    about = "of bfloat16 and float16 parameters, by ranger_cuda's optimizers"
    add(how, "--weight-rounding", about, choices=WEIGHT_ROUNDINGS)
    names = [str(dtype).removeprefix("torch.") for dtype in STATE_DTYPES]
    add(how, "--state-dtype", "of their moments", choices=names)

    many = parser.add_argument_group("several processes (see torchrun --help)")
    add(many, "--parallel", "by DistributedDataParallel or fully_shard", choices=PARALLEL)
    about = "of a batch, for ranks to share; a power of two (default: the number of ranks)"
    add(many, "--slices", about, type=_positive, metavar="N")

    where = parser.add_argument_group("where to, and how to go on")
    where.add_argument(
        "--out",
        type=os.path.normpath,  # "" is the current folder: say so in messages
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    again = where.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the checkpoint in --out; without one, start",
    )
    again.add_argument(
        "--overwrite",
        action="store_true",
        default=False,
        help="start over where --out has a run already (without it, that is refused)",
    )
    add(where, "--checkpoint-every", "steps between checkpoints", type=_positive, metavar="N")
    add(where, "--evaluate-every", "steps between evaluations", type=_positive, metavar="N")


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number") from error


def _positive(value: str) -> int:
    number = _whole(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return number


def _seed(value: str) -> int:
    number = _whole(value)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 2**32)")
    return number


def _device(value: str) -> str:
    if value == "auto":
        return value
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{value!r} is none of cpu, cuda, cuda:1, ..., auto")
    return str(device)


def _learning_rate(value: str) -> tuple[str, float]:
    name, _, number = value.rpartition("=")
    if name and name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no optimizer; choose from {', '.join(OPTIMIZERS)}"
        )
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not (rate > 0 and math.isfinite(rate)):
        raise argparse.ArgumentTypeError(
            f"{value!r} is no learning rate above 0; write 1e-3 for all or adamw=1e-3 for one"
        )
    return name or EVERY_OPTIMIZER, rate


class _CollectRates(argparse.Action):
    """``--lr 1e-3 adamw=2e-3`` as a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, dict(values))
