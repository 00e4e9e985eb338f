"""How numbers are stored, in Triton: the codecs, and the random bits that some of them round with.

``csrc/formats/codecs.h`` and ``csrc/rule/random.h`` are the same in C++, and
``ranger_cuda/state/codecs.py`` says why. Codecs are compiled in by their names. All of it is of
float32 values and integer operations on their bits, but for the codecs that are numbers as they
are. Nothing here adds a product: see ``product()`` of ``triton_rule.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Elements that share a scale, side by side in a parameter's row-major order.
GROUP_SIZE = tl.constexpr(32)

# A float32's bits: infinity, all but the sign, the smallest normal number, how many are of the
# fraction, and those that Split24 keeps.
INFINITY, MAGNITUDE = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF)
LEAST_NORMAL, FRACTION = tl.constexpr(1 << 23), tl.constexpr(23)
UPPER_24 = tl.constexpr(0xFFFFFF00)
# bfloat16 is its upper half: half a last place of that, and a NaN.
HALF_A_PLACE, BFLOAT16_NAN = tl.constexpr(0x8000), tl.constexpr(0x7FC0)
# float16's: infinity, a NaN, the sign; the smallest normal number as a float32's bits, and how many
# bits more those have.
FLOAT16_INFINITY, FLOAT16_NAN, FLOAT16_SIGN = (tl.constexpr(n) for n in (0x7C00, 0x7E00, 0x8000))
FLOAT16_LEAST, FLOAT16_DROPPED = tl.constexpr(0x38800000), tl.constexpr(13)


@triton.constexpr_function
def is_grouped(CODEC):
    """Whether elements share a scale."""
    return CODEC in ("GroupedSigned", "GroupedRoot")


@triton.constexpr_function
def is_random(CODEC):
    """Whether it rounds stochastically."""
    return is_grouped(CODEC) or CODEC in ("StochasticBFloat16", "StochasticFloat16", "Split24")


@triton.constexpr_function
def stored_type(CODEC):
    """What an element is in the stream's own tensor: bits, where they are not a number's."""
    if is_grouped(CODEC):
        return tl.uint8
    return {"Float32": tl.float32, "Float64": tl.float64}.get(CODEC, tl.uint16)


@triton.constexpr_function
def rest_type(CODEC):
    """What is stored beside it, for an element or for a group; None: nothing."""
    if is_grouped(CODEC):
        return tl.uint8
    return {"Split": tl.int16, "Split24": tl.int8, "Master": tl.float32}.get(CODEC)


# --- random bits ---------------------------------------------------------------------------------

# What the counter, and a word of each stream's, are multiplied by.
COUNTER_FACTOR, MOMENTS_FACTOR, PARAM_FACTOR = (
    tl.constexpr(n) for n in (0xD2511F53, 0xCD9E8D57, 0x9E3779B1)
)


class Keys(NamedTuple):
    """Of one parameter in one step: 32 bits each (RandomKeys)."""

    counter: Any
    moments: Any
    param: Any


@triton.jit
def mixed(word):
    """64 bits, each of which depends on each of ``word``'s: SplitMix64's."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def folded(x, FACTOR: tl.constexpr):
    """Both halves of a 64-bit product of 32-bit numbers, one upon the other."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def random_bits(position, counter, key, FACTOR: tl.constexpr, UPPER: tl.constexpr):
    """16 for each element: half of a word, of its position in its whole parameter."""
    word = folded(folded(position ^ counter, COUNTER_FACTOR) ^ key, FACTOR)
    return word >> 16 if UPPER else word & 0xFFFF


# --- numbers -------------------------------------------------------------------------------------


@triton.jit
def bits_of(value):
    """Of a float32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def value_of(bits):
    """The float32."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(bits):
    """Whether a float32 is."""
    return (bits & MAGNITUDE) < INFINITY


@triton.jit
def is_nan(bits):
    """Likewise."""
    return (bits & MAGNITUDE) > INFINITY


@triton.jit
def bfloat16_value(stored):
    """By hand, which is exact everywhere: denormals, too."""
    return value_of(stored.to(tl.uint32) << 16)


@triton.jit
def upper_half(bits, nan):
    """A bfloat16: of a float32's bits."""
    return tl.where(nan, BFLOAT16_NAN, bits >> 16).to(tl.uint16)


