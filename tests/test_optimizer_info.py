"""What torch's own test_optim.py checks of every torch.optim optimizer, of ours.

Each test runs over a description of RAdam, Ranger and Lookahead (see optimizer_infos.py); in all
of them every second step syncs.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from optimizer_infos import (
    CONFIGS,
    INFOS,
    SCHEDULERS,
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

ERRORS = [
    pytest.param(info.optim_cls, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
    for info in INFOS
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_descriptions_leave_implementation_flags_to_the_grid(info):
    for config in info.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & config.kwargs.keys()


@pytest.mark.parametrize(("optim_cls", "error"), ERRORS)
def test_wrong_arguments_raise_what_torch_raises(optim_cls, error):
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        # params is None for a wrong hyperparameter: it must be found before they are looked at.
        optim_cls(given.params, **given.kwargs)


# torch's fused AdamW takes a strided parameter's memory for dense: that pair is left out.
LAYOUTS = [
    pytest.param(config.values[0], contiguous, id=f"{config.id}-{contiguous}")
    for config in CONFIGS
    for contiguous in (True, False)
    if contiguous or not config.values[0].kwargs.get("fused")
]


def layer(contiguous):
    weight, bias = random_params((10, 5, 2), (10, 2))
    if contiguous:
        return Parameter(weight[..., 0].detach().clone()), Parameter(bias[..., 0].detach().clone())
    return Parameter(weight[..., 0].detach()), Parameter(bias[..., 0].detach())


def descend(optimizer, loss_of, schedulers, use_closure=True, steps=20):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(steps):
        if use_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
    return first, closure().item()


@pytest.mark.parametrize("schedulers", [(), *SCHEDULERS])
@pytest.mark.parametrize(("config", "contiguous"), LAYOUTS)
def test_goes_the_right_direction(config, contiguous, schedulers):
    weight, bias = layer(contiguous)
    x = torch.randn(5, generator=torch.Generator().manual_seed(1))
    optimizer = config.build([weight, bias])
    first, last = descend(
        optimizer,
        lambda: (weight.mv(x) + bias).square().sum(),
        [make(optimizer) for make in schedulers],
        use_closure=contiguous,
    )
    assert last > first if config.kwargs.get("maximize") else last < first


@pytest.mark.parametrize("schedulers", [(), *SCHEDULERS])
@each_info
def test_param_groups_with_schedulers_go_the_right_direction(config, schedulers):
    weight, weight2 = random_params((10, 5), (10, 5))
    x = torch.randn(5, generator=torch.Generator().manual_seed(1))
    optimizer = config.build([{"params": [weight]}, {"params": [weight2], "lr": 0.01}])
    first, last = descend(
        optimizer,
        lambda: (weight.mv(x) + weight2.mv(x)).square().sum(),
        [make(optimizer) for make in schedulers],
    )
    assert last < first


@each_config_without("max_grad_norm")  # one norm over all parameters ties them together
def test_param_groups_are_as_optimizers_of_their_own(config):
    options = [{"lr": 0.01}, {"weight_decay": 0.3}, {"betas": (0.5, 0.6), "lr": 1e-4}]
    together = random_params((3, 4), (5,), (2,))
    apart = copy.deepcopy(together)
    one = config.build([{"params": [p], **o} for p, o in zip(together, options, strict=True)])
    many = [config.build([p], **o) for p, o in zip(apart, options, strict=True)]
    for step in range(8):
        set_grads(together, step)
        set_grads(apart, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    assert all(bytes_of(a) == bytes_of(b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@each_config
def test_a_tensor_lr_equals_its_value_as_a_number(config, shape):
    lr = torch.full(shape, 0.01)
    params, expected = random_params((10, 5), (10,)), random_params((10, 5), (10,))
    train(config.build(params, lr=lr), params, range(8))
    train(config.build(expected, lr=lr.item()), expected, range(8))
    for param, other in zip(params, expected, strict=True):
        if config.is_ours:
            assert bytes_of(param) == bytes_of(other)
        else:
            # torch's AdamW takes a tensor's arithmetic to float32. Each of 8 steps rounds the
            # parameter twice and an update below it in size three times, 2**-24 each; a rounding
            # at the wrong side of a sync adds one: 6 are fewer than 8.
            assert (param - other).abs().max() <= 8 * 8 * 2.0**-24 * other.abs().max()
    assert lr == torch.full(shape, 0.01)


# torch's fused AdamW takes no complex parameters; a norm over pairs is another reduction.
@each_config_without("fused", "max_grad_norm")
def test_complex_parameters_are_pairs_of_reals(config):
    real = random_params((10, 5, 2), (2,))
    paired = [Parameter(torch.view_as_complex(p.detach().clone())) for p in real]
    by_pair, by_real = config.build(paired), config.build(real)
    for step in range(8):
        set_grads(real, step)
        for p, r in zip(paired, real, strict=True):
            p.grad = torch.view_as_complex(r.grad.clone())
        by_pair.step()
        by_real.step()
        for p, r in zip(paired, real, strict=True):
            assert bytes_of(torch.view_as_real(p.detach())) == bytes_of(r)
            for name, value in by_real.state[r].items():
                other = by_pair.state[p][name]
                assert bytes_of(value) == bytes_of(
                    torch.view_as_real(other) if other.is_complex() else other
                )


@each_config_without("fused")
def test_minimizes_a_complex_function(config):
    maximize = config.kwargs.get("maximize", False)
    z = Parameter(torch.tensor([1.5 + 1.5j, -1.0 + 0.5j]))
    optimizer = config.build([z], lr=0.05)
    first, last = descend(optimizer, lambda: z.abs().square().sum(), [], steps=30)
    assert last > first if maximize else last < first


@each_config_without("max_grad_norm")  # one norm over all parameters ties them together
def test_dtypes_in_one_optimizer_are_as_optimizers_of_their_own(config):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    if config.kwargs.get("fused"):
        dtypes = dtypes[:4]  # torch's fused AdamW takes no complex ones
    together = [random_params((3, 4), dtype=dtype)[0] for dtype in dtypes]
    apart = copy.deepcopy(together)
    train(config.build(together), together, range(6))
    set_by_all = [config.build([p]) for p in apart]
    for step in range(6):
        set_grads(apart, step)
        for optimizer in set_by_all:
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        assert bytes_of(a) == bytes_of(b), a.dtype


@each_config
def test_a_zero_gradient_without_decay_moves_nothing(config):
    params = random_params((10, 5), (3,))
    before = [bytes_of(p) for p in params]
    optimizer = config.build(params, weight_decay=0)
    for _ in range(6):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert [bytes_of(p) for p in params] == before
    assert all(optimizer.state[p]["step"] == 6 for p in params)


@each_config
def test_a_step_without_gradients_changes_nothing(config):
    params = random_params((10, 5), (3,))
    optimizer = config.build(params)
    before = snapshot(optimizer)
    optimizer.step()
    assert same(snapshot(optimizer), before)
    train(optimizer, params, range(3))
    for param in params:
        param.grad = None
    before = snapshot(optimizer)
    optimizer.step()
    assert same(snapshot(optimizer), before)


@each_config
def test_parameters_without_elements_are_stepped(config):
    embedding = torch.nn.Embedding(10, 0)
    other = random_params((4,))[0]
    optimizer = config.build([embedding.weight, other])
    for _ in range(3):
        optimizer.zero_grad()
        (embedding(torch.tensor([1, 2])).sum() + other.sum()).backward()
        optimizer.step()
    assert embedding.weight.shape == (10, 0)
    assert optimizer.state[embedding.weight]["step"] == 3


@each_config
def test_state_is_tensors_of_the_parameters_shape_and_a_step_count(config):
    params = random_params((10, 5), ())
    optimizer = train(config.build(params), params, range(3))
    for param in params:
        state = optimizer.state[param]
        assert {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
        for name, value in state.items():
            assert isinstance(value, torch.Tensor)
            if name.endswith("step"):
                assert value.shape == ()
                assert value == 3
            else:
                assert value.shape == param.shape
                assert value.count_nonzero() == value.numel()


@each_config
def test_gradients_are_never_written(config):
    params = random_params((10, 5), (3,), ())
    optimizer = config.build(params)
    for step in range(4):
        set_grads(params, step)
        grads = [p.grad for p in params]
        before = [(bytes_of(g), g._version) for g in grads]
        optimizer.step()
        assert [(bytes_of(g), g._version) for g in grads] == before
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
@each_config_without("max_grad_norm", ours=True)
def test_a_gradient_of_another_dtype_counts_by_its_values(config, dtype):
    params, others = random_params((5, 4)), random_params((5, 4))
    optimizer, other = config.build(params), config.build(others)
    params[0].grad_dtype = dtype
    for step in range(5):
        set_grads(others, step)
        params[0].grad = (others[0].grad * 8).to(dtype)
        others[0].grad = params[0].grad.float()
        optimizer.step()
        other.step()
        assert params[0].grad.dtype == dtype
    assert same(snapshot(optimizer), snapshot(other))


@each_config
def test_maximize_is_minimize_on_negated_gradients(config):
    maximized, minimized = random_params((10, 5), (3,)), random_params((10, 5), (3,))
    up, down = config.build(maximized, maximize=True), config.build(minimized, maximize=False)
    for step in range(6):
        set_grads(maximized, step)
        set_grads(minimized, step)
        for param in minimized:
            param.grad.neg_()
        up.step()
        down.step()
    assert all(bytes_of(a) == bytes_of(b) for a, b in zip(maximized, minimized, strict=True))


@each_config
def test_steps_do_not_depend_on_the_default_dtype(config):
    params, expected = random_params((10, 5)), random_params((10, 5))
    train(config.build(expected), expected, range(6))
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = config.build(params)
        for step in range(6):
            set_grads(params, step)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert bytes_of(params[0]) == bytes_of(expected[0])


@each_info
def test_printing_names_the_optimizer_and_every_option_of_every_group(config):
    a, b = random_params((3,), (4,))
    optimizer = config.build([{"params": [a]}, {"params": [b], "lr": 0.25}])
    text = repr(optimizer)
    assert type(optimizer).__name__ in text
    assert "Parameter Group 0" in text
    assert "Parameter Group 1" in text
    assert "lr: 0.25" in text
    for name in optimizer.param_groups[0].keys() - {"params"}:
        assert text.count(f"    {name}: ") == 2
    assert str(a.detach()) not in text


@each_info
def test_nan_gradients_reach_the_parameter_and_no_other(config):
    hit, spared = random_params((3,), (3,))
    optimizer = config.build([hit, spared])
    set_grads([hit, spared], 0)
    hit.grad[1] = math.nan
    optimizer.step()
    assert hit.isnan().tolist() == [False, True, False]
    assert not spared.isnan().any()
