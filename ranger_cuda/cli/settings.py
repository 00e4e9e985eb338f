"""What a training run is told: defaults, presets and flags, and what a resume may change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..state import formats
from ..state.formats import WEIGHT_ROUNDINGS
from . import corpus
from .errors import CommandError
from .gpt import SHAPES, Shape
from .optimizers import OPTIMIZERS
from .parallel import started_ranks

DEFAULTS: dict[str, Any] = {
    "model": "tiny",
    "data": corpus.STDLIB,
    "max_bytes": 4_000_000,
    "optimizers": ["ranger", "adamw", "radam"],
    "batch_size": 8,
    "seed": 0,
    "device": "auto",
    "steps": 4000,
    "checkpoint_every": 500,
    "evaluate_every": 200,
    "dtype": "float32",
    "weight_rounding": WEIGHT_ROUNDINGS[0],
    "state_dtype": "float32",
    "parallel": "none",
}
DTYPES = ("float32", "bfloat16", "float16")
PARALLEL = ("none", "ddp", "fsdp")

EVERY_OPTIMIZER = "*"  # the key of a learning rate that was given without a name

# Up to this width a second thread gains a fifth on an idle machine and loses much more on a busy
# one, where every small operation waits for both: a step of the default three took 27 ms with one
# thread and up to 275 with two, on two cores with a load of 2.
NARROW = 64

# Some ten thousand crash PyTorch. What any real machine has must pass here too: a run goes on with
# as many threads as it was started with, wherever that is.
MOST_THREADS = max(1024, 4 * (os.cpu_count() or 1))

# They say how long and how often, and leave every step as it is.
_MAY_CHANGE_ON_RESUME = {"steps", "checkpoint_every", "evaluate_every"}


@dataclass(frozen=True)
class Settings:
    """A complete description of a run: together with the text, it determines every weight."""

    model: str
    layers: int
    heads: int
    width: int
    context: int
    data: str
    max_bytes: int
    optimizers: list[str]
    lr: dict[str, float]
    batch_size: int
    seed: int
    device: str
    threads: int
    steps: int
    checkpoint_every: int
    evaluate_every: int
    # Of the model, and of what ranger_cuda's optimizers keep of it; runs of old have none.
    dtype: str = DEFAULTS["dtype"]
    weight_rounding: str = DEFAULTS["weight_rounding"]
    state_dtype: str = DEFAULTS["state_dtype"]
    parallel: str = DEFAULTS["parallel"]
    slices: int = 1  # of a batch, for the ranks to share

    @property
    def storage(self) -> dict[str, Any]:
        """The same, as arguments of ranger_cuda's optimizers."""
        state_dtype = getattr(torch, self.state_dtype, self.state_dtype)  # or "8bit"
        return {"weight_rounding": self.weight_rounding, "state_dtype": state_dtype}

    @property
    def shape(self) -> Shape:
        """The size of the model."""
        return Shape(self.layers, self.heads, self.width, self.context)


