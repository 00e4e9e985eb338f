"""Lookahead around other optimizers: the arithmetic, what shines through, checkpoints."""

from __future__ import annotations

import copy
import functools
import io
import threading

import numpy
import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from optimizer_infos import bytes_of, random_params, same, set_grads, snapshot, train
from ranger_cuda import Lookahead, RAdam, Ranger

SHAPES = ((5, 4), (3, 1), (1, 7))
INNER = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, alpha=0.7, centered=True),  # its own "alpha"
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),  # and another
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),  # its state is there from the start
    "Rprop": lambda p: optim.Rprop(p),
    "Muon": lambda p: optim.Muon(p, lr=0.01),
    "torch RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "RAdam": lambda p: RAdam(p, lr=0.01, weight_decay=0.1),
}
each_inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)
K, ALPHA = 3, 0.8


class WrittenOut:
    """Lookahead, Algorithm 1, around an optimizer of its own."""

    def __init__(self, params, make):
        self.params, self.inner, self.t = params, make(params), 0
        self.slow = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        self.t += 1
        if self.t % K == 0:
            for slow, param in zip(self.slow, self.params, strict=True):
                slow.add_(ALPHA * (param - slow))
                param.copy_(slow)


def step_on(optimizer, params, step):
    """Fixed gradients; within a closure, as LBFGS wants it and the others allow."""

    def closure():
        set_grads(params, step)
        return sum((p.detach() * p.grad).sum() for p in params)

    return optimizer.step(closure)


@each_inner
def test_is_algorithm_1_bit_for_bit(make):
    params, expected = random_params(*SHAPES), random_params(*SHAPES)
    optimizer, reference = Lookahead(make(params), K, ALPHA), WrittenOut(expected, make)
    for step in range(2 * K + 1):
        loss = step_on(optimizer, params, step)
        step_on(reference, expected, step)
        assert same(list(params), list(expected)), step
        assert same([optimizer.state[p]["slow_param"] for p in params], reference.slow), step
    assert loss is not None


@each_inner
def test_resumes_in_mid_cycle_exactly(make):
    params = random_params(*SHAPES)
    optimizer = Lookahead(make(params), K, ALPHA)
    for step in range(K + 2):
        step_on(optimizer, params, step)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)

    resumed = random_params(*SHAPES, seed=1)
    other = Lookahead(make(resumed), K, ALPHA)
    other.load_state_dict(saved)
    for param, value in zip(resumed, values, strict=True):
        param.data.copy_(value)  # after the optimizer is made and loaded, as trainers may
    assert same(snapshot(other), snapshot(optimizer))
    for step in range(K + 2, 2 * K + 3):
        step_on(optimizer, params, step)
        step_on(other, resumed, step)
        assert same(snapshot(other), snapshot(optimizer)), step


@each_inner
def test_a_checkpoint_of_the_inner_optimizer_alone_loads_and_starts_a_cycle(make):
    params, others = random_params(*SHAPES), random_params(*SHAPES, seed=1)
    inner = make(params)
    for step in range(4):
        step_on(inner, params, step)
    optimizer = Lookahead(make(others), K, ALPHA)
    step_on(optimizer, others, 9)
    optimizer.load_state_dict(copy.deepcopy(inner.state_dict()))
    for other, param in zip(others, params, strict=True):
        other.data.copy_(param.data)

    reference = WrittenOut(params, lambda _: inner)
    for step in range(4, 4 + K + 1):
        step_on(optimizer, others, step)
        step_on(reference, params, step)
        assert same(list(others), list(params)), step


def test_a_lookahead_checkpoint_loads_into_the_inner_optimizer_alone():
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = train(Lookahead(optim.AdamW(params), k=10), params, range(4))
    alone = train(optim.AdamW(others), others, range(4))
    alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(4, 8))  # no sync among these steps
    train(alone, others, range(4, 8))
    assert same(list(params), list(others))


# --- Ranger, RAdam and Lookahead(RAdam) --------------------------------------------------------

OPTIONS = {"lr": 0.01, "betas": (0.95, 0.999), "eps": 1e-5, "decoupled_weight_decay": True}
ALIKE = {
    "Ranger": lambda p: Ranger(p, k=K, alpha=ALPHA, **OPTIONS),
    "Lookahead": lambda p: Lookahead(RAdam(p, **OPTIONS), K, ALPHA),
}


