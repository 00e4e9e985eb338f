"""Lookahead around other optimizers: the arithmetic, what shines through, checkpoints."""

from __future__ import annotations

import copy
import io

import numpy
import pytest
import torch
from torch import optim

from inner_optimizers import ALPHA, SHAPES, K, WrittenOut, each_inner, raising, step_on
from optimizer_infos import bytes_of, random_params, same, set_grads, snapshot, train
from ranger_cuda import Lookahead, RAdam, Ranger


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
