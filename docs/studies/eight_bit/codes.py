"""The candidates: 8-bit codes for Adam's moments, ours and those that others have.

Ours are the codecs of the package. The others are written anew from their published definitions, as
tables of levels; FlashOptim rounds its companded code to nearest before it is expanded, here after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranger_cuda.state import formats
from ranger_cuda.state.codecs import GROUP, Codec

Round = Callable[[Tensor, Tensor], Tensor]  # a moment and 16 random bits each: what is read back


class Candidate(NamedTuple):
    """A pair of codes."""

    name: str
    m: Round
    v: Round
    bytes: float  # of both moments, a parameter
    stochastic: bool
    in_plot: bool = False


# --- ours -----------------------------------------------------------------------------------------


def through(codec: Codec, value: Tensor, random: Tensor) -> Tensor:
    """Write with a codec of the package, and read back."""
    stored = torch.empty(value.shape, dtype=codec.dtype)
    rest = {p.name: torch.empty(len(value) // GROUP, dtype=p.dtype) for p in codec.rest}
    codec.encode(value, stored, rest, random)
    return codec.decode(stored, rest, torch.float32)


def ours() -> tuple[Round, Round]:
    """As the package has them."""
    format = formats.of(torch.float32, state_dtype="8bit")
    return partial(through, format.exp_avg), partial(through, format.exp_avg_sq)


# --- the others: a table of levels, and a scale for each group ------------------------------------


def absmax(group: Tensor) -> tuple[Tensor, Tensor]:
    """What a group is divided by, and what that is when it is read back: float32."""
    scale = group.abs().amax(1, keepdim=True).clamp(min=2.0**-126)
    return scale, scale


def absmax_half(group: Tensor) -> tuple[Tensor, Tensor]:
    """The same, kept as a float16."""
    scale, _ = absmax(group)
    return scale, scale.half().float()


def power_of_two(group: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two above the largest: a byte."""
    scale = torch.exp2(torch.frexp(absmax(group)[0]).exponent.float())
    return scale, scale


def with_table(
    value: Tensor,
    random: Tensor,
    *,
    table: Tensor,
    size: int = GROUP,
    scales: Callable[[Tensor], tuple[Tensor, Tensor]],
    root: bool = False,
    never_zero: bool = False,
    in_square: bool = False,
) -> Tensor:
    """Round each element to one of the two levels around it, in proportion or to the nearer one.

    Args:
        table: the levels, ascending, as fractions of the scale.
        size: elements of a group.
        root: whether the value's root is kept.
        never_zero: whether what is above 0 stays there.
        in_square: whether it is the square that is right on average.
    """
    group = (value.sqrt() if root else value).view(-1, size)
    divisor, scale = scales(group)
    x = group / divisor
    above = torch.searchsorted(table, x).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    part = (random.view(-1, size) + 0.5) / 65536
    if in_square:
        up = x * x - low * low > (high * high - low * low) * (1 - part)
    else:
        up = x - low > (high - low) * (1 - part)
    level = torch.where(up, high, low)
    if never_zero:
        level = torch.where(group > 0, level.clamp(min=float(table[1])), level)
    read = torch.where(x.isnan(), x, level * scale).view(-1)
    return read * read if root else read


def minifloat(signed: bool, exponent: int) -> Tensor:
    """A small float of 8 bits, so many of them its exponent; half of its largest power of two is 1.

    So much room is left for the largest of a group, to be rounded up.
    """
    fraction = 8 - signed - exponent
    code = torch.arange(1 << (exponent + fraction))
    part = (code % (1 << fraction)) / (1 << fraction)
    power = code >> fraction
    levels = torch.where(power > 0, (1 + part) * torch.exp2(power.float()), 2 * part)
    levels = levels / 2.0 ** ((1 << exponent) - 1)
    return torch.cat([-levels[1:].flip(0), levels]) if signed else levels


def linear(signed: bool) -> Tensor:
    """Equal steps."""
    return torch.arange(-127, 128) / 127 if signed else torch.arange(256) / 255


def companded() -> Tensor:
    """Where ``2x / (1 + |x|)`` has equal steps: finer around 0."""
    y = linear(signed=True)
    return y / (2 - y.abs())


def dynamic(signed: bool) -> Tensor:
    """The dynamic map (Dettmers, arXiv:1511.04561; unsigned: Dettmers et al., arXiv:2110.02861).

    Seven decades; the lower one is, the fewer bits are left for a linear fraction between 0.1
    and 1. Its levels are the middles of the steps.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    negative = -positive if signed else positive[:0]
    return torch.cat([negative, torch.tensor([0.0, 1.0]), positive]).sort().values


def logarithmic(signed: bool, octaves: int = 12) -> Tensor:
    """Equal ratios, over as many powers of two, and 0."""
    levels = torch.exp2(-octaves * torch.linspace(1, 0, 127 if signed else 255))
    return torch.cat([-levels.flip(0) if signed else levels[:0], torch.zeros(1), levels])


def pair(m: Tensor, v: Tensor, *, only_v: dict[str, Any], **options: Any) -> tuple[Round, Round]:
    """The codes of both moments, from tables."""
    return partial(with_table, table=m, **options), partial(
        with_table, table=v, **options, **only_v
    )


def candidates() -> Iterator[Candidate]:
    """All of them: rounded to nearest, and stochastically."""
    byte, half, full, block = 2 + 2 / GROUP, 2 + 4 / GROUP, 2 + 8 / GROUP, 2 + 8 / 256
    root = {"root": True}
    careful = {"root": True, "never_zero": True}

    def small(m: int, v: int, **more: bool) -> tuple[Round, Round]:
        tables = minifloat(True, m), minifloat(False, v)
        return pair(*tables, only_v={**careful, **more}, scales=power_of_two)

    log = pair(logarithmic(True), logarithmic(False), only_v=careful, scales=power_of_two)
    straight = pair(linear(True), linear(False), only_v={}, scales=absmax_half)
    flash = pair(companded(), linear(False), only_v=root, scales=absmax_half)
    wide = pair(companded(), linear(False), only_v=root, scales=absmax)
    mapped = pair(dynamic(True), dynamic(False), only_v={}, scales=absmax, size=256)
    for name, codes, size, roundings in (
        ("m E3M4, √v E3M5 (ours)", ours(), byte, "SN"),
        ("m E2M5, √v E2M6", small(2, 2), byte, "S"),
        ("m E4M3, √v E3M5", small(4, 3), byte, "S"),
        ("m E4M3, √v E4M4", small(4, 4), byte, "S"),
        ("m E4M3, √v E4M4, v right on average", small(4, 4, in_square=True), byte, "S"),
        ("m and √v logarithmic, 12 octaves", log, byte, "sn"),
        ("m and v linear, fp16 scale", straight, half, "sn"),
        ("m companded, √v linear, fp16 scale (FlashOptim)", flash, half, "sN"),
        ("m companded, √v linear, fp32 scale", wide, full, "sn"),
        ("m and v dynamic map (bitsandbytes, torchao)", mapped, block, "sN"),
    ):
        for kind in roundings:  # in upper case: those in the plots
            rounding = {"s": "stochastic", "n": "nearest"}[kind.lower()]
            yield Candidate(f"{name}, {rounding}", *codes, size, kind in "sS", kind.isupper())
