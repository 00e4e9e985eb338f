"""The readable spec: plain PyTorch, one parameter at a time, on any device and dtype.

Every other backend returns the bits of this one. Only ``+ - * /`` and the square root, each
correctly rounded and in this order; no ``lerp``, ``addcmul``, ``addcdiv`` or ``alpha=``, which
may fuse two roundings into one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..state.formats import Format
from ..state.hyperparameters import Hyperparameters
from ..state.tensors import plain
from .schedule import Coefficients, coefficients, rounded


class Row(NamedTuple):
    """One parameter that moves in this step."""

    param: Tensor
    grad: Tensor | None  # plain and real: see tensors.plain_grad; None if the rule reads none
    state: dict[str, Any]
    group: int
    format: Format

    def tensors(self) -> list[Tensor]:
        """All memory that a step of this parameter reads or writes."""
        state = [plain(value) for value in self.state.values() if torch.is_tensor(value)]
        return [plain(self.param), *state, *([] if self.grad is None else [self.grad])]


@torch.no_grad()
def radam_step(
    rows: Sequence[Row], hypers: Sequence[Hyperparameters], grad_scales: Sequence[float]
) -> None:
    """One RAdam step with Lookahead fused in.

    Args:
        rows: the parameters that have a gradient. Their states are updated in place.
        hypers: the hyperparameters of each group.
        grad_scales: for each group, what its gradients are multiplied by.
    """
    memo: dict[Any, Coefficients] = {}
    for row in rows:
        assert row.grad is not None
        t = int(row.state["step"]) + 1
        format = row.format
        dtype = format.value
        key = (row.group, t, dtype)
        if key not in memo:
            memo[key] = coefficients(hypers[row.group], t, grad_scales[row.group], dtype)
        c = memo[key]

        state = {name: plain(value) for name, value in row.state.items() if torch.is_tensor(value)}
        param = plain(row.param)
        p = format.param.decode(param, state, dtype)
        m = format.exp_avg.decode(state["exp_avg"], state, dtype)
        v = format.exp_avg_sq.decode(state["exp_avg_sq"], state, dtype)
        p, m, v = radam(p, row.grad.to(dtype), m, v, c)
        if c.sync:
            slow = format.slow_param.decode(state["slow_param"], state, dtype)
            p = lookahead(p, slow, c.alpha)
            format.slow_param.encode(p, state["slow_param"], state)
        format.param.encode(p, param, state)
        format.exp_avg.encode(m, state["exp_avg"], state)
        format.exp_avg_sq.encode(v, state["exp_avg_sq"], state)
        row.state["step"].fill_(t)


def radam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """The RAdam update of one parameter (Algorithm 2 of the paper, lines 5 to 13).

    Args:
        p, g, m, v: parameter, gradient, ``exp_avg`` and ``exp_avg_sq``; none is written.
    Returns:
        the new parameter, ``exp_avg`` and ``exp_avg_sq``.
    """
    g = g * c.grad_scale
    if c.weight_decay != 0.0:
        g = g + c.weight_decay * p
    m = c.beta1 * m + c.one_minus_beta1 * g
    v = c.beta2 * v + c.one_minus_beta2 * (g * g)
    u = m / (sqrt(v) + c.eps) if c.rectified else m
    return p * c.decay - c.step_size * u, m, v


def lookahead(p: Tensor, slow: Tensor, alpha: float) -> Tensor:
    """The Lookahead interpolation (Algorithm 1 of the paper, last line of the outer loop).

    Returns the new slow weight, which both go on from. ``alpha = 1`` takes ``p`` itself, which
    ``slow + (p - slow)`` may miss by a rounding.
    """
    return p if alpha == 1.0 else slow + alpha * (p - slow)


def sqrt(v: Tensor) -> Tensor:
    """Correctly rounded square root. ``torch.sqrt`` on the CPU is not; NumPy's is."""
    if v.device.type != "cpu" or is_traceable_wrapper_subclass(v):  # NumPy sees no wrapper's memory
        return torch.sqrt(v)
    array = v.detach().numpy()
    return torch.from_numpy(np.sqrt(array, out=np.empty_like(array)))


@torch.no_grad()
def lookahead_step(
    rows: Sequence[Row], hypers: Sequence[Hyperparameters], grad_scales: Sequence[float]
) -> None:
    """Lookahead after another optimizer's step: every ``k`` steps, pull and go on from there."""
    for row in rows:
        t = int(row.state["lookahead_step"]) + 1
        if t % hypers[row.group].k == 0:
            format, dtype = row.format, row.format.value
            state = {
                part.name: plain(row.state[part.name]) for part in format.parts(("slow_param",))
            }
            param, slow = plain(row.param), state["slow_param"]
            alpha = rounded([hypers[row.group].alpha], dtype)[0]
            p = format.param.decode(param, state, dtype)
            p = lookahead(p, format.slow_param.decode(slow, state, dtype), alpha)
            format.slow_param.encode(p, slow, state)
            format.param.encode(p, param, state)
        row.state["lookahead_step"].fill_(t)


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the context each parameter holds its slow weight; afterwards its own bits again.

    Args:
        pairs: parameters and their slow weights, of the same shape. Where the dtypes agree, the
            two change places, one tensor's worth of extra memory at a time; a low-precision
            parameter is set aside and gets its slow weight rounded to nearest.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for param, slow in pairs:
            p, s = plain(param), plain(slow)
            aside = s if p.dtype == s.dtype else p.clone()
            if aside is not s:
                p.copy_(s)
            else:
                exchange(p, s)
            undo.append((p, aside))
        yield
    finally:
        for p, aside in reversed(undo):
            exchange(p, aside)


@torch.no_grad()
def exchange(a: Tensor, b: Tensor) -> None:
    """Swap the values of two tensors of the same shape and dtype, in place."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