@pytest.mark.parametrize("source", ALIKE)
@pytest.mark.parametrize("target", ALIKE)
def test_ranger_and_lookahead_go_on_from_each_others_checkpoints(source, target):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = train(ALIKE[source](params), params, range(K + 2))
    other = ALIKE[target](others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, value in zip(others, params, strict=True):
        param.data.copy_(value.data)
    for step in range(K + 2, 3 * K + 2):
        train(optimizer, params, [step])
        train(other, others, [step])
        assert same(list(params), list(others)), step


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("source", ALIKE)
def test_radam_goes_on_from_a_checkpoint_with_slow_weights_without_them(source, backend):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = train(ALIKE[source](params), params, range(K + 2))
    loaded = RAdam(params, backend=backend)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    plain = RAdam(others, **OPTIONS, backend=backend)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("slow_param")
    saved["param_groups"] = copy.deepcopy(plain.state_dict()["param_groups"])
    plain.load_state_dict(saved)
    for param, value in zip(others, params, strict=True):
        param.data.copy_(value.data)
    train(loaded, params, range(K + 2, 3 * K))
    train(plain, others, range(K + 2, 3 * K))
    assert same(list(params), list(others))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_group_keys_named_k_and_alpha_mean_nothing_to_radam(backend):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    group = {"params": params, "k": 2, "alpha": "mine"}
    train(RAdam([group], backend=backend), params, range(5))
    train(RAdam(others, backend=backend), others, range(5))
    assert same(list(params), list(others))


# --- what shines through -----------------------------------------------------------------------


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


def raising(*_):
    raise StopIteration


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_alpha_and_k_may_be_arrays_of_numpy(backend):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    inner, other = optim.SGD(params, lr=0.1), optim.SGD(others, lr=0.1)
    k, alpha = numpy.array(2), numpy.array(0.5)
    train(Lookahead(inner, k, alpha, backend=backend), params, range(5))
    train(Lookahead(other, 2, 0.5, backend=backend), others, range(5))
    assert same(list(params), list(others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lookahead_around_radam_is_ranger_where_parameters_are_exact(dtype):
    params, others = random_params(*SHAPES, dtype=dtype), random_params(*SHAPES, dtype=dtype)
    train(ALIKE["Ranger"](params), params, range(3 * K))
    train(ALIKE["Lookahead"](others), others, range(3 * K))
    assert same(list(params), list(others))


def test_an_inner_optimizer_that_saves_other_state_is_refused():
    class Elsewhere(optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "state": {}}

    params = random_params(*SHAPES)
    optimizer = train(Lookahead(Elsewhere(params, lr=0.1)), params, [0])
    with pytest.raises(
        RuntimeError, match=r"Elsewhere\.state_dict\(\) leaves out the slow weights"
    ):
        optimizer.state_dict()


@pytest.mark.parametrize("make", [lambda p: Ranger(p), lambda p: Lookahead(RAdam(p))])
def test_a_load_whose_hook_fails_changes_nothing(make):
    params = random_params(*SHAPES)
    optimizer = train(make(params), params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(3, 5))
    before = snapshot(optimizer)
    which = optimizer.optimizer if isinstance(optimizer, Lookahead) else optimizer
    handle = which.register_load_state_dict_post_hook(raising)
    with pytest.raises(StopIteration):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)
    handle.remove()
    train(optimizer, params, [5])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_slow_weight_that_is_missing_starts_at_the_parameter(backend):
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    optimizer = Lookahead(optim.SGD(params, lr=0.1), K, ALPHA, backend=backend)
    train(optimizer, params, range(K + 1))
    train(optim.SGD(others, lr=0.1), others, range(3))
    for param, other in zip(params, others, strict=True):
        param.data.copy_(other.data)
        del optimizer.state[param]["slow_param"]
    reference = WrittenOut(others, lambda p: optim.SGD(p, lr=0.1))
    reference.t = K + 1  # the cycle goes on
    for step in range(2 * K):
        step_on(optimizer, params, step)
        step_on(reference, others, step)
        assert same(list(params), list(others)), step


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_groups_have_cycles_of_their_own_and_keep_them(backend):
    a, b, c = random_params((3,), (3,), (3,))
    optimizer = Lookahead(
        optim.SGD([{"params": [a]}, {"params": [b], "lookahead_k": 2}], lr=0.1),
        k=3,
        backend=backend,
    )
    optimizer.add_param_group({"params": [c], "lookahead_k": 1, "lookahead_alpha": 0.0})
    start = bytes_of(c)
    for step in range(6):
        train(optimizer, [a, b, c], [step])
        for param, k in ((a, 3), (b, 2), (c, 1)):
            synced = bytes_of(param) == bytes_of(optimizer.state[param]["slow_param"])
            assert synced == ((step + 1) % k == 0)
        assert bytes_of(c) == start  # alpha = 0 comes back to the first value
    # A checkpoint without Lookahead leaves each group its own.
    alone = optim.SGD([{"params": [p]} for p in (a, b, c)], lr=0.2)
    optimizer.load_state_dict(alone.state_dict())
    assert [g["lookahead_k"] for g in optimizer.param_groups] == [3, 2, 1]
    assert [g["lookahead_alpha"] for g in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.2] * 3


def test_wrapping_leaves_the_inner_defaults_as_they_are():
    inner = RAdam(random_params(*SHAPES))
    before = dict(inner.defaults)
    optimizer = copy.deepcopy(Lookahead(inner))
    assert optimizer.defaults == inner.defaults == before


def test_alpha_one_is_the_inner_optimizer():
    params, others = random_params(*SHAPES), random_params(*SHAPES)
    train(Lookahead(optim.AdamW(params), k=2, alpha=1.0), params, range(7))
    train(optim.AdamW(others), others, range(7))
    assert same(list(params), list(others))


def test_a_parameter_that_joins_late_or_rests_has_its_own_cycle():
    params = random_params((3,), (3,), (3,))
    optimizer = Lookahead(optim.SGD(params, lr=0.1, momentum=0.9), K, ALPHA)
    moves = [range(12), range(4, 12), (0, 1, 2, 3, 7, 8, 11)]
    alone = random_params((3,), (3,), (3,))
    references = [WrittenOut([p], lambda p: optim.SGD(p, lr=0.1, momentum=0.9)) for p in alone]
    for step in range(12):
        set_grads(params, step)
        for param, expected, reference, when in zip(params, alone, references, moves, strict=True):
            if step in when:
                expected.grad = param.grad.clone()
                reference.step()
            else:
                param.grad = None
        optimizer.step()
        assert same(list(params), list(alone)), step
    assert [optimizer.state[p]["lookahead_step"].item() for p in params] == [12, 8, 7]


@pytest.mark.parametrize("make", [optim.SparseAdam, lambda p: optim.SGD(p, lr=0.1)])
def test_sparse_gradients_are_the_inner_optimizers_business(make):
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    expected = copy.deepcopy(embedding)
    optimizer = Lookahead(make(list(embedding.parameters())), K, ALPHA)
    reference = WrittenOut(list(expected.parameters()), make)
    for step in range(2 * K):
        for model, o in ((embedding, optimizer), (expected, reference)):
            model.zero_grad()
            model(torch.tensor([step % 6, 1])).square().sum().backward()
            o.step()
        assert bytes_of(embedding.weight) == bytes_of(expected.weight)


def test_low_precision_parameters_keep_float32_slow_weights_through_a_checkpoint():
    params = random_params(*SHAPES, dtype=torch.bfloat16)
    optimizer = train(Lookahead(optim.SGD(params, lr=0.01), k=2), params, range(5))
    before = snapshot(optimizer)
    assert optimizer.state[params[0]]["slow_param"].dtype == torch.float32
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(snapshot(optimizer), before)


# --- refusals ----------------------------------------------------------------------------------


def test_wraps_optimizers_that_have_no_slow_weights():
    params = random_params((3,))
    with pytest.raises(TypeError, match="give it an optimizer, not parameters"):
        Lookahead(params)
    for inner in (Ranger(params), Lookahead(RAdam(params))):
        with pytest.raises(ValueError, match="has Lookahead already"):
            Lookahead(inner)


def test_an_inner_step_that_fails_counts_no_step():
    params = random_params(*SHAPES)
    optimizer = train(Lookahead(RAdam(params), k=2), params, range(3))
    optimizer.add_param_group({"params": random_params((2,), seed=5)})
    set_grads([p for g in optimizer.param_groups for p in g["params"]], 3)
    optimizer.param_groups[1]["params"][0].grad = torch.ones(2).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_a_checkpoint_with_slow_weights_of_another_shape_is_refused_unchanged():
    params = random_params(*SHAPES)
    optimizer = train(Lookahead(optim.SGD(params, lr=0.1)), params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["slow_param"] = torch.zeros(7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'slow_param' of parameter 1 has shape \(7,\)"):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)


# --- evaluation on the slow weights ------------------------------------------------------------


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_slow_weights_are_swapped_in_and_back_bit_for_bit(make, dtype):
    params = random_params(*SHAPES, (2,), dtype=dtype)
    optimizer = train(make(params), params[:-1], range(K + 2))
    before = snapshot(optimizer)
    slow = [optimizer.state[p]["slow_param"].to(dtype, copy=True) for p in params[:-1]]

    @optimizer.slow_weights()
    def evaluate():
        assert same([p.detach() for p in params[:-1]], slow)
        assert not same(slow[0], before["params"][0])
        assert same(params[-1].detach(), before["params"][-1])  # not stepped: stays
        for call in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.slow_weights().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="leave the context first"):
                call()
        raise KeyError("from within")

    with pytest.raises(KeyError, match="from within"):
        evaluate()
    assert same(snapshot(optimizer), before)
    train(optimizer, params, [K + 2])
