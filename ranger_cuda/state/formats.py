"""How parameters and their state are stored: one table. New state, the checks of a step and of a
checkpoint, the reference, the kernels' launchers and ``info`` all read it.

A format has a codec for each stream (the parameter, its moments, its slow weight) around a rule
that sees float32 or float64 values only. ``csrc/formats/formats.h`` has the rows that kernels
serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override  # torch depends on it

State = Mapping[str, Tensor]  # by name


class Part(NamedTuple):
    """A tensor of a parameter's state; of the parameter's shape.

    Attributes:
        dtype: of a real parameter's; a complex one's is complex.
        starts_as_param: whether it starts as the parameter, or as zeros.
        is_bits: whether another dtype would not keep what it says.
    """

    name: str
    dtype: torch.dtype
    starts_as_param: bool = False
    is_bits: bool = False

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """The dtype of it beside ``param``."""
        return self.dtype.to_complex() if param.is_complex() else self.dtype

    def new(self, param: Tensor) -> Tensor:
        """It, before the first update of ``param``."""
        keep, dtype = torch.preserve_format, self.dtype_for(param)
        if self.starts_as_param:
            return param.detach().to(dtype, copy=True, memory_format=keep)
        return torch.zeros_like(param, dtype=dtype, memory_format=keep, requires_grad=False)


@dataclass(frozen=True)
class Codec:
    """Values as they are, rounded to nearest where the type is narrower than the arithmetic's.

    Attributes:
        dtype: of the stream's own tensor.
        rest: what is stored beside it.
    """

    dtype: torch.dtype
    rest: tuple[Part, ...] = ()

    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        """The values, of dtype ``value``; ``stored`` itself where they are the same."""
        return stored.to(value)

    def encode(self, value: Tensor, stored: Tensor, rest: State) -> None:
        """Write ``value`` to ``stored`` and to ``rest``."""
        stored.copy_(value)


@dataclass(frozen=True)
class Split(Codec):
    """A float32 in two halves: bfloat16, rounded to nearest, and what the rounding took.

    Ties are rounded away from zero, not to even: only then does every rest fit a signed 16-bit
    integer. A parameter that others write to between steps (weights loaded late, a mask, a clamp)
    counts as it is then; what was kept of its old value at most moves it within its own rounding.
    """

    dtype: torch.dtype = torch.bfloat16
    rest: tuple[Part, ...] = (Part("residual", torch.int16, is_bits=True),)

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        high, residual = stored.float(), rest["residual"]
        # Nothing is nearer to 0 than 0, or beyond infinity: such a residual is of a value gone.
        residual = torch.where(high == 0.0, residual.clamp(min=0), residual)
        residual = torch.where(high.isinf(), residual.clamp(max=0), residual)
        return (high.view(torch.int32) + residual).view(torch.float32)

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State) -> None:
        bits = value.view(torch.int32)
        high = (bits + 0x8000) & ~0xFFFF
        nan = value.isnan()
        stored.copy_(torch.where(nan, value, high.view(torch.float32)))
        rest["residual"].copy_(torch.where(nan, 0, bits - high))


@dataclass(frozen=True)
class Beside(Codec):
    """A float16 and, beside it, the float32 that it is a rounding of.

    Where others have written to it since, it counts as it is.
    """

    dtype: torch.dtype = torch.float16
    rest: tuple[Part, ...] = (Part("master", torch.float32, starts_as_param=True, is_bits=True),)

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        master = rest["master"]
        return torch.where(master.to(stored.dtype) == stored, master, stored.to(value))

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State) -> None:
        rest["master"].copy_(value)
        stored.copy_(value)


MOMENTS = ("exp_avg", "exp_avg_sq")
STREAMS = (*MOMENTS, "slow_param")


class Format(NamedTuple):
    """A row of the table.

    Attributes:
        name: as ``csrc/formats/formats.h`` has it.
        value: the dtype of the arithmetic.
        param, exp_avg, exp_avg_sq, slow_param: the codec of each stream.
        weight_rounding, state_dtype: what has to be asked for; None: anything.
        native: whether there are kernels for it.
    """

    name: str
    value: torch.dtype
    param: Codec
    exp_avg: Codec
    exp_avg_sq: Codec
    slow_param: Codec
    weight_rounding: str | None = None
    state_dtype: torch.dtype | None = None
    native: bool = False

    def parts(self, streams: Iterable[str | None] = STREAMS) -> list[Part]:
        """The state of a parameter: beside it, and of these streams."""
        found = list(self.param.rest)
        for stream in filter(None, streams):
            codec: Codec = getattr(self, stream)
            found.append(Part(stream, codec.dtype, starts_as_param=stream == "slow_param"))
            found += codec.rest
        return found


def _format(
    name: str, param: Codec, value: torch.dtype, weight_rounding: str | None, native: bool
) -> Format:
    plain = Codec(value)
    state_dtype = None if value == torch.float64 else value
    return Format(name, value, param, plain, plain, plain, weight_rounding, state_dtype, native)


_F32 = torch.float32
FORMATS = (
    _format("float32", Codec(_F32), _F32, None, native=True),
    _format("float64", Codec(torch.float64), torch.float64, None, native=True),
    _format("bfloat16_exact", Split(), _F32, "exact", native=False),
    _format("bfloat16_nearest", Codec(torch.bfloat16), _F32, "nearest", native=False),
    _format("float16_exact", Beside(), _F32, "exact", native=False),
    _format("float16_nearest", Codec(torch.float16), _F32, "nearest", native=False),
)

# What may be asked for, the default first.
WEIGHT_ROUNDINGS = tuple(dict.fromkeys(f.weight_rounding for f in FORMATS if f.weight_rounding))
STATE_DTYPES = tuple(dict.fromkeys(f.state_dtype for f in FORMATS if f.state_dtype))
# Of gradients that kernels read as they are.
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every state of a tensor's shape that any format has.
PARTS = {part.name: part for format in FORMATS for part in format.parts()}


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a complex number's parts; any other itself."""
    return dtype.to_real() if dtype.is_complex else dtype


