"""Damaged checkpoints: each is refused whole, with a sentence that says what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_same, twins
from optimizer_infos import lookahead_radam
from ranger_cuda import Lookahead, RAdam, Ranger
from saved_runs import make, train


def state_without_momenta(saved):
    del saved["state"][0]["exp_avg"], saved["state"][0]["exp_avg_sq"]


def wrong_shape(saved):
    saved["state"][1]["exp_avg"] = torch.zeros(8)


def no_moment(saved):
    del saved["state"][1]["exp_avg_sq"]


def zero_eps(saved):
    saved["param_groups"][0]["eps"] = 0.0


def one_group_more(saved):
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


def half_a_step(saved):
    saved["state"][1]["step"] = 2.5


def step_of_the_moment_s_shape(saved):
    saved["state"][1]["step"] = saved["state"][1]["exp_avg"].clone()


def negative_step(saved):
    saved["state"][1]["step"] = torch.tensor(-1.0)


def moment_that_is_a_number(saved):
    saved["state"][1]["exp_avg"] = 0.0


def is_now(value):
    """The state of a parameter."""

    def damage(saved):
        saved["state"][1] = value

    damage.__name__ = f"state_that_is_a_{type(value).__name__}"
    return damage


def becomes(what, change, name=None):
    """A tensor of the state."""

    def damage(saved):
        state = saved["state"][1]
        changed = name or next(n for n in ("slow_param", "exp_avg_sq") if n in state)
        state[changed] = change(state[changed])

    damage.__name__ = f"{what}_{name or 'tensor'}"
    return damage


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


CHANGES = {
    "bool": lambda t: t > 0,
    "integer": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
}


def without(*keys):
    def damage(saved):
        for key in keys[:-1]:
            saved = saved[key]
        del saved[keys[-1]]

    damage.__name__ = f"without_{keys[-1]}"
    return damage


def replaced(value, *keys):
    def damage(saved):
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = value

    damage.__name__ = f"{keys[-1]}_is_{value!r}"
    return damage


STRUCTURE = [
    one_group_more,
    *[is_now(value) for value in (0, None, [], "x", torch.zeros(7))],
    without("state"),
    without("param_groups"),
    without("param_groups", 0),
    without("param_groups", 0, "params"),
    *[replaced(value, "state") for value in (None, [], 0)],
    *[replaced(value, "param_groups") for value in (None, {}, 0, [None], [[]])],
    *[
        replaced(v, "param_groups", 0, "params")
        for v in (None, 3, "012", [0], [0, 0, 1], [[], 1, 2])
    ],
    *[replaced(v, "param_groups", 0, "param_names") for v in (5, ["a"], "abc")],
]
DAMAGES = [
    *STRUCTURE,
    wrong_shape,
    no_moment,
    state_without_momenta,
    zero_eps,
    half_a_step,
    step_of_the_moment_s_shape,
    negative_step,
    moment_that_is_a_number,
    *[becomes(what, change) for what, change in CHANGES.items()],
    *[becomes(w, c, "exp_avg") for w, c in CHANGES.items()],
    *[becomes(w, CHANGES[w], "step") for w in ("complex", "sparse", "meta", "freed")],
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(cls, damage):
    assert_refused_whole(cls, damage)


@pytest.mark.parametrize(
    "damage",
    [
        *STRUCTURE,
        *[becomes(w, c, "slow_param") for w, c in CHANGES.items()],
        *[becomes(w, CHANGES[w], "lookahead_step") for w in ("complex", "sparse", "meta", "freed")],
        replaced(6.5, "param_groups", 0, "lookahead_k"),
        replaced(2.0, "param_groups", 0, "lookahead_alpha"),
        # What only the inner optimizer refuses, half-way through its load.
        without("state", 1, "step"),
        replaced("x", "state", 1, "step"),
    ],
    ids=lambda f: f.__name__,
)
def test_a_checkpoint_is_refused_whole_around_any_optimizer(damage):
    assert_refused_whole(lambda params: Lookahead(torch.optim.AdamW(params)), damage)


def assert_refused_whole(cls, damage):
    params, other = twins(make([torch.float32]))
    optimizer, twin = train(cls(params), params, range(5)), train(cls(other), other, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    before = [dict(vars(o)) for o in (optimizer, getattr(optimizer, "optimizer", optimizer))]
    with pytest.raises((ValueError, RuntimeError, TypeError, KeyError)) as refusal:
        optimizer.load_state_dict(saved)
    if damage.__name__ not in ("without_step", "step_is_'x'") or hasattr(optimizer, "_rule"):
        assert not isinstance(refusal.value, (TypeError, KeyError))
        assert str(refusal.value).startswith("loaded state dict")
    after = [dict(vars(o)) for o in (optimizer, getattr(optimizer, "optimizer", optimizer))]
    for b, a in zip(before, after, strict=True):
        assert b.keys() == a.keys()
        assert all(b[name] is a[name] for name in ("state", "param_groups") if name in b)
    for each, its in ((optimizer, params), (twin, other)):
        train(each, its, range(5, 9))
    assert_same(optimizer, twin, params, other, "after a refused load")


@pytest.mark.parametrize("wrong", [None, 3, [], "x", {}])
@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_what_is_no_state_dict_is_refused(cls, wrong):
    optimizer = cls([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(wrong)


def test_real_moments_of_a_complex_parameter_are_refused():
    (param,) = make([torch.complex64])[1:2]
    optimizer = train(Ranger([param]), [param], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"] = saved["state"][0]["exp_avg_sq"].real
    with pytest.raises(ValueError, match=r"'exp_avg_sq' of parameter 0 is torch\.float32"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("dtype", "name", "convert"),
    [
        (torch.bfloat16, "residual", lambda t: t.float()),
        (torch.bfloat16, "residual", lambda t: t.half()),
        (torch.bfloat16, "residual", lambda t: t.long()),
        (torch.float16, "master", lambda t: t.half()),
        (torch.float16, "master", lambda t: t.double()),
        (torch.float16, "master", lambda t: t.int()),
    ],
)
def test_the_rest_of_a_master_that_has_lost_bits_is_refused(dtype, name, convert):
    (param,), _ = twins([torch.randn(5).to(dtype)])
    optimizer = train(Ranger([param]), [param], range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = convert(saved["state"][0][name])
    with pytest.raises(ValueError, match=rf"'{name}' of parameter 0 is torch.*bits"):
        optimizer.load_state_dict(saved)


def test_a_residual_of_earlier_versions_is_the_same_bits():
    (a,), (b,) = twins([torch.randn(5).bfloat16()])
    first, second = Ranger([a]), Ranger([b])
    train(first, [a], range(3))
    b.data.copy_(a)
    saved = copy.deepcopy(first.state_dict())
    saved["state"][0]["residual"] = saved["state"][0]["residual"].view(torch.int16)
    second.load_state_dict(saved)
    train(first, [a], range(3, 9))
    train(second, [b], range(3, 9))
    assert_same(first, second, [a], [b], "after the load")
