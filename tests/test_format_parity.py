"""Every format of every native backend returns the reference's bits, and defects would show."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import assert_same, give_gradients, twins
from ptx.device import device
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.state import codecs, formats
from ranger_cuda.state.formats import FORMATS
from targets import ALL_NAMES, ARCHITECTURES, kernels_of, open_target
from test_parity import spread

NEW = [f.name for f in FORMATS if formats.is_low(f.param.dtype) or f.counts_elements]
BY_NAME = {format.name: format for format in FORMATS}
EVERYWHERE = ("cpu-1-thread", "cpu-2-threads", "emulated", "cuda", "triton")


@pytest.fixture(autouse=True)
def _small_tensors_have_8_bits(monkeypatch):
    monkeypatch.setattr(formats, "LEAST_FOR_8_BIT", 0)


def arguments(format):
    """What asks for a format."""
    return {
        "weight_rounding": format.weight_rounding or "exact",
        "state_dtype": format.state_dtype or torch.float32,
    }


def tensors(dtype, generator):
    """Whole groups and parts of one; several chunks; no boundary; gaps; other orders of memory."""
    shapes = [(97,), (3, 64), (5,), (), (0,), (1, 161), (1100,)]
    made = [spread(shape, torch.float32, generator, 3).to(dtype) for shape in shapes]
    made.append(spread((7, 10), torch.float32, generator, 3).to(dtype).t())
    made.append(spread((2, 32, 2, 2), torch.float32, generator, 3).to(dtype).contiguous())
    made[-1] = made[-1].to(memory_format=torch.channels_last)
    made.append(torch.stack([made[0], made[0]], -1)[..., 0])
    return made


def check(target, format, steps=7, build=Ranger, **more):
    """The same steps there and by the reference, with gradients of any dtype, infinite and NaN."""
    generator = torch.Generator().manual_seed(0)
    a, b = twins(tensors(format.param.dtype, generator), target.move)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "seed": -5, **arguments(format), **more}
    native, reference = (
        build(params, backend=backend, **options)
        for params, backend in ((a, target.backend), (b, "reference"))
    )
    for param in (*a, *b):
        param.grad_dtype = None  # any
    for step in range(steps):
        if step == 1:  # gradients are centralized from the middle of a run on
            for group in (*native.param_groups, *reference.param_groups):
                group["centralize"] = "all"
        if step == 2:  # slow weights get momentum in the middle of a run
            for group in (*native.param_groups, *reference.param_groups):
                group["outer_momentum"] = 0.9
        if step == 3:  # and bounds
            for group in (*native.param_groups, *reference.param_groups):
                group["bounds"] = (-0.3, 1.0)
        dtypes = formats.GRAD_DTYPES
        gradients = [
            None
            if (i + step) % 5 == 4
            else spread(p.shape, torch.float32, generator).to(dtypes[(i + step) % len(dtypes)])
            for i, p in enumerate(a)
        ]
        if step == steps - 2:
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
                for gradient in gradients[:3]:
                    if gradient is not None:
                        gradient.view(-1)[17 * i % gradient.numel()] = value
        give_gradients(gradients, a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")
    return native


@pytest.mark.parametrize("target", EVERYWHERE, indirect=True)
@pytest.mark.parametrize("name", NEW)
def test_every_bit_of_a_format_is_the_reference_s(target, name):
    native = check(target, BY_NAME[name], k=2, alpha=0.3, weight_decay=0.1)
    rows = native._dispatcher._native.roster.rows(0)
    assert {row[1] for row in rows} == {name}, "not by these kernels"


# What takes long: each codec at least once, here and in `make ptx`.
SOME = ["bfloat16_stochastic24_8bit", "float16_exact", "bfloat16_exact_bfloat16"]
SOME += ["float16_stochastic_8bit", "bfloat16_nearest", "float16_nearest", "bfloat16_stochastic"]


@pytest.mark.parametrize("target", ["interpreted"], indirect=True)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == SOME[0] else pytest.mark.ptx) for n in SOME],
)
def test_every_bit_in_triton_s_interpreter_is_the_reference_s(target, name):
    check(target, BY_NAME[name], steps=4, k=2, alpha=0.3, weight_decay=0.1)


# Both kinds of parameters and all moments, one of each here, and all in `make ptx`.
COMPILED = {"bfloat16_stochastic24_8bit", "float32_bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, sm, marks=() if name in COMPILED and sm == 90 else pytest.mark.ptx)
        for sm in ARCHITECTURES
        for name in NEW
    ],
)
def test_every_bit_of_what_nvcc_compiles_is_the_reference_s(name, architecture, monkeypatch):
    format = BY_NAME[name]
    target = open_target(f"compiled-cuda-{architecture}", monkeypatch, kernels_of(format))
    optimizer = check(target, format, steps=5, k=2, alpha=0.3, weight_decay=0.1)
    with device().counting() as launches:
        optimizer.step()
    *before, schedule, first, second = [launch.kernel for launch in launches]
    assert ["CentralizeKernel" in kernel for kernel in before] == [False, True]
    assert "ScheduleKernel" in before[0]
    assert "ScheduleKernel" in schedule
    main = [first, second]
    assert ["Scattered" in kernel for kernel in main] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, sm, marks=() if name in SOME and sm == 90 else pytest.mark.ptx)
        for sm in ARCHITECTURES
        for name in NEW
    ],
)
def test_every_bit_of_what_triton_compiles_is_the_reference_s(name, architecture, monkeypatch):
    target = open_target(f"compiled-triton-{architecture}", monkeypatch)
    check(target, BY_NAME[name], steps=5, k=2, alpha=0.3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("target", "rounding"),
    [
        *itertools.product(("cpu-2-threads", "emulated"), formats.WEIGHT_ROUNDINGS),
        ("interpreted", "stochastic24"),
    ],
    indirect=["target"],
)
def test_lookahead_pulls_what_its_inner_optimizer_stores(target, rounding):
    format = BY_NAME[f"bfloat16_{rounding}"]

    def build(params, *, backend, **options):
        return Lookahead(RAdam(params, backend=backend, **options), k=2, alpha=0.3, backend=backend)

    check(target, format, steps=5, build=build)


# --- defects of the spec, which the kernels do not have ------------------------------------------


def check_tie(target):
    """A step to the middle between two neighbours, from where the next must go on."""
    start = torch.tensor([1.0, -1.0, 3.0]).bfloat16()
    (a,), (b,) = twins([start], target.move)
    options = {"lr": 2.0**-8, "betas": (0.5, 0.5), "rho_threshold": 1e6}
    native = RAdam([a], backend=target.backend, **options)
    reference = RAdam([b], backend="reference", **options)
    for step in range(2):
        give_gradients([-start], [a], [b], move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, [a], [b], f"step {step + 1}")


# What nvcc compiles is above.
@pytest.mark.parametrize(
    "target", [n for n in ALL_NAMES if not n.startswith("compiled-cuda")], indirect=True
)
def test_a_tie_is_the_reference_s(target):
    check_tie(target)


def residual_with_the_wrong_sign_at_a_tie(patch):
    kept = codecs.Split.encode

    def encode(self, value, stored, rest, random):
        kept(self, value, stored, rest, random)
        residual = rest["residual"].view(torch.int16)
        residual[residual == -(2**15)] = 2**15 - 1

    patch.setattr(codecs.Split, "encode", encode)


def ties_to_even(patch):
    """Where half a last place is rounded up, the rest of some does not fit."""
    kept = codecs.Split24.encode

    def encode(self, value, stored, rest, random):
        kept(self, value, stored, rest, random)
        up = rest[self.rest[0].name] == -128
        stored[up & (stored.view(torch.int16) % 2 == 1)] *= 1 - 2**-8

    patch.setattr(codecs.Split24, "encode", encode)


def a_group_s_maximum_without_its_last_lane(patch):
    kept = codecs.Grouped.scales

    def scales(self, magnitude):
        seen = magnitude.clone()
        seen[codecs.GROUP - 1 :: codecs.GROUP] = 0
        return kept(self, seen)

    patch.setattr(codecs.Grouped, "scales", scales)


def random_bits_used_for_two_streams(patch):
    from ranger_cuda.backends import reference

    kept = reference.random_bits

    def random_bits(*arguments):
        bits = kept(*arguments)
        return bits._replace(exp_avg_sq=bits.exp_avg)

    patch.setattr(reference, "random_bits", random_bits)


def the_same_random_bits_in_each_step(patch):
    from ranger_cuda.backends import reference

    kept = reference.keys_of
    patch.setattr(reference, "keys_of", lambda seed, place, step, **_: kept(seed, place, 1))


DEFECTS = [
    (ties_to_even, "bfloat16_stochastic24"),
    (a_group_s_maximum_without_its_last_lane, "float32_8bit"),
    (random_bits_used_for_two_streams, "float32_8bit"),
    (the_same_random_bits_in_each_step, "bfloat16_stochastic"),
]


@pytest.mark.parametrize("target", ["cpu-1-thread"], indirect=True)
@pytest.mark.parametrize(("plant", "name"), DEFECTS)
def test_a_planted_defect_is_found(target, plant, name, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"step \d"):
        check(target, BY_NAME[name])


@pytest.mark.parametrize("target", ["cpu-1-thread"], indirect=True)
def test_a_residual_with_the_wrong_sign_is_found(target, monkeypatch):
    residual_with_the_wrong_sign_at_a_tie(monkeypatch)
    with pytest.raises(AssertionError, match="residual"):
        check_tie(target)