def resolve(given: Mapping[str, Any]) -> Settings:
    """Complete the flags that were given with the defaults, and check them."""
    chosen = DEFAULTS | _normal(given)
    shape = SHAPES[chosen["model"]]._asdict()
    chosen |= {key: chosen.get(key, value) for key, value in shape.items()}
    chosen["lr"] = _learning_rates(chosen["optimizers"], chosen.get("lr", {}))
    narrow = chosen["width"] <= NARROW
    chosen.setdefault("threads", 1 if narrow else torch.get_num_threads())
    if chosen["device"] == "auto":
        chosen["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen["parallel"] != "none":
        chosen.setdefault("slices", started_ranks() or 1)
    settings = Settings(**chosen)
    _check(settings)
    return settings


def resume(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """The settings of a saved run; flags need not be repeated, and may not contradict them."""
    settings = Settings(**saved)
    wanted = _normal(given)
    if wanted.get("device") == "auto":
        del wanted["device"]
    if "lr" in wanted:
        wanted["lr"] = settings.lr | _learning_rates(settings.optimizers, wanted["lr"], settings.lr)
    differences = [
        f"--{field.name.replace('_', '-')} is {_shown(wanted[field.name])}, "
        f"and was {_shown(getattr(settings, field.name))}"
        for field in fields(settings)
        if field.name in wanted
        and field.name not in _MAY_CHANGE_ON_RESUME
        and wanted[field.name] != getattr(settings, field.name)
    ]
    if differences:
        raise CommandError(
            "these settings differ from those of the saved run: "
            + "; ".join(differences)
            + ". Leave them out to go on as before, or start another run with another --out"
        )
    free = {key: wanted[key] for key in _MAY_CHANGE_ON_RESUME if key in wanted}
    settings = replace(settings, **free)
    _check(settings)
    return settings


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain values that a checkpoint and a JSON file can hold."""
    return asdict(settings)


def _normal(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags in the form in which they are saved."""
    known = {field.name for field in fields(Settings)}
    normal = {key: value for key, value in given.items() if key in known}
    if normal.get("data", corpus.STDLIB) != corpus.STDLIB:
        normal["data"] = os.path.abspath(normal["data"])  # a resume may start in another folder
    return normal


def _learning_rates(
    names: list[str], given: Mapping[str, float], defaults: Mapping[str, float] | None = None
) -> dict[str, float]:
    unused = sorted(set(given) - set(names) - {EVERY_OPTIMIZER})
    if unused:
        raise CommandError(
            f"--lr names {', '.join(unused)}, which this run does not train; it trains "
            + ", ".join(names)
        )
    if defaults is None:
        defaults = {name: OPTIMIZERS[name].lr for name in names}
    return {name: given.get(name, given.get(EVERY_OPTIMIZER, defaults[name])) for name in names}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={number:g}" for name, number in value.items())
    return str(value)


def _check(settings: Settings) -> None:
    if len(set(settings.optimizers)) != len(settings.optimizers):
        raise CommandError(
            f"--optimizers {' '.join(settings.optimizers)} has one of them twice; name each once"
        )
    if settings.width % settings.heads:
        raise CommandError(
            f"--width {settings.width} is no multiple of --heads {settings.heads}; "
            "every head needs the same number of channels"
        )
    if settings.threads > MOST_THREADS:
        raise CommandError(
            f"--threads {settings.threads} is far more than the {os.cpu_count()} CPUs here can "
            f"use; give no more than {MOST_THREADS}"
        )
    _check_ranks(settings, started_ranks())
    try:
        formats.of(getattr(torch, settings.dtype), **settings.storage)
    except ValueError as error:
        raise CommandError(f"--dtype {settings.dtype}: {error}") from error
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"device {settings.device} cannot be used here ({reason}); try --device cpu with "
            "another --out, or see: python -m ranger_cuda info"
        ) from error


def _check_ranks(settings: Settings, ranks: int | None) -> None:
    parallel, slices = settings.parallel, settings.slices
    if parallel == "none":
        if (ranks or 1) > 1:
            raise CommandError(
                f"torchrun started {ranks} processes, which would all train the same; add "
                "--parallel ddp or --parallel fsdp, or start one"
            )
        if slices > 1:
            raise CommandError("--slices is for ranks to share: give it with --parallel")
        return
    if ranks is None:
        raise CommandError(
            f"--parallel {parallel} is for processes that torchrun starts: torchrun "
            f"--nproc-per-node 2 -m ranger_cuda train --parallel {parallel}"
        )
    if slices & (slices - 1):
        raise CommandError(
            f"a batch in {slices} slices (--slices; the number of ranks where it is not given) "
            "cannot be added in pairs; give a power of two"
        )
    if slices % ranks:
        raise CommandError(
            f"{ranks} ranks cannot share the {slices} slices of a batch; start a number of ranks "
            f"that divides {slices}, or another run with more --slices"
        )
    if settings.batch_size % slices:
        raise CommandError(
            f"--batch-size {settings.batch_size} is no multiple of the {slices} slices that ranks "
            "share"
        )
