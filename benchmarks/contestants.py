"""Who is measured, each in its fastest form. Peers are imported when they are built, so that a
missing one costs its own rows only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import ranger_cuda

Step = Callable[[], object]


class Contestant(NamedTuple):
    """A row of the table."""

    name: str
    build: Callable[[list[Parameter]], Optimizer]
    package: str = "torch"  # what pip calls it
    compiled: bool = False  # wrap step() in torch.compile


def _optimi(params: list[Parameter]) -> Optimizer:
    import optimi

    return optimi.Ranger(params, lr=1e-3)


def _pytorch_optimizer(params: list[Parameter]) -> Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.Ranger(params, lr=1e-3)


def _timm(params: list[Parameter]) -> Optimizer:
    from timm.optim import Lookahead, RAdamLegacy

    return Lookahead(RAdamLegacy(params, lr=1e-3), alpha=0.5, k=6)


CONTESTANTS = [
    Contestant("ranger", lambda p: ranger_cuda.Ranger(p, lr=1e-3), "ranger_cuda"),
    Contestant("radam", lambda p: ranger_cuda.RAdam(p, lr=1e-3), "ranger_cuda"),
    Contestant("torch AdamW fused", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
    Contestant("torch AdamW foreach", lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)),
    Contestant("torch RAdam foreach", lambda p: torch.optim.RAdam(p, lr=1e-3, foreach=True)),
    Contestant(
        "torch RAdam compiled",
        # The learning rate as a tensor, and capturable where it works: without, it recompiles.
        lambda p: torch.optim.RAdam(
            p, lr=torch.tensor(1e-3), foreach=True, capturable=p[0].device.type == "cuda"
        ),
        compiled=True,
    ),
    Contestant("optimi Ranger", _optimi, "torch-optimi"),
    Contestant("pytorch-optimizer Ranger", _pytorch_optimizer, "pytorch-optimizer"),
    Contestant("timm Lookahead(RAdam)", _timm, "timm"),
]


def step_of(contestant: Contestant, optimizer: Optimizer) -> Step:
    """What a training loop would call."""
    return torch.compile(optimizer.step) if contestant.compiled else optimizer.step
