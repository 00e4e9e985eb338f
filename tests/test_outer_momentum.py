"""Momentum of slow weights: the papers' algorithm, and what becomes of its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Parameter

from helpers import assert_same, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger

BUFFER = "outer_momentum_buffer"
K, ALPHA, MU = 3, 0.7, 0.9


def gradients(shapes, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def made(params, **changed):
    options = {"lr": 0.05, "k": K, "alpha": ALPHA, "outer_momentum": MU, **changed}
    return Ranger(params, **options)


def train(optimizer, params, steps):
    for step in steps:
        give_gradients(gradients([p.shape for p in params], step, params[0].dtype), params)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_sync_is_a_step_of_sgd_on_the_way_back(backend, nesterov):
    """SNOO, arXiv:2510.15830, Algorithm 1; DiLoCo, arXiv:2311.08105, with one worker."""
    inner = Parameter(torch.linspace(-2, 2, 50, dtype=torch.float64))
    outer = Parameter(inner.detach().clone())
    ours = Parameter(inner.detach().clone())
    radam = RAdam([inner], lr=0.05, backend=backend)
    sgd = torch.optim.SGD([outer], lr=ALPHA, momentum=MU, nesterov=nesterov)
    ranger = Ranger(
        [ours],
        lr=0.05,
        betas=(0.9, 0.999),
        eps=1e-8,
        k=K,
        alpha=ALPHA,
        outer_momentum=MU,
        outer_nesterov=nesterov,
        backend=backend,
    )
    for step in range(8 * K):
        (gradient,) = gradients([50], step, torch.float64)
        inner.grad = ours.grad = gradient
        radam.step()
        if step % K == K - 1:
            outer.grad = outer.detach() - inner.detach()
            sgd.step()
            inner.data.copy_(outer.data)
        ranger.step()
        torch.testing.assert_close(ours, inner, rtol=1e-13, atol=1e-13)
    slow, buffer = ranger.state[ours]["slow_param"], ranger.state[ours][BUFFER]
    torch.testing.assert_close(slow, outer.detach(), rtol=1e-13, atol=1e-13)
    mine = sgd.state[outer]["momentum_buffer"]
    torch.testing.assert_close(buffer, mine, rtol=1e-13, atol=1e-13)


def test_the_algorithm_by_hand():
    """Two syncs of one number whose fast weight falls by 1 in between, alpha 0.5, momentum 0.5:
    d = 1, b = 1, u = 1.5, slow = 2 - 0.75; then d = 1, b = 1.5, u = 1.75, slow less 0.875."""
    p = Parameter(torch.tensor([2.0]))
    optimizer = Lookahead(torch.optim.SGD([p], lr=0.5), k=2, alpha=0.5, outer_momentum=0.5)
    found = []
    for _ in range(4):
        p.grad = torch.ones(1)
        optimizer.step()
        found.append(p.item())
    assert found == [1.5, 1.25, 0.75, 0.375]
    assert optimizer.state[p][BUFFER].item() == 1.5


def test_without_momentum_there_is_no_buffer():
    for momentum in (0.0, MU):
        p = Parameter(torch.ones(3))
        optimizer = made([p], outer_momentum=momentum)
        train(optimizer, [p], range(K))
        assert (BUFFER in optimizer.state[p]) == (momentum > 0)


def test_ranger_and_lookahead_around_radam_return_the_same_bits():
    a, b = twins([torch.randn(70), torch.randn(3, 5)])
    fused = made(a, betas=(0.9, 0.999), eps=1e-8)
    wrapped = Lookahead(RAdam(b, lr=0.05, decoupled_weight_decay=True), K, ALPHA, outer_momentum=MU)
    for step in range(4 * K):
        give_gradients(gradients([p.shape for p in a], step), a, b)
        fused.step()
        wrapped.step()
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(fused.state[x][BUFFER], wrapped.state[y][BUFFER])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("at", range(1, 2 * K + 1))
def test_a_run_resumed_at_any_point_has_the_bits_of_one_that_was_not(backend, at):
    (a,), (b,) = twins([torch.randn(40)])
    whole, first = made([a], backend=backend), made([b], backend=backend)
    train(whole, [a], range(3 * K))
    train(first, [b], range(at))
    c = Parameter(b.detach().clone())
    resumed = made([c], backend=backend, outer_momentum=0.0)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert resumed.param_groups[0]["outer_momentum"] == MU
    train(resumed, [c], range(at, 3 * K))
    assert_same(whole, resumed, [a], [c], "after all steps")


def test_a_checkpoint_without_momentum_starts_it_from_zero():
    (a,), (b,) = twins([torch.randn(40)])
    plain = made([a], outer_momentum=0.0)
    train(plain, [a], range(K))
    b.data.copy_(a.data)
    saved = plain.state_dict()
    for group in saved["param_groups"]:
        del group["outer_momentum"], group["outer_nesterov"]  # of an earlier version
    optimizer = made([b])
    optimizer.load_state_dict(saved)
    train(optimizer, [b], range(K, K + 1))
    assert torch.equal(optimizer.state[b][BUFFER], torch.zeros(40))


@pytest.mark.parametrize("build", [made, lambda p: Lookahead(RAdam(p), outer_momentum=MU)])
def test_momentum_that_is_switched_off_is_kept_and_not_used(build):
    p = Parameter(torch.randn(40))
    optimizer = build([p])
    train(optimizer, [p], range(12))
    kept = optimizer.state[p][BUFFER].clone()
    assert kept.any()
    for group in optimizer.param_groups:
        group["outer_momentum"] = 0.0
    (q,), other = twins([p.detach()])[0], RAdam([p])
    without = build([q])
    without.load_state_dict(optimizer.state_dict())
    del without.state[q][BUFFER], other
    for step in range(12, 24):
        give_gradients(gradients([40], step), [p], [q])
        optimizer.step()
        without.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p][BUFFER], kept)


def test_slow_weights_that_are_reset_have_no_momentum():
    p = Parameter(torch.randn(40))
    optimizer = made([p])
    train(optimizer, [p], range(K + 1))
    assert optimizer.state[p][BUFFER].any()
    optimizer.reset_slow_weights()
    assert not optimizer.state[p][BUFFER].any()
    assert torch.equal(optimizer.state[p]["slow_param"], p)


def test_the_buffer_is_decoded():
    p = Parameter(torch.randn(40).bfloat16())
    optimizer = made([p])
    train(optimizer, [p], range(K))
    assert torch.equal(optimizer.decoded_state(p)[BUFFER], optimizer.state[p][BUFFER])
    assert optimizer.state[p][BUFFER].dtype == torch.float32


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), "0.9", None])
def test_what_is_no_momentum_is_refused(value):
    params = [Parameter(torch.ones(1))]
    for build in (made, lambda p, **options: Lookahead(RAdam(p), **options)):
        with pytest.raises((ValueError, TypeError), match="outer_momentum"):
            build(params, outer_momentum=value)
        with pytest.raises(ValueError, match="outer_nesterov"):
            build(params, outer_nesterov=2)
    optimizer = made(params)
    train(optimizer, params, range(1))
    before = params[0].clone()
    optimizer.param_groups[0]["outer_momentum"] = value
    params[0].grad = torch.ones(1)
    with pytest.raises((ValueError, TypeError), match="outer_momentum"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_buffer_of_another_shape_is_refused():
    p = Parameter(torch.randn(40))
    optimizer = made([p])
    train(optimizer, [p], range(1))
    saved = optimizer.state_dict()
    saved["state"][0][BUFFER] = torch.zeros(3)
    with pytest.raises(ValueError, match="outer_momentum_buffer"):
        optimizer.load_state_dict(saved)
    optimizer.state[p][BUFFER] = torch.zeros(3)
    p.grad = torch.ones(40)
    with pytest.raises(RuntimeError, match="outer_momentum_buffer"):
        optimizer.step()