@triton.jit
def float16_value(stored):
    """Exact."""
    return stored.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nearest_float16(value):
    """Ties go to even."""
    return value.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def joined(high, low):
    """The float32 of a bfloat16 and what its rounding took, a signed number of last places.

    Where others have written to the bfloat16 since, nothing is nearer to 0 than 0, or beyond
    infinity.
    """
    bits = high.to(tl.uint32) << 16
    magnitude = bits & MAGNITUDE
    low = tl.where((magnitude == 0) & (low < 0), 0, low)
    low = tl.where((magnitude == INFINITY) & (low > 0), 0, low)
    return value_of(bits + low.to(tl.uint32, bitcast=True))


# --- small floats of which a group shares a power of two -----------------------------------------

NOT_FINITE = tl.constexpr(255)  # the scale of a group with an infinity or NaN
LARGEST_EXPONENT = tl.constexpr(6)  # of a group's largest, so that it can be rounded up
LARGEST_FACTOR = tl.constexpr(126)  # the exponent of a power of two whose inverse is normal, too
CODE, CODE_SIGN = tl.constexpr(0x7F), tl.constexpr(0x80)  # of GroupedSigned
# Codes in a group that is not finite: there 0 is 0, and for GroupedSigned all that is finite.
SIGNED_INFINITY, SIGNED_NAN = tl.constexpr(1), tl.constexpr(2)
ROOT_FINITE, ROOT_INFINITY, ROOT_NAN = (tl.constexpr(n) for n in (1, 2, 3))


@triton.constexpr_function
def dropped(CODEC):
    """How many bits of a float32's fraction have no place."""
    return FRACTION.value - {"GroupedSigned": 4, "GroupedRoot": 5}[CODEC]


