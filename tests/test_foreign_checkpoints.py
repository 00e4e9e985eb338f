"""Checkpoints of other optimizers: they load and training goes on, or they are refused."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_same, twins
from optimizer_infos import lookahead_radam, same, snapshot
from ranger_cuda import Lookahead, RAdam, Ranger, convert_checkpoint
from saved_runs import make, train


def ranger_of_2019(saved):
    """lessw2020's Ranger."""
    for state in saved["state"].values():
        state["slow_buffer"] = state.pop("slow_param", state["exp_avg"].clone())


def its_threshold(saved):
    saved["param_groups"][0]["N_sma_threshhold"] = 5


def timm_lookahead(saved):
    for state in saved["state"].values():
        state["lookahead_slow_buff"] = state["exp_avg"].clone()
    saved["param_groups"][0].update(lookahead_alpha=0.5, lookahead_k=6, lookahead_step=3)


def amsgrad(saved):
    for state in saved["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()


def amsgrad_before_its_first_step(saved):
    saved["state"].clear()
    saved["param_groups"][0]["amsgrad"] = True


def nadam(saved):
    for state in saved["state"].values():
        state["mu_product"] = torch.tensor(0.7)


def sgd_state(saved):
    for state in saved["state"].values():
        state.clear()
        state["momentum_buffer"] = torch.zeros(7)


def parameters_by_names(saved):
    saved["state"] = {str(key): state for key, state in saved["state"].items()}


FOREIGNERS = {
    "slow_buffer": ranger_of_2019,
    "N_sma_threshhold": its_threshold,
    "lookahead_slow_buff": timm_lookahead,
    "max_exp_avg_sq": amsgrad,
    "amsgrad": amsgrad_before_its_first_step,
    "mu_product": nadam,
    "momentum_buffer": sgd_state,
    "state of '0'": parameters_by_names,
}


@pytest.mark.parametrize("name", FOREIGNERS)
@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_what_would_lose_its_meaning_is_refused_or_left_out_with_a_warning(cls, name):
    (a, b), c = twins(make([torch.float32])), make([torch.float32])
    optimizer = train(cls(a), a, range(5))
    twin = train(cls(b), b, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    FOREIGNERS[name](saved)
    kept = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=rf"loaded state dict: .*{name}.*strict=False"):
        optimizer.load_state_dict(saved)
    for each, params in ((optimizer, a), (twin, b)):
        train(each, params, range(5, 9))
    assert_same(optimizer, twin, a, b, "after a refused load")

    other = cls(c)
    with pytest.warns(UserWarning, match=rf"loaded state dict: .*{name}") as warned:
        other.load_state_dict(saved, strict=False)
    assert len(warned) == 1
    assert same(saved, kept)
    known = {"step", "exp_avg", "exp_avg_sq", "slow_param", "lookahead_step"}
    assert all(
        isinstance(key, torch.Tensor) and state.keys() <= known
        for key, state in other.state.items()
    )
    assert not {"amsgrad", "N_sma_threshhold"} & other.param_groups[0].keys()
    train(other, c, [0])
    other.load_state_dict(other.state_dict())  # nothing foreign is left


@pytest.mark.parametrize("name", ["slow_buffer", "slow_params", "lookahead_slow_buff"])
def test_others_slow_weights_are_refused_around_any_optimizer(name):
    a, _ = twins([torch.randn(3)])
    optimizer = train(Lookahead(torch.optim.AdamW(a)), a, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = saved["state"][0].pop("slow_param")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{name}.*strict=False"):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)
    with pytest.warns(UserWarning, match=name):
        optimizer.load_state_dict(saved, strict=False)
    assert name not in optimizer.state[a[0]]


@pytest.mark.parametrize("source", [Ranger, lookahead_radam])
def test_radam_leaves_slow_weights_out_and_says_so(source):
    a, b = twins(make([torch.float32]))
    optimizer, other = train(source(a), a, range(3)), RAdam(b)
    with pytest.warns(UserWarning, match=r"slow_param.*RAdam has no slow weights"):
        other.load_state_dict(optimizer.state_dict())
    assert {name for p in b for name in other.state[p]} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam])
def test_no_dead_state_is_carried(cls, recwarn):
    """A master's rest when the parameter is float32 by now, and a wrapper's count of steps."""
    a, b = twins(make([torch.bfloat16, torch.float16]))
    optimizer = train(lookahead_radam(a) if cls is Ranger else cls(a), a, range(3))
    other = cls([torch.nn.Parameter(p.detach().float()) for p in b])
    other.load_state_dict(optimizer.state_dict())
    known = {"step", "exp_avg", "exp_avg_sq"}
    known |= {"slow_param"} if cls is not RAdam else set()
    known |= {"lookahead_step"} if cls is lookahead_radam else set()
    assert {name for state in other.state.values() for name in state} == known
    assert not [warning for warning in recwarn if "loaded state dict" in str(warning.message)]


def test_values_that_trainers_add_to_a_state_are_kept_as_copies():
    a, b = twins(make([torch.float32]))
    optimizer, other = train(Ranger(a), a, range(3)), Ranger(b)
    saved = optimizer.state_dict()
    inner = torch.ones(2)
    saved["state"][0].update(note="mine", count=[3, {"of": inner}])
    saved["state"]["mine"] = {"seen": 5}
    other.load_state_dict(saved)
    assert other.state[b[0]]["note"] == "mine"
    assert other.state["mine"] == {"seen": 5}
    (three, of) = other.state[b[0]]["count"]
    assert (three, of["of"].tolist()) == (3, [1, 1])
    inner.zero_()
    assert of["of"].tolist() == [1, 1]


@pytest.mark.parametrize("key", ["clip_exp", "caution", "wd_ratio", "schedule_decay", "ns_steps"])
def test_optimizers_that_are_like_radam_but_for_a_key_are_refused(key):
    """Adopt, AdamP, NAdam and Muon of timm, say."""
    params = [torch.nn.Parameter(torch.ones(2))]
    moments = {name: torch.ones(2) for name in ("exp_avg", "exp_avg_sq")}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    stranger = {"state": {0: {"step": 3, **moments}}, "param_groups": [{**group, key: 0.5}]}
    optimizer = Ranger(params)
    for load in (optimizer.load_state_dict, lambda s: convert_checkpoint(s, optimizer)):
        with pytest.raises(ValueError, match=key):
            load(copy.deepcopy(stranger))


def test_a_period_of_lookahead_that_is_none_is_refused():
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = Ranger(params)
    params[0].grad = torch.ones(2)
    optimizer.step()
    saved = torch.optim.AdamW(params).state_dict()
    saved["state"] = {0: {"step": 3.0, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    saved["param_groups"][0] |= {"lookahead_step": 3, "lookahead_k": 0}
    with pytest.raises(ValueError, match="Invalid k value: 0"):
        convert_checkpoint(saved, optimizer)
