"""What users of torch.optim expect around the step: schedulers, averaging, clipping, compilation,
parameter groups, closures."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

from optimizer_infos import (
    bytes_of,
    each_info,
    random_params,
    ranger,
    same,
    set_grads,
    snapshot,
    train,
)
from ranger_cuda import RAdam, Ranger

each_class = pytest.mark.parametrize("cls", [RAdam, ranger], ids=["RAdam", "Ranger"])

# --- schedulers --------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=4),
}


def test_the_table_has_every_scheduler_of_this_torch():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


def run_scheduled(optimizer, params, make, steps=8):
    """The hyperparameters that each step was taken with."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "scheduler.step() before optimizer.step()" and its like
        scheduler = make(optimizer)
        for step in range(steps):
            seen.append([(float(g["lr"]), tuple(g["betas"])) for g in optimizer.param_groups])
            train(optimizer, params, [step])
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
    return seen


def two_groups(params):
    return [{"params": params[:1]}, {"params": params[1:], "lr": 5e-3}]


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@each_info
def test_a_scheduler_sets_what_the_next_step_uses(config, make):
    params, others = random_params((5,), (3,)), random_params((5,), (3,))
    options = {"lr": 1e-2, "betas": (0.9, 0.99)}
    seen = run_scheduled(config.build(two_groups(params), **options), params, make)
    reference = torch.optim.AdamW(two_groups(random_params((5,), (3,))), **options)
    assert seen == run_scheduled(reference, reference.param_groups[0]["params"], make)
    assert len({lr for step in seen for lr, _ in step}) > 2  # it did change something

    by_hand = config.build(two_groups(others), **options)
    for step, values in enumerate(seen):
        for group, (lr, betas) in zip(by_hand.param_groups, values, strict=True):
            group["lr"], group["betas"] = lr, betas
        train(by_hand, others, [step])
    assert same(list(params), list(others))


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@each_info
def test_schedulers_that_cycle_momentum_cycle_betas(config, name):
    params = random_params((5,))
    seen = run_scheduled(config.build(params, lr=1e-2, betas=(0.9, 0.99)), params, SCHEDULERS[name])
    assert len({beta1 for ((_, (beta1, _)),) in seen}) > 3
    assert {beta2 for ((_, (_, beta2)),) in seen} == {0.99}


@each_info
def test_a_scheduled_run_resumes_in_mid_cycle(config):
    def start():
        params = random_params((5,))
        optimizer = config.build(params, lr=1e-2)
        return params, optimizer, lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)

    def go_on(params, optimizer, scheduler, steps):
        for step in steps:
            train(optimizer, params, [step])
            scheduler.step()

    whole, first, second = start(), start(), start()
    go_on(*whole, range(11))
    go_on(*first, range(5))
    second[0][0].data.copy_(first[0][0].data)
    for new, old in zip(second[1:], first[1:], strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    go_on(*second, range(5, 11))
    assert same(snapshot(second[1]), snapshot(whole[1]))


@each_info
def test_a_tensor_lr_changed_in_place_between_steps_counts_at_once(config):
    lr = torch.tensor(0.01)
    params, others = random_params((5, 4)), random_params((5, 4))
    by_tensor, by_number = config.build(params, lr=lr), config.build(others, lr=lr.clone())
    for step in range(6):
        lr.mul_(0.5)
        by_number.param_groups[0]["lr"] = lr.clone()
        train(by_tensor, params, [step])
        train(by_number, others, [step])
        assert by_tensor.param_groups[0]["lr"] is lr
    assert same(list(params), list(others))


@each_info
def test_stochastic_weight_averaging(config):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = config.build(model.parameters(), lr=1e-2)
    averaged, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)
    total = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(6):
        train(optimizer, list(model.parameters()), [step])
        averaged.update_parameters(model)
        scheduler.step()
        total += model.weight.detach().double()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    # A running mean of 6 float32 values: each update rounds a difference, a quotient and a sum.
    bound = 6 * 3 * 2.0**-24 * model.weight.detach().abs().max()
    assert (averaged.module.weight - total / 6).abs().max() <= bound


# --- gradients ---------------------------------------------------------------------------------


@each_info
def test_cycles_count_optimizer_steps_not_backward_passes(config):
    (accumulated,), (summed,) = random_params((4, 3)), random_params((4, 3))
    x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    optimizer, other = config.build([accumulated]), config.build([summed])
    for _ in range(5):
        optimizer.zero_grad()
        for part in x:
            (accumulated * part).sum().backward()
        optimizer.step()
        summed.grad = x[0] + x[1] + x[2]
        other.step()
        assert bytes_of(accumulated) == bytes_of(summed)
    assert optimizer.state[accumulated]["step"] == 5


