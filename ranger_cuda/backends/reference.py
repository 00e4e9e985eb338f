"""The readable spec: plain PyTorch, one parameter at a time, on any device and dtype.

Every other backend returns the bits of this one. Only ``+ - * /`` and the square root, each
correctly rounded and in this order; no ``lerp``, ``addcmul``, ``addcdiv`` or ``alpha=``, which
may fuse two roundings into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..state.codecs import GROUP, sqrt
from ..state.formats import Format
from ..state.hyperparameters import Hyperparameters
from ..state.random_bits import Bits, Keys, keys_of, random_bits
from ..state.tensors import plain
from .schedule import Coefficients, coefficients

# Elements at a time, a multiple of GROUP: memory for their values is all that a step needs.
PIECE = 8192 * GROUP
# Of the sum of a slice: csrc/rule/radam_lookahead.h.
LANES = 128


class Row(NamedTuple):
    """One parameter that moves in this step."""

    param: Tensor
    grad: Tensor | None  # plain and real: see tensors.plain_grad; None if the rule reads none
    state: dict[str, Any]
    group: int
    format: Format
    place: int = 0  # counted through the groups
    first: int = 0  # of its elements, in the whole parameter that it is a shard of
    centralized: bool = False  # whether its gradient is, before the step

    def tensors(self) -> list[Tensor]:
        """All memory that a step of this parameter reads or writes."""
        return [*self.streams().values()]

    def streams(self) -> dict[str, Tensor]:
        """The same, by name."""
        found = {n: plain(value) for n, value in self.state.items() if torch.is_tensor(value)}
        found["param"] = plain(self.param)
        return found if self.grad is None else {**found, "grad": self.grad}


def pieces(row: Row) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """A parameter and all that belongs to it, piece by piece: where a piece begins, and its
    elements in row-major order, one-dimensional. They are written in place."""
    parts = row.format.parts()
    names = {"param", "grad", *(part.name for part in parts)}
    streams = {name: tensor for name, tensor in row.streams().items() if name in names}
    count = streams["param"].numel()
    if count <= PIECE and not row.format.counts_elements:
        yield 0, streams
        return
    flat = {name: tensor.reshape(-1) for name, tensor in streams.items()}
    grouped = {part.name for part in parts if part.is_grouped}
    for begin in range(0, count, PIECE):
        end = min(begin + PIECE, count)
        yield (
            begin,
            {
                name: tensor[begin // GROUP : -(-end // GROUP)]
                if name in grouped
                else tensor[begin:end]
                for name, tensor in flat.items()
            },
        )
    for name, tensor in streams.items():
        if not tensor.is_contiguous() and name != "grad":  # reshape() has copied it
            tensor.copy_(flat[name].view_as(tensor))


def bits_of(row: Row, keys: Keys, begin: int, param: Tensor) -> Bits:
    """The random bits of a piece, where any are needed."""
    if not any(codec.is_random for codec in row.format.codecs()):
        return Bits()
    return random_bits(keys, row.first + begin, param.numel(), param.device)


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
        t = int(row.state["step"]) + 1
        format = row.format
        dtype = format.value
        if row.centralized and row.grad is not None and row.grad.numel():
            row = row._replace(grad=centralized(row.grad.to(dtype), plain(row.param), format))
        key = (row.group, t, dtype)
        if key not in memo:
            memo[key] = coefficients(hypers[row.group], t, grad_scales[row.group], dtype)
        c = memo[key]
        keys = keys_of(hypers[row.group].seed, row.place, t)
        for begin, piece in pieces(row):
            bits = bits_of(row, keys, begin, piece["param"])
            p = format.param.decode(piece["param"], piece, dtype)
            m = format.exp_avg.decode(piece["exp_avg"], piece, dtype)
            v = format.exp_avg_sq.decode(piece["exp_avg_sq"], piece, dtype)
            p, m, v = radam(p, piece["grad"].to(dtype), m, v, c)
            if c.sync:
                slow = format.slow_param.decode(piece["slow_param"], piece, dtype)
                p = pull(p, slow, piece, c, hypers[row.group])
            p = bounded(p, c)
            if c.sync:
                format.slow_param.encode(p, piece["slow_param"], piece, bits.param)
            format.param.encode(p, piece["param"], piece, bits.param)
            format.exp_avg.encode(m, piece["exp_avg"], piece, bits.exp_avg)
            format.exp_avg_sq.encode(v, piece["exp_avg_sq"], piece, bits.exp_avg_sq)
        row.state["step"].fill_(t)


def centralized(grad: Tensor, param: Tensor, format: Format) -> Tensor:
    """Gradient centralization (Yong et al., arXiv:2004.01461, equation (1)): the gradient less the
    mean of its slice along the first dimension.

    A slice's elements are taken in the order of the parameter's memory (row-major, where the format
    counts elements), LANES at a time, the rest of the last time being 0; then the upper half of the
    lanes is added to the lower, until one is left.
    """
    dims = list(range(1, grad.dim()))
    if not format.counts_elements:
        dims.sort(key=param.stride, reverse=True)
    slices = grad.permute(0, *dims).reshape(len(grad), -1)
    sums = slices.new_zeros(len(slices), LANES)
    for elements in slices.split(LANES, dim=1):
        sums[:, : elements.shape[1]] += elements
    while sums.shape[1] > 1:
        lower, upper = sums.chunk(2, dim=1)
        sums = lower + upper
    mean = sums / torch.full_like(sums, slices.shape[1])
    return grad - mean.view(-1, *[1] * len(dims))


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


def outer_step(p: Tensor, slow: Tensor, b: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Lookahead with momentum: SGD's step of the slow weight, whose gradient is the way back to it
    from the fast one (SNOO, arXiv:2510.15830, Algorithm 1; ``alpha`` is the outer learning rate).

    Returns the new slow weight, which both go on from, and the new ``outer_momentum_buffer``.
    """
    d = slow - p
    b = c.outer_momentum * b + d
    u = d + c.outer_momentum * b if c.outer_nesterov else b
    return slow - c.alpha * u, b


