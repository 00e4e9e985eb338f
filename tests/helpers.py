"""Shared by the tests: awkward parameters and gradients, and comparison by bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as integers, with every NaN the same (its payload is no promise)."""
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor[tensor.isnan()] = float("nan")
    return tensor.view(INTEGER[tensor.element_size()])


def assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert a.dtype == b.dtype, what
    assert a.shape == b.shape, what
    if "residual" in what and a.dtype == torch.bfloat16:  # no number: each bit counts
        a, b = a.view(torch.int16), b.view(torch.int16)
    assert torch.equal(bits(a), bits(b)), f"{what}: {a} != {b}"


def assert_same(
    first: Optimizer, second: Optimizer, a: Sequence[Tensor], b: Sequence[Tensor], when: object
) -> None:
    """Every parameter and every state tensor of two optimizers, bit for bit."""
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(p, q, f"{when}, parameter {i}")
        assert first.state[p].keys() == second.state[q].keys(), f"{when}, parameter {i}"
        for name, value in first.state[p].items():
            assert_same_bits(value, second.state[q][name], f"{when}, {name} of parameter {i}")


def twins(
    tensors: Iterable[Tensor], move: Callable[[Tensor], Tensor] = lambda t: t
) -> tuple[list[Parameter], list[Parameter]]:
    """Two sets of parameters with the same values and strides, in memory of their own, the first
    moved to where the test wants it."""
    pairs = [(Parameter(move(twin(t))), Parameter(twin(t))) for t in tensors]
    return [a for a, _ in pairs], [b for _, b in pairs]


def twin(tensor: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.zeros(max(span, 1) if tensor.numel() else 0, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def give_gradients(
    gradients: Iterable[Tensor | None],
    *sets: Sequence[Tensor],
    move: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:
    """The same gradients to each set of parameters; to the first moved, as in :func:`twins`."""
    for i, gradient in enumerate(gradients):
        for which, params in enumerate(sets):
            moved = gradient if gradient is None or which else move(gradient)
            params[i].grad = moved


def resizable_storage(tensor: Tensor) -> torch.UntypedStorage:
    """The storage of a tensor, one of its own that torch can resize: not one that processes share,
    or that NumPy has looked at."""
    if tensor.is_shared() or not tensor.untyped_storage().resizable():
        tensor.data = tensor.data.clone()
    return tensor.untyped_storage()


def adamw_checkpoint(count: int, *shape: int) -> dict[str, Any]:
    """What torch's AdamW saves after a step of so many parameters."""
    params = [Parameter(torch.ones(shape)) for _ in range(count)]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones(shape)
    optimizer.step()
    return optimizer.state_dict()


def with_gradients(*tensors):
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def parameters(seed=0):
    """One of every kind, the last of which is never stepped."""
    torch.manual_seed(seed)
    values = torch.tensor([1.5, -0.0, float("nan"), float("inf"), 1e-45, 3.0])
    tensors = [
        values,
        values.double(),
        values.bfloat16(),
        values.half(),
        torch.complex(values, values.flip(0)),
        torch.randn(4, 6)[:, ::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(5),
    ]
    return [Parameter(t) for t in tensors]
