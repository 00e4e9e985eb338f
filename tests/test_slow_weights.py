"""Evaluation on the slow weights, and back, without losing a bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from helpers import assert_same_bits, parameters
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.step.native import StepInputs


@pytest.fixture(params=["Ranger", "Lookahead"])
def stepped(request):
    """An optimizer in mid-cycle, with parameters of every kind, one of them not stepped yet."""
    params = parameters()
    optimizer = (
        Ranger(params, lr=0.1, k=4)
        if request.param == "Ranger"
        else Lookahead(RAdam(params, lr=0.1), k=4)
    )
    for _ in range(6):
        for param in params[:-1]:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer, params


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def test_parameters_hold_their_slow_weights_and_then_their_own_bits_again(stepped):
    optimizer, params = stepped
    fast = copies(params)
    slow = copies(optimizer.state[p]["slow_param"] for p in params[:-1])
    with optimizer.slow_weights():
        for param, value in zip(params, slow, strict=False):
            assert_same_bits(param, value.to(param.dtype), "inside")
        assert_same_bits(params[-1], fast[-1], "inside, a parameter that has not been stepped")
    for param, value in zip(params, fast, strict=True):
        assert_same_bits(param, value, "afterwards")
    for param, value in zip(params, slow, strict=False):
        assert_same_bits(optimizer.state[param]["slow_param"], value, "afterwards, slow weights")
    assert not torch.equal(params[5], slow[5])


def test_an_exception_inside_brings_the_parameters_back(stepped):
    optimizer, params = stepped
    fast = copies(params)

    def evaluate():
        with optimizer.slow_weights():
            raise KeyError("from the evaluation")

    with pytest.raises(KeyError, match="from the evaluation"):
        evaluate()
    for param, value in zip(params, fast, strict=True):
        assert_same_bits(param, value, "after the exception")
    optimizer.step()


@pytest.mark.parametrize(
    ("call", "do"),
    [
        (r"step\(\)", lambda o: o.step()),
        (r"state_dict\(\)", lambda o: o.state_dict()),
        (r"load_state_dict\(\)", lambda o: o.load_state_dict({})),
        (r"slow_weights\(\)", lambda o: o.slow_weights().__enter__()),
        ("copying or pickling", copy.deepcopy),
        ("copying or pickling", pickle.dumps),
    ],
)
def test_what_would_mix_up_the_weights_is_refused_inside(stepped, call, do):
    optimizer, params = stepped
    fast = copies(params)
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=f"{call} inside"):
        do(optimizer)
    for param, value in zip(params, fast, strict=True):
        assert_same_bits(param, value, call)


def test_training_goes_on_as_if_there_had_been_no_evaluation(stepped):
    optimizer, params = stepped
    saved = copies(params), optimizer.state_dict()
    before = {k: v.clone() for k, v in optimizer.state[params[5]].items()}
    with optimizer.slow_weights():
        pass
    assert saved[1]["param_groups"] == optimizer.state_dict()["param_groups"]
    for name, value in before.items():
        assert_same_bits(optimizer.state[params[5]][name], value, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_given_other_memory_inside_get_their_values_back(dtype):
    model = torch.nn.Linear(3, 2).to(dtype)
    optimizer = Ranger(model.parameters(), k=2)
    for _ in range(3):
        model(torch.ones(3, dtype=dtype)).sum().backward()
        optimizer.step()
    fast = copies(model.parameters())
    slow = [optimizer.state[p]["slow_param"].clone() for p in model.parameters()]
    with optimizer.slow_weights():
        model.double()
        model.to(dtype)
    for param, value in zip(model.parameters(), fast, strict=True):
        assert_same_bits(param, value, "fast")
    for param, value in zip(model.parameters(), slow, strict=True):
        assert_same_bits(optimizer.state[param]["slow_param"], value, "slow")


# --- slow weights of weights that are loaded later -----------------------------------------------

BUILDS = {
    "Ranger": lambda p, **kw: Ranger(p, k=3, **kw),
    "Ranger, reference": lambda p, **kw: Ranger(p, k=3, backend="reference", **kw),
    "Ranger, clipping": lambda p, **kw: Ranger(p, k=3, max_grad_norm=1e9, **kw),
    "Lookahead(RAdam)": lambda p, **kw: Lookahead(RAdam(p, **kw), k=3),
    "Lookahead(SGD)": lambda p, **kw: Lookahead(torch.optim.SGD(p, **kw), k=3),
}
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def model_of(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Linear(5, 3).to(dtype)


def give(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps):
    for step in steps:
        give(params, step)
        optimizer.step()


def assert_same_run(optimizer, params, other, others, what):
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q, what)
        for name, value in other.state[q].items():
            assert_same_bits(optimizer.state[p][name], value, f"{what}, {name}")


def rest(optimizer, params):
    """A step as torch.distributed.checkpoint makes it into empty state."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        is_tensor = isinstance(group["lr"], torch.Tensor)
        group["lr"] = torch.tensor(0.0) if is_tensor else 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


