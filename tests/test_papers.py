"""The algorithms of the papers, written out in float64, and ``torch.optim.RAdam``.

All comparisons are in float64 with one bound, 1e-12 relative. Each step rounds some 15 times and
the errors of 50 steps add up to about 50 * 15 * 1.1e-16 = 8e-14 where nothing cancels; ten times
that leaves room for the parameters' own cancellation, and any mistake in a formula is far above.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers import assert_same, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger

STEPS = 50
BOUND = 1e-12
BACKENDS = ("reference", "cpu")


def gradients(seed=0, shape=(31,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(STEPS)]


def start(shape=(31,), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=dtype)


def relative_difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def radam_of_the_paper(theta, grads, lr, beta1, beta2, eps, threshold=4.0):
    """Liu et al., Algorithm 2, line by line; eps is added to the root of v_t before its bias
    correction, as RAdam's authors and torch have it. Yields theta_t."""
    m = torch.zeros_like(theta)
    v = torch.zeros_like(theta)
    rho_inf = 2 / (1 - beta2) - 1
    for t, g in enumerate(grads, 1):
        v = beta2 * v + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * g
        m_hat = m / (1 - beta1**t)
        rho_t = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho_t > threshold:
            l_t = math.sqrt(1 - beta2**t) / (v.sqrt() + eps)
            r_t = math.sqrt(
                ((rho_t - 4) * (rho_t - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho_t)
            )
            theta = theta - lr * r_t * m_hat * l_t
        else:
            theta = theta - lr * m_hat
        yield theta


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.99), (0.0, 0.9), (0.9, 0.5)])
def test_radam_is_algorithm_2_of_its_paper(backend, betas):
    param = torch.nn.Parameter(start())
    grads = gradients()
    *_, expected = radam_of_the_paper(start(), grads, 1e-2, *betas, 1e-8)
    found = run(RAdam([param], lr=1e-2, betas=betas, backend=backend), param, grads)
    assert relative_difference(found, expected) < BOUND


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "alpha"), [(6, 0.5), (5, 0.8), (1, 0.3), (7, 1.0)])
def test_ranger_is_radam_under_lookahead_s_algorithm_1(backend, k, alpha):
    """Zhang et al., Algorithm 1: the inner optimizer keeps its moments across a sync."""
    param = torch.nn.Parameter(start())
    grads = gradients(1)
    slow, moments, t = start(), None, 0
    while t < STEPS:  # outer loop
        fast = slow.clone()
        for grad in grads[t : t + k]:  # inner loop
            t += 1
            fast, moments = one_radam_step(fast, grad, moments, t)
        if t % k == 0:
            slow = slow + alpha * (fast - slow)
    expected = slow if STEPS % k == 0 else fast
    found = run(Ranger([param], lr=1e-2, k=k, alpha=alpha, backend=backend), param, grads)
    assert relative_difference(found, expected) < BOUND


def one_radam_step(theta, g, moments, t, lr=1e-2, beta1=0.95, beta2=0.999, eps=1e-5):
    m, v = moments if moments else (torch.zeros_like(theta), torch.zeros_like(theta))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho_t <= 4:
        return theta - lr * m / (1 - beta1**t), (m, v)
    r_t = math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))
    adaptive = math.sqrt(1 - beta2**t) / (v.sqrt() + eps)
    return theta - lr * r_t * m / (1 - beta1**t) * adaptive, (m, v)


OPTIONS = [
    {},
    {"lr": 0.1},
    {"lr": torch.tensor(1e-2, dtype=torch.float64)},
    {"betas": (0.8, 0.95)},
    {"betas": (0.0, 0.99)},
    {"eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_radam_with_threshold_5_is_torch_s(backend, dtype, options):
    a, b = twins([start(dtype=dtype)])
    grads = gradients(2, dtype=dtype)
    ours = run(RAdam(a, rho_threshold=5, backend=backend, **options), a[0], grads)
    theirs = run(torch.optim.RAdam(b, foreach=False, **options), b[0], grads)
    assert relative_difference(ours, theirs) < BOUND


def test_lookahead_around_radam_is_ranger_bit_for_bit():
    """With parameters that join late, miss steps, and groups with cycles of their own."""
    made = [torch.randn(shape) for shape in [(), (5,), (40, 30), (3, 4, 5)]]
    a, b = twins(made)
    common = {"betas": (0.95, 0.999), "eps": 1e-5, "weight_decay": 0.1}
    ranger = Ranger([{"params": a[:2]}, {"params": a[2:], "k": 4, "alpha": 0.7}], **common)
    inner = RAdam(b[:2], decoupled_weight_decay=True, **common)
    wrapped = Lookahead(inner)
    wrapped.add_param_group({"params": b[2:], "lookahead_k": 4, "lookahead_alpha": 0.7})
    generator = torch.Generator().manual_seed(3)
    for step in range(25):
        grads = [
            None
            if step < 3 * i or (step + i) % 6 == 5
            else torch.randn(p.shape, generator=generator)
            for i, p in enumerate(a)
        ]
        give_gradients(grads, a, b)
        ranger.step()
        wrapped.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q), step
            for name, value in ranger.state[p].items():
                assert torch.equal(value, inner.state[q][name]), (step, name)


def test_a_cycle_of_one_that_goes_all_the_way_is_radam_bit_for_bit():
    a, b = twins([torch.randn(1000) * 10 ** torch.linspace(-9, 3, 1000)])
    ranger = Ranger(a, k=1, alpha=1.0)
    radam = RAdam(b, betas=(0.95, 0.999), eps=1e-5, decoupled_weight_decay=True)
    for _ in range(25):
        give_gradients([torch.randn(1000)], a, b)
        ranger.step()
        radam.step()
        assert torch.equal(a[0], b[0])


def test_alpha_zero_returns_to_the_start_at_every_sync():
    param = torch.nn.Parameter(torch.randn(50))
    first = param.detach().clone()
    ranger = Ranger([param], k=3, alpha=0.0, weight_decay=0.1)
    for step in range(1, 13):
        param.grad = torch.randn(50)
        ranger.step()
        assert torch.equal(param, first) == (step % 3 == 0)


def test_the_two_backends_agree_in_every_option():
    for options in OPTIONS:
        a, b = twins([start(dtype=torch.float32)])
        ours = Ranger(a, backend="cpu", **options)
        reference = Ranger(b, backend="reference", **options)
        for grad in gradients(4, dtype=torch.float32):
            give_gradients([grad], a, b)
            ours.step()
            reference.step()
        assert_same(ours, reference, a, b, options)
