"""Evaluation on the slow weights, and back, without losing a bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from helpers import assert_same_bits
from ranger_cuda import Lookahead, RAdam, Ranger


@pytest.fixture(params=["Ranger", "Lookahead"])
def stepped(request):
    """An optimizer in mid-cycle, with parameters of every kind, one of them not stepped yet."""
    values = torch.tensor([1.5, -0.0, float("nan"), float("inf"), 1e-45, 3.0])
    tensors = [
        values,
        values.double(),
        values.bfloat16(),
        values.half(),
        torch.complex(values, values.flip(0)),
        torch.randn(4, 6)[:, ::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(5),
    ]
    params = [torch.nn.Parameter(t) for t in tensors]
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
