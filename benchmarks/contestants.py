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


# What a float32 step has to move for a parameter: p, m, v read and written, g read; in one of
# Lookahead's six steps also the slow weight, read and written.
ADAM_BYTES = 28.0
RANGER_BYTES = (5 * 28 + 36) / 6


class Contestant(NamedTuple):
    """A row of the table."""

    name: str
    build: Callable[[list[Parameter]], Optimizer]
    package: str = "torch"  # what pip calls it
    compiled: bool = False  # wrap step() in torch.compile
    bytes_per_parameter: float | None = ADAM_BYTES  # None: its state is not float32
    device: str | None = None  # the only type of device to measure it on
    turn: int = 0  # on a GPU, of the runs over all workloads: what matters less comes later


def _optimi(params: list[Parameter]) -> Optimizer:
    import optimi

    return optimi.Ranger(params, lr=1e-3)  # on a GPU: Triton


def _optimi_foreach(params: list[Parameter]) -> Optimizer:
    import optimi

    return optimi.Ranger(params, lr=1e-3, foreach=True)


def _flashoptim(quantize: bool) -> Callable[[list[Parameter]], Optimizer]:
    def build(params: list[Parameter]) -> Optimizer:
        import flashoptim

        return flashoptim.FlashAdamW(params, lr=1e-3, quantize=quantize, master_weight_bits=None)

    return build


def _pytorch_optimizer(params: list[Parameter]) -> Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.Ranger(params, lr=1e-3)


def _timm(params: list[Parameter]) -> Optimizer:
    from timm.optim import Lookahead, RAdamLegacy

    return Lookahead(RAdamLegacy(params, lr=1e-3), alpha=0.5, k=6)


# Ours with the backend by name: a kernel that is missing is an error, not a slow row.
CONTESTANTS = [
    Contestant(
        "ranger",
        lambda p: ranger_cuda.Ranger(p, lr=1e-3, backend=p[0].device.type),
        "ranger_cuda",
        bytes_per_parameter=RANGER_BYTES,
    ),
    Contestant(
        "radam",
        lambda p: ranger_cuda.RAdam(p, lr=1e-3, backend=p[0].device.type),
        "ranger_cuda",
    ),
    Contestant(
        "ranger triton",
        lambda p: ranger_cuda.Ranger(p, lr=1e-3, backend="triton"),
        "ranger_cuda",
        bytes_per_parameter=RANGER_BYTES,
        device="cuda",
    ),
    Contestant("torch AdamW fused", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
    Contestant(
        "torch AdamW foreach", lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), turn=1
    ),
    Contestant(
        "torch RAdam foreach", lambda p: torch.optim.RAdam(p, lr=1e-3, foreach=True), turn=1
    ),
    Contestant(
        "torch RAdam compiled",
        # The learning rate as a tensor, and capturable where it works: without, it recompiles.
        lambda p: torch.optim.RAdam(
            p, lr=torch.tensor(1e-3), foreach=True, capturable=p[0].device.type == "cuda"
        ),
        compiled=True,
        turn=2,
    ),
    Contestant("optimi Ranger", _optimi, "torch-optimi", bytes_per_parameter=RANGER_BYTES),
    Contestant(
        "optimi Ranger foreach",
        _optimi_foreach,
        "torch-optimi",
        bytes_per_parameter=RANGER_BYTES,
        device="cuda",
        turn=1,
    ),
    Contestant("flashoptim AdamW float32", _flashoptim(False), "flashoptim", device="cuda"),
    Contestant(
        "flashoptim AdamW 8-bit",
        _flashoptim(True),
        "flashoptim",
        bytes_per_parameter=None,
        device="cuda",
    ),
    Contestant(
        "pytorch-optimizer Ranger",
        _pytorch_optimizer,
        "pytorch-optimizer",
        bytes_per_parameter=RANGER_BYTES,
        turn=1,
    ),
    Contestant(
        "timm Lookahead(RAdam)", _timm, "timm", bytes_per_parameter=RANGER_BYTES, device="cpu"
    ),
]


def contestants_on(device: torch.device) -> list[Contestant]:
    """Those that are measured on ``device``."""
    return [c for c in CONTESTANTS if c.device in (None, device.type)]


def step_of(contestant: Contestant, optimizer: Optimizer) -> Step:
    """What a training loop would call."""
    return torch.compile(optimizer.step) if contestant.compiled else optimizer.step
