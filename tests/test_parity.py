"""Every native backend returns the reference's bits: parameters and all state, every step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import assert_same, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.state.formats import GRAD_DTYPES
from targets import ALL_NAMES

STEPS = 25
FLOATS = (torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.complex64, torch.complex128)


def spread(shape, dtype, generator, decades=12):
    """Random numbers with magnitudes across many decades, denormals and exact zeros among them."""
    real = dtype.to_real() if dtype.is_complex else dtype
    shape = (*shape, 2) if dtype.is_complex else tuple(shape)
    exponent = (torch.rand(shape, generator=generator, dtype=real) - 0.5) * decades
    values = torch.randn(shape, generator=generator, dtype=real) * 10.0**exponent
    kind = torch.rand(shape, generator=generator)
    values = torch.where(kind < 0.05, values * torch.finfo(real).tiny, values)
    values = torch.where(kind > 0.97, torch.zeros_like(values), values)
    return torch.view_as_complex(values) if dtype.is_complex else values


def reverse(t):
    return t.permute(list(range(t.dim()))[::-1])


LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "reversed": lambda t: reverse(reverse(t).contiguous()),
    "sliced": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.shape[0] else t,
}
PARAM_LAYOUTS = sorted(LAYOUTS.keys() - {"expanded"})  # in-place writes need memory per element

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
members = st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from(PARAM_LAYOUTS))
betas = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-7])
groups = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 1e-3, 0.3]),
        "betas": st.tuples(betas, betas),
        "eps": st.sampled_from([1e-30, 1e-8, 1e-5, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "decoupled_weight_decay": st.booleans(),
        "rho_threshold": st.sampled_from([4.0, 5.0, 100.0]),
        "maximize": st.booleans(),
        "k": st.sampled_from([1, 2, 5, 6]),
        "alpha": st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
        "outer_momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "outer_nesterov": st.booleans(),
        "bounds": st.sampled_from([None, (-0.5, 0.25), (0.0, None), (None, 0.1)]),
        "centralize": st.sampled_from([None, "conv", "all"]),
    }
)
models = st.lists(
    st.tuples(groups, st.lists(members, min_size=1, max_size=4)), min_size=1, max_size=3
)


@pytest.mark.parametrize("target", [n for n in ALL_NAMES if n != "interpreted"], indirect=True)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(models, st.integers(0, 2**31))
def test_every_bit_of_parameters_and_state_is_the_reference_s(target, drawn, seed):
    check_every_bit(target, drawn, seed, STEPS)


@pytest.mark.parametrize("target", ["interpreted"], indirect=True)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(models, st.integers(0, 2**31))
def test_every_bit_in_triton_s_interpreter_is_the_reference_s(target, drawn, seed):
    check_every_bit(target, drawn, seed, 13)


def check_every_bit(target, drawn, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    sets = ([], [])
    grouped = ([], [])
    for options, tensors in drawn:
        if any(dtype.is_complex for _, dtype, _ in tensors):
            options = {**options, "centralize": None}
        made = [LAYOUTS[layout](spread(s, d, generator, 3)) for s, d, layout in tensors]
        for params, side, new in zip(sets, grouped, twins(made, target.move), strict=True):
            params.extend(new)
            side.append({"params": new, **options})
    native = Ranger(grouped[0], backend=target.backend)
    reference = Ranger(grouped[1], backend="reference")
    layouts = sorted(LAYOUTS)
    for step in range(steps):
        gradients = [
            None
            if (i + step) % 4 == 3
            else LAYOUTS[layouts[(i + step) % len(layouts)]](spread(p.shape, p.dtype, generator))
            for i, p in enumerate(sets[0])
        ]
        give_gradients(gradients, *sets, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, *sets, f"step {step + 1}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.slow
def test_large_tensors_cut_into_chunks_are_the_reference_s(target, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1_000_003,), (16384,), (16385,), (2, 16384), (500, 700), (3,)]
    if target.slow:
        shapes = [(40_003,), (8192,), (8193,), (2, 8192), (90, 100), (3,)]
    if target.small:
        shapes = [(1003,), (256,), (257,), (2, 64), (20, 30), (3,)]
    made = [spread(shape, dtype, generator, 3) for shape in shapes]
    made.append(made[-2].t())
    a, b = twins(made, target.move)
    native, reference = Ranger(a, backend=target.backend), Ranger(b, backend="reference")
    for step in range(13 if target.slow else STEPS):
        gradients = [spread(p.shape, dtype, generator) for p in a]
        give_gradients(gradients, a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


def every_number(dtype):
    """All numbers of a 16-bit type, and many of a wider one: NaN is compared elsewhere."""
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        return numbers[~numbers.isnan()]
    generator = torch.Generator().manual_seed(0)
    return torch.cat([spread((999,), dtype, generator, d) for d in (1, 12, 60)])


@pytest.mark.parametrize("gradient", GRAD_DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_any_dtype_are_read_where_they_are(target, dtype, gradient, monkeypatch):
    numbers = every_number(gradient)
    if target.small or target.slow:
        numbers = numbers[
            torch.randperm(len(numbers), generator=torch.Generator())[
                : 201 if target.slow else 1001
            ]
        ]
    # Side by side, on no boundary, and with gaps.
    layouts = (lambda t: t, lambda t: torch.cat([t[:1], t])[1:], lambda t: t.repeat(2, 1).t()[:, 0])
    a, b = twins([torch.ones(len(numbers), dtype=dtype) for _ in layouts], target.move)
    native = Ranger(a, k=2, weight_decay=0.1, backend=target.backend)
    reference = Ranger(b, k=2, weight_decay=0.1, backend="reference")
    monkeypatch.setattr("ranger_cuda.step.native.plain_grad", lambda *_: pytest.fail("a copy"))
    for param in (*a, *b):
        param.grad_dtype = gradient
    for step in range(6 if target.slow else 9):  # rectified from the fifth on
        gradients = [layout(numbers.roll(step)) for layout in layouts]
        give_gradients(gradients, a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_and_nan_gradients_are_the_reference_s(target, dtype):
    values = [float("inf"), -float("inf"), float("nan"), 1e38, 1.0, 0.0, -0.0, 1e-45]
    a, b = twins([torch.tensor(values * 5, dtype=dtype)], target.move)
    native, reference = Ranger(a, k=2, backend=target.backend), Ranger(b, k=2, backend="reference")
    for step in range(STEPS):
        gradient = torch.tensor(values[step % 8 :] + values * 5, dtype=dtype)[:40]
        give_gradients([gradient], a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 2)])
def test_a_lazily_negated_gradient_is_negated(target, shape):
    z = torch.randn(shape, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    a, b = twins([torch.ones(shape), torch.ones(*shape, 2)[..., 0]], target.move)
    native, expected = RAdam(a, backend=target.backend), RAdam(b, backend="reference")
    for params, gradient in ((a, target.move(lazy)), (b, (-z.imag).clone())):
        for param in params:
            param.grad = gradient
    native.step()
    expected.step()
    assert_same(native, expected, a, b, "after a step")


def test_a_lazily_conjugated_gradient_is_conjugated(target):
    z = torch.randn(5, dtype=torch.complex64)
    a, b = twins([torch.ones(5, dtype=torch.complex64)], target.move)
    a[0].grad, b[0].grad = target.move(z.conj()), z.conj().resolve_conj().clone()
    assert a[0].grad.is_conj()
    native, expected = RAdam(a, backend=target.backend), RAdam(b, backend="reference")
    native.step()
    expected.step()
    assert_same(native, expected, a, b, "after a step")


@pytest.mark.parametrize(("alpha", "momentum"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.9)])
def test_the_lookahead_wrapper_is_the_reference_s(target, alpha, momentum):
    generator = torch.Generator().manual_seed(1)
    made = [
        spread(s, d, generator, 3)
        for s in [(), (7, 5), (200 if target.small else 9_000 if target.slow else 40_000,)]
        for d in DTYPES
    ]
    made += [LAYOUTS[layout](torch.randn(4, 3, 2, 5)) for layout in PARAM_LAYOUTS]
    a, b = twins(made, target.move)
    native, reference = (
        Lookahead(
            RAdam(params, backend=backend), 3, alpha, outer_momentum=momentum, backend=backend
        )
        for params, backend in ((a, target.backend), (b, "reference"))
    )
    for step in range(10):
        gradients = [
            None if (i + step) % 5 == 4 else spread(p.shape, p.dtype, generator)
            for i, p in enumerate(a)
        ]
        give_gradients(gradients, a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


def test_a_narrower_instruction_set_gives_the_same_bits():
    """Each in a process of its own: the set is chosen at the first use."""
    program = (
        "import sys, torch\n"
        "from helpers import bits\n"
        "from ranger_cuda import Ranger, _C\n"
        "print(_C.build_info()['cpu_capability'])\n"
        "g = torch.Generator().manual_seed(0)\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    p = torch.nn.Parameter(torch.randn(70_001, generator=g, dtype=dtype))\n"
        "    o = Ranger([p], weight_decay=0.1, backend=sys.argv[1])\n"
        "    for _ in range(13):\n"
        "        p.grad = torch.randn(70_001, generator=g, dtype=dtype) ** 5\n"
        "        o.step()\n"
        "    print(*(int(bits(t).long().sum()) for t in (p, *o.state[p].values())))\n"
    )

    def run(capability, backend):
        environment = {**os.environ, "RANGER_CUDA_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", program, backend]
        folder = Path(__file__).parent
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent)])
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        chosen, *sums = result.stdout.splitlines()
        return chosen, sums

    wide, expected = run("avx512", "reference")
    sets = {"baseline", "avx2", "avx512"}
    for capability in sets:
        chosen, found = run(capability, "cpu")
        assert chosen == capability or wide != "avx512", "a set that this processor has was skipped"
        assert found == expected, capability
