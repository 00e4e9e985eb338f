"""The random bits of stochastic rounding: as even, and as unrelated, as chance has it.

Everything is fixed, so that a test passes always or never. Limits are in standard deviations of
what chance would give, on both sides; what is too even is not random either. Chance alone passes 5
once in two million, and here are a few hundred counts and some ten thousand pairs of bits.
"""

from __future__ import annotations

import math

import pytest
import torch

from ranger_cuda.state import random_bits as module
from ranger_cuda.state.random_bits import Bits, keys_of, random_bits

STREAMS = Bits._fields
COUNT = 1 << 19
CPU = torch.device("cpu")
LIMIT = 5.0
KEYS = {"first": (0, 0, 1), "later": (0, 3, 1000), "seed": (123456789, 0, 1)}


@pytest.fixture(autouse=True)
def one_thread():
    """Two that wait for each other take long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits_of(seed=0, place=0, step=1, first=0, count=COUNT):
    """The streams, by name."""
    return random_bits(keys_of(seed, place, step), first, count, CPU)._asdict()


def deviation(cells, count):
    """Of a chi-square of ``cells``, numbers below ``count``, that should be even."""
    found = torch.bincount(cells.flatten(), minlength=count).double()
    assert len(found) == count
    expected = cells.numel() / count
    chi_square = ((found - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: its cube root is nearly normal.
    free = count - 1
    spread = 2 / (9 * free)
    return float(((chi_square / free) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def check_even(x):
    assert abs(deviation(x, 1 << 16)) < LIMIT
    for shift in range(0, 16, 4):
        assert abs(deviation(x >> shift & 15, 16)) < LIMIT


def check_unrelated(a, b):
    """Pairs of their upper and of their lower bits, the difference of all, and bit against bit."""
    for shift in (0, 8, 12):
        pair = (a >> shift & 15) << 4 | b >> shift & 15
        assert abs(deviation(pair, 256)) < LIMIT
    assert abs(deviation(a ^ b, 1 << 16)) < LIMIT
    assert abs(deviation((a - b) & 0xFFFF, 1 << 16)) < LIMIT
    places = torch.arange(16, dtype=torch.int32)
    one, other = ((x[: 1 << 18, None] >> places & 1) * 2.0 - 1 for x in (a, b))
    related = one.T @ other / math.sqrt(len(one))
    assert related.abs().max() < LIMIT


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_all_values_are_as_frequent(stream, key):
    x = bits_of(*key)[stream]
    assert x.min() >= 0
    check_even(x)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 8, 32, 1024])
def test_neighbours_are_unrelated(stream, lag):
    x = bits_of()[stream]
    check_unrelated(x[:-lag], x[lag:])


def test_streams_are_unrelated():
    found = bits_of()
    for a, b in (("param", "exp_avg"), ("param", "exp_avg_sq"), ("exp_avg", "exp_avg_sq")):
        check_unrelated(found[a], found[b])


OTHERS = {
    "the next step": {"step": 2},
    "the step after that": {"step": 3},
    "the next parameter": {"place": 1},
    "a parameter far away": {"place": 1024},
    "the next seed": {"seed": 1},
    "a seed of another sign": {"seed": -1},
    "a seed that differs in its upper half": {"seed": 1 << 40},
    "the seed and the place changed places": {"seed": 5, "place": 3},
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_keys_have_unrelated_bits(stream, other):
    first = {"seed": 3, "place": 5} if len(other) == 2 else {}
    check_unrelated(bits_of(**first)[stream], bits_of(**other)[stream])


def test_a_pull_has_other_bits_than_the_step_of_its_count():
    keys = keys_of(0, 0, 7), keys_of(0, 0, 7, pull=True)
    a, b = (random_bits(key, 0, COUNT, CPU)._asdict() for key in keys)
    for stream in STREAMS:
        check_unrelated(a[stream], b[stream])


def sums(over):
    """Of each stream's deviations from their mean, in units of one's standard deviation."""
    count = 4096
    total = {stream: torch.zeros(count, dtype=torch.float64) for stream in STREAMS}
    for step in range(1, over + 1):
        for stream, x in bits_of(step=step, count=count).items():
            total[stream] += x.double() - 32767.5
    one = math.sqrt((65536**2 - 1) / 12)
    return {stream: x / one for stream, x in total.items()}


def test_what_rounding_adds_up_to_over_many_steps_is_a_random_walk():
    over = 2000
    for x in sums(over).values():
        variance = float((x**2).mean()) / over
        assert abs(variance - 1) < LIMIT * math.sqrt(2 / len(x))
        groups = x.view(-1, 32).sum(1)  # neighbours, too, go their own ways
        variance = float((groups**2).mean()) / (32 * over)
        assert abs(variance - 1) < LIMIT * math.sqrt(2 / len(groups))


def test_a_shard_s_bits_are_the_whole_s():
    whole = bits_of(count=5000)
    for first, count in ((0, 1), (1, 4999), (31, 33), (4096, 904)):
        for stream, x in bits_of(first=first, count=count).items():
            assert torch.equal(x, whole[stream][first : first + count])


def test_positions_wrap_around_at_2_to_the_32():
    around = bits_of(first=(1 << 32) - 3, count=6)
    start = bits_of(count=3)
    for stream, x in around.items():
        assert torch.equal(x[3:], start[stream])
        assert not torch.equal(x[:3], start[stream])


def test_each_bit_of_a_key_changes_half_of_the_other_bits():
    words = torch.tensor([module.mixed(i) - (1 << 63) for i in range(2000)])
    for place in range(64):
        others = torch.tensor([module.mixed(i ^ 1 << place) - (1 << 63) for i in range(2000)])
        changed = (words ^ others)[:, None] >> torch.arange(64) & 1
        share = changed.double().mean(0)
        assert ((share - 0.5).abs() < LIMIT * 0.5 / math.sqrt(len(words))).all()


@pytest.mark.parametrize("fault", ["one hash less", "a counter alone"])
def test_what_is_related_is_found(monkeypatch, fault):
    folded = module._folded
    if fault == "one hash less":
        monkeypatch.setattr(module, "_folded", lambda x, f: x if f == 0xD2511F53 else folded(x, f))
    else:
        monkeypatch.setattr(module, "_folded", lambda x, factor: x)
    with pytest.raises(AssertionError):
        test_neighbours_are_unrelated("param", 1)
