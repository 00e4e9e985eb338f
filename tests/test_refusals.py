"""What is refused: every hyperparameter that no step may use and every tensor that no backend can
move. Whatever is refused changes nothing: no parameter, no state, no group."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from optimizer_infos import (
    OWN,
    assert_refuses,
    each_fused,
    each_own,
    lookahead_adamw,
    lookahead_radam,
    random_params,
    ranger,
    same,
    set_grads,
    snapshot,
    train,
)
from ranger_cuda import Lookahead, RAdam, Ranger

NAN, INF, TWO = math.nan, math.inf, 2.0

# option, value, error, message
WRONG = [
    ("lr", -1e-9, ValueError, "Invalid learning rate: -1e-09; it must be finite"),
    ("lr", NAN, ValueError, "Invalid learning rate: nan"),
    ("lr", INF, ValueError, "Invalid learning rate: inf"),
    ("lr", torch.tensor(NAN), ValueError, r"Invalid learning rate: nan|tensor\(nan\)"),
    ("lr", torch.tensor([1e-3, 1e-3]), ValueError, r"Tensor lr must be 1-element.*\(2,\)"),
    ("lr", torch.tensor([]), ValueError, "Tensor lr must be 1-element"),
    ("lr", None, TypeError, "must be a number"),
    ("lr", "0.1", TypeError, "'0.1' is no number"),
    ("lr", b"1", TypeError, "b'1' is no number"),
    ("lr", True, TypeError, "True is no number"),
    ("lr", 1j, TypeError, "must be a number"),
    ("lr", torch.tensor(1j), TypeError, "must be a number"),
    ("lr", torch.tensor(0.1, device="meta"), TypeError, "must be a number"),
    ("lr", 1e39, ValueError, r"Invalid learning rate: 1e\+39; it must be finite in float32"),
    ("lr", 10**400, TypeError, "must be a number"),
    ("betas", (-0.1, 0.9), ValueError, "beta parameter at index 0: -0.1"),
    ("betas", (1.0, 0.9), ValueError, "beta parameter at index 0: 1.0"),
    ("betas", (0.9, 1.0), ValueError, "beta parameter at index 1: 1.0"),
    ("betas", (0.9, NAN), ValueError, "beta parameter at index 1: nan"),
    ("betas", (0.9, 1 - 1e-17), ValueError, "beta parameter at index 1: 1.0"),  # is 1 in float64
    ("betas", (0.9,), ValueError, "give two numbers"),
    ("betas", (0.9, 0.99, 0.999), ValueError, "give two numbers"),
    ("betas", 0.9, ValueError, "give two numbers"),
    ("betas", ("0.9", 0.99), TypeError, "'0.9' is no number"),
    ("betas", (False, 0.99), TypeError, "False is no number"),
    ("betas", (torch.ones(2), 0.99), TypeError, "must be a number"),
    ("eps", 0.0, ValueError, "a parameter whose gradient is exactly 0 becomes NaN"),
    ("eps", -1e-8, ValueError, "Invalid epsilon value: -1e-08"),
    ("eps", 1e-60, ValueError, "above 0 in float32"),
    ("eps", 2.0**-150, ValueError, "above 0 in float32"),  # rounds to 0, ties to even
    ("eps", NAN, ValueError, "Invalid epsilon value: nan"),
    ("eps", INF, ValueError, "Invalid epsilon value: inf"),
    ("eps", 1e39, ValueError, r"Invalid epsilon value: 1e\+39"),
    ("eps", True, TypeError, "True is no number"),
    ("eps", None, TypeError, "must be a number"),
    ("weight_decay", -1e-3, ValueError, "Invalid weight_decay value: -0.001"),
    ("weight_decay", NAN, ValueError, "Invalid weight_decay value: nan"),
    ("weight_decay", INF, ValueError, "Invalid weight_decay value: inf"),
    ("weight_decay", 3.5e38, ValueError, r"Invalid weight_decay value: 3.5e\+38; .* in float32"),
    ("weight_decay", True, TypeError, "True is no number"),
    ("weight_decay", np.True_, TypeError, "True_? is no number"),
    ("weight_decay", torch.tensor(True), TypeError, r"tensor\(True\) is no number"),
    ("rho_threshold", 3.9, ValueError, "Invalid rho_threshold value: 3.9; it must be at least 4"),
    ("rho_threshold", NAN, ValueError, "Invalid rho_threshold value: nan"),
    ("max_grad_norm", 0.0, ValueError, "Invalid max_grad_norm value: 0.0"),
    ("max_grad_norm", -1.0, ValueError, "Invalid max_grad_norm value: -1.0"),
    ("max_grad_norm", NAN, ValueError, "Invalid max_grad_norm value: nan"),
    ("max_grad_norm", b"1", ValueError, "Invalid max_grad_norm value: b'1'"),
    ("max_grad_norm", True, ValueError, "Invalid max_grad_norm value: True"),
    ("max_grad_norm", torch.ones(2), ValueError, "Invalid max_grad_norm value: tensor"),
    ("maximize", torch.ones(2), ValueError, "Invalid maximize value: tensor"),
    ("max_grad_norm", "1", ValueError, "Invalid max_grad_norm value: '1'"),
    ("weight_rounding", "Exact", ValueError, "Invalid weight_rounding value: 'Exact'; this"),
    ("weight_rounding", None, ValueError, "Invalid weight_rounding value: None"),
]
WRONG_LOOKAHEAD = [
    ("k", 0, ValueError, "Invalid k value: 0; the Lookahead period is a whole number"),
    ("k", -6, ValueError, "Invalid k value: -6"),
    ("k", 2.5, ValueError, "Invalid k value: 2.5"),
    ("k", TWO, ValueError, "Invalid k value: 2.0"),
    ("k", True, ValueError, "Invalid k value: True"),
    ("k", None, ValueError, "Invalid k value: None"),
    ("k", 10**400, ValueError, "Invalid k value: 1000"),
    ("k", torch.tensor(6, device="meta"), ValueError, "Invalid k value: tensor"),
    ("alpha", b"1", ValueError, "Invalid alpha value: b'1'"),
    ("alpha", True, ValueError, "Invalid alpha value: True"),
    ("alpha", torch.ones(2), ValueError, "Invalid alpha value: tensor"),
    ("alpha", -0.1, ValueError, r"Invalid alpha value: -0.1; .* in \[0, 1\]"),
    ("alpha", 1.1, ValueError, "Invalid alpha value: 1.1"),
    ("alpha", NAN, ValueError, "Invalid alpha value: nan"),
]
CASES = [
    pytest.param(cls, *case, id=f"{name}-{case[0]}-{case[1]}"[:40])
    for name, cls in OWN.items()
    for case in WRONG + (WRONG_LOOKAHEAD if name != "RAdam" else [])
]
each_wrong_value = pytest.mark.parametrize(("cls", "option", "value", "error", "message"), CASES)


def key_in_group(option):
    """What a group calls it, where ``alpha`` may be another library's."""
    return f"lookahead_{option}" if option in ("k", "alpha") else option


