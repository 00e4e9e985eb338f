"""Who is measured. Peers are imported when they are built, so that a missing one costs its own rows
only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter, ParameterList

from .clocks import Step, capture
from .machine import installed

Build = Callable[[list[Parameter]], Step]

OURS = "ranger"
TRITON = "ranger triton"
ADAMW = "torch AdamW fused"
LOW, LOWEST = "ranger, bf16 exact", "ranger, bf16 stochastic, 8-bit"
PURE = "torch AdamW fused, pure bf16"
OUR_PACKAGE = "ranger_cuda"

# What a float32 step has to move for a parameter: p, m, v read and written, g read; in one of
# Lookahead's six steps also the slow weight, read and written.
ADAM_BYTES = 28.0
RANGER_BYTES = (5 * 28 + 36) / 6
MOST_TENSORS_TO_COMPILE = 100  # torch.compile takes over eight minutes for a step over 1,000
LEAST_TENSORS_TO_CAPTURE = 1000  # where launches cost more than memory


class Contestant(NamedTuple):
    """A row of the table."""

    name: str
    package: str  # what pip calls it
    build: Build  # what a training loop would call
    bytes_per_parameter: float | None = ADAM_BYTES  # None: has no fixed number
    turn: int = 0  # of the runs over all workloads: what matters less comes later
    device: str | None = None  # the only type of device to measure it on
    compiled: bool = False  # by torch.compile, in the first steps
    captured: bool = False  # a CUDA graph, of the gradients that it was given first
    dtype: torch.dtype = torch.float32  # of parameters and gradients

    def obstacle(self, device: torch.device, tensors: int) -> str | None:
        """Why it cannot step so many tensors there; None: it can, as far as is known."""
        if self.device not in (None, device.type):
            return f"measured on {self.device} only"
        if self.captured and tensors < LEAST_TENSORS_TO_CAPTURE:
            return f"captured from {LEAST_TENSORS_TO_CAPTURE} tensors on"
        if self.compiled and tensors > MOST_TENSORS_TO_COMPILE:
            return f"compiling a step over more than {MOST_TENSORS_TO_COMPILE} tensors takes long"
        if self.package != OUR_PACKAGE and installed(self.package) is None:
            return f"not installed (pip install --no-deps {self.package})"
        return None


def of(module: str, kind: str, **options: Any) -> Build:
    """An optimizer of a package."""

    def build(params: list[Parameter]) -> Step:
        return getattr(importlib.import_module(module), kind)(params, lr=1e-3, **options).step

    return build


def ours(kind: str, backend: str | None = None, **options: Any) -> Build:
    """With the backend by name: a kernel that is missing is an error, not a slow row."""

    def build(params: list[Parameter]) -> Step:
        where = backend or params[0].device.type
        return of("ranger_cuda", kind, backend=where, **options)(params)

    return build


def graph(build: Build) -> Build:
    """A step captured and replayed: nothing of Python, little of the driver."""

    def captured(params: list[Parameter]) -> Step:
        step = build(params)
        replay = capture(step, params[0].device).replay
        return lambda owner=step: replay()  # whose state is the graph's, too

    return captured


def _compiled_radam(params: list[Parameter]) -> Step:
    # The learning rate as a tensor, and capturable where it works: without, it recompiles.
    capturable = params[0].device.type == "cuda"
    lr = torch.tensor(1e-3)
    return torch.compile(torch.optim.RAdam(params, lr, foreach=True, capturable=capturable).step)


def _bfloat16_moments(params: list[Parameter]) -> Step:
    """torch takes the dtype of the state that it finds; there is no option for it."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    for param in params:
        state = {"step": torch.zeros((), device=param.device)}
        state |= {key: param.detach().bfloat16().zero_() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = state
    return optimizer.step


def _compiled_ranger(params: list[Parameter]) -> Step:
    from pytorch_optimizer import create_optimizer

    model = ParameterList(params)
    return create_optimizer(model, "ranger", lr=1e-3, compile=True, use_gc=False).step


def _timm(params: list[Parameter]) -> Step:
    from timm.optim import Lookahead, RAdamLegacy

    return Lookahead(RAdamLegacy(params, lr=1e-3), alpha=0.5, k=6).step


ADAMW_FUSED = of("torch.optim", "AdamW", fused=True)
ADAMW_CAPTURED = graph(of("torch.optim", "AdamW", fused=True, capturable=True))
RANGER, TRITON_RANGER = ours("Ranger"), ours("Ranger", "triton")
# Without gradient centralization, which is an algorithm of its own. Foreach is its default.
PYTORCH_OPTIMIZER = functools.partial(of, "pytorch_optimizer", "Ranger", use_gc=False)
OPTIMI = functools.partial(of, "optimi", "Ranger")  # on a GPU by default Triton
FLASH = functools.partial(of, "flashoptim", "FlashAdamW", master_weight_bits=None)

_ranger = functools.partial(Contestant, bytes_per_parameter=RANGER_BYTES)
GRAPH: dict[str, Any] = {"device": "cuda", "captured": True}
_POZ = "pytorch-optimizer"
CONTESTANTS = [
    _ranger(OURS, OUR_PACKAGE, RANGER),
    Contestant("radam", OUR_PACKAGE, ours("RAdam")),
    _ranger(TRITON, OUR_PACKAGE, TRITON_RANGER, device="cuda"),
    Contestant(ADAMW, "torch", ADAMW_FUSED),
    _ranger("ranger, CUDA graph", OUR_PACKAGE, graph(RANGER), **GRAPH),
    _ranger("ranger triton, CUDA graph", OUR_PACKAGE, graph(TRITON_RANGER), **GRAPH),
    Contestant("torch AdamW fused, CUDA graph", "torch", ADAMW_CAPTURED, **GRAPH),
    Contestant("torch AdamW fused, bf16 moments", "torch", _bfloat16_moments, 20.0, 1, "cuda"),
    Contestant(PURE, "torch", ADAMW_FUSED, 14.0, 1, dtype=torch.bfloat16),
    Contestant(LOW, OUR_PACKAGE, ours("Ranger"), 26 + 8 / 6, turn=1, dtype=torch.bfloat16),
    Contestant(
        LOWEST,
        OUR_PACKAGE,
        ours("Ranger", weight_rounding="stochastic", state_dtype="8bit"),
        10 + 2 / 16 + 4 / 6,
        turn=1,
        dtype=torch.bfloat16,
    ),
    Contestant("torch AdamW foreach", "torch", of("torch.optim", "AdamW", foreach=True), turn=1),
    Contestant("torch RAdam foreach", "torch", of("torch.optim", "RAdam", foreach=True), turn=1),
    Contestant("torch RAdam compiled", "torch", _compiled_radam, turn=2, compiled=True),
    _ranger("optimi Ranger", "torch-optimi", OPTIMI()),
    _ranger("optimi Ranger foreach", "torch-optimi", OPTIMI(foreach=True), turn=1, device="cuda"),
    Contestant("flashoptim AdamW float32", "flashoptim", FLASH(quantize=False), device="cuda"),
    Contestant("flashoptim AdamW 8-bit", "flashoptim", FLASH(quantize=True), None, device="cuda"),
    _ranger("pytorch-optimizer Ranger", _POZ, PYTORCH_OPTIMIZER(), turn=1),
    _ranger(
        "pytorch-optimizer Ranger loop",
        _POZ,
        PYTORCH_OPTIMIZER(foreach=False),
        turn=1,
        device="cpu",
    ),
    _ranger("pytorch-optimizer Ranger compiled", _POZ, _compiled_ranger, turn=2, compiled=True),
    _ranger("timm Lookahead(RAdam)", "timm", _timm, turn=1, device="cpu"),
]
PACKAGES = list(dict.fromkeys(contestant.package for contestant in CONTESTANTS))
