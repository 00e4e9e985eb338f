"""The optimizers that the experiments compare, by the names that the figures print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import ranger_cuda

from . import Job, Results

Contestant = dict[str, Any]
"""``name`` and ``lr``; optionally ``warmup`` (steps in which the learning rate rises linearly),
``cosine`` (whether it then falls to 0 with the last step), ``dtype`` (the parameters'), and
arguments of the optimizer."""


def _adam(params: Iterable[Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


def _radam(params: Iterable[Parameter], lr: float, **options: Any) -> Optimizer:
    return ranger_cuda.RAdam(params, lr=lr, decoupled_weight_decay=True, **options)


def _ranger(params: Iterable[Parameter], lr: float, state_dtype: str, **options: Any) -> Optimizer:
    dtype = state_dtype if state_dtype == "8bit" else getattr(torch, state_dtype)
    return ranger_cuda.Ranger(params, lr=lr, state_dtype=dtype, **options)


def _sgd(params: Iterable[Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True)


def _lookahead_adam(
    params: Iterable[Parameter], lr: float, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    return ranger_cuda.Lookahead(_adam(params, lr, weight_decay), **options)


def _lookahead_sgd(params: Iterable[Parameter], lr: float, k: int, alpha: float) -> Optimizer:
    return ranger_cuda.Lookahead(_sgd(params, lr), k=k, alpha=alpha)


SGD = 10  # times the learning rates of the others, which scale a gradient of norm 1


class Style(NamedTuple):
    """How to build a contestant, and its colour in every figure (Okabe and Ito's palette)."""

    build: Callable[..., Optimizer]
    colour: str
    line: str = "-"


STYLES = {
    "Ranger": Style(ranger_cuda.Ranger, "#D55E00"),
    "Ranger, cosine": Style(ranger_cuda.Ranger, "#D55E00", "--"),
    "Ranger, outer momentum": Style(ranger_cuda.Ranger, "#E69F00"),
    "RAdam": Style(_radam, "#009E73"),
    "Adam": Style(_adam, "#0072B2"),
    "Adam, warmup": Style(_adam, "#56B4E9"),
    "AdamW": Style(_adam, "#0072B2"),
    "AdamW, warmup + cosine": Style(_adam, "#0072B2", "--"),
    "Lookahead(AdamW)": Style(_lookahead_adam, "#CC79A7"),
    "Lookahead(AdamW), outer momentum": Style(_lookahead_adam, "#CC79A7"),
    "Lookahead(SGD)": Style(_lookahead_sgd, "#E69F00"),
    "SGD": Style(_sgd, "#E69F00"),
    "float32": Style(_ranger, "#000000"),
    "float32, 8-bit moments": Style(_ranger, "#000000", "--"),
    "exact": Style(_ranger, "#0072B2"),
    "exact, bfloat16 moments": Style(_ranger, "#0072B2", ":"),
    "exact, 8-bit moments": Style(_ranger, "#0072B2", "--"),
    "stochastic24": Style(_ranger, "#009E73"),
    "stochastic24, 8-bit moments": Style(_ranger, "#009E73", "--"),
    "stochastic": Style(_ranger, "#E69F00"),
    "stochastic, 8-bit moments": Style(_ranger, "#E69F00", "--"),
    "nearest": Style(_ranger, "#CC79A7"),
}


def tuned(sweep: list[Job], results: Results) -> list[Contestant] | None:
    """Each contestant with the learning rate, and whatever else the sweep varies, of its lowest
    mean loss there.

    None before all of the sweep is among the results.
    """
    done = [(job, result) for job, result in results if job in sweep]
    if len(done) < len(sweep):
        return None
    best = []
    for i in range(len(sweep[0]["contestants"])):
        losses: dict[str, list[float]] = {}
        for job, result in done:
            final = result["curves"][i]["validation_loss"][-1]
            losses.setdefault(json.dumps(job["contestants"][i]), []).append(
                math.inf if final is None else final
            )
        best.append(json.loads(min(losses, key=lambda setting: fmean(losses[setting]))))
    return best


def build(
    contestant: Contestant, params: Iterable[Parameter], steps: int
) -> tuple[Optimizer, LambdaLR]:
    """The optimizer, and its schedule over ``steps`` steps."""
    options = {name: value for name, value in contestant.items() if name != "dtype"}
    warmup = options.pop("warmup", 0)
    cosine = options.pop("cosine", False)
    optimizer = STYLES[options.pop("name")].build(params, **options)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(steps - warmup, 1)
        return (1 + math.cos(math.pi * progress)) / 2 if cosine else 1.0

    return optimizer, LambdaLR(optimizer, factor)
