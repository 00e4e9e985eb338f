"""The optimizers that ``train`` compares, each with the learning rate that suits it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import ranger_cuda

WEIGHT_DECAY = 0.01  # decoupled, the same for all (sgd has none)


class Choice(NamedTuple):
    """One name of ``--optimizers``."""

    what: str
    lr: float
    build: Callable[..., Optimizer]  # of the parameters, the rate, and Settings.storage if it takes
    takes_storage: bool = False


def _ranger(params: Iterable[nn.Parameter], lr: float, **storage: Any) -> Optimizer:
    return ranger_cuda.Ranger(params, lr=lr, weight_decay=WEIGHT_DECAY, **storage)


def _ranger_cuda_radam(params: Iterable[nn.Parameter], lr: float, **storage: Any) -> Optimizer:
    return ranger_cuda.RAdam(
        params, lr=lr, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True, **storage
    )


def _lookahead_adamw(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return ranger_cuda.Lookahead(_adamw(params, lr))


# The others get the fastest implementation that PyTorch has of them, or the times would say little.
def _adamw(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)


def _radam(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.RAdam(
        params, lr=lr, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True, foreach=True
    )


def _sgd(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True)


# The learning rates: the best of a sweep by factors of 2 (sgd: of 3), by the validation loss on the
# weights that are trained (not the slow ones), after the default 4,000 steps of the default model;
# the mean of seeds 1 and 2, so that the default seed 0 had no say. No schedule, no warmup, no
# clipping. Python 3.11.7's standard library, torch 2.13.
#
#                    5e-4   1e-3   2e-3   4e-3   8e-3   1.6e-2
#   ranger                         1.727  1.698  1.709  1.713
#   radam                   1.746  1.715  1.731  1.739
#   fused-radam                    1.717                        (at radam's only)
#   adamw            1.753  1.684  1.694  1.800  2.075
#   lookahead-adamw                1.713  1.681  1.868
#   sgd              0.03: 1.857   0.1: 1.866   0.3: 2.324   1: diverges
OPTIMIZERS = {
    "ranger": Choice("ranger_cuda.Ranger", 4e-3, _ranger, takes_storage=True),
    "fused-radam": Choice("ranger_cuda.RAdam", 2e-3, _ranger_cuda_radam, takes_storage=True),
    "lookahead-adamw": Choice("ranger_cuda.Lookahead around AdamW", 4e-3, _lookahead_adamw),
    "adamw": Choice("torch.optim.AdamW(fused=True)", 1e-3, _adamw),
    "radam": Choice("torch.optim.RAdam(foreach=True)", 2e-3, _radam),
    "sgd": Choice("torch.optim.SGD(momentum=0.9, fused=True)", 0.03, _sgd),
}