@each_wrong_value
def test_a_wrong_value_is_refused_by_the_constructor(cls, option, value, error, message):
    params = random_params((3,))
    with pytest.raises(error, match=message):
        cls(params, **{option: value})
    if cls is not lookahead_radam:  # there the options of Lookahead are no defaults of a group
        key = key_in_group(option)
        with pytest.raises(error, match=message):  # nor may every group override a wrong default
            cls([{"params": params, key: cls(params).defaults[key]}], **{option: value})


@pytest.mark.parametrize("cls", [RAdam, Ranger])
def test_a_state_dtype_that_there_is_not_is_refused(cls):
    with pytest.raises(ValueError, match=r"Invalid state_dtype value: torch.int8.*torch.float32"):
        cls(random_params((3,)), state_dtype=torch.int8)


@each_wrong_value
def test_a_wrong_value_is_refused_in_a_group(cls, option, value, error, message):
    first, second = random_params((3,), (3,))
    optimizer = train(cls([first]), [first], range(3))
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [second], key_in_group(option): value})
    assert len(optimizer.param_groups) == 1
    assert same(snapshot(optimizer), before)


@each_wrong_value
def test_a_value_that_becomes_wrong_stops_the_step_before_anything_moved(
    cls, option, value, error, message
):
    params = random_params((3,), (3,))
    optimizer = cls([{"params": [p]} for p in params])
    train(optimizer, params, range(3))
    good = snapshot(optimizer)
    optimizer.param_groups[-1][key_in_group(option)] = value
    set_grads(params, 3)
    with pytest.raises(error, match=message):
        optimizer.step()
    now = snapshot(optimizer)
    assert same([now["params"], now["state"]], [good["params"], good["state"]])

    optimizer.param_groups[-1][key_in_group(option)] = good["groups"][-1][key_in_group(option)]
    untouched = random_params((3,), (3,))
    expected = train(cls([{"params": [p]} for p in untouched]), untouched, range(4))
    optimizer.step()
    assert same(snapshot(optimizer), snapshot(expected))