# --- torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@each_info
def test_compiled_code_steps_as_eager_code_and_compiles_once(config, backend):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, config.build(model.parameters(), lr=torch.tensor(1e-2))

    def train_step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(train_step, backend=counter)
    (model, optimizer), (other, reference) = start(), start()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    frames = []
    for step in range(8):
        for o in (optimizer, reference):
            o.param_groups[0]["lr"].mul_(0.9)
        loss, expected = compiled(model, optimizer, x), train_step(other, reference, x)
        if config.is_ours:
            assert torch.equal(loss, expected)
            assert same(snapshot(optimizer), snapshot(reference)), step
        else:  # torch compiles its AdamW to other operations; ours is the pull
            state = optimizer.state[model.weight]
            assert state["lookahead_step"] == step + 1
            assert same(state["slow_param"], model.weight.detach()) == (step % 2 == 1)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames[2:] == [frames[2]] * 6  # gradients and state are new in the first two calls


# --- groups and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
@each_class
def test_implementation_flags_change_nothing(cls, flag):
    params, others = random_params((5, 4)), random_params((5, 4))
    flagged, plain = cls(params, **{flag: True}), cls(others)
    train(flagged, params, range(5))
    train(plain, others, range(5))
    assert same(snapshot(flagged), snapshot(plain))


@each_class
def test_differentiable_is_refused(cls):
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        cls(random_params((2,)), differentiable=True)


@each_class
def test_defaults_are_the_arguments_and_groups_override_them(cls):
    a, b = random_params((2,), (2,))
    optimizer = cls(
        [{"params": [a]}, {"params": [b], "lr": 0.5, "eps": 1e-3}], lr=0.25, weight_decay=0.1
    )
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["weight_decay"] == 0.1
    expected = {**optimizer.defaults, "lr": 0.5, "eps": 1e-3}
    for group, values in zip(optimizer.param_groups, (optimizer.defaults, expected), strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == values
    lookahead = {"lookahead_k", "lookahead_alpha"}
    lookahead |= {"outer_momentum", "outer_nesterov"}
    assert set(optimizer.defaults) <= set(RAdam.__init__.__code__.co_varnames) | lookahead
    assert Ranger([a]).defaults["lookahead_k"] == 6


@each_info
def test_a_parameter_named_twice_in_a_group_is_stepped_once(config):
    (twice,), (once,) = random_params((3,)), random_params((3,))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = config.build([twice, twice])
    train(optimizer, [twice], range(5))
    assert optimizer.state[twice].get("lookahead_step", 5) == 5
    if config.is_ours:  # torch's own steps it twice
        train(config.build([once]), [once], range(5))
        assert bytes_of(twice) == bytes_of(once)
        assert optimizer.state[twice]["step"] == 5
        (again,) = random_params((3,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            by_reference = config.build([again, again], backend="reference")
        train(by_reference, [again], range(5))
        assert bytes_of(again) == bytes_of(once)


@each_info
def test_parameters_that_cannot_be_optimized_are_refused(config):
    (leaf,) = random_params((3,))
    for params, error, message in (
        ([], ValueError, "empty parameter list"),
        ([leaf * 2], ValueError, "non-leaf"),
        ([1.0], TypeError, "can only optimize Tensors"),
        ([{"params": {leaf}}], TypeError, "ordered"),
    ):
        with pytest.raises(error, match=message):
            config.build(params)


@each_info
def test_a_group_added_after_training_started_has_its_own_count(config):
    old, new = random_params((3,), (3,))
    expected_old, expected_new = random_params((3,), (3,))
    optimizer = train(config.build([old]), [old], range(3))
    optimizer.add_param_group({"params": [new], "lr": 0.01})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [old]})
    first, second = config.build([expected_old]), config.build([expected_new], lr=0.01)
    train(first, [expected_old], range(3))
    for step in range(3, 8):
        set_grads([old, new], step)
        set_grads([expected_old, expected_new], step)
        for each in (optimizer, first, second):
            each.step()
    assert same([old, new], [expected_old, expected_new])
    assert [optimizer.state[p]["step"].item() for p in (old, new)] == [8, 5]


@each_info
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(config):
    (param,), (other,) = random_params((3,)), random_params((3,))
    optimizer, reference = config.build([param]), config.build([other])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    for _ in range(4):
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss == other.detach().square().sum()
        other.grad = 2 * other.detach()
        reference.step()
    assert calls == [True] * 4
    assert bytes_of(param) == bytes_of(other)


@each_info
def test_zero_grad_drops_or_zeroes_gradients(config):
    params = random_params((3,), (2,))
    optimizer = config.build([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, 0)
    kept = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_backward_pass_through_weights_of_before_the_step_is_an_error(target):
    param = torch.nn.Parameter(target.move(torch.ones(3)))
    other = torch.nn.Parameter(target.move(torch.ones(3)))
    optimizer = Ranger([param], backend=target.backend)
    loss = (param * other).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
