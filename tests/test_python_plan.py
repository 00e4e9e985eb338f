"""Where nothing is compiled, the plan in Python finds what the compiled one does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranger_cuda import Ranger, support
from ranger_cuda.backends.python_plan import PythonPlan, TensorRow
from ranger_cuda.dispatch import RANGER, members
from ranger_cuda.tensors import plain, plain_grad
from test_memory import CHANGES, make_params
from test_parity import LAYOUTS, PARAM_LAYOUTS


@pytest.fixture
def extension():
    found = support.extension()
    if isinstance(found, support.Obstacle):
        pytest.skip(found.cause)
    return found


def filled(plan, optimizer):
    for param, group, name in members(optimizer.param_groups):
        if param in optimizer.state:
            state = optimizer.state[param]
            plan.add_row(param, group, name, "triton", state, RANGER.streams, RANGER.step_name)
        else:
            plan.add_idle(param, group)
    plan.finish(optimizer.state)
    return plan


def both_plans(extension, optimizer):
    compiled = extension.StepPlan(
        extension.StepPlan.Rule.RADAM, Tensor.__dlpack_c_exchange_api__, plain, plain_grad
    )
    return filled(compiled, optimizer), filled(PythonPlan(), optimizer)


def collect(plan, optimizer, moved=None):
    return plan.collect(optimizer.param_groups, optimizer.state, moved)


def rows(plan):
    return [TensorRow(*row) for row in plan.rows()]


def assert_same_step(compiled, python, optimizer):
    assert collect(compiled, optimizer)
    assert collect(python, optimizer)
    assert rows(compiled) == rows(python)
    assert [*map(id, compiled.moved())] == [*map(id, python.moved())]
    params = [param for param, _, _ in members(optimizer.param_groups) if param in optimizer.state]
    found = zip(params, compiled.gradients(), python.gradients(), strict=True)
    for param, by_compiled, by_python in found:
        gradient = param.grad
        if gradient is None:
            assert by_compiled == by_python == 0
        elif (gradient.is_neg() or gradient.is_conj()) and gradient.numel():
            # Each reads a copy of its own.
            assert min(by_compiled, by_python) > 1
            assert gradient.data_ptr() not in (by_compiled, by_python)
        else:
            assert by_compiled == by_python == (gradient.data_ptr() or 1)


def negated(tensor):
    """The same numbers as a tensor that stands for the negative of its memory."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_every_layout_is_described_alike(extension, dtype):
    shapes = [(), (0,), (1,), (7,), (5, 1, 3), (1, 4, 1), (2, 3, 4, 5), (4, 4)]
    params = [
        torch.nn.Parameter(LAYOUTS[layout](torch.randn(shape, dtype=dtype)))
        for shape in shapes
        for layout in PARAM_LAYOUTS
    ]
    optimizer = Ranger(params, backend="reference")
    lazy = torch.Tensor.conj if dtype.is_complex else negated
    kinds = [*LAYOUTS.values(), lambda t: None, lazy]

    def give(step):
        for i, param in enumerate(params):
            gradient = torch.randn(param.shape, dtype=dtype)
            param.grad = kinds[(i + step) % len(kinds)](gradient)

    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    plans = both_plans(extension, optimizer)
    for step in range(2 * len(kinds)):
        give(step // 2)  # every other step, gradients lie as in the one before
        before = [plan.layout_changes() for plan in plans]
        assert_same_step(*plans, optimizer)
        changed = [plan.layout_changes() > n for plan, n in zip(plans, before, strict=True)]
        if step:  # there is none before the first
            assert changed == [step % 2 == 0] * 2, step


def test_what_moves_may_be_said_and_no_gradient_is_read_then(extension):
    params = make_params(50)
    optimizer = Ranger(params, backend="reference")
    optimizer.step()
    moved = [i % 2 == 0 for i in range(len(params))]
    for plan in both_plans(extension, optimizer):
        assert collect(plan, optimizer)
        assert min(plan.gradients()) > 1
        assert collect(plan, optimizer, moved)
        assert plan.gradients() == [int(moves) for moves in moved]
        assert [*map(id, plan.moved())] == [*map(id, params[::2])]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_steps_are_noticed_alike(extension, change):
    params = make_params(50)
    optimizer = Ranger(params, backend="reference")
    optimizer.step()
    plans = both_plans(extension, optimizer)
    assert_same_step(*plans, optimizer)
    change(optimizer, params)
    if change.__name__ == "replace_dicts":
        # The compiled one takes another order of names for a change.
        assert [collect(plan, optimizer) for plan in plans] == [False, True]
    else:
        assert [collect(plan, optimizer) for plan in plans] == [
            change.__name__ == "replace_group"
        ] * 2


def new_gradient_for_the_idle(optimizer, params):
    params[1].grad = torch.ones(3)


def another_stride(optimizer, params):
    params[0].data = params[0].data.t()


def another_dtype(optimizer, params):
    params[0].data = params[0].data.view(torch.int32).view(torch.complex32).real


def a_state_of_another_shape_at_its_address(optimizer, params):
    value = optimizer.state[params[0]]["exp_avg"]
    value.data = value.data[:2]


def a_state_of_another_stride_at_its_address(optimizer, params):
    value = optimizer.state[params[0]]["exp_avg"]
    value.data = value.data.t()


def a_state_of_another_dtype_at_its_address(optimizer, params):
    value = optimizer.state[params[0]]["exp_avg"]
    value.data = value.data.view(torch.int32)


def a_parameter_moves_to_another_group(optimizer, params):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def a_group_more(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


@pytest.mark.parametrize(
    "change",
    [
        new_gradient_for_the_idle,
        another_stride,
        another_dtype,
        a_state_of_another_shape_at_its_address,
        a_state_of_another_stride_at_its_address,
        a_state_of_another_dtype_at_its_address,
        a_parameter_moves_to_another_group,
        a_group_more,
    ],
    ids=lambda change: change.__name__,
)
def test_smaller_changes_are_noticed_too(extension, change):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(4, 4), (3,), (5,)]]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = Ranger(groups, backend="reference")
    params[0].grad, params[2].grad = torch.ones(4, 4), torch.ones(5)
    optimizer.step()
    plans = both_plans(extension, optimizer)
    assert_same_step(*plans, optimizer)
    change(optimizer, params)
    for plan in plans:
        assert not collect(plan, optimizer)


