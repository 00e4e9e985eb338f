"""Gradients released in backward: the bits of ``step()``, and nothing that it would not do."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from helpers import assert_same, twins
from ranger_cuda import RAdam, Ranger
from ranger_cuda.state.formats import STATE_DTYPES, WEIGHT_ROUNDINGS
from ranger_cuda.step import release as release_module
from ranger_cuda.step.dispatch import Dispatcher
from released import OPTIONS, SHAPES, STEPS, backward, in_groups, released, run, tensors, unchanged

NAMES = ["cpu-1-thread", "emulated", "cuda", "interpreted", "triton"]


# --- the bits of step() --------------------------------------------------------------------------


@pytest.mark.parametrize("target", NAMES, indirect=True)
@pytest.mark.parametrize("rounding", WEIGHT_ROUNDINGS)
def test_each_step_has_the_bits_of_step(target, rounding):
    """Random bits differ by a parameter's place among all of the optimizer's."""
    steps = range(3 if target.slow else STEPS)
    a, b = twins(tensors(torch.bfloat16), target.move)
    build = {"backend": target.backend, "weight_rounding": rounding, **OPTIONS}
    optimizer, handle = released(Ranger(in_groups(a), **build))
    other = Ranger(in_groups(b), **{**build, "backend": "reference"})
    for step in steps:
        resting = (step % 3, 4)[: 1 + step % 2]
        backward(a, step, resting)
        run(other, b, [step], lambda _: resting)  # noqa: B023
        assert all(p.grad is None for p in a)
        assert_same(optimizer, other, a, b, f"step {step}")
        optimizer.step()
        assert_same(optimizer, other, a, b, f"a step after step {step}")
    handle.remove()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_every_format_and_class_has_the_bits_of_step(cls, state_dtype, dtype, backend):
    options = {"lr": 0.05, "state_dtype": state_dtype, "backend": backend}
    if cls is Ranger:
        options |= {"k": 2, "outer_momentum": 0.5}
    a, b = twins(tensors(dtype, (*SHAPES, (65, 64))))
    optimizer, other = cls(in_groups(a), **options), cls(in_groups(b), **options)
    optimizer.release_gradients()
    run(optimizer, a)
    run(other, b)
    assert_same(optimizer, other, a, b, "after all steps")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_warmup_from_zero_has_the_bits_of_step(backend):
    """Slow weights made while lr is 0 are made anew by the first step that moves."""
    a, b = twins(tensors())
    builds = [Ranger(p, backend=backend, lr=0.05, k=3) for p in (a, b)]
    builds[0].release_gradients()
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: t // 2) for o in builds]
    for step in range(STEPS):
        if step == 1:  # weights are loaded after a step that moved nothing
            for p in (*a, *b):
                p.data.mul_(2)
        for params, optimizer, scheduler in zip((a, b), builds, schedulers, strict=True):
            run(optimizer, params, [step])
            scheduler.step()
        assert_same(*builds, a, b, f"step {step}")


@pytest.mark.parametrize("what", ["model", "backward"])
def test_torch_compile_leaves_it_alone(what):
    models = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    models[1].load_state_dict(models[0].state_dict())
    (optimizer, _), other = released(Ranger(models[0].parameters())), Ranger(models[1].parameters())
    compiled = functools.partial(torch.compile, backend="aot_eager")
    forward = compiled(models[0]) if what == "model" else models[0]
    for step in range(3):
        inputs = torch.full((2, 4), step + 1.0)
        loss = forward(inputs).sum()
        with compiled_autograd._enable(compiled()) if what == "backward" else nullcontext():
            loss.backward()
        other.zero_grad()
        models[1](inputs).sum().backward()
        other.step()
        a, b = ([*model.parameters()] for model in models)
        assert all(p.grad is None for p in a)
        assert_same(optimizer, other, a, b, f"step {step}")


def test_a_parameter_that_is_used_twice_moves_once_by_the_sum():
    a, b = twins([torch.randn(4, 4)])
    optimizer, other = RAdam(a), RAdam(b)
    optimizer.release_gradients()
    for (p,) in (a, b):
        (p @ p.sin()).sum().backward()
    other.step()
    assert optimizer.state[a[0]]["step"] == 1
    assert_same(optimizer, other, a, b, "used twice")


def test_micro_batches_move_by_the_sum_of_their_gradients():
    a, b = twins(tensors())
    (optimizer, handle), other = released(Ranger(a, **OPTIONS)), Ranger(b, **OPTIONS)
    for step in range(STEPS):
        with handle.paused():
            for micro in range(2):
                with handle.paused():  # one that a library has put around it
                    backward(a, 10 * step + micro)
                assert not optimizer.state[a[0]].get("step", 0) > step
        assert all(p.grad is not None for p in a)
        backward(a, 10 * step + 2)
        for micro in range(3):
            backward(b, 10 * step + micro)
        other.step()
        other.zero_grad()
        assert all(p.grad is None for p in a)
        assert_same(optimizer, other, a, b, f"step {step}")


def test_every_backward_pass_is_a_step():
    a = tensors(shapes=[(3,)])[0].requires_grad_()
    optimizer, _ = released(RAdam([a]))
    loss = (a * 2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert optimizer.state[a]["step"] == 2


def test_a_group_that_joins_and_a_parameter_that_thaws_are_released():
    a, b = twins(tensors())
    optimizer, other = RAdam(a[:2], lr=0.05), RAdam(b[:2], lr=0.05)
    a[1].requires_grad_(False)
    optimizer.release_gradients()
    assert not a[1].requires_grad
    for part in (slice(0, 1), slice(0, 4), slice(0, 6)):
        if part.stop == 4:
            a[1].requires_grad_(True)
            for who, params in ((optimizer, a), (other, b)):
                who.add_param_group({"params": params[2:4], "weight_decay": 0.1})
                who.add_param_group({"params": params[4:]})
        run(optimizer, a[part])
        run(other, b[part])
        assert_same(optimizer, other, a[part], b[part], str(part))
    backward(a, 0)
    assert all(p.grad is None for p in a)


def test_parameters_that_leave_the_groups_keep_their_gradients():
    a = [Parameter(t) for t in tensors()]
    optimizer, _ = released(RAdam(a))
    backward(a, 0)
    del optimizer.param_groups[0]["params"][0]
    check = unchanged(optimizer, a[:1])
    backward(a, 1)
    check()
    assert a[0].grad is not None
    assert all(p.grad is None for p in a[1:])
    assert optimizer.state[a[1]]["step"] == 2


def test_parameters_that_torch_swapped_are_step_s_to_move():
    a, b = twins(tensors())
    (optimizer, _), other = released(Ranger(a, **OPTIONS)), Ranger(b, **OPTIONS)
    for part in range(2):
        for param in a if part else ():
            torch.utils.swap_tensors(param, Parameter(param.detach().clone()))
        backward(a, part)
        assert all((p.grad is None) == (part == 0) for p in a)
        optimizer.step()
        optimizer.zero_grad()
        run(other, b, [part])
        assert_same(optimizer, other, a, b, f"part {part}")


def test_backward_passes_in_several_threads_wait_for_each_other(monkeypatch):
    """As those of several devices are, in one backward pass."""
    params = [Parameter(t) for t in tensors(shapes=[(3,)] * 4)]
    optimizer, _ = released(RAdam(params))
    move, under_way = release_module._Mover.move, []

    def slowly(*args):
        under_way.append(1)
        time.sleep(0.002)
        assert len(under_way) == 1
        move(*args)
        under_way.clear()

    monkeypatch.setattr(release_module._Mover, "move", slowly)
    with ThreadPoolExecutor(len(params)) as threads:
        for param in params:
            threads.submit(lambda p: [backward([p], step) for step in range(20)], param)
    assert [int(optimizer.state[p]["step"]) for p in params] == [20] * len(params)


# --- what it costs -------------------------------------------------------------------------------


def peak(function):
    """The most tensor memory that is taken at once while it runs, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    taken = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return most


