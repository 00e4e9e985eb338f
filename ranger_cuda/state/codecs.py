"""How numbers are stored: the codecs that formats are made of.

Between memory and the arithmetic of a step, which sees float32 or float64 values only. All of it is
integer operations on the bits of a float32, additions and the root: the same bits anywhere.
``csrc/formats/codecs.h`` is the same in C++.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override  # torch depends on it

State = Mapping[str, Tensor]  # by name

GROUP = 32  # elements that share a scale, side by side in a parameter's row-major order


class Part(NamedTuple):
    """A tensor of a parameter's state.

    Attributes:
        dtype: of a real parameter's; a complex one's is complex.
        starts_as_param: whether it starts as the parameter, or as zeros.
        is_bits: whether another dtype would not keep what it says.
        is_grouped: whether it has an element for each group of elements, and not for each.
    """

    name: str
    dtype: torch.dtype
    starts_as_param: bool = False
    is_bits: bool = False
    is_grouped: bool = False

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """The dtype of it beside ``param``."""
        return self.dtype.to_complex() if param.is_complex() else self.dtype

    def shape_for(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of it beside a parameter of ``shape``.

        Groups do not cross rows where rows are whole groups, so that both are sharded alike.
        """
        if not self.is_grouped:
            return tuple(shape)
        if shape and shape[-1] % GROUP == 0:
            return (*shape[:-1], shape[-1] // GROUP)
        return (-(-shape.numel() // GROUP),)


@dataclass(frozen=True)
class Codec:
    """Values as they are, rounded to nearest where the type is narrower than the arithmetic's.

    Attributes:
        name: as ``csrc/formats/codecs.h`` has it.
        dtype: of the stream's own tensor.
        rest: what is stored beside it.
        is_random: whether it rounds stochastically.
        is_grouped: whether elements share something.
    """

    name: str
    dtype: torch.dtype
    rest: tuple[Part, ...] = ()
    is_random: bool = False
    is_grouped: bool = False

    @property
    def counts_elements(self) -> bool:
        """Whether it matters where in its parameter an element is."""
        return self.is_random or self.is_grouped

    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        """The values, of dtype ``value``; ``stored`` itself where they are the same."""
        return stored.to(value)

    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        """Write ``value`` to ``stored`` and to ``rest``.

        Args:
            random: 16 random bits for each element, if the codec rounds stochastically.
        """
        stored.copy_(value)


INFINITY = 0x7F800000  # a float32's bits


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def _value(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _bfloat16_of(bits: Tensor, nan: Tensor) -> Tensor:
    """bfloat16 with the upper halves of ``bits``; NaN where it is."""
    return torch.where(nan, torch.nan, _value(bits & ~0xFFFF)).to(torch.bfloat16)


@dataclass(frozen=True)
class StochasticBFloat16(Codec):
    """A float32's upper half, rounded up as often as the lower half is large.

    Infinity and NaN are not rounded; from the largest finite bfloat16 on, values round to infinity.
    """

    name: str = "StochasticBFloat16"
    dtype: torch.dtype = torch.bfloat16
    is_random: bool = True

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        assert random is not None
        bits, finite = _bits(value), value.isfinite()
        stored.copy_(_bfloat16_of(torch.where(finite, bits + random, bits), value.isnan()))


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 of a bfloat16 and what its rounding took, a signed number of last places.

    Others may have written to the bfloat16 since. Nothing is nearer to 0 than 0, or beyond
    infinity: there, what was taken was of a value gone.
    """
    low = torch.where(high == 0.0, low.clamp(min=0), low)
    low = torch.where(high.isinf(), low.clamp(max=0), low)
    return _value(_bits(high) + low)


@dataclass(frozen=True)
class Split(Codec):
    """A float32 in two halves: bfloat16, rounded to nearest, and what the rounding took.

    Ties are rounded away from zero, not to even: only then does every rest fit a signed 16-bit
    integer. Its bits lie in a bfloat16 tensor, as NCCL and gloo carry no 16-bit integers. A
    parameter that others write to between steps (weights loaded late, a mask, a clamp) counts as
    it is then; what was kept of its old value at most moves it within its own rounding.
    """

    name: str = "Split"
    dtype: torch.dtype = torch.bfloat16
    rest: tuple[Part, ...] = (Part("residual", torch.bfloat16, is_bits=True),)

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        return _joined(stored.float(), rest["residual"].view(torch.int16).int())

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        bits, nan = _bits(value), value.isnan()
        high = (bits + 0x8000) & ~0xFFFF
        stored.copy_(_bfloat16_of(high, nan))
        rest["residual"].view(torch.int16).copy_(torch.where(nan, 0, bits - high))


@dataclass(frozen=True)
class Split24(Codec):
    """A float32's upper 24 bits, the rest rounded stochastically: bfloat16 and 8 bits.

    As of :class:`Split`, the bfloat16 is rounded half up in magnitude, so that what it took fits a
    signed 8-bit integer.
    """

    name: str = "Split24"
    dtype: torch.dtype = torch.bfloat16
    rest: tuple[Part, ...] = (Part("residual", torch.int8, is_bits=True),)
    is_random: bool = True

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        return _joined(stored.float(), rest[self.rest[0].name].int() << 8)

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        assert random is not None
        bits, nan = _bits(value), value.isnan()
        bits = torch.where(value.isfinite(), bits + (random >> 8), bits) & ~0xFF
        high = (bits + 0x8000) & ~0xFFFF
        stored.copy_(_bfloat16_of(high, nan))
        rest[self.rest[0].name].copy_(torch.where(nan, 0, (bits - high) >> 8))


def _narrowed(value: Tensor, least: Tensor | int, dropped: int, random: Tensor) -> Tensor:
    """The magnitude of ``value`` in a smaller type: exponent, then fraction.

    Args:
        least: the bits of the type's smallest normal number, a power of two. Its exponent becomes
            1; below it lie fixed-point numbers, which adding it makes of them.
        dropped: how many bits of the fraction are dropped.
        random: as many random bits.
    """
    magnitude = _bits(value) & 0x7FFFFFFF
    least = torch.as_tensor(least, dtype=torch.int32, device=value.device)
    fixed = _bits(_value(magnitude) + _value(least)) - least
    normal = magnitude - least + (1 << 23)
    return (torch.where(magnitude < least, fixed, normal) + random) >> dropped


@dataclass(frozen=True)
class StochasticFloat16(Codec):
    """A float16, rounded stochastically, to infinity from the largest on."""

    name: str = "StochasticFloat16"
    dtype: torch.dtype = torch.float16
    is_random: bool = True

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        assert random is not None
        narrow = _narrowed(value, 0x38800000, 13, random >> 3).clamp(max=0x7C00)
        narrow = torch.where(value.isinf(), 0x7C00, narrow)
        narrow = torch.where(value.isnan(), 0x7E00, narrow)
        sign = (_bits(value) >> 16) & 0x8000
        stored.copy_((narrow | sign).to(torch.int16).view(torch.float16))


@dataclass(frozen=True)
class Master(Codec):
    """A float16 and, beside it, the float32 that it is a rounding of.

    Where others have written to it since, it counts as it is.
    """

    name: str = "Master"
    dtype: torch.dtype = torch.float16
    rest: tuple[Part, ...] = (Part("master", torch.float32, starts_as_param=True, is_bits=True),)

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        master = rest["master"]
        return torch.where(master.to(stored.dtype) == stored, master, stored.to(value))

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        rest["master"].copy_(value)
        stored.copy_(value)


# What a group's scale is if one of its elements is infinite or NaN; its elements' codes say which.
_NOT_FINITE = 255
_LARGEST_SCALE = 248  # of a group whose largest has float32's largest exponent


@dataclass(frozen=True)
class Grouped(Codec):
    """Small floats in 8 bits, of which each group shares a power of two (as OCP's MX formats do).

    3 bits of exponent, 0 for fixed-point numbers, and 4 or 5 of fraction, rounded stochastically:
    what is kept is right on average however small the change. The largest of a group has the
    exponent 6, so that it can be rounded up. A scale counts from 0, where 1 in the exponent is
    float32's smallest normal number.
    """

    dtype: torch.dtype = torch.uint8
    is_random: bool = True
    is_grouped: bool = True
    fraction: int = 0  # bits

    def scales(self, magnitude: Tensor) -> Tensor:
        """The scale of each group, from the bits of its elements' magnitudes."""
        missing = -len(magnitude) % GROUP
        groups = torch.nn.functional.pad(magnitude, (0, missing)).view(-1, GROUP)
        largest = groups.amax(1)
        scale = ((largest >> 23) - 6).clamp(min=0)
        return torch.where(largest >= INFINITY, _NOT_FINITE, scale)

    def narrowed(self, value: Tensor, rest: State, random: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of magnitudes, and whether their groups are finite; writes the scales."""
        scales = self.scales(_bits(value) & 0x7FFFFFFF)
        rest[self.rest[0].name].copy_(scales)
        scale = scales.repeat_interleave(GROUP)[: len(value)]
        least = (scale.clamp(max=_LARGEST_SCALE) + 1) << 23
        dropped = 23 - self.fraction
        # 16 random bits, and a half of their last.
        lowest = dropped - 16
        codes = _narrowed(value, least, dropped, (random << lowest) + (1 << (lowest - 1)))
        return codes, scale != _NOT_FINITE

    def widened(self, codes: Tensor, rest: State) -> tuple[Tensor, Tensor]:
        """The magnitudes that codes stand for, and whether their groups are finite."""
        scale = rest[self.rest[0].name].int().repeat_interleave(GROUP)[: len(codes)]
        bits = codes << (23 - self.fraction)
        least = (scale + 1) << 23
        fixed = _value(bits + least) - _value(least)
        normal = _value(bits + (scale << 23))
        return torch.where(codes < 1 << self.fraction, fixed, normal), scale != _NOT_FINITE


@dataclass(frozen=True)
class GroupedSigned(Grouped):
    """A sign, 3 bits of exponent and 4 of fraction. Beside an infinity or NaN all else is 0."""

    name: str = "GroupedSigned"
    fraction: int = 4

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        codes = stored.int() & 0x7F
        magnitude, finite = self.widened(codes, rest)
        others = torch.where(codes == 1, torch.inf, torch.where(codes == 0, 0.0, torch.nan))
        magnitude = torch.where(finite, magnitude, others)
        return _value(_bits(magnitude) | ((stored.int() & 0x80) << 24))

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        assert random is not None
        codes, finite = self.narrowed(value, rest, random)
        others = torch.where(value.isnan(), 2, torch.where(value.isinf(), 1, 0))
        sign = torch.where(value.isnan(), 0, (_bits(value) >> 24) & 0x80)  # NaN's is no promise
        stored.copy_(torch.where(finite, codes, others) | sign)


@dataclass(frozen=True)
class GroupedRoot(Grouped):
    """The root of a number from 0 on, 3 bits of exponent and 5 of fraction; above 0 it stays there.

    Beside an infinity or NaN all else above 0 is 2^126.
    """

    name: str = "GroupedRoot"
    fraction: int = 5

    @override
    def decode(self, stored: Tensor, rest: State, value: torch.dtype) -> Tensor:
        codes = stored.int()
        root, finite = self.widened(codes, rest)
        others = torch.where(codes == 2, torch.inf, torch.where(codes == 3, torch.nan, 2.0**63))
        root = torch.where(finite, root, torch.where(codes == 0, 0.0, others))
        return root * root

    @override
    def encode(self, value: Tensor, stored: Tensor, rest: State, random: Tensor | None) -> None:
        assert random is not None
        root = sqrt(value)
        codes, finite = self.narrowed(root, rest, random)
        others = torch.where(root.isnan(), 3, torch.where(root.isinf(), 2, 1))
        codes = torch.where(finite, codes.clamp(min=1), others)
        stored.copy_(torch.where(root == 0.0, 0, codes))


def sqrt(v: Tensor) -> Tensor:
    """Correctly rounded square root. ``torch.sqrt`` on the CPU is not; NumPy's is."""
    if v.device.type != "cpu" or is_traceable_wrapper_subclass(v):  # NumPy sees no wrapper's memory
        return torch.sqrt(v)
    array = v.detach().numpy()
    return torch.from_numpy(np.sqrt(array, out=np.empty_like(array)))
