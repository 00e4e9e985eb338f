"""Where gradients cannot be released: an error, before anything moves."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.step import release as release_module
from released import STEPS, backward, in_groups, released, run, tensors, unchanged


def test_it_is_refused_where_gradients_are_no_steps_yet():
    params = [Parameter(t) for t in tensors()]
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0 of group 0"):
        RAdam(params, max_grad_norm=1.0).release_gradients()
    for nonfinite in ("skip", "raise"):
        with pytest.raises(RuntimeError, match=f"nonfinite_grad_norm='{nonfinite}'"):
            RAdam(params, nonfinite_grad_norm=nonfinite).release_gradients()
    with pytest.raises(RuntimeError, match="amp_scaling"):
        RAdam(params, amp_scaling=True).release_gradients()
    optimizer = Ranger(params, eval_with_slow_weights=True)
    run(optimizer, params)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"release_gradients\(\) in eval mode"):
        optimizer.release_gradients()
    optimizer.zero_grad()
    backward(params, 0)
    assert all(p.grad is not None for p in params)  # none of these left a hook


def test_a_parameter_is_released_by_one_optimizer():
    p, q, r = (Parameter(torch.ones(3)) for _ in range(3))
    first, handle = released(RAdam([p]))
    both = Ranger([q, p])
    with pytest.raises(RuntimeError, match="released by another optimizer"):
        both.release_gradients()
    second, _ = released(Ranger([r]))
    with pytest.raises(RuntimeError, match="released by another optimizer"):
        second.add_param_group({"params": [q, p]})
    assert len(second.param_groups) == 1
    q.sum().backward()
    assert q.grad is not None  # nobody has a hook on it
    handle.remove()
    q.grad = None
    both.release_gradients()
    (p.sum() + q.sum()).backward()
    assert both.state[p]["step"] == both.state[q]["step"] == 1
    assert not first.state


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("max_grad_norm", 1.0, RuntimeError),
        ("lr", -1.0, ValueError),
        ("weight_rounding", "no", ValueError),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_group_that_becomes_wrong_is_an_error_before_anything_moves(stepped, key, value, error):
    params = [Parameter(t) for t in tensors()]
    optimizer, _ = released(Ranger(in_groups(params)))
    if stepped:
        run(optimizer, params)
    for group in optimizer.param_groups:
        kept = group[key]
        group[key] = value
        check = unchanged(optimizer, params)
        with pytest.raises(error, match=key if key != "lr" else "learning rate"):
            backward(params, STEPS)
        check()
        group[key] = kept
        optimizer.zero_grad()
    backward(params, STEPS)
    assert all(p.grad is None for p in params)


def test_slow_weights_in_place_are_not_moved():
    params = [Parameter(t) for t in tensors()]
    optimizer, _ = released(Ranger(params, eval_with_slow_weights=True))
    run(optimizer, params)
    with optimizer.slow_weights():
        check = unchanged(optimizer, params)
        with pytest.raises(RuntimeError, match="leave the context first"):
            backward(params, STEPS)
        check()
    optimizer.eval()
    optimizer.zero_grad()
    check = unchanged(optimizer, params)
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) first"):
        backward(params, STEPS)
    check()
    optimizer.zero_grad()
    optimizer.train()
    backward(params, STEPS)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_gradient_that_cannot_be_used_leaves_its_parameter(stepped, backend):
    bags = [torch.nn.Embedding(5, 3, sparse=sparse) for sparse in (False, True)]
    params = [bag.weight for bag in bags]
    optimizer = RAdam([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    if stepped:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release_gradients()
    check = unchanged(optimizer, params[1:])
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 is torch\.sparse_coo"):
        bags[1](torch.tensor([1, 2])).sum().backward()
    check()
    assert params[1].grad is not None
    bags[0](torch.tensor([1, 2])).sum().backward()
    assert optimizer.state[params[0]]["step"] == 1 + stepped


def test_errors_call_a_parameter_as_step_does():
    weight = torch.nn.Embedding(5, 3, sparse=True)
    optimizer, _ = released(RAdam(weight.named_parameters()))
    with pytest.raises(RuntimeError, match="the gradient of 'weight' is"):
        weight(torch.tensor([1, 2])).sum().backward()
    del optimizer


def test_an_interrupt_leaves_no_gradient_that_was_stepped_by(monkeypatch):
    param = Parameter(torch.ones(3))
    optimizer, _ = released(RAdam([param]))
    move = release_module._Mover.move

    def interrupted(*args):
        move(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(release_module._Mover, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backward([param], 0)
    assert optimizer.state[param]["step"] == 1
    assert param.grad is None


def test_a_grad_scaler_says_that_there_is_nothing_to_unscale():
    param = Parameter(torch.ones(3))
    optimizer, _ = released(RAdam([param]))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param.sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_lookahead_around_it_is_refused():
    params = [Parameter(torch.ones(3))]
    inner, handle = released(RAdam(params))
    with pytest.raises(RuntimeError, match="use Ranger"):
        Lookahead(inner)
    handle.remove()
    optimizer = Lookahead(inner)
    inner.release_gradients()
    backward(params, 0)
    with pytest.raises(RuntimeError, match="use Ranger"):
        optimizer.step()


def test_another_step_under_way_is_an_error():
    param = Parameter(torch.ones(3))
    optimizer, _ = released(RAdam([param]))
    with optimizer._dispatcher.alone(), pytest.raises(RuntimeError, match="under way"):
        backward([param], 0)
    assert param not in optimizer.state
