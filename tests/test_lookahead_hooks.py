"""What shines through Lookahead: the inner optimizer's groups, state, hooks and closures."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from inner_optimizers import ALPHA, SHAPES, K, WrittenOut, raising, step_on
from optimizer_infos import bytes_of, random_params, same, set_grads, snapshot, train
from ranger_cuda import Lookahead, RAdam


def test_groups_state_and_defaults_are_the_inner_optimizers():
    params = random_params(*SHAPES)
    inner = optim.RMSprop(params, alpha=0.7)
    optimizer = Lookahead(inner, K, ALPHA)
    train(optimizer, params, [0])
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert optimizer.param_groups[0]["alpha"] == 0.7
    assert {"square_avg", "slow_param", "lookahead_step"} <= inner.state[params[0]].keys()
    assert isinstance(optimizer, optim.Optimizer)
    assert "k: 3, alpha: 0.8" in repr(optimizer)
    assert "RMSprop" in repr(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)  # which gives the inner optimizer new groups and state
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state


@pytest.mark.parametrize("of_inner", [True, False])
def test_a_scheduler_may_be_made_for_either(of_inner):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    inner = optim.SGD(params, lr=1.0)
    optimizer = Lookahead(inner, K, ALPHA)
    scheduler = lr_scheduler.StepLR(inner if of_inner else optimizer, 2, 0.5)
    reference = WrittenOut(others, lambda p: optim.SGD(p, lr=1.0))
    for step in range(2 * K):
        reference.inner.param_groups[0]["lr"] = 0.5 ** (step // 2)
        step_on(reference, others, step)
        step_on(optimizer, params, step)
        scheduler.step()
        assert same(list(params), list(others)), step


def test_hooks_of_the_inner_optimizer_run():
    params = random_params(*SHAPES)
    inner = optim.SGD(params, lr=0.1)
    calls = []
    inner.register_step_pre_hook(lambda *_: calls.append("inner pre"))
    inner.register_step_post_hook(lambda *_: calls.append("inner post"))
    optimizer = Lookahead(inner)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, params, [0])
    assert calls == ["pre", "inner pre", "inner post", "post"]


@pytest.mark.parametrize("has_scheduler", [True, False])
def test_global_hooks_run_once_around_the_step_and_its_pull(has_scheduler):
    params = random_params(*SHAPES)
    inner = optim.SGD(params, lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 1) if has_scheduler else None  # replaces inner.step
    optimizer = Lookahead(inner, k=1, alpha=0.5)
    seen = []
    see = lambda name: lambda which, *_: seen.append((name, which, snapshot(optimizer)))  # noqa: E731
    handles = [
        register_optimizer_step_pre_hook(see("pre")),
        register_optimizer_step_post_hook(see("post")),
    ]
    try:
        for step, closure in enumerate([None, lambda: None]):
            before = snapshot(optimizer)
            set_grads(params, step)
            optimizer.step(closure)
            assert [(name, which) for name, which, _ in seen] == [
                ("pre", optimizer),
                ("post", optimizer),
            ]
            assert same([state for *_, state in seen], [before, snapshot(optimizer)])
            seen.clear()
            if scheduler:
                scheduler.step()  # warns if it finds that no step was taken
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("which", ["wrapper", "inner"])
def test_a_hook_may_replace_the_arguments_of_a_step(which):
    params = random_params(*SHAPES)
    optimizer = Lookahead(optim.SGD(params, lr=0.1))
    hook = optimizer if which == "wrapper" else optimizer.optimizer
    hook.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 5.0), kwargs))
    assert optimizer.step() == 5.0


@pytest.mark.parametrize(
    ("on", "has_scheduler"), [("class", False), ("instance", False), ("instance", True)]
)
def test_what_replaced_the_inner_step_is_called(on, has_scheduler):
    class Mine(optim.SGD):
        pass

    params, others = random_params(*SHAPES), random_params(*SHAPES)
    inner = Mine(params, lr=0.1)
    if has_scheduler:
        lr_scheduler.StepLR(inner, 100)  # replaces inner.step, too
    owner = Mine if on == "class" else inner
    calls, step_before = [], owner.step

    @functools.wraps(step_before)
    def replaced(*args):
        calls.append(args)
        return step_before(*args)

    owner.step = replaced
    optimizer = Lookahead(inner, K, ALPHA)
    reference = WrittenOut(others, lambda p: optim.SGD(p, lr=0.1))
    for step in range(2 * K):
        step_on(optimizer, params, step)
        step_on(reference, others, step)
        assert same(list(params), list(others)), step
    assert len(calls) == 2 * K


@pytest.mark.parametrize("call", ["step", "load_state_dict"])
@pytest.mark.parametrize("of_inner", [optim.SGD, RAdam])
def test_nothing_comes_between_a_step_and_its_pull(of_inner, call):
    """Neither another thread nor a hook; or the inner optimizer's step were in no cycle."""
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    inner = of_inner(params, lr=0.1)
    optimizer = train(Lookahead(inner, K, ALPHA), params, [0])
    expected = train(Lookahead(of_inner(others, lr=0.1), K, ALPHA), others, range(K + 1))
    saved = copy.deepcopy(optimizer.state_dict())
    refusals = []

    def meddle(*_):
        try:
            optimizer.step() if call == "step" else optimizer.load_state_dict(saved)
        except RuntimeError as error:
            refusals.append(str(error))

    def meddle_everywhere(*_):
        meddle()
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()

    inner.register_step_pre_hook(meddle_everywhere)
    inner.register_step_post_hook(meddle_everywhere)
    train(optimizer, params, range(1, K + 1))
    assert len(refusals) == 4 * K
    assert all("another step of this optimizer is under way" in text for text in refusals)
    assert same(snapshot(optimizer), snapshot(expected))


