"""float32 master values of low-precision parameters.

``"exact"``: a bfloat16 parameter keeps the rest of its float32 master in an int16 state,
``residual``; a float16 parameter keeps the whole master, ``master``. ``"nearest"``: the
parameter is all there is, as in plain PyTorch.

The bfloat16 half is the master rounded to nearest with ties away from zero, not to even:
only then does every remainder fit a signed 16-bit integer.

A parameter that others write to between steps (weights loaded late, a mask, a clamp) counts as it
is then; what was kept of its old value at most moves it within its own rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Name and dtype of the state that completes a parameter.
MASTERS = {torch.bfloat16: ("residual", torch.int16), torch.float16: ("master", torch.float32)}
LOW_PRECISION = tuple(MASTERS)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the moments for parameters of ``dtype``."""
    dtype = dtype.to_real() if dtype.is_complex else dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def master_state(dtype: torch.dtype, weight_rounding: str) -> tuple[str, torch.dtype] | None:
    """Name and dtype of the state that completes a parameter of ``dtype``; None if none does."""
    return MASTERS.get(dtype) if weight_rounding == "exact" else None


def new_master_state(param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The state that completes ``param`` as it is now; see :func:`master_state`."""
    if name == "master":
        return param.detach().to(dtype, memory_format=torch.preserve_format, copy=True)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def load(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The value that the arithmetic works on; a new tensor if ``param`` is low precision."""
    if param.dtype not in LOW_PRECISION:
        return param
    value = param.float()
    if param.dtype == torch.float16 and "master" in state:
        master = state["master"]
        return torch.where(master.to(param.dtype) == param, master, value)
    if param.dtype == torch.bfloat16 and "residual" in state:
        residual = state["residual"]
        # Nothing is nearer to 0 than 0, or beyond infinity: such a residual is of a value gone.
        residual = torch.where(value == 0.0, residual.clamp(min=0), residual)
        residual = torch.where(value.isinf(), residual.clamp(max=0), residual)
        value = (value.view(torch.int32) + residual).view(torch.float32)
    return value


def store(value: Tensor, param: Tensor, state: dict[str, Any]) -> None:
    """Round ``value`` into ``param`` and keep what rounding took, where there is a state for it."""
    if param.dtype == torch.bfloat16 and "residual" in state:
        bits = value.view(torch.int32)
        high = (bits + 0x8000) & ~0xFFFF
        nan = value.isnan()
        param.copy_(torch.where(nan, value, high.view(torch.float32)))
        state["residual"].copy_(torch.where(nan, 0, bits - high))
        return
    if param.dtype == torch.float16 and "master" in state:
        state["master"].copy_(value)
    param.copy_(value)
