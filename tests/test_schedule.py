"""The scalars of a step: the same bits in Python and C++, and right."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranger_cuda import _C
from ranger_cuda.backends.schedule import ipow, schedule
from ranger_cuda.state.hyperparameters import Hyperparameters, packed


def hyper(**changed):
    values = {
        "lr": 1e-3,
        "beta1": 0.95,
        "beta2": 0.999,
        "eps": 1e-5,
        "weight_decay": 0.0,
        "rho_threshold": 4.0,
        "alpha": 0.5,
        "outer_momentum": 0.0,
        "low": -math.inf,
        "high": math.inf,
        "k": 6,
        "max_grad_norm": math.inf,
        "decoupled_weight_decay": True,
        "maximize": False,
    }
    return Hyperparameters(**{**values, **changed})


hypers = st.builds(
    hyper,
    lr=st.floats(0, 10),
    beta1=st.floats(0, 1, exclude_max=True),
    beta2=st.floats(0, 1, exclude_max=True),
    weight_decay=st.floats(0, 1),
    rho_threshold=st.floats(4, 100),
    k=st.integers(0, 10),
    decoupled_weight_decay=st.booleans(),
)


@given(hypers, st.one_of(st.integers(1, 50), st.integers(1, 2**24)))
def test_cpp_and_python_give_the_same_bits(h, step):
    assert _C.schedule(packed([h]), step) == tuple(schedule(h, step))


@given(hypers, st.integers(1, 2**24))
def test_a_step_never_ascends_and_is_finite(h, step):
    now = schedule(h, step)
    assert 0.0 <= now.step_size < float("inf")


def exact(beta1, beta2, step, threshold=4):
    """rho_t, and step_size for lr = 1, in 60 decimal digits."""
    with localcontext() as context:
        context.prec = 60
        b1, b2 = Decimal(beta1) ** step, Decimal(beta2) ** step
        rho_inf = 2 / (1 - Decimal(beta2)) - 1
        rho_t = rho_inf - 2 * step * b2 / (1 - b2)
        if rho_t <= threshold:
            return rho_t, 1 / (1 - b1)
        r_t = ((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)).sqrt()
        return rho_t, r_t * (1 - b2).sqrt() / (1 - b1)


@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("beta1", [0.0, 0.9, 0.95, 0.999])
def test_step_sizes_are_those_of_exact_arithmetic(beta1, beta2):
    """The bound: rho_t is a difference of numbers near 2/(1-beta2), each within a few of 2^-53, and
    1-beta2^t is at least about 1-beta2; so its error is at most about 2^-50/(1-beta2)^2, relative
    to rho_t-4, which is at least 0.9 in the steps compared."""
    bound = 2.0**-50 / (1 - beta2) ** 2 + 1e-13
    for step in [1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 100, 1000, 12345, 10**6]:
        rho_t, expected = exact(beta1, beta2, step)
        now = schedule(hyper(lr=1.0, beta1=beta1, beta2=beta2), step)
        assert now.rectified == (rho_t > 4)
        if not now.rectified or rho_t > Decimal("4.9"):
            assert abs(now.step_size / float(expected) - 1) < bound, step


@pytest.mark.parametrize(
    ("beta2", "threshold", "first"), [(0.999, 4, 5), (0.999, 5, 6), (0.9999, 4, 5), (0.9999, 5, 6)]
)
def test_rectification_starts_at_the_right_step(beta2, threshold, first):
    h = hyper(beta2=beta2, rho_threshold=float(threshold))
    assert [schedule(h, t).rectified for t in range(1, 10)] == [t >= first for t in range(1, 10)]
    assert [exact(0.9, beta2, t)[0] > threshold for t in range(1, 10)] == [
        t >= first for t in range(1, 10)
    ]


@given(st.floats(0, 1), st.integers(0, 2**24))
def test_powers_are_as_good_as_pow(base, exponent):
    """Each of at most 2 * 25 multiplications rounds, and a squaring doubles what came before:
    the relative error grows like the exponent, in units of 2^-53, for results that are normal."""
    found, expected = ipow(base, exponent), base**exponent
    if expected > 1e-290:
        assert abs(found / expected - 1) <= (exponent + 2) * 2.0**-52


@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_cycle_ends_every_k_steps(k):
    assert [schedule(hyper(k=k), t).sync for t in range(1, 25)] == [
        t % k == 0 for t in range(1, 25)
    ]
