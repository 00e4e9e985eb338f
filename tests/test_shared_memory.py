"""Whose state and memory it is: of a parameter that rests, and of several tensors at once."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import adamw_checkpoint, assert_same, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger

STATE = ("exp_avg", "exp_avg_sq", "slow_param", "step")


def make_ranger(params, backend):
    return Ranger(params, lr=0.1, k=2, backend=backend)


def make_lookahead(params, backend):
    return Lookahead(RAdam(params, lr=0.1, backend=backend), k=2, backend=backend)


# --- the state of a parameter that rests --------------------------------------------------------


def items(optimizer, param):
    """The state of a parameter: names, objects and values."""
    state = optimizer.state[param].items()
    return [(name, id(value), copy.deepcopy(value)) for name, value in state]


def assert_untouched(optimizer, param, before):
    after = items(optimizer, param)
    assert [item[:2] for item in after] == [item[:2] for item in before]
    for (name, _, value), (_, _, was) in zip(after, before, strict=True):
        assert value == was if not torch.is_tensor(value) else torch.equal(value, was), name


def float_step(optimizer, param):
    optimizer.state[param]["step"] = 1


def double_step(optimizer, param):
    optimizer.state[param]["step"] = optimizer.state[param]["step"].double()


def no_moments(optimizer, param):
    del optimizer.state[param]["exp_avg"]


def only_slow_weights(optimizer, param):
    optimizer.state[param].clear()
    optimizer.state[param]["slow_param"] = torch.zeros_like(param)


def nothing_else(optimizer, param):
    pass


INCOMPLETE = [nothing_else, float_step, double_step, no_moments, only_slow_weights]


@pytest.mark.parametrize("wrapper", [False, True])
@pytest.mark.parametrize("change", INCOMPLETE, ids=lambda change: change.__name__)
def test_the_state_of_a_parameter_that_rests_stays_as_it_is(target, change, wrapper):
    a, b = twins([torch.ones(5), torch.ones(5)], target.move)
    optimizers = []
    for params, backend in ((a, target.backend), (b, "reference")):
        optimizer = (
            Lookahead(torch.optim.AdamW(params, lr=0.1), backend=backend)
            if wrapper
            else Ranger(params, lr=0.1, backend=backend)
        )
        optimizer.load_state_dict(adamw_checkpoint(2, 5))
        change(optimizer, params[1])
        optimizers.append(optimizer)
        before = items(optimizer, params[1])
        for _ in range(3):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
            assert_untouched(optimizer, params[1], before)
        if change is not only_slow_weights:  # with them it is swapped, and back
            with optimizer.slow_weights():
                assert_untouched(optimizer, params[1], before)
        assert_untouched(optimizer, params[1], before)
        with torch.no_grad():
            params[1].fill_(100.0)  # what slow weights that are made later start from
    if wrapper and change in (only_slow_weights, float_step, no_moments):
        return  # AdamW cannot step it
    for _ in range(7):
        give_gradients([torch.ones(5), torch.ones(5)], a, b, move=target.move)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(*optimizers, a, b, "once it moves")


# --- memory that tensors share ------------------------------------------------------------------


def tie(optimizer, params):
    params[0].data = params[2].data


def tie_to_another(optimizer, params):
    if params[0].data_ptr() == params[1].data_ptr():
        params[0].data = params[3].data
    else:
        params[0].data = params[1].data


def tie_to_a_part(optimizer, params):
    base = torch.cat([params[2].detach(), params[0].detach()[:3]])
    params[2].data, params[0].data = base[:-3], base[3:]


def share_states(*names):
    def share_them(optimizer, params):
        for name in names:
            optimizer.state[params[0]][name] = optimizer.state[params[2]][name]

    share_them.__name__ = f"share_{'_and_'.join(names)}"
    return share_them


CHANGES = [tie, tie_to_another, tie_to_a_part, *map(share_states, STATE), share_states(*STATE)]


def large(target):
    return 500 if target.small else 60_000


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_memory_that_comes_to_be_shared_moves_as_the_reference_moves_it(target, change):
    a, b = twins([torch.randn(large(target)) for _ in range(4)], target.move)
    native = Ranger(a, lr=0.1, k=2, backend=target.backend)
    reference = Ranger(b, lr=0.1, k=2, backend="reference")
    for step in range(8):
        give_gradients([torch.randn(p.shape) for p in a], a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step}")
        if step in (1, 4):
            for optimizer, params in ((native, a), (reference, b)):
                change(optimizer, params)


def own(p, q):
    p.grad, q.grad = p.detach(), torch.ones_like(q)


def own_shifted(p, q):
    for param, low in ((p, 0), (q, 1)):
        base = torch.cat([param.detach(), param.detach()[:1]])
        param.data, param.grad = base[1 - low :][: len(param)], base[low:][: len(param)]


def of_the_first(p, q):
    p.grad, q.grad = torch.ones_like(p), p.detach()


def of_the_second(p, q):
    p.grad, q.grad = q.detach(), torch.ones_like(q)


def of_each_other(p, q):
    p.grad, q.grad = q.detach(), p.detach()


def of_the_first_shifted(p, q):
    base = torch.cat([p.detach(), p.detach()[:7]])
    p.data, p.grad, q.grad = base[: len(p)], torch.ones_like(p), base[7:]


def of_the_second_shifted(p, q):
    base = torch.cat([q.detach(), q.detach()[:7]])
    q.data, p.grad, q.grad = base[: len(q)], base[7:], torch.ones_like(q)


GRADIENTS = [
    own,
    own_shifted,
    of_the_first,
    of_the_second,
    of_each_other,
    of_the_first_shifted,
    of_the_second_shifted,
]


@pytest.mark.parametrize("give", GRADIENTS, ids=lambda give: give.__name__)
def test_gradients_in_the_memory_of_parameters_are_read_as_the_reference_reads_them(target, give):
    a, b = twins([torch.randn(large(target)) for _ in range(2)], target.move)
    native = Ranger(a, lr=0.1, k=2, backend=target.backend)
    reference = Ranger(b, lr=0.1, k=2, backend="reference")
    for step in range(8):
        if step % 4 < 2:
            give_gradients([torch.randn(p.shape) for p in a], a, b, move=target.move)
        else:
            give(*a)
            give(*b)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step}")


@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (1, 1), (3, 2)])
def test_a_parameter_whose_elements_overlap_moves_as_the_reference_moves_it(target, strides):
    if target.device.type != "cpu":
        pytest.skip("which of the values lasts there is anyone's guess")
    shape = (9, 7) if target.small else (150, 200)  # several chunks, and for torch one
    values = torch.randn(3 * sum(shape)).as_strided(shape, strides)
    a, b = twins([values, torch.randn(5)], target.move)
    native = Ranger(a, lr=0.1, k=2, backend=target.backend)
    reference = Ranger(b, lr=0.1, k=2, backend="reference")
    for step in range(8):
        give_gradients([torch.randn(p.shape) for p in a], a, b, move=target.move)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step}")


@pytest.mark.parametrize("build", [make_ranger, make_lookahead], ids=["Ranger", "Lookahead"])
@pytest.mark.parametrize("what", ["groups", "params", "both"])
def test_groups_and_their_parameters_may_be_tuples(target, build, what):
    a, b = twins([torch.randn(5), torch.randn(3)], target.move)
    tuples = build([{"params": [p]} for p in a], target.backend)
    lists = build([{"params": [p]} for p in b], "reference")
    if what != "groups":
        for group in tuples.param_groups:
            group["params"] = tuple(group["params"])
    if what != "params":
        tuples.param_groups = tuple(tuples.param_groups)
    for step in range(4):
        give_gradients([torch.randn(p.shape) for p in a], a, b, move=target.move)
        tuples.step()
        lists.step()
        assert_same(tuples, lists, a, b, f"step {step}")
        with tuples.slow_weights(), lists.slow_weights():
            assert_same(tuples, lists, a, b, f"step {step}, slow weights")
