"""Tensors that no backend can move are refused, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from optimizer_infos import (
    assert_refuses,
    each_info,
    each_own,
    random_params,
    same,
    set_grads,
    snapshot,
    train,
)


def assert_refused_unchanged(optimizer, params, error, message, steps_before=0):
    """The gradients are set; a step must fail and change nothing, and go on once they are right."""
    assert_refuses(optimizer, error, message)
    after = train(optimizer, params, [steps_before])
    assert all(after.state[p]["step"] == steps_before + 1 for p in params)


@pytest.mark.parametrize("steps_before", [0, 3])
@each_own
def test_a_sparse_gradient_on_the_last_parameter_moves_none(cls, steps_before):
    params = random_params((4, 3), (2,), (5, 3))
    optimizer = train(cls(params), params, range(steps_before))
    set_grads(params, 9)
    params[-1].grad = params[-1].grad.to_sparse()
    message = "gradient of parameter 2 of group 0.*sparse gradients are not supported.*to_dense"
    assert_refused_unchanged(optimizer, params, RuntimeError, message, steps_before)


@pytest.mark.parametrize("steps_before", [0, 3])
@each_own
def test_a_gradient_of_another_shape_on_the_last_parameter_moves_none(cls, steps_before):
    params = random_params((4, 3), (2,), (6,))
    optimizer = train(cls(params), params, range(steps_before))
    set_grads(params, 9)
    # As after replacing a parameter's memory and forgetting zero_grad().
    params[-1].data = params[-1].data.view(2, 3)
    assert_refuses(optimizer, RuntimeError, r"shape \(6,\).*shape \(2, 3\)")
    params[-1].data = params[-1].data.view(6)
    assert_go_on(optimizer, params, steps_before)


def assert_go_on(optimizer, params, steps_before):
    train(optimizer, params, [steps_before])
    assert all(optimizer.state[p]["step"] == steps_before + 1 for p in params)


@each_own
def test_a_parameter_whose_state_no_longer_fits_moves_none(cls):
    params = random_params((4, 3), (2,), (6,))
    optimizer = train(cls(params), params, range(3))
    params[-1].data = params[-1].data.double()
    params[-1].grad = None
    set_grads(params, 3)
    message = r"state '\w+' of parameter 2 of group 0 is torch.float32.*load_state_dict"
    assert_refuses(optimizer, RuntimeError, message)
    optimizer.load_state_dict(optimizer.state_dict())  # as the message says
    set_grads(params, 3)
    optimizer.step()
    assert optimizer.state[params[-1]]["exp_avg"].dtype == torch.float64


@each_own
def test_a_complex_gradient_of_a_real_parameter_moves_none(cls):
    params = random_params((4, 3), (2,))
    optimizer = cls(params)
    set_grads(params[:1], 0)
    params[-1].grad_dtype = torch.complex64
    params[-1].grad = torch.ones(2, dtype=torch.complex64)
    assert_refuses(optimizer, RuntimeError, r"torch.complex64, but the parameter is torch.float")


@each_own
def test_an_integer_parameter_is_refused_by_the_step(cls):
    (fine,) = random_params((3,))
    whole = torch.tensor([1, 2, 3])
    optimizer = cls([fine, whole])
    set_grads([fine], 0)
    whole.grad = torch.tensor([1, 1, 1])
    message = r"parameter 1 of group 0 is torch.int64 on cpu.*supported"
    assert_refuses(optimizer, ValueError, message)


@each_info
def test_meta_parameters_construct_and_the_step_refuses_them(config):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    (fine,) = random_params((3,))
    optimizer = config.build([fine, *model.parameters()])
    set_grads([fine], 0)
    train(optimizer, [fine], [0])  # as long as they have no gradient they are no hindrance
    for param in model.parameters():
        param.grad = torch.empty_like(param)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is .* on meta.*materialize"):
        optimizer.step()
    assert same(snapshot(optimizer)["state"], before["state"])
    assert same(snapshot(optimizer)["params"][0], before["params"][0])


@each_info
def test_an_expanded_parameter_is_refused_by_the_step(config):
    (fine,) = random_params((3,))
    expanded = Parameter(torch.ones(1).expand(4))
    optimizer = config.build([fine, expanded])
    set_grads([fine], 0)
    expanded.grad = torch.ones(4)
    assert_refuses(optimizer, ValueError, r"expanded tensor.*contiguous")


@each_own
def test_errors_call_named_parameters_by_their_names(cls):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = cls(model.named_parameters())
    set_grads(model.parameters(), 0)
    model[1].weight.grad = model[1].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of '1\.weight' is torch.sparse_coo"):
        optimizer.step()
