"""How parameters and their state are stored: one table. New state, the checks of a step and of a
checkpoint, the reference, the kernels' launchers and ``info`` all read it.

A format has a codec for each stream (the parameter, its moments, its slow weight) around a rule
that sees float32 or float64 values only. ``csrc/formats/formats.h`` has the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .codecs import (
    Codec,
    GroupedRoot,
    GroupedSigned,
    Master,
    Part,
    Split,
    Split24,
    StochasticBFloat16,
    StochasticFloat16,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
STREAMS = (*MOMENTS, "slow_param", "outer_momentum_buffer")

StateDType = torch.dtype | Literal["8bit"]
# Parameters of fewer elements keep float32 moments: there is nothing to save.
LEAST_FOR_8_BIT = 4096


class Format(NamedTuple):
    """A row of the table.

    Attributes:
        name: as ``csrc/formats/formats.h`` has it.
        value: the dtype of the arithmetic.
        param, exp_avg, exp_avg_sq, slow_param: the codec of each stream.
        weight_rounding, state_dtype: what has to be asked for; None: anything.
    """

    name: str
    value: torch.dtype
    param: Codec
    exp_avg: Codec
    exp_avg_sq: Codec
    slow_param: Codec
    weight_rounding: str | None = None
    state_dtype: StateDType | None = None

    @property
    def outer_momentum_buffer(self) -> Codec:
        """That of the momentum of slow weights: numbers of the arithmetic's dtype."""
        return _F64 if self.value == torch.float64 else _F32

    def codecs(self) -> tuple[Codec, ...]:
        """Of all streams."""
        return (
            self.param,
            self.exp_avg,
            self.exp_avg_sq,
            self.slow_param,
            self.outer_momentum_buffer,
        )

    def parts(self, streams: Iterable[str | None] = STREAMS) -> list[Part]:
        """The state of a parameter: beside it, and of these streams."""
        return [*self.param.rest, *(part for s in filter(None, streams) for part in self.of(s))]

    def of(self, stream: str) -> list[Part]:
        """The state of a stream."""
        codec: Codec = getattr(self, stream)
        is_slow = stream == "slow_param"
        main = Part(stream, codec.dtype, starts_as_param=is_slow, is_bits=codec.is_grouped)
        return [main, *codec.rest]

    @property
    def counts_elements(self) -> bool:
        """Whether it matters where in its parameter an element is."""
        return any(codec.counts_elements for codec in self.codecs())


def _part(name: str, dtype: torch.dtype, is_grouped: bool = False) -> tuple[Part]:
    return (Part(name, dtype, is_bits=True, is_grouped=is_grouped),)


_F32, _F64, _BF16, _F16 = (
    Codec(name, dtype)
    for name, dtype in (
        ("Float32", torch.float32),
        ("Float64", torch.float64),
        ("BFloat16", torch.bfloat16),
        ("Float16", torch.float16),
    )
)
_RANDOM_BF16, _RANDOM_F16 = StochasticBFloat16(), StochasticFloat16()
_SLOW24 = replace(Split24(), rest=_part("slow_residual", torch.int8))
# Parameters, and how they are rounded: the codecs of the parameter and of its slow weight, which is
# a snapshot of it.
_PARAMETERS: tuple[tuple[str, Codec, Codec, str | None], ...] = (
    ("float32", _F32, _F32, None),
    ("bfloat16_exact", Split(), _F32, "exact"),
    ("bfloat16_stochastic24", Split24(), _SLOW24, "stochastic24"),
    ("bfloat16_stochastic", _RANDOM_BF16, _RANDOM_BF16, "stochastic"),
    ("bfloat16_nearest", _BF16, _F32, "nearest"),
    ("float16_exact", Master(), _F32, "exact"),
    ("float16_stochastic", _RANDOM_F16, _RANDOM_F16, "stochastic"),
    ("float16_nearest", _F16, _F32, "nearest"),
)
_STATES: tuple[tuple[str, Codec, Codec, StateDType], ...] = (
    ("", _F32, _F32, torch.float32),
    ("_bfloat16", _RANDOM_BF16, _RANDOM_BF16, torch.bfloat16),
    (
        "_8bit",
        GroupedSigned(rest=_part("exp_avg_scale", torch.uint8, is_grouped=True)),
        GroupedRoot(rest=_part("exp_avg_sq_scale", torch.uint8, is_grouped=True)),
        "8bit",
    ),
)
FORMATS = (
    *(
        Format(name + suffix, torch.float32, param, m, v, slow, rounding, state_dtype)
        for suffix, m, v, state_dtype in _STATES
        for name, param, slow, rounding in _PARAMETERS
    ),
    Format("float64", torch.float64, _F64, _F64, _F64, _F64),
)

