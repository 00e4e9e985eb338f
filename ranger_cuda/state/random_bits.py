"""The random bits of stochastic rounding: a counter and a key, hashed; no state, no generator.

The counter is an element's position in its whole parameter, so that a shard's bits are the whole's.
The key is of the seed, the parameter's place in its optimizer, and the step. ``csrc/rule/random.h``
is the same in C++.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_HALF = (1 << 32) - 1


class Keys(NamedTuple):
    """Of one parameter in one step: 32 bits each."""

    counter: int  # the counter's
    moments: int  # of the word that exp_avg takes the upper and exp_avg_sq the lower half of
    param: int  # of the word that the parameter, and its slow weight, take the upper half of


def mixed(word: int) -> int:
    """64 bits, each of which depends on each of ``word``'s.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; the
    constants are variant 13 of Stafford's, as in SplitMix64.
    """
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def keys_of(seed: int, place: int, step: int, *, pull: bool = False) -> Keys:
    """The keys of a step.

    Args:
        seed: the optimizer's, 64 bits of it.
        place: of the parameter, counted through the groups.
        step: its own count, 1 in its first.
        pull: whether it is a pull alone, after another optimizer's step of the same count.
    """
    word = mixed(mixed(mixed(seed & _WORD) ^ place) ^ (2 * step + pull))
    return Keys(word & _HALF, word >> 32, mixed(word) & _HALF)


class Bits(NamedTuple):
    """16 random bits for each element and stream, int32; None where nothing is random.

    A slow weight takes the parameter's, and is then the same number.
    """

    param: Tensor | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None


def random_bits(keys: Keys, first: int, count: int, device: torch.device) -> Bits:
    """Those of elements ``first`` to ``first + count - 1`` of a parameter, modulo 2^32."""
    counter = torch.arange(first, first + count, dtype=torch.int64, device=device) & _HALF
    x = _folded(counter ^ keys.counter, 0xD2511F53)
    moments = _folded(x ^ keys.moments, 0xCD9E8D57)
    param = _folded(x ^ keys.param, 0x9E3779B1)
    return Bits((param >> 16).int(), (moments >> 16).int(), (moments & 0xFFFF).int())


def _folded(x: Tensor, factor: int) -> Tensor:
    """Both halves of a 64-bit product of 32-bit numbers, one upon the other."""
    product = x * factor  # int64 wraps around
    return (product >> 32 ^ product) & _HALF