@each_wrong_value
def test_a_checkpoint_with_a_wrong_value_is_refused_unchanged(cls, option, value, error, message):
    params = random_params((3,))
    optimizer = train(cls(params), params, range(3))
    if option == "k" and value is TWO:
        return  # see test_a_whole_period_in_a_checkpoint_is_an_int
    before = snapshot(optimizer)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0][key_in_group(option)] = value
    for state in wrong["state"].values():
        state["step"] += 10
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("k", [6.0, torch.tensor(6), torch.tensor([6]), torch.tensor(6.0), 6])
@pytest.mark.parametrize("cls", [ranger, lookahead_radam, lookahead_adamw])
def test_a_whole_period_in_a_checkpoint_is_an_int(cls, k):
    params = random_params((3,))
    optimizer = train(cls(params), params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lookahead_k"] = k
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lookahead_k"] == 6
    assert type(optimizer.param_groups[0]["lookahead_k"]) is int


def test_a_tensor_whose_memory_was_given_back_is_no_number():
    freed = torch.tensor(0.1)
    freed.untyped_storage().resize_(0)
    for options in ({"lr": freed}, {"betas": (freed, 0.9)}, {"alpha": freed}, {"k": freed}):
        optimizer = Ranger(random_params((3,)))
        saved = optimizer.state_dict()
        saved["param_groups"][0].update(options)
        with pytest.raises(RuntimeError, match="not allocated"):
            Ranger(random_params((3,)), **options)
        with pytest.raises(RuntimeError, match=r"loaded state dict.*not allocated"):
            optimizer.load_state_dict(saved)


RIGHT = [
    {"lr": 0.0},
    {"lr": torch.tensor([[1e-3]])},
    {"lr": torch.tensor(1e-3, dtype=torch.float64)},
    {"betas": (0.0, 0.0)},
    {"betas": [0.9, 0.999]},
    {"betas": (0.999999, 0.9999999)},
    {"betas": (torch.tensor(0.9), torch.tensor(0.999))},
    {"eps": 2.0**-149},  # the smallest float32
    {"weight_decay": 0.0, "rho_threshold": INF},
    {"rho_threshold": 4},
    {"max_grad_norm": INF},
    {"max_grad_norm": 1},
    {"max_grad_norm": 1e39},
    {"eps": torch.finfo(torch.float32).max},
    {"k": 1},
    {"k": 10**6},
    {"alpha": 0},
    {"alpha": 1},
]


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_values_at_the_edge_are_taken_and_keep_parameters_finite(options):
    for cls in (Ranger,) if {"k", "alpha"} & options.keys() else (RAdam, Ranger):
        params = random_params((5,), (4,))
        optimizer = cls(params, **options)
        for step in range(8):
            set_grads(params, step)
            params[0].grad[0] = 0.0
            optimizer.step()
        assert all(p.isfinite().all() for p in params)


# --- other arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RAdam, Ranger, lookahead_radam, lookahead_adamw])
def test_a_backend_that_there_is_not_is_refused(cls):
    build = cls
    if cls is lookahead_adamw:

        def build(params, backend):
            return Lookahead(torch.optim.AdamW(params), backend=backend)

    params = random_params((3,))
    with pytest.raises(ValueError, match=r"Invalid backend: 'gpu'; use None .* 'cpu', 'reference'"):
        build(params, backend="gpu")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*ranger_cuda info"):
        build(params, backend="triton")


def test_a_backend_that_does_not_serve_a_dtype_moves_nothing():
    fine = random_params((3,))[0]
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    optimizer = Ranger([fine, other], backend="cpu")
    set_grads([fine], 0)
    other.grad = torch.ones_like(other)
    assert_refuses(optimizer, ValueError, r"parameter 1 of group 0 is torch.int64 on cpu, which")


@each_own
def test_an_expanded_state_is_refused_by_the_step(cls):
    params = random_params((3,), (4,))
    optimizer = train(cls(params), params, range(2))
    kept = optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(1).expand(4)
    set_grads(params, 2)
    assert_refuses(optimizer, RuntimeError, r"state 'exp_avg' of parameter 1 .*expanded")
    optimizer.state[params[1]]["exp_avg"] = kept
    optimizer.step()


@pytest.mark.parametrize("damage", ["no state", "no step", "other shape", "fraction"])
@each_fused
def test_a_damaged_state_beside_a_native_one_moves_neither(cls, damage):
    """A bfloat16 parameter, which the reference moves, beside one that the CPU's kernels move."""
    params = [*random_params((3,)), *random_params((4,), dtype=torch.bfloat16)]
    optimizer = train(cls(params), params, range(2))
    state = optimizer.state[params[1]]
    if damage == "no state":
        state.clear()  # as of a new parameter
    elif damage == "no step":
        del state["step"]
    elif damage == "other shape":
        state["exp_avg"] = torch.zeros(5)
    else:
        state["step"].fill_(1.5)
    set_grads(params, 2)
    if damage in ("no state", "no step"):
        optimizer.step()
        assert state["step"] == 1
        return
    assert_refuses(optimizer, RuntimeError, r"state '\w+' of parameter 1")


@pytest.mark.parametrize("count", [-1.0, 2.5, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_fused
def test_a_step_count_that_is_none_stops_the_step(cls, backend, count):
    params = random_params((3,), (4,))
    optimizer = train(cls(params, backend=backend), params, range(2))
    optimizer.state[params[1]]["step"].fill_(count)
    set_grads(params, 2)
    assert_refuses(optimizer, RuntimeError, r"parameter 1 of group 0 .*whole number")


def test_slow_weights_that_do_not_fit_stop_the_step_before_the_inner_optimizer_moved():
    params = random_params((3,), (4,))
    optimizer = train(Lookahead(torch.optim.SGD(params, lr=0.1)), params, range(2))
    optimizer.state[params[1]]["slow_param"] = torch.zeros(5)
    set_grads(params, 2)
    assert_refuses(optimizer, RuntimeError, r"state 'slow_param' of parameter 1")


@each_fused
def test_a_resting_parameter_that_could_not_move_stops_no_step(cls):
    params = random_params((3,), (4,))
    for backend in ("cpu", "reference"):
        optimizer = train(cls(params, backend=backend), params, range(2))
        params[1].data = torch.zeros(5)
        params[1].grad = None
        set_grads(params[:1], 2)
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 3
        params[1].data = torch.zeros(4)


@each_fused
def test_numbers_of_numpy_and_torch_are_numbers(cls):
    (param,) = random_params((3,))
    set_grads([param], 0)
    numbers = {"lr": np.float32(0.1), "max_grad_norm": np.float32(1.0)}
    numbers["weight_decay"] = np.array(0.1)
    if "k" in cls([param]).defaults:
        numbers.update(k=np.int64(2), alpha=torch.tensor(0.5))
    cls([param], **numbers).step()


@pytest.mark.parametrize("wrong", ["yes", 2])
def test_the_opt_in_to_eval_mode_is_a_bool(wrong):
    params = [torch.nn.Parameter(torch.ones(2))]
    inner = torch.optim.SGD(params, lr=0.1)
    for make in (Ranger, lambda _, **options: Lookahead(inner, **options)):
        with pytest.raises(ValueError, match=f"eval_with_slow_weights value: {wrong!r}"):
            make(params, eval_with_slow_weights=wrong)


def test_decoded_state_is_refused_in_eval_mode():
    (param,) = params = random_params((3,))
    optimizer = Ranger(params, k=2, eval_with_slow_weights=True)
    train(optimizer, params, range(3))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"decoded_state\(\) in eval mode"):
        optimizer.decoded_state(param)
    optimizer.train()
    assert optimizer.decoded_state(param).keys() >= {"param", "slow_param"}
