"""State dicts, copies and hooks of our optimizers, as torch's test_optim.py checks its own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from optimizer_infos import (
    bytes_of,
    each_config,
    each_config_without,
    each_info,
    random_params,
    same,
    set_grads,
    snapshot,
    train,
)

SHAPES = ((10, 5), (3,), ())
STEPS = 5  # the third cycle of k = 2 is half over: a lost phase shows


def trained(config, steps=STEPS):
    params = random_params(*SHAPES)
    return params, train(config.build(params), params, range(steps))


def fresh(config, like=None):
    params = random_params(*SHAPES, seed=1)
    if like is not None:
        with torch.no_grad():
            for param, value in zip(params, like, strict=True):
                param.copy_(value)
    return params, config.build(params)


def assert_go_on_alike(a, b, steps=range(STEPS, STEPS + 6)):
    (params, optimizer), (others, other) = a, b
    for step in steps:
        train(optimizer, params, [step])
        train(other, others, [step])
        assert same(snapshot(optimizer)["params"], snapshot(other)["params"])
        assert same(snapshot(optimizer)["state"], snapshot(other)["state"])


@each_config
def test_a_loaded_state_goes_on_as_the_saved_one(config):
    params, optimizer = trained(config)
    others, other = fresh(config, like=params)
    # Copied, as torch.optim shares the tensors that it need not convert.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())
    assert_go_on_alike((params, optimizer), (others, other))


@each_config_without("fused")  # without its flag it is another implementation
def test_a_state_from_before_its_flags_existed_loads(config):
    params, optimizer = trained(config)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in config.info.not_og_supported_flags:
            if flag != "maximize" or "maximize" not in config.kwargs:
                group.pop(flag, None)
    others, other = fresh(config, like=params)
    other.load_state_dict(older)
    assert_go_on_alike((params, optimizer), (others, other))


@each_info
def test_a_step_that_is_a_plain_number_loads(config):
    params, optimizer = trained(config)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    others, other = fresh(config, like=params)
    other.load_state_dict(state_dict)
    assert_go_on_alike((params, optimizer), (others, other))


def named(params):
    return [(f"name{i}", param) for i, param in enumerate(params)]


@pytest.mark.parametrize("names_from", [True, False])
@pytest.mark.parametrize("names_to", [True, False])
@each_info
def test_states_load_between_optimizers_with_and_without_names(config, names_from, names_to):
    params, others = random_params(*SHAPES), random_params(*SHAPES, seed=1)
    optimizer = train(config.build(named(params) if names_from else params), params, range(STEPS))
    other = config.build(named(others) if names_to else others)
    with torch.no_grad():
        for param, value in zip(others, params, strict=True):
            param.copy_(value)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_go_on_alike((params, optimizer), (others, other))
    names = [name for name, _ in named(params)]
    assert other.param_groups[0].get("param_names") == (names if names_from or names_to else None)


@each_config
def test_a_saved_file_loads_with_weights_only(config):
    params, optimizer = trained(config)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location="cpu")
    assert same(loaded, optimizer.state_dict())
    others, other = fresh(config, like=params)
    other.load_state_dict(loaded)
    assert_go_on_alike((params, optimizer), (others, other))


@each_info
def test_a_state_with_another_number_of_groups_or_parameters_is_refused_unchanged(config):
    params, optimizer = trained(config)
    before = snapshot(optimizer)
    for wrong in (params[:2], [{"params": params[:1]}, {"params": params[1:]}]):
        with pytest.raises(ValueError, match=r"parameter group"):
            optimizer.load_state_dict(config.build(wrong).state_dict())
    assert same(snapshot(optimizer), before)


# --- copies ------------------------------------------------------------------------------------


def public_attributes(optimizer):
    return {name for name in dir(optimizer) if not name.startswith("_")}


@each_config
def test_a_deepcopy_has_all_public_attributes_and_goes_on_alone(config):
    params, optimizer = trained(config)
    before = snapshot(optimizer)
    others, other = copy.deepcopy((params, optimizer))
    assert public_attributes(other) == public_attributes(optimizer)
    assert other.param_groups[0]["params"][0] is others[0]
    train(other, others, range(STEPS, STEPS + 3))
    assert same(snapshot(optimizer), before)
    others, other = copy.deepcopy((params, optimizer))
    assert_go_on_alike((params, optimizer), (others, other))


@each_config
def test_a_pickled_optimizer_goes_on_as_the_original(config):
    params, optimizer = trained(config)
    others, other = pickle.loads(pickle.dumps((params, optimizer)))
    assert other.param_groups[0]["params"][0] is others[0]
    assert same(other.defaults, optimizer.defaults)
    assert_go_on_alike((params, optimizer), (others, other))


@each_info
def test_copies_keep_what_the_constructor_was_told(config):
    options = {"backend": "reference"} if config.is_ours else {}
    optimizer = config.build(random_params(*SHAPES), **options)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._options == optimizer._options
        if config.is_ours and hasattr(other, "optimizer"):
            assert other.optimizer._options["backend"] == "reference"


# --- hooks of a step ---------------------------------------------------------------------------


@each_info
def test_a_step_pre_hook_may_replace_the_arguments_of_the_step(config):
    params = random_params(*SHAPES)
    optimizer = config.build(params)
    set_grads(params, 0)
    seen = []

    def hook(who, args, kwargs):
        seen.append((who, args, kwargs))
        return (who, lambda: "from the hook"), {}

    handle = optimizer.register_step_pre_hook(hook)
    assert optimizer.step() == "from the hook"
    assert seen == [(optimizer, (optimizer,), {})]
    handle.remove()
    assert optimizer.step() is None
    assert len(seen) == 1


@each_info
def test_a_step_post_hook_sees_the_parameters_moved(config):
    params = random_params(*SHAPES)
    optimizer = config.build(params)
    before = [bytes_of(p) for p in params]
    seen = []
    handle = optimizer.register_step_post_hook(
        lambda who, args, kwargs: seen.append((who, [bytes_of(p) for p in params]))
    )
    train(optimizer, params, [0])
    assert seen == [(optimizer, [bytes_of(p) for p in params])]
    assert seen[0][1] != before
    handle.remove()
    train(optimizer, params, [1])
    assert len(seen) == 1


@each_info
def test_hooks_of_all_optimizers_run_around_those_of_this_one(config):
    params = random_params(*SHAPES)
    optimizer = config.build(params)
    calls = []

    def note(name):
        return lambda who, *_: calls.append((name, who))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        train(optimizer, params, [0])
    finally:
        for handle in handles:
            handle.remove()
    names = ("global pre", "pre", "post", "global post")
    assert calls == [(name, optimizer) for name in names]
    train(optimizer, params, [1])
    assert len(calls) == 4


# --- hooks of state dicts ----------------------------------------------------------------------


@each_info
def test_state_dict_hooks_run_before_and_after_in_order(config):
    _, optimizer = trained(config)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda who: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda who: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda who, saved: {**saved, "by": "hook"})
    optimizer.register_state_dict_post_hook(lambda who, saved: calls.append(saved["by"]))
    optimizer.register_state_dict_post_hook(lambda who, saved: calls.append("post"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["first", "pre", "post", "hook"]
    assert saved["by"] == "hook"


@each_info
def test_load_state_dict_hooks_see_and_replace_what_is_loaded(config):
    params, optimizer = trained(config)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 0.123
    _, other = fresh(config, like=params)
    calls = []

    def halve(who, state_dict):
        calls.append("second")
        for group in state_dict["param_groups"]:
            group["lr"] *= 0.5

    def replace(who, state_dict):
        calls.append("first")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_pre_hook(replace, prepend=True)
    other.register_load_state_dict_post_hook(
        lambda who: calls.append(("loaded", who.param_groups[0]["lr"], len(who.state)))
    )
    other.load_state_dict(saved)
    assert calls == ["first", "second", ("loaded", 0.25, len(SHAPES))]
    assert saved["param_groups"][0]["lr"] == 0.123
    assert other.param_groups[0]["lr"] == 0.25


@each_info
def test_a_load_state_dict_hook_may_rename_what_is_loaded(config):
    params, optimizer = trained(config)
    foreign = copy.deepcopy(optimizer.state_dict())
    for state in foreign["state"].values():
        state["m"] = state.pop("exp_avg")

    def rename(who, state_dict):
        for state in state_dict["state"].values():
            state["exp_avg"] = state.pop("m")

    others, other = fresh(config, like=params)
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(foreign)
    assert_go_on_alike((params, optimizer), (others, other))


@each_info
def test_hooks_outlive_loading_a_state(config):
    params, optimizer = trained(config)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, [STEPS])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["load", "step", "load"]
