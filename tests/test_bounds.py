"""Bounds of a group: where a step leaves parameters and slow weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from helpers import give_gradients, twins
from ranger_cuda import RAdam, Ranger

LOW, HIGH = -0.5, 0.25
OPTIMIZERS = [RAdam, Ranger]


def gradients(shapes, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_with_bounds_is_a_step_and_then_a_clamp(backend, cls):
    """Where no slow weight is pulled, a pass of its own over the parameters does the same."""
    a, b = twins([torch.randn(70), torch.randn(3, 5)])
    options = {"lr": 0.1, "backend": backend, **({"k": 1000} if cls is Ranger else {})}
    bounded, plain = cls(a, bounds=(LOW, HIGH), **options), cls(b, **options)
    for step in range(8):
        give_gradients(gradients([p.shape for p in a], step), a, b)
        bounded.step()
        plain.step()
        with torch.no_grad():
            for q in b:
                q.clamp_(LOW, HIGH)
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q)
        assert any((p == LOW).any() for p in a)
        assert any((p == HIGH).any() for p in a)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bounds_come_after_the_pull_and_bind_slow_weights(backend, momentum):
    """k = 2: the step before a pull is clamped; the fast weight that is pulled is not."""
    p, q = Parameter(torch.zeros(40)), Parameter(torch.zeros(40))
    options = {"lr": 1.0, "k": 2, "alpha": 0.9, "outer_momentum": momentum, "backend": backend}
    bounded, plain = Ranger([p], bounds=(LOW, HIGH), **options), Ranger([q], **options)
    for step in range(8):
        give_gradients(gradients([40], step), [p], [q])
        before = q.detach().clone()
        assert torch.equal(p, before)
        bounded.step()
        plain.step()
        assert not torch.equal(p, q), "nothing was bounded"
        q.data.clamp_(LOW, HIGH)
        if step % 2:
            plain.state[q]["slow_param"].clamp_(LOW, HIGH)
            assert torch.equal(bounded.state[p]["slow_param"], p)
        assert torch.equal(p, q)


@pytest.mark.parametrize("rounding", ["exact", "stochastic24", "nearest", "stochastic"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_stored_is_bounded_in_any_rounding(backend, rounding):
    """Numbers of the parameter's dtype bound it whatever the rounding, and the master, too."""
    p = Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16())
    low, high = -0.3984375, 0.25
    optimizer = Ranger([p], lr=0.02, bounds=(low, high), weight_rounding=rounding, backend=backend)
    for step in range(13):
        give_gradients([gradients([5000], step)[0].bfloat16()], [p])
        optimizer.step()
        assert p.min() == low
        assert p.max() == high
        decoded = optimizer.decoded_state(p)["param"]
        assert (decoded.min(), decoded.max()) == (low, high)
    slow = optimizer.decoded_state(p)["slow_param"]
    assert (slow.min(), slow.max()) == (low, high)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_stays_one_and_infinity_does_not(backend, cls):
    p = Parameter(torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0]))
    optimizer = cls([p], lr=0.0, bounds=(0.0, 1.0), backend=backend)
    p.grad = torch.zeros(5)
    optimizer.step()
    assert p[0].isnan()
    assert p[1:].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_each_group_has_its_own_and_they_may_change():
    a, b, c = (Parameter(torch.full((3,), 2.0)) for _ in range(3))
    groups = [
        {"params": [a], "bounds": (None, 1.0)},
        {"params": [b], "bounds": (3.0, None)},
        {"params": [c]},
    ]
    optimizer = Ranger(groups, lr=1e-3)
    give_gradients([torch.ones(3)] * 3, [a, b, c])
    optimizer.step()
    assert (a == 1.0).all()
    assert (b == 3.0).all()
    assert ((c > 1.9) & (c < 2.0)).all()
    optimizer.param_groups[1]["bounds"] = [-1, 0]
    optimizer.param_groups[2]["bounds"] = None
    optimizer.step()
    assert (b == 0.0).all()


def test_they_are_kept_in_a_checkpoint_and_an_older_one_has_none():
    p = Parameter(torch.zeros(3))
    saved = Ranger([p], bounds=(-1.0, 1.0)).state_dict()
    optimizer = Ranger([p])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["bounds"] == (-1.0, 1.0)
    del saved["param_groups"][0]["bounds"]
    optimizer = Ranger([p], bounds=(-2.0, 2.0))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["bounds"] == (-2.0, 2.0)


@pytest.mark.parametrize(
    "bounds",
    [
        (1.0, -1.0),
        (math.nan, 1.0),
        (0.0, math.nan),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        1.0,
        (1.0,),
        (0.0, 1.0, 2.0),
        ("0", 1.0),
        (True, 2.0),
        "ab",
        torch.zeros(2, 2),
        (1e39, None),
        (-math.inf, -1e39),
        {-1.0, 1.0},
        b"\0\1",
        iter((0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_what_are_no_bounds_is_refused(cls, bounds):
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="Invalid bounds value"):
        cls([p], bounds=bounds)
    optimizer = cls([p])
    p.grad = torch.ones(2)
    optimizer.param_groups[0]["bounds"] = bounds
    with pytest.raises(ValueError, match="Invalid bounds value"):
        optimizer.step()
    assert (p == 1.0).all()
    assert not optimizer.state[p]


def test_tensors_and_infinities_may_be_bounds():
    p = Parameter(torch.ones(2))
    optimizer = RAdam([p], lr=1e-3, bounds=torch.tensor([-math.inf, 0.5]))
    p.grad = torch.ones(2)
    optimizer.step()
    assert (p == 0.5).all()