def is_low(dtype: torch.dtype) -> bool:
    """Whether parameters of ``dtype`` are rounded from the arithmetic's values."""
    return dtype in (torch.bfloat16, torch.float16)


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for parameters of ``dtype``."""
    return torch.float64 if real(dtype) == torch.float64 else torch.float32


def dtypes(native: bool = False) -> tuple[torch.dtype, ...]:
    """The dtypes of parameters that there are formats for, with kernels if ``native``."""
    found = dict.fromkeys(f.param.dtype for f in FORMATS if f.native or not native)
    parts = [d.to_complex() for d in found if d in (torch.float32, torch.float64)]
    return (*(d for d in found if not is_low(d)), *parts, *(d for d in found if is_low(d)))


def of(
    dtype: torch.dtype,
    weight_rounding: str = WEIGHT_ROUNDINGS[0],
    state_dtype: torch.dtype = STATE_DTYPES[0],
) -> Format:
    """The format of parameters of ``dtype`` that fits what was asked for.

    Raises:
        ValueError: there is none.
    """
    for format in FORMATS:
        if (
            format.param.dtype == real(dtype)
            and format.weight_rounding in (None, weight_rounding)
            and format.state_dtype in (None, state_dtype)
        ):
            return format
    raise ValueError(
        f"there is no format for parameters of {dtype} with weight_rounding={weight_rounding!r} "
        f"and state_dtype={state_dtype}; this version has parameters of "
        + ", ".join(str(known).removeprefix("torch.") for known in dtypes())
    )


def slow_part(dtype: torch.dtype) -> Part:
    """What a slow weight is beside parameters of ``dtype``."""
    return Part("slow_param", value_dtype(dtype), starts_as_param=True)


def known_parts(
    dtype: torch.dtype,
    streams: Sequence[str | None],
    state_dtype: torch.dtype = STATE_DTYPES[0],
) -> dict[str, Part]:
    """Every state that any format of such parameters has, however they are rounded."""
    return {
        part.name: part
        for format in FORMATS
        if format.param.dtype == real(dtype) and format.state_dtype in (None, state_dtype)
        for part in format.parts(streams)
    }