def test_an_error_in_a_post_hook_of_the_inner_optimizer_loses_no_pull():
    params = random_params(*SHAPES)
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=1, alpha=0.0)
    before = [bytes_of(p) for p in params]
    optimizer.optimizer.register_step_post_hook(raising)
    with pytest.raises(StopIteration):
        train(optimizer, params, [0])
    assert [bytes_of(p) for p in params] == before
    assert all(optimizer.state[p]["lookahead_step"] == 1.0 for p in params)


def test_hooks_of_the_inner_optimizer_see_its_own_step():
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=1, alpha=0.0)
    seen = []
    optimizer.optimizer.register_step_post_hook(
        lambda *_: seen.extend(p.detach().clone() for p in params)
    )
    train(optimizer, params, [0])
    train(optim.SGD(others, lr=0.1), others, [0])
    assert same(seen, [p.detach() for p in others])


@pytest.mark.parametrize("make", [optim.Adam, lambda p: optim.SGD(p, lr=0.1), RAdam])
def test_pre_hooks_of_the_inner_optimizer_may_drop_and_make_gradients(make):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    inner = make(params)
    optimizer = Lookahead(inner, k=2, alpha=0.5)
    expected = Lookahead(make(others), k=2, alpha=0.5)

    def hook(*_):
        set_grads(params, step)
        if step == 0:
            params[0].grad = None

    inner.register_step_pre_hook(hook)
    for step in range(5):
        for param in params:  # the hook drops the first one's, and makes the others'
            param.grad = torch.ones_like(param) if param is params[0] else None
        optimizer.step()
        set_grads(others, step)
        if step == 0:
            others[0].grad = None
        expected.step()
        assert same(snapshot(optimizer), snapshot(expected)), step


def test_a_group_that_joins_within_a_step_moves_from_the_next_on():
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = Lookahead(optim.SGD(params[:2], lr=0.1), K, ALPHA)
    expected = Lookahead(optim.SGD(others[:2], lr=0.1), K, ALPHA)

    def closure():
        set_grads(params[:2], step)
        if step == 1:
            optimizer.add_param_group({"params": params[2:]})

    for step in range(K + 1):
        optimizer.step(closure)
        train(expected, others[:2], [step])
        assert same(list(params), list(others)), step
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("frozen", [torch.arange(3), torch.zeros(1).expand(5)])
def test_a_closure_s_step_leaves_frozen_parameters_alone(frozen):
    params = random_params(*SHAPES)
    params.append(torch.nn.Parameter(frozen, requires_grad=False))
    optimizer = Lookahead(optim.SGD(params, lr=0.1))
    optimizer.step(lambda: set_grads(params[:-1], 0))
    assert "slow_param" in optimizer.state[params[0]]
    assert params[-1] not in optimizer.state
