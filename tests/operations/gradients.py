"""Gradients of every layout, those that alias something, and those that go."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import operation
from .world import LARGE, Draw, Side

KINDS = ["laid out"] * 6 + ["expanded", "negated", "kept", "none", "zero", "strange", "conjugated"]


def new_gradient(draw: Draw, param: Tensor, *, conjugated: bool) -> Tensor | None:
    """A gradient of any kind for ``param``, lazily conjugated only if it may be."""
    kind = draw.choice(KINDS if conjugated else KINDS[:-1])
    if kind == "none":
        return None
    if kind == "kept" and fits(param):
        return param.grad
    if kind == "expanded" and param.dim():
        return draw.tensor(param.shape[-1:], param.dtype).expand(param.shape)
    if kind == "negated" and param.dtype in COMPLEX:
        return negated(draw, param)
    if kind == "conjugated" and param.is_complex():
        return draw.laid_out(draw.tensor(param.shape, param.dtype)).conj()
    values = draw.tensor(param.shape, param.dtype)
    if kind == "zero":
        return torch.zeros_like(values)
    if kind == "strange" and values.numel():
        odd = draw.choice([-0.0, 1e-45, -1e-40, 1e30, float("inf"), float("nan")])
        values.view(-1)[draw.randrange(values.numel())] = odd
    return draw.laid_out(values * 10.0 ** draw.choice([0, 0, 0, -3, 2]))


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def negated(draw: Draw, param: Tensor) -> Tensor:
    """As autograd has it: the imaginary parts of a lazy conjugate."""
    return draw.laid_out(draw.tensor(param.shape, COMPLEX[param.dtype])).conj().imag


def fits(param: Tensor) -> bool:
    grad = param.grad
    return grad is not None and grad.shape == param.shape and grad.dtype == param.dtype


def give_all(side: Side, draw: Draw) -> None:
    for param in side.grouped():
        param.grad = new_gradient(draw, param, conjugated=side.variant.is_ours)


def give_plain(side: Side, draw: Draw) -> None:
    """A gradient that moves it to every parameter."""
    for param in side.grouped():
        param.grad = draw.tensor(param.shape, param.dtype)


@operation(6)
def give_gradients(side: Side, draw: Draw) -> None:
    give_all(side, draw)


@operation(4)
def give_one_gradient(side: Side, draw: Draw) -> None:
    param = draw.choice(side.grouped())
    param.grad = new_gradient(draw, param, conjugated=side.variant.is_ours)


@operation()
def gradients_in_one_buffer(side: Side, draw: Draw) -> None:
    """As DDP has them, one behind the other."""
    for dtype in dict.fromkeys(p.dtype for p in side.grouped()):
        params = [p for p in side.grouped() if p.dtype == dtype]
        start = draw.randrange(4)
        buffer = draw.tensor([start + sum(p.numel() for p in params)], dtype)
        for param in params:
            param.grad = buffer[start : start + param.numel()].view(param.shape)
            start += param.numel()


@operation()
def change_gradients_in_place(side: Side, draw: Draw) -> None:
    for param in side.grouped():
        grad = param.grad
        if grad is not None and 0 not in grad.stride():
            grad.mul_(draw.choice([-1, 0.5, 3])).add_(draw.choice([0, 0.25]))


@operation()
def zero_grad(side: Side, draw: Draw) -> None:
    if draw.random() < 0.5:
        side.optimizer.zero_grad()
        return
    for param in side.grouped():  # which could not be zeroed
        if param.grad is not None and 0 in param.grad.stride():
            param.grad = None
    side.optimizer.zero_grad(set_to_none=False)


@operation(5)
def gradient_is_its_parameter(side: Side, draw: Draw) -> None:
    """Or its transpose, or lies beside it: an element's gradient is another's value."""
    param = draw.choice(side.grouped())
    kind = draw.choice(["same", "transposed", "shifted"])
    if kind == "shifted":
        room = draw.tensor([param.numel() + 1], param.dtype)
        param.data = room[1:].view(param.shape).copy_(param.detach())
        param.grad = room[:-1].view(param.shape)
        return
    own = param.detach()
    is_square = own.dim() == 2 and own.shape[0] == own.shape[1]
    param.grad = own.mT if is_square and kind == "transposed" else own


@operation(5)
def gradient_is_another_parameter(side: Side, draw: Draw) -> bool:
    return alias(side, draw, [p.detach() for p in side.grouped()])


@operation()
def gradient_is_another_gradient(side: Side, draw: Draw) -> bool:
    return alias(side, draw, [p.grad for p in side.grouped() if p.grad is not None])


@operation(4)
def gradient_is_state(side: Side, draw: Draw) -> bool:
    here = [(name, value) for _, name, value in side.states() if not side.variant.is_apart(name)]
    return alias(side, draw, [value for name, value in here if "step" not in name])


def alias(side: Side, draw: Draw, others: list[Tensor]) -> bool:
    """A gradient that lies where one of ``others`` does, or in a part of it."""
    pairs = [
        (param, other)
        for param in side.grouped()
        for other in others
        if param.dtype == other.dtype and param.numel() <= other.numel() and param.numel()
    ]
    if not pairs:
        return False
    large = [pair for pair in pairs if pair[0].numel() == LARGE.numel()]
    param, other = draw.choice(large if large and draw.random() < 0.5 else pairs)
    if other.shape == param.shape:
        param.grad = other
    elif other.is_contiguous():
        start = draw.randrange(other.numel() - param.numel() + 1)
        param.grad = other.view(-1)[start : start + param.numel()].view(param.shape)
    else:
        return False
    return True
