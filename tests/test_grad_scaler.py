"""torch.amp.GradScaler, in its default way and with ``amp_scaling=True``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from optimizer_infos import bytes_of, each_info, random_params, ranger, same, set_grads, snapshot
from ranger_cuda import Lookahead, RAdam, Ranger

SCALE = 1024.0  # a power of two: scaling and unscaling round nothing, so bits can be compared
each_class = pytest.mark.parametrize("cls", [RAdam, ranger], ids=["RAdam", "Ranger"])
either_way = pytest.mark.parametrize("amp_scaling", [False, True])


def scaler(**kwargs):
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, **kwargs})


def set_scaled_grads(params, step, scale, bad=None):
    set_grads(params, step)
    for param in params:
        param.grad.mul_(scale)
    if bad is not None:
        params[-1].grad.view(-1)[0] = bad


def prepare(grad_scaler):
    grad_scaler.scale(torch.ones(()))  # makes its tensors, as scaling a loss does


def run(optimizer, params, grad_scaler, steps, overflow_at=(), clip=None):
    prepare(grad_scaler)
    for step in steps:
        bad = float("inf") if step in overflow_at else None
        set_scaled_grads(params, step, grad_scaler.get_scale(), bad)
        if clip is not None:
            grad_scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, clip)
        grad_scaler.step(optimizer)
        grad_scaler.update()


def run_unscaled(optimizer, params, steps, clip=None):
    for step in steps:
        set_grads(params, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def build(cls, amp_scaling, shapes=((5, 4), (3,), ()), **kwargs):
    params = random_params(*shapes)
    return params, cls(params, amp_scaling=amp_scaling, **kwargs)


@either_way
@each_class
def test_scaled_training_is_unscaled_training(cls, amp_scaling):
    params, optimizer = build(cls, amp_scaling)
    others, other = build(cls, False)
    run(optimizer, params, scaler(), range(8))
    run_unscaled(other, others, range(8))
    assert same(snapshot(optimizer), snapshot(other))


@each_info
def test_the_default_way_serves_every_optimizer(config):
    params, others = random_params((5, 4), (3,)), random_params((5, 4), (3,))
    optimizer, other = config.build(params), config.build(others)
    run(optimizer, params, scaler(), range(8), overflow_at=(3, 4))
    run_unscaled(other, others, (0, 1, 2, 5, 6, 7))
    assert same(snapshot(optimizer), snapshot(other))


@either_way
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@each_class
def test_an_overflow_changes_nothing_at_all(cls, bad, amp_scaling):
    params, optimizer = build(cls, amp_scaling)
    grad_scaler = scaler()
    for step in range(3):  # in mid-cycle: k is 2
        run(optimizer, params, grad_scaler, [step])
    before = snapshot(optimizer)
    set_scaled_grads(params, 3, SCALE, bad)
    assert grad_scaler.step(optimizer) is None
    grad_scaler.update()
    assert same(snapshot(optimizer), before)
    assert grad_scaler.get_scale() == SCALE / 2

    # The next step goes by its own flag, and is step 4 of a run without the overflow.
    run(optimizer, params, grad_scaler, [4])
    others, other = build(cls, False)
    run_unscaled(other, others, (0, 1, 2, 4))
    assert same(snapshot(optimizer), snapshot(other))


@each_class
def test_an_overflow_at_the_first_step_makes_no_state(cls):
    params, optimizer = build(cls, True)
    before = snapshot(optimizer)
    run(optimizer, params, scaler(), [0], overflow_at=[0])
    assert same(snapshot(optimizer), before)
    assert not optimizer.state


@either_way
@each_class
def test_clipping_after_unscaling_clips_once_and_unscales_once(cls, amp_scaling):
    params, optimizer = build(cls, amp_scaling)
    others, other = build(cls, False)
    run(optimizer, params, scaler(), range(6), clip=0.5, overflow_at=[2])
    run_unscaled(other, others, (0, 1, 3, 4, 5), clip=0.5)
    assert same(snapshot(optimizer), snapshot(other))


@either_way
@pytest.mark.parametrize("scale", [2.0, 2.0**16])
@each_class
def test_max_grad_norm_is_of_the_unscaled_gradients(cls, scale, amp_scaling):
    params, optimizer = build(cls, amp_scaling, max_grad_norm=0.5)
    others, other = build(cls, False, max_grad_norm=0.5)
    run(optimizer, params, scaler(init_scale=scale), range(4))
    run_unscaled(other, others, range(4))
    # The scale is a power of two, so the norm of scaled gradients is the scaled norm exactly.
    assert same(snapshot(optimizer)["params"], snapshot(other)["params"])


@each_class
def test_the_step_that_unscales_leaves_the_gradients_scaled(cls):
    params, optimizer = build(cls, True)
    grad_scaler = scaler()
    prepare(grad_scaler)
    set_scaled_grads(params, 0, SCALE)
    before = [bytes_of(p.grad) for p in params]
    grad_scaler.step(optimizer)
    assert [bytes_of(p.grad) for p in params] == before


@each_class
def test_a_scale_that_is_no_power_of_two_is_divided_out(cls):
    params, optimizer = build(cls, True)
    others, other = build(cls, False)
    run(optimizer, params, scaler(init_scale=1000.0), [0])
    run_unscaled(other, others, [0])
    for param, expected in zip(params, others, strict=True):
        m, n = optimizer.state[param]["exp_avg"], other.state[expected]["exp_avg"]
        # Scaling rounds, 1 / scale rounds, their product rounds; then each moment rounds once.
        assert ((m - n).abs() <= 6 * 2.0**-24 * n.abs()).all()


@each_class
def test_a_scaled_step_without_any_gradient_changes_nothing(cls):
    params, optimizer = build(cls, True)
    grad_scaler = scaler()
    prepare(grad_scaler)
    before = snapshot(optimizer)
    grad_scaler.step(optimizer)
    assert same(snapshot(optimizer), before)
    assert all(param.grad is None for param in params)


@each_class
def test_nothing_of_a_scaled_step_stays_behind(cls):
    params, optimizer = build(cls, True)
    others, other = build(cls, False)
    run(optimizer, params, scaler(), range(2))
    run_unscaled(optimizer, params, range(2, 5))  # without a scaler from now on
    run_unscaled(other, others, range(5))
    assert same(snapshot(optimizer), snapshot(other))
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@each_class
def test_nothing_of_a_failed_scaled_step_stays_behind(cls):
    params, optimizer = build(cls, True)
    others, other = build(cls, False)
    grad_scaler = scaler()
    prepare(grad_scaler)
    set_scaled_grads(params, 0, SCALE)
    optimizer.param_groups[0]["eps"] = 0.0
    with pytest.raises(ValueError, match="Invalid epsilon"):
        grad_scaler.step(optimizer)
    optimizer.param_groups[0]["eps"] = other.param_groups[0]["eps"]
    grad_scaler.step(optimizer)  # again: with a scale left over it would unscale twice
    grad_scaler.update()
    run_unscaled(other, others, [0])
    assert same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("cls", [RAdam, Ranger, Lookahead])
def test_amp_scaling_is_never_announced_by_the_class(cls):
    # Lightning and Accelerate read it there and then refuse clipping or miss skipped steps.
    for name in ("_step_supports_amp_scaling", "grad_scale", "found_inf"):
        assert not hasattr(cls, name)


@each_class
def test_amp_scaling_is_announced_by_instances_that_asked_for_it(cls):
    _, on = build(cls, True)
    _, off = build(cls, False)
    for optimizer in (on, copy.deepcopy(on), pickle.loads(pickle.dumps(on))):
        assert optimizer._step_supports_amp_scaling
    on.load_state_dict(off.state_dict())
    assert on._step_supports_amp_scaling
    off.load_state_dict(on.state_dict())
    assert not hasattr(off, "_step_supports_amp_scaling")


def test_lookahead_around_an_optimizer_with_amp_scaling_takes_the_default_way():
    params, others = random_params((5, 4), (3,)), random_params((5, 4), (3,))
    optimizer = Lookahead(RAdam(params, amp_scaling=True), k=2)
    other = Lookahead(RAdam(others), k=2)
    run(optimizer, params, scaler(), range(7), overflow_at=[2])
    run_unscaled(other, others, (0, 1, 3, 4, 5, 6))
    assert same(snapshot(optimizer), snapshot(other))


@either_way
@each_class
def test_one_scaler_serves_two_optimizers_each_by_its_own_flag(cls, amp_scaling):
    params, optimizer = build(cls, amp_scaling)
    others, other = build(cls, amp_scaling)
    before, grad_scaler = snapshot(optimizer), scaler()
    prepare(grad_scaler)
    set_scaled_grads(params, 0, SCALE, float("nan"))
    set_scaled_grads(others, 0, SCALE)
    grad_scaler.step(optimizer)
    grad_scaler.step(other)
    grad_scaler.update()
    assert same(snapshot(optimizer), before)
    expected, reference = build(cls, False)
    run_unscaled(reference, expected, [0])
    assert same(snapshot(other), snapshot(reference))