@each_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_slow_weights_made_before_the_weights_are_loaded_are_taken_anew(build, dtype, lr):
    model, loaded = model_of(0, dtype), model_of(1, dtype)
    params, others = list(model.parameters()), list(loaded.parameters())
    optimizer, reference = build(params, lr=lr), build(others, lr=lr)
    rest(optimizer, params)
    rest(reference, others)
    model.load_state_dict(loaded.state_dict())
    for step in range(7):
        train(optimizer, params, [step])
        train(reference, others, [step])
        assert_same_run(optimizer, params, reference, others, f"step {step}")


@each_build
def test_a_sync_while_lr_is_still_0_pulls_to_no_weights_of_before(build):
    model, loaded = model_of(0), model_of(1)
    params = list(model.parameters())
    optimizer = build(params, lr=0.0)
    train(optimizer, params, [0])
    model.load_state_dict(loaded.state_dict())
    train(optimizer, params, range(1, 5))  # a warm-up's first steps
    for param, value in zip(params, loaded.parameters(), strict=True):
        assert_same_bits(param, value, "after a sync")
        assert_same_bits(optimizer.state[param]["slow_param"], value.detach(), "slow")


@each_build
@pytest.mark.parametrize("zeros", [1, 2, 4])
def test_a_warmup_from_lr_0_has_the_bits_of_slow_weights_that_stay(build, zeros):
    model, other = model_of(0), model_of(0)
    params, others = list(model.parameters()), list(other.parameters())
    optimizer, reference = build(params, lr=0.1), build(others, lr=0.1)
    for step in range(10):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.01 * max(0, step - zeros + 1)
        train(optimizer, params, [step])
        train(reference, others, [step])
        # What is loaded is not taken anew.
        reference.load_state_dict(reference.state_dict())
        assert_same_run(optimizer, params, reference, others, f"step {step}")


def spoil_a_gradient(params, patch):
    params[1].grad = params[1].grad.to_sparse()


def spoil_the_launch(params, patch):
    patch.setattr(StepInputs, "of", lambda *args, **kwargs: 1 / 0)


@pytest.mark.parametrize("spoil", [spoil_a_gradient, spoil_the_launch])
@pytest.mark.parametrize("name", [name for name in BUILDS if name != "Lookahead(SGD)"])
def test_a_step_that_fails_leaves_the_slow_weights_that_there_were(name, spoil):
    model, loaded = model_of(0), model_of(1)
    params = list(model.parameters())
    optimizer = BUILDS[name](params, lr=0.1)
    rest(optimizer, params)
    slow = [optimizer.state[p]["slow_param"] for p in params]
    values = copies(slow)
    model.load_state_dict(loaded.state_dict())
    give(params, 0)
    with pytest.MonkeyPatch.context() as patch:
        spoil(params, patch)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            optimizer.step()
    for param, before, value in zip(params, slow, values, strict=True):
        assert optimizer.state[param]["slow_param"] is before
        assert_same_bits(before, value, "after the failed step")
    start = copies(params)
    train(optimizer, params, [0])
    for param, value in zip(params, start, strict=True):
        assert_same_bits(optimizer.state[param]["slow_param"], value, "after the next")


