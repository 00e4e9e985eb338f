"""What a step allocates, what an optimizer keeps alive, and memory that changes between steps."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers import assert_same, assert_same_bits, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.state.hyperparameters import read

BUILDERS = {
    "RAdam": RAdam,
    "Ranger": lambda params: Ranger(params, k=2),
    "Lookahead": lambda params: Lookahead(RAdam(params), k=2),
}


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def make_params(large=50_000):
    shapes = [(), (1,), (300, 7), (20, 3, 5, 5), (large,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    params.append(torch.nn.Parameter(torch.randn(6, 8)[:, ::2]))
    for i, param in enumerate(params):
        grad = torch.randn(param.shape)
        # Gradients that lie as the parameter does, and some that do not.
        param.grad = grad.mT.contiguous().mT if i % 2 and grad.dim() > 1 else grad
    return params


def allocated(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def test_a_step_allocates_no_tensor_memory_after_the_first(build):
    optimizer = build(make_params())
    assert allocated(optimizer.step) > 0  # the state: this measure can see an allocation
    for _ in range(4):
        assert allocated(optimizer.step) == 0


def test_deleting_an_optimizer_frees_its_state_at_once(build):
    build(make_params()).step()  # torch's own first step in a process leaves something behind
    gc.collect()
    gc.disable()
    try:
        params = make_params()
        optimizer = build(params)
        optimizer.step()
        optimizer.step()
        alive = [weakref.ref(v) for p in params for v in optimizer.state[p].values()]
        alive += [weakref.ref(p) for p in params]
        del optimizer, params
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_no_replaced_state_is_kept_alive():
    params = make_params()
    optimizer = Ranger(params)
    optimizer.step()
    old = [weakref.ref(v) for p in params for v in optimizer.state[p].values()]
    for p in params:
        for name, value in optimizer.state[p].items():
            optimizer.state[p][name] = value.clone()
    del value
    assert [ref() for ref in old] == [None] * len(old)


def replace_tensors(optimizer, params):
    for p in params:
        for name, value in list(optimizer.state[p].items()):
            optimizer.state[p][name] = value.clone()


def replace_one_tensor(optimizer, params):
    optimizer.state[params[2]]["exp_avg"] = torch.full_like(params[2], 0.25)


def replace_dicts(optimizer, params):
    for p in params:
        optimizer.state[p] = dict(reversed(optimizer.state[p].items()))


def clear_state(optimizer, params):
    optimizer.state.clear()


def move_whole_state(optimizer, params):
    for p in params:
        for value in optimizer.state[p].values():
            value.data = value.data.clone() * 0.5 if value.dim() else value.data.clone()


def move_one_tensor(optimizer, params):
    value = optimizer.state[params[2]]["exp_avg"]
    value.data = value.data.clone() * 0.5


def move_parameters(optimizer, params):
    for p in params:
        p.data = p.data.clone() + 1


def change_layout(optimizer, params):
    params[3].data = params[3].data.to(memory_format=torch.channels_last)


def drop_a_parameter(optimizer, params):
    del optimizer.param_groups[0]["params"][1]


def swap_parameters(optimizer, params):
    group = optimizer.param_groups[0]["params"]
    group[0], group[1] = group[1], group[0]


def replace_group(optimizer, params):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.5}


def load_own_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES = [
    replace_tensors,
    replace_one_tensor,
    replace_dicts,
    clear_state,
    move_whole_state,
    move_one_tensor,
    move_parameters,
    change_layout,
    drop_a_parameter,
    swap_parameters,
    replace_group,
    load_own_state,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_step_goes_by_what_there_is_now(target, change):
    """After the change the native backend goes on as the reference does, which keeps nothing."""
    a, b = twins(make_params(500 if target.small else 50_000), target.move)
    native = Ranger(a, k=2, backend=target.backend)
    reference = Ranger(b, k=2, backend="reference")
    for step in range(6):
        give_gradients([torch.randn(p.shape) for p in a], a, b, move=target.move)
        if step == 3:
            for optimizer, params in ((native, a), (reference, b)):
                change(optimizer, params)
        native.step()
        reference.step()
        assert_same(native, reference, a, b, f"step {step + 1}")


def test_a_reused_address_is_not_taken_for_the_old_tensor():
    """Parameters come and go at the same addresses with other sizes."""
    for size in [64, 16, 32, 8, 64] * 10:
        a, b = twins([torch.randn(size), torch.randn(2, size)])
        native, reference = Ranger(a), Ranger(b, backend="reference")
        for _ in range(3):
            a[0].data, b[0].data = torch.ones(size), torch.ones(size)
            give_gradients([torch.randn(p.shape) for p in a], a, b)
            native.step()
            reference.step()
            assert_same(native, reference, a, b, size)
            for optimizer, params in ((native, a), (reference, b)):
                for p in params:
                    optimizer.state[p] = {n: v.clone() for n, v in optimizer.state[p].items()}


def test_a_parameter_named_twice_in_a_group_moves_once():
    (a,), (b,) = twins([torch.randn(5)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = Ranger([a, a])
    once = Ranger([b])
    for _ in range(7):
        give_gradients([torch.randn(5)], [a], [b])
        twice.step()
        once.step()
        assert_same(twice, once, [a], [b], "twice")


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_memory_swapped_under_one_state_tensor_is_never_written_after_it_is_freed(dtype):
    """In a process of its own, which would die of it; and the new memory is soon found."""
    program = (
        "import torch\n"
        "from ranger_cuda import Ranger\n"
        f"ps = [torch.nn.Parameter(torch.randn(40, 30, dtype={dtype})) for _ in range(100)]\n"
        "optimizer = Ranger(ps, lr=0.1, k=2)\n"
        "for step in range(110):\n"
        "    for p in ps: p.grad = torch.randn_like(p)\n"
        "    optimizer.step()\n"
        "    if step == 3:\n"
        "        swapped = optimizer.state[ps[50]]['exp_avg']\n"
        "        swapped.data = swapped.data.clone()\n"
        "before = swapped.clone()\n"
        "optimizer.step()\n"
        "assert not torch.equal(before, swapped)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


def test_a_load_in_another_thread_leaves_a_step_under_way_its_memory():
    program = (
        "import copy, threading, torch\n"
        "from ranger_cuda import Ranger\n"
        "ps = [torch.nn.Parameter(torch.randn(300, 200)) for _ in range(10)]\n"
        "optimizer = Ranger(ps)\n"
        "for p in ps: p.grad = torch.randn_like(p)\n"
        "done = threading.Event()\n"
        "def run():\n"
        "    while not done.is_set():\n"
        "        try: optimizer.step()\n"
        "        except RuntimeError as error: assert 'in another thread' in str(error)\n"
        "threads = [threading.Thread(target=run) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for _ in range(50): optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))\n"
        "done.set()\n"
        "for thread in threads: thread.join()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


def load_a_state(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def drop_the_state(optimizer):
    optimizer.state.clear()


@pytest.mark.parametrize("meanwhile", [load_a_state, drop_the_state], ids=lambda f: f.__name__)
def test_a_step_moves_what_it_collected_whatever_becomes_of_the_state(target, meanwhile):
    """As by another thread; what the launch reads and writes is alive, and nobody else's."""
    param = torch.nn.Parameter(target.move(torch.ones(5)))
    param.grad = target.move(torch.ones(5))
    optimizer = Ranger([param], backend=target.backend)
    optimizer.step()
    dispatcher = optimizer._dispatcher
    with dispatcher.alone():
        dispatcher.collect(optimizer.param_groups, optimizer.state, optimizer._new_state)
        meanwhile(optimizer)
        state = copy.deepcopy(dict(optimizer.state[param]))
        dispatcher.launch([read(optimizer.param_groups[0], lookahead=True)])
    for name, value in state.items():
        assert torch.equal(optimizer.state[param][name], value)
    expected = torch.nn.Parameter(torch.ones(5))
    expected.grad = torch.ones(5)
    twice = Ranger([expected], backend="reference")
    twice.step()
    twice.step()
    assert_same_bits(param, expected, "parameter")