def test_the_gradients_of_a_model_are_never_there_at_once():
    layers, side = 16, 64
    one = side * side * 4
    found = {}
    for release in (False, True):
        model = torch.nn.Sequential(
            *(torch.nn.Linear(side, side, bias=False) for _ in range(layers))
        )
        optimizer = Ranger(model.parameters())
        if release:
            optimizer.release_gradients()
        for _ in range(2):
            loss = model(torch.ones(1, side)).sum()
            found[release] = peak(loss.backward)
            optimizer.step()
            optimizer.zero_grad()
    assert found[False] > layers // 2 * one
    assert found[True] < 3 * one


def test_host_work_is_proportional_to_the_number_of_parameters():
    def calls(count):
        params = [Parameter(torch.ones(1)) for _ in range(count)]
        optimizer = Ranger(params)
        optimizer.release_gradients()
        backward(params, 0)
        total = sum(p.sum() for p in params)
        found = []
        sys.setprofile(lambda frame, event, _: found.append(event))
        try:
            total.backward()
        finally:
            sys.setprofile(None)
        return len(found)

    few, more, most = calls(50), calls(100), calls(200)
    assert few > 50
    assert most - more == 2 * (more - few)


def test_what_a_parameter_s_step_needs_is_made_once_and_groups_are_checked_once_a_pass(monkeypatch):
    made, checked = [], []
    at, check = Dispatcher.at, Ranger._check_group
    params = [Parameter(t) for t in tensors()]
    optimizer, _ = released(Ranger(in_groups(params)))
    monkeypatch.setattr(Dispatcher, "at", lambda *args: made.append(args[1]) or at(*args))
    monkeypatch.setattr(Ranger, "_check_group", lambda *args: checked.append(1) or check(*args))
    for step in range(3):
        checked.clear()
        backward(params, step)
        assert sorted(made) == [*range(len(params))]
        if step:  # the first looks at what can be wrong of them as they are, too
            assert len(checked) == len(optimizer.param_groups)