@each_build
def test_loaded_slow_weights_are_not_taken_anew(build):
    params = list(model_of(0).parameters())
    optimizer = build(params, lr=0.1)
    rest(optimizer, params)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["slow_param"].fill_(2.0)  # in place, as torch.distributed.checkpoint loads
    optimizer.load_state_dict(saved)
    train(optimizer, params, [0])
    for param in params:
        assert (optimizer.state[param]["slow_param"] == 2.0).all()


@each_build
def test_a_parameter_that_moves_later_takes_its_slow_weight_then(build):
    model, loaded = model_of(0), model_of(1)
    params = list(model.parameters())
    optimizer = build(params, lr=0.1)
    rest(optimizer, params)
    params[1].grad = None
    train(optimizer, params[:1], range(2))
    model.load_state_dict(loaded.state_dict())
    train(optimizer, params, [2])
    assert_same_bits(optimizer.state[params[1]]["slow_param"], loaded.bias.detach(), "later")
    assert not torch.equal(optimizer.state[params[0]]["slow_param"], loaded.weight)


@each_build
@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_takes_them_anew_as_well(build, again):
    params = list(model_of(0).parameters())
    optimizer = build(params, lr=0.1)
    rest(optimizer, params)
    copied = again(optimizer)
    others = copied.param_groups[0]["params"]
    for param, value in zip(others, model_of(1).parameters(), strict=True):
        param.data.copy_(value)
    start = copies(others)
    train(copied, others, [0])
    for param, value in zip(others, start, strict=True):
        assert_same_bits(copied.state[param]["slow_param"], value, "a copy's")


@each_build
def test_parameters_that_have_not_moved_yet_are_their_slow_weights(build):
    model, loaded = model_of(0), model_of(1)
    params = list(model.parameters())
    optimizer = build(params, lr=0.1)
    rest(optimizer, params)
    model.load_state_dict(loaded.state_dict())
    with optimizer.slow_weights():
        for param, value in zip(params, loaded.parameters(), strict=True):
            assert_same_bits(param, value, "inside")
    for key, state in optimizer.state_dict()["state"].items():
        assert_same_bits(state["slow_param"], params[key].detach(), "saved")


def test_reset_slow_weights_makes_each_the_parameter_as_it_is(stepped):
    optimizer, params = stepped
    before = {param: dict(state) for param, state in optimizer.state.items()}
    values = {p: {n: v.clone() for n, v in s.items()} for p, s in before.items()}
    fast = copies(params)
    optimizer.reset_slow_weights()
    for param, value in zip(params, fast, strict=True):
        assert_same_bits(param, value, "the parameter")
        for name, old in before.get(param, {}).items():
            assert optimizer.state[param][name] is old  # graphs that were captured write there
            if name != "slow_param":
                assert_same_bits(old, values[param][name], name)
            else:
                assert_same_bits(old.to(param.dtype), value, "slow")
    assert params[-1] not in optimizer.state
    with optimizer.slow_weights():
        for param, value in zip(params, fast, strict=True):
            assert_same_bits(param, value, "inside")
        with pytest.raises(RuntimeError, match=r"reset_slow_weights\(\) inside"):
            optimizer.reset_slow_weights()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reset_slow_weights_keeps_what_rounding_took(dtype):
    """A sync then pulls to the float32 value, which does not move."""
    param = torch.nn.Parameter(torch.full((4,), 1.0, dtype=dtype))
    exact = torch.nn.Parameter(torch.full((4,), 1.0))
    optimizer, other = (Ranger([p], lr=1e-4, k=100) for p in (param, exact))
    for step in range(5):
        train(optimizer, [param], [step])
        exact.grad = param.grad.float()
        other.step()
    for each in (optimizer, other):
        each.reset_slow_weights()
    assert not torch.equal(exact, exact.to(dtype).float())
    assert_same_bits(optimizer.state[param]["slow_param"], exact.detach(), "slow")