@pytest.mark.parametrize("wrapper", [False, True])
def test_a_step_within_a_step_is_refused_and_the_first_goes_on(target, wrapper):
    """Also what the reference moves beside it."""
    params = [torch.nn.Parameter(target.move(torch.ones(5))) for _ in range(3)]
    params[2].data = params[1].data  # what shares memory moves one after the other
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Lookahead(RAdam(params), k=1) if wrapper else Ranger(params, k=1)
    optimizer.step()
    launched = optimizer._dispatcher.launch
    refusals = []

    def launch(*args):
        with pytest.raises(RuntimeError, match="in another thread"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="in another thread"), optimizer.slow_weights():
            pass
        refusals.append(launched(*args))

    optimizer._dispatcher.launch = launch
    optimizer.step()
    assert len(refusals) == 1
    name = "lookahead_step" if wrapper else "step"
    assert [optimizer.state[param][name] for param in params] == [2, 2, 2]


def test_parameters_that_share_memory_move_one_after_the_other():
    results = []
    for backend in ("cpu", "cpu", "reference"):
        generator = torch.Generator().manual_seed(0)
        a = torch.nn.Parameter(torch.randn(300, 300, generator=generator))
        b = torch.nn.Parameter(torch.zeros(300, 300))
        b.data = a.data
        optimizer = Ranger([a, b], lr=0.1, backend=backend)
        for _ in range(8):
            a.grad = torch.randn(300, 300, generator=generator)
            b.grad = torch.randn(300, 300, generator=generator)
            optimizer.step()
        results.append(a.detach())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_what_is_made_in_inference_mode_is_written_outside_of_it(target):
    for backend in (target.backend, "reference"):
        param = torch.nn.Parameter(target.move(torch.ones(3)))
        param.grad = target.move(torch.ones(3))
        optimizer = Ranger([param], k=2, backend=backend)
        with torch.inference_mode():
            optimizer.step()
        param.grad = target.move(torch.ones(3))
        optimizer.step()
        assert optimizer.state[param]["step"] == 2


def test_a_default_device_is_no_business_of_a_step(target):
    a, b = twins([torch.ones(5)], target.move)
    first, second = Ranger(a, backend=target.backend), Ranger(b, backend="reference")
    for _ in range(7):
        give_gradients([torch.ones(5)], a, b, move=target.move)
        with torch.device("meta"):  # whatever is made without a device has no values
            first.step()
            second.step()
        assert_same(first, second, a, b, "default device")