# What may be asked for, the default first.
WEIGHT_ROUNDINGS = tuple(dict.fromkeys(f.weight_rounding for f in FORMATS if f.weight_rounding))
STATE_DTYPES = tuple(dict.fromkeys(f.state_dtype for f in FORMATS if f.state_dtype))
# Of gradients that kernels read as they are.
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every state that any format has, by name: one of each, where formats differ in its dtype.
PARTS = {part.name: part for format in reversed(FORMATS) for part in format.parts()}


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a complex number's parts; any other itself."""
    return dtype.to_real() if dtype.is_complex else dtype


def is_low(dtype: torch.dtype) -> bool:
    """Whether parameters of ``dtype`` are rounded from the arithmetic's values."""
    return dtype in (torch.bfloat16, torch.float16)


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for parameters of ``dtype``."""
    return torch.float64 if real(dtype) == torch.float64 else torch.float32


def dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of parameters that there are formats for."""
    found = dict.fromkeys(f.param.dtype for f in FORMATS)
    wide = [d for d in found if not is_low(d)]
    return (*wide, *(d.to_complex() for d in wide), *(d for d in found if is_low(d)))


def of(
    dtype: torch.dtype,
    weight_rounding: str = WEIGHT_ROUNDINGS[0],
    state_dtype: StateDType = STATE_DTYPES[0],
) -> Format:
    """The format of parameters of ``dtype`` that fits what was asked for.

    Raises:
        ValueError: there is none.
    """
    if dtype.is_complex:
        state_dtype = STATE_DTYPES[0]
    for format in FORMATS:
        if (
            format.param.dtype == real(dtype)
            and format.weight_rounding in (None, weight_rounding)
            and format.state_dtype in (None, state_dtype)
        ):
            return format
    raise ValueError(
        f"there is no format for parameters of {dtype} with weight_rounding={weight_rounding!r} "
        f"and state_dtype={state_dtype!r}; this version has parameters of "
        + ", ".join(str(known).removeprefix("torch.") for known in dtypes())
        + " ('stochastic24' is for bfloat16)"
    )


def of_param(param: Tensor, weight_rounding: str, state_dtype: StateDType) -> Format:
    """The format of ``param``: of all of it, where it is sharded.

    Raises:
        ValueError: there is none.
    """
    if state_dtype == "8bit" and param.numel() < LEAST_FOR_8_BIT:
        state_dtype = torch.float32
    return of(param.dtype, weight_rounding, state_dtype)


def known_parts(dtype: torch.dtype, streams: Sequence[str | None]) -> set[str]:
    """Every state that any format of such parameters has, by name."""
    return {
        part.name
        for format in FORMATS
        if format.param.dtype == real(dtype)
        for part in format.parts(streams)
    }


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a state has in checkpoints: those of formats, and of earlier versions."""
    found = [part.dtype for f in FORMATS for part in f.parts() if part.name == name]
    return (*dict.fromkeys(found), *((torch.int16,) if name == "residual" else ()))


def codec_of(stream: str, state: Mapping[str, Any]) -> Codec | None:
    """How a stream lies in a state that has it; None: as numbers."""
    for format in FORMATS:
        codec: Codec = getattr(format, stream)
        parts = format.of(stream)
        if codec.rest and all(p.name in state and state[p.name].dtype == p.dtype for p in parts):
            return codec
    return None