@triton.jit
def by_group(elements):
    """Of a block's elements a row for each group."""
    return tl.reshape(elements, (elements.shape[0] // GROUP_SIZE, GROUP_SIZE))


@triton.jit
def spread(scales, TIMES: tl.constexpr):
    """Each as often."""
    COUNT: tl.constexpr = scales.shape[0]
    return tl.reshape(tl.broadcast_to(scales[:, None], (COUNT, TIMES)), (COUNT * TIMES,))


@triton.jit
def larger(a, b):
    """Of two, or of two in each place."""
    return tl.maximum(a, b)


@triton.jit
def scales_of(magnitudes):
    """The scale of each group, from the bits of its elements' magnitudes."""
    largest = tl.reduce(by_group(magnitudes), 1, larger)
    exponent = largest >> FRACTION
    scale = tl.where(exponent < LARGEST_EXPONENT, 0, exponent - LARGEST_EXPONENT)
    return tl.where(largest >= INFINITY, NOT_FINITE, scale).to(tl.uint8)


@triton.jit
def power_of_two(exponent):
    """A float32, of -126 to 127."""
    return value_of((exponent + 127) << FRACTION)


@triton.jit
def code_of(value, scale, random, CODEC: tl.constexpr):
    """Exponent and fraction. 16 random bits, and a half of their last, are as many as dropped.

    In multiples of 2^scale: float32 has fixed-point numbers itself below its normal ones. 2^-scale
    may have to be two factors; what the first rounds, the second makes 0.
    """
    LOWEST: tl.constexpr = dropped(CODEC) - 16
    most = tl.minimum(scale, LARGEST_FACTOR)
    magnitude = value_of(bits_of(value) & MAGNITUDE) * power_of_two(most - scale)
    code = bits_of(magnitude * power_of_two(0 - most))
    return (code + (random << LOWEST) + (1 << (LOWEST - 1))) >> dropped(CODEC)


@triton.jit
def magnitude_of(code, scale, CODEC: tl.constexpr):
    """The number that a code stands for."""
    most = tl.minimum(scale, LARGEST_FACTOR)
    bits = code << dropped(CODEC)
    return value_of(bits) * power_of_two(most) * power_of_two(scale - most)


@triton.jit
def coded(values, CODEC: tl.constexpr):
    """What is coded of values."""
    return tl.sqrt_rn(values) if CODEC == "GroupedRoot" else values


@triton.jit
def decode_group(stored, scale, CODEC: tl.constexpr):
    """Elements that share a scale."""
    code, scale = stored.to(tl.uint32), scale.to(tl.uint32)
    if CODEC == "GroupedSigned":
        sign = (code & CODE_SIGN) << 24
        code = code & CODE
        other = tl.where(code == SIGNED_INFINITY, INFINITY, INFINITY + 1)
        other = tl.where(code == 0, 0, other)
        bits = bits_of(magnitude_of(code, scale, CODEC))
        value = value_of(tl.where(scale == NOT_FINITE, other, bits) | sign)
    else:
        other = tl.where(code == ROOT_NAN, float("nan"), 2.0**63)
        other = tl.where(code == ROOT_INFINITY, float("inf"), other)
        other = tl.where(code == 0, 0.0, other)
        root = tl.where(scale == NOT_FINITE, other, magnitude_of(code, scale, CODEC))
        value = root * root
    return value


@triton.jit
def encode_group(value, scale, random, CODEC: tl.constexpr):
    """Codes of what ``coded`` returned. Beside an infinity or NaN they say who it is."""
    bits, scale = bits_of(value), scale.to(tl.uint32)
    magnitude = bits & MAGNITUDE
    code = code_of(value, scale, random, CODEC)
    if CODEC == "GroupedSigned":
        other = tl.where(magnitude == INFINITY, SIGNED_INFINITY, 0)
        code = tl.where(scale == NOT_FINITE, other, code) | ((bits >> 24) & CODE_SIGN)
        code = tl.where(is_nan(bits), SIGNED_NAN, code)  # whose sign is nobody's promise
    else:
        other = tl.where(magnitude == INFINITY, ROOT_INFINITY, 0)
        code = tl.where(scale == NOT_FINITE, other, code)
        code = tl.maximum(code, tl.minimum(magnitude, ROOT_FINITE))  # what is above 0 stays there
        code = tl.where(is_nan(bits), ROOT_NAN, code)
    return code.to(tl.uint8)


@triton.constexpr_function
def number_codec(T):
    """Of numbers of this type, as they are."""
    return {tl.float32: "Float32", tl.float64: "Float64"}[T]


# --- elements each by itself ---------------------------------------------------------------------


@triton.jit
def decode(stored, rest, CODEC: tl.constexpr):
    """Values, from what is stored of each and beside it."""
    if CODEC == "Split":
        value = joined(stored, rest.to(tl.int32))
    elif CODEC == "Split24":
        value = joined(stored, rest.to(tl.int32) << 8)
    elif CODEC == "Master":
        value = float16_value(stored)
        # Where others have written to the float16 since, it counts as it is.
        value = tl.where(float16_value(nearest_float16(rest)) == value, rest, value)
    elif CODEC == "BFloat16" or CODEC == "StochasticBFloat16":
        value = bfloat16_value(stored)
    elif CODEC == "Float16" or CODEC == "StochasticFloat16":
        value = float16_value(stored)
    else:
        value = stored
    return value


@triton.jit
def encode(value, random, CODEC: tl.constexpr):
    """What is stored of values, and beside it: anything, where nothing is."""
    rest = value
    if CODEC == "Split":
        bits = bits_of(value)
        nan = is_nan(bits)
        stored = upper_half(bits + HALF_A_PLACE, nan)  # ties away from zero: the rest fits 16 bits
        rest = tl.where(nan, 0, bits).to(tl.int16)
    elif CODEC == "Split24":
        bits = bits_of(value)
        nan = is_nan(bits)
        bits = tl.where(is_finite(bits), bits + (random >> 8), bits)
        stored = upper_half((bits & UPPER_24) + HALF_A_PLACE, nan)
        rest = tl.where(nan, 0, bits >> 8).to(tl.int8)
    elif CODEC == "Master":
        stored = nearest_float16(value)
    elif CODEC == "BFloat16":
        bits = bits_of(value)
        stored = upper_half(bits + (HALF_A_PLACE - 1) + ((bits >> 16) & 1), is_nan(bits))
    elif CODEC == "StochasticBFloat16":
        bits = bits_of(value)
        stored = upper_half(tl.where(is_finite(bits), bits + random, bits), is_nan(bits))
    elif CODEC == "Float16":
        stored = nearest_float16(value)
    elif CODEC == "StochasticFloat16":
        stored = stochastic_float16(value, random)
    else:
        stored = value
    return stored, rest


@triton.jit
def stochastic_float16(value, random):
    """Rounded to infinity from the largest on."""
    bits = bits_of(value)
    magnitude = bits & MAGNITUDE
    # Below float16's normal numbers lie fixed-point ones, which adding its least makes of them.
    least = value_of(bits * 0 + FLOAT16_LEAST)
    fixed = bits_of(value_of(magnitude) + least) - FLOAT16_LEAST
    normal = magnitude - (FLOAT16_LEAST - LEAST_NORMAL)
    narrow = tl.where(magnitude < FLOAT16_LEAST, fixed, normal)
    narrow = (narrow + (random >> (16 - FLOAT16_DROPPED))) >> FLOAT16_DROPPED
    finite = is_finite(bits) & (narrow < FLOAT16_INFINITY)
    narrow = tl.where(finite, narrow, FLOAT16_INFINITY)
    narrow = tl.where(is_nan(bits), FLOAT16_NAN, narrow)
    return (narrow | ((bits >> 16) & FLOAT16_SIGN)).to(tl.uint16)