def complex_model():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Ranger(params, backend="reference")
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("call", range(1, 8))
def test_state_that_goes_while_a_compiled_plan_is_checked_is_not_followed(extension, call):
    """To describe a complex tensor it calls Python, where other threads may run."""
    _, optimizer = complex_model()
    countdown = [0]

    def plain_meanwhile(tensor):
        countdown[0] -= 1
        if countdown[0] == 0:
            optimizer.state.clear()
        return plain(tensor)

    rule, api = extension.StepPlan.Rule.RADAM, Tensor.__dlpack_c_exchange_api__
    plan = filled(extension.StepPlan(rule, api, plain_meanwhile, plain_grad), optimizer)
    countdown[0] = call
    collect(plan, optimizer)
    if countdown[0] <= 0:
        with pytest.raises(RuntimeError, match="state was replaced"):
            plan.hold()
    else:
        plan.hold()  # it asked less often


def test_state_that_goes_while_a_compiled_plan_is_filled_is_refused(extension):
    (first, second, _), optimizer = complex_model()
    plan, _ = both_plans(extension, optimizer)
    more = (RANGER.streams, RANGER.step_name)
    plan.add_row(first, 0, "first", "triton", optimizer.state[first], *more)
    optimizer.state[first].clear()
    with pytest.raises(RuntimeError, match="state was replaced"):
        plan.add_row(second, 0, "second", "triton", optimizer.state[second], *more)


def test_an_object_at_a_reused_address_is_not_taken_for_the_old_tensor():
    """Not even if it has the old one's memory."""
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(2)]
    optimizer = Ranger(params, backend="reference")
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    plan = filled(PythonPlan(), optimizer)
    assert collect(plan, optimizer)
    state = optimizer.state[params[1]]
    memory, address = state["exp_avg"].detach(), id(state["exp_avg"])
    del state["exp_avg"]
    others = []
    while id(again := memory.detach()) != address:
        others.append(again)
        if len(others) == 1000:
            pytest.skip("no object was made at that address")
    state["exp_avg"] = again
    assert not collect(plan, optimizer)
    with pytest.raises(RuntimeError, match="state was replaced"):
        plan.hold()


def test_a_plan_in_python_keeps_no_parameter_alive():
    param = torch.nn.Parameter(torch.randn(4))
    optimizer = Ranger([param], backend="reference")
    param.grad = torch.ones(4)
    optimizer.step()
    plan = filled(PythonPlan(), optimizer)
    assert collect(plan, optimizer)
    del optimizer, param
    assert plan.moved() == []


def test_a_shard_that_moves_in_memory_is_noticed(extension):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(distribute_tensor(torch.randn(8, 3), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.randn(8, 3), mesh, [Shard(0)])
        optimizer = Ranger([param, torch.nn.Parameter(torch.randn(2))], backend="reference")
        optimizer.step()
        plans = both_plans(extension, optimizer)
        assert rows(plans[0]) == rows(plans[1])
        for plan in plans:
            assert collect(plan, optimizer)
            assert plan.gradients() == [param.grad.to_local().data_ptr()]
        moment = optimizer.state[param]["exp_avg"]
        moment._local_tensor = moment._local_tensor.clone()
        for plan in plans:
            assert not collect(plan, optimizer)
    finally:
        dist.destroy_process_group()