@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_deleting_an_optimizer_frees_everything_at_once(cls):
    first = [Parameter(torch.ones(3))]
    run(released(cls(first))[0], first)  # torch's own first step leaves something behind
    gc.collect()
    gc.disable()
    try:
        params = [Parameter(t) for t in tensors()]
        optimizer, handle = released(cls(params))
        run(optimizer, params, range(3))
        alive = [weakref.ref(v) for p in params for v in optimizer.state[p].values()]
        alive += [weakref.ref(optimizer), weakref.ref(handle)]
        del optimizer, handle
        assert [ref() for ref in alive] == [None] * len(alive)
        backward(params, 0)
        assert all(p.grad is not None for p in params)
        assert not any(p._post_accumulate_grad_hooks for p in params)
        alive = [weakref.ref(p) for p in params]
        del params
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


# --- its end, copies and checkpoints -------------------------------------------------------------


def test_after_remove_step_moves_again_and_it_can_begin_anew():
    a, b = twins(tensors())
    (optimizer, handle), other = released(Ranger(a, **OPTIONS)), Ranger(b, **OPTIONS)
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.release_gradients()
    run(optimizer, a)
    handle.remove()
    handle.remove()
    backward(a, STEPS)
    assert all(p.grad is not None for p in a)
    run(optimizer, a, [STEPS])
    again = optimizer.release_gradients()
    handle.remove()  # of what is over
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.release_gradients()
    run(optimizer, a, range(STEPS + 1, STEPS + 3))
    backward(a, STEPS + 3)
    assert all(p.grad is None for p in a)
    run(other, b, range(STEPS + 4))
    assert_same(optimizer, other, a, b, "in the end")
    again.remove()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_steps_as_ever(copied):
    params = [Parameter(t) for t in tensors()]
    optimizer, _ = released(Ranger(params, **OPTIONS))
    run(optimizer, params, range(4))
    others, other = copied((params, optimizer))
    backward(others, 4)
    assert all(p.grad is not None for p in others)
    other.step()
    run(optimizer, params, [4])
    assert_same(optimizer, other, params, others, "the copy")
    other.release_gradients()
    run(other, others, [5])
    run(optimizer, params, [5])
    assert_same(optimizer, other, params, others, "the copy, released")


def test_loading_a_checkpoint_goes_on_with_the_release():
    a, b = twins(tensors())
    (optimizer, _), other = released(Ranger(a, **OPTIONS)), Ranger(b, **OPTIONS)
    run(optimizer, a, range(2))
    run(other, b, range(4))
    for p, q in zip(a, b, strict=True):
        p.data.copy_(q.data)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    backward(a, 4)
    assert all(p.grad is None for p in a)
    run(other, b, [4])
    assert_same(optimizer, other, a, b, "loaded")
