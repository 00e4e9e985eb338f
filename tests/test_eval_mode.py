"""`optimizer.eval()` and `.train()`: evaluation on the slow weights, as trainers ask for it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter

from helpers import assert_same, assert_same_bits, parameters
from ranger_cuda import Lookahead, RAdam, Ranger

BUILDS = {
    "Ranger": lambda p, on=True, **kw: Ranger(p, lr=0.1, k=4, eval_with_slow_weights=on, **kw),
    "Lookahead": lambda p, on=True, **kw: Lookahead(
        RAdam(p, lr=0.1, **kw), k=4, eval_with_slow_weights=on
    ),
}
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params[:-1]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def assert_hold(params, values, what):
    for i, (param, value) in enumerate(zip(params, values, strict=True)):
        assert_same_bits(param, value.to(param.dtype), f"{what}, parameter {i}")


def slow_values(optimizer, params):
    return copies(optimizer.state.get(p, {}).get("slow_param", p) for p in params)


@pytest.fixture(params=BUILDS)
def stepped(request):
    params = parameters()
    optimizer = BUILDS[request.param](params)
    train(optimizer, params, range(6))
    return optimizer, params


def test_parameters_hold_slow_weights_in_eval_mode_and_their_own_bits_after_it(stepped):
    optimizer, params = stepped
    fast, slow = copies(params), slow_values(optimizer, params)
    assert not torch.equal(fast[5], slow[5])
    for _ in range(2):
        for _ in range(2):  # once more changes nothing
            optimizer.eval()
            assert_hold(params, slow, "in eval mode")
        for _ in range(2):
            optimizer.train()
            assert_hold(params, fast, "in train mode")
    for param, value in zip(params[:-1], slow, strict=False):
        assert_same_bits(optimizer.state[param]["slow_param"], value, "slow")
        assert "fast_param" not in optimizer.state[param]
    assert params[-1] not in optimizer.state


@each_build
def test_without_the_opt_in_nothing_happens(build):
    params = parameters()
    optimizer = build(params, on=False)
    train(optimizer, params, range(6))
    fast, saved = copies(params), pickle.dumps(optimizer.state_dict())
    optimizer.eval()
    assert_hold(params, fast, "after eval()")
    assert pickle.dumps(optimizer.state_dict()) == saved
    assert "eval_mode" not in optimizer.param_groups[0]
    train(optimizer, params, [6])
    with optimizer.slow_weights():
        optimizer.train()


@pytest.mark.parametrize(
    ("call", "do"),
    [
        (r"step\(\)", lambda o: o.step()),
        (r"slow_weights\(\)", lambda o: o.slow_weights().__enter__()),
        (r"reset_slow_weights\(\)", lambda o: o.reset_slow_weights()),
    ],
)
def test_what_would_mix_up_the_weights_is_refused_in_eval_mode(stepped, call, do):
    optimizer, params = stepped
    fast, slow = copies(params), slow_values(optimizer, params)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=f"{call} in eval mode.*optimizer.train"):
        do(optimizer)
    assert_hold(params, slow, call)
    optimizer.train()
    assert_hold(params, fast, call)
    do(optimizer)


@pytest.mark.parametrize("call", ["eval", "train"])
def test_it_is_refused_inside_slow_weights(stepped, call):
    optimizer, params = stepped
    fast = copies(params)
    with (
        optimizer.slow_weights(),
        pytest.raises(RuntimeError, match=rf"{call}\(\) inside `with optimizer.slow_weights"),
    ):
        getattr(optimizer, call)()
    assert_hold(params, fast, "afterwards")


def test_a_slow_weight_that_does_not_fit_leaves_all_as_it_was(stepped):
    optimizer, params = stepped
    fast = copies(params)
    optimizer.state[params[-2]]["slow_param"] = torch.ones(7)
    with pytest.raises(RuntimeError, match="slow_param"):
        optimizer.eval()
    assert_hold(params, fast, "afterwards")
    assert not any("fast_param" in state for state in optimizer.state.values())
    optimizer.train()
    assert_hold(params, fast, "afterwards")


def test_a_copy_that_fails_half_way_is_undone(stepped, monkeypatch):
    optimizer, params = stepped
    fast = copies(params)
    slow_of = optimizer._dispatcher.slow_pairs

    def spoilt(*args):
        pairs = slow_of(*args)
        last = [*pairs][-1]
        pairs[last] = pairs[last][0], torch.ones(9, 9)
        return pairs

    monkeypatch.setattr(optimizer._dispatcher, "slow_pairs", spoilt)
    with pytest.raises(RuntimeError):
        optimizer.eval()
    assert_hold(params, fast, "afterwards")
    train(optimizer, params, [6])


# --- checkpoints and copies -----------------------------------------------------------------------


def saved(optimizer, params):
    file = io.BytesIO()
    torch.save({"model": copies(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file)


def load_model(params, values):
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


@each_build
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_checkpoint_of_eval_mode_resumes_with_the_bits_of_one_of_train_mode(build, first):
    params, others = parameters(), parameters(1)
    optimizer, resumed = build(params), build(others)
    train(optimizer, params, range(6))
    slow = slow_values(optimizer, params)
    optimizer.eval()
    checkpoint = saved(optimizer, params)
    optimizer.train()
    train(optimizer, params, range(6, 15))

    train(resumed, others, range(20, 23))
    if first == "model":
        load_model(others, checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    load_model(others, checkpoint["model"])
    assert_hold(others, slow, "as evaluated")
    with pytest.raises(RuntimeError, match=r"step\(\) in eval mode"):
        resumed.step()
    resumed.eval()
    assert_hold(others, slow, "as evaluated")
    resumed.train()
    train(resumed, others, range(6, 15))
    assert_same(optimizer, resumed, params, others, "after resuming")


@pytest.mark.parametrize("weight_rounding", ["exact", "stochastic24", "stochastic", "nearest"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_so_does_one_of_low_precision(build, weight_rounding):
    def make(seed):
        torch.manual_seed(seed)
        params = [Parameter(torch.randn(64).bfloat16()), Parameter(torch.ones(1))]
        return params, build(params, weight_rounding=weight_rounding, state_dtype=torch.bfloat16)

    (params, optimizer), (others, resumed) = make(0), make(1)
    train(optimizer, params, range(6))
    optimizer.eval()
    checkpoint = saved(optimizer, params)
    optimizer.train()
    resumed.load_state_dict(checkpoint["optimizer"])
    resumed.train()
    assert_same(optimizer, resumed, params[:1], others[:1], "resumed")
    for each, its in ((optimizer, params), (resumed, others)):
        train(each, its, range(6, 15))
    assert_same(optimizer, resumed, params[:1], others[:1], "after resuming")


def test_a_checkpoint_of_train_mode_ends_eval_mode(stepped):
    optimizer, params = stepped
    checkpoint = saved(optimizer, params)
    reference = copy.deepcopy(optimizer)
    its = reference.param_groups[0]["params"]
    train(optimizer, params, range(6, 9))
    optimizer.eval()
    load_model(params, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert not any("fast_param" in state for state in optimizer.state.values())
    optimizer.train()
    assert_hold(params, checkpoint["model"], "loaded")
    train(optimizer, params, range(6, 12))
    train(reference, its, range(6, 12))
    assert_same(optimizer, reference, params, its, "after resuming")


@each_build
def test_so_does_one_of_an_optimizer_that_did_not_opt_in(build):
    params, others = parameters(), parameters()
    optimizer, other = build(params), build(others, on=False)
    for each, its in ((optimizer, params), (other, others)):
        train(each, its, range(6))
    optimizer.eval()
    load_model(params, others)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["eval_mode"] is False
    for each, its in ((optimizer, params), (other, others)):
        train(each, its, range(6, 9))
    assert_same(optimizer, other, params, others, "after loading")


OTHERS = {
    "RAdam": lambda p: RAdam(p),
    "Ranger": lambda p: Ranger(p),
    "Lookahead": lambda p: Lookahead(torch.optim.RAdam(p)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("options", [{}, {"strict": False}])
def test_a_checkpoint_of_eval_mode_is_refused_where_nobody_would_end_it(stepped, other, options):
    optimizer, _ = stepped
    optimizer.eval()
    others = parameters(1)
    refusing = other(others)
    before = copies(others)
    with pytest.raises(ValueError, match=r"saved in eval mode.*eval_with_slow_weights=True"):
        refusing.load_state_dict(optimizer.state_dict(), **options)
    assert_hold(others, before, "after refusing")
    assert not refusing.state
    optimizer.train()
    refusing.load_state_dict(optimizer.state_dict(), **options)


def drop(state_dict):
    del state_dict["state"][5]["fast_param"]


def resize(state_dict):
    state_dict["state"][5]["fast_param"] = torch.ones(7)


def make_whole(state_dict):
    state_dict["state"][5]["fast_param"] = torch.ones(4, 3, dtype=torch.int64)


def name_no_mode(state_dict):
    state_dict["param_groups"][0]["eval_mode"] = False


def name_another_mode(state_dict):
    state_dict["param_groups"][0]["eval_mode"] = "eval"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "parameter 5 has no 'fast_param'.*call optimizer.train"),
        (resize, r"'fast_param' of parameter 5 has shape \(7,\)"),
        (make_whole, "'fast_param' of parameter 5 is torch.int64"),
        (name_no_mode, "has a 'fast_param', but 'eval_mode' of its group is not True"),
        (name_another_mode, "Invalid eval_mode value: 'eval'"),
    ],
)
def test_a_checkpoint_that_would_lose_the_fast_weights_is_refused(stepped, spoil, message):
    optimizer, params = stepped
    fast = copies(params)
    optimizer.eval()
    state_dict = copy.deepcopy(optimizer.state_dict())
    spoil(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    optimizer.train()
    assert_hold(params, fast, "after refusing")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_eval_mode_is_one_in_eval_mode(stepped, again):
    optimizer, params = stepped
    optimizer.eval()
    copied = again(optimizer)
    its = copied.param_groups[0]["params"]
    assert_hold(its, params, "copied")
    with pytest.raises(RuntimeError, match=r"step\(\) in eval mode"):
        copied.step()
    for each, own in ((optimizer, params), (copied, its)):
        each.train()
        train(each, own, range(6, 12))
    assert_same(optimizer, copied, params, its, "after training on")


def test_what_is_given_other_memory_in_eval_mode_gets_its_values_back(stepped):
    optimizer, params = stepped
    fast = copies(params)
    optimizer.eval()
    for param in params:
        wide = param.data.to(torch.promote_types(param.dtype, torch.float64))
        param.data = wide.to(param.dtype)
    optimizer.train()
    assert_hold(params, fast, "afterwards")


def test_a_group_added_in_eval_mode_is_trained_from_then_on(stepped):
    optimizer, params = stepped
    fast = copies(params)
    optimizer.eval()
    added = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added]})
    with pytest.raises(RuntimeError, match=r"step\(\) in eval mode"):
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.train()
    assert_hold(params, fast, "afterwards")
    assert_hold([added], [torch.ones(3)], "afterwards")
    added.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(added, torch.ones(3))


@each_build
def test_parameters_that_have_not_moved_yet_are_their_slow_weights(build):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(1))]
    optimizer = build(params)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, [0])
    load_model(params, [torch.full((3,), 5.0), torch.ones(1)])
    optimizer.eval()
    assert_hold(params[:1], [torch.full((3,), 5.0)], "in eval mode")
    optimizer.train()
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, params, [0])
    assert_hold([optimizer.state[params[0]]["slow_param"]], [torch.full((3,), 5.0)], "slow")


@each_build
def test_memory_of_the_fast_weights_is_free_after_it(build):
    params = parameters()
    optimizer = build(params)
    train(optimizer, params, range(2))
    before = {p: [*s] for p, s in optimizer.state.items()}
    optimizer.eval()
    assert all("fast_param" in state for state in optimizer.state.values())
    optimizer.train()
    assert {p: [*s] for p, s in optimizer.state.items()} == before