def pull(
    p: Tensor,
    slow: Tensor,
    piece: Mapping[str, Tensor],
    c: Coefficients,
    hyper: Hyperparameters,
) -> Tensor:
    """The new slow weight at a sync; its momentum, if it has one, is written."""
    if hyper.outer_momentum == 0.0:
        return lookahead(p, slow, c.alpha)
    p, b = outer_step(p, slow, piece["outer_momentum_buffer"], c)
    piece["outer_momentum_buffer"].copy_(b)
    return p


def bounded(p: Tensor, c: Coefficients) -> Tensor:
    """Where a group's bounds leave a parameter. A NaN stays one, as in ``torch.clamp``, and -0 at a
    bound of 0, as there it may not."""
    if c.low == -math.inf and c.high == math.inf:
        return p
    return torch.where(p < c.low, c.low, torch.where(p > c.high, c.high, p))


@torch.no_grad()
def lookahead_step(
    rows: Sequence[Row], hypers: Sequence[Hyperparameters], grad_scales: Sequence[float]
) -> None:
    """Lookahead after another optimizer's step: every ``k`` steps, pull and go on from there."""
    for row in rows:
        t = int(row.state["lookahead_step"]) + 1
        hyper = hypers[row.group]
        if t % hyper.k == 0:
            format, dtype = row.format, row.format.value
            c = coefficients(hyper, t, 1.0, dtype)
            keys = keys_of(hyper.seed, row.place, t, pull=True)
            for begin, piece in pieces(row):
                bits = bits_of(row, keys, begin, piece["param"])
                p = format.param.decode(piece["param"], piece, dtype)
                slow = format.slow_param.decode(piece["slow_param"], piece, dtype)
                p = pull(p, slow, piece, c, hyper)
                format.slow_param.encode(p, piece["slow_param"], piece, bits.param)
                format.param.encode(p, piece["param"], piece, bits.param)
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
