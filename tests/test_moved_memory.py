"""Memory that is moved or taken away between steps, within slow_weights() and in other threads.

Most of it is done in a process of its own, which would die of an address that no longer holds.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from helpers import (
    adamw_checkpoint,
    assert_same,
    assert_same_bits,
    give_gradients,
    resizable_storage,
    twins,
)
from ranger_cuda import Lookahead, RAdam, Ranger

STATE = ("exp_avg", "exp_avg_sq", "slow_param", "step")

# --- what moves the memory of a tensor, which stays the same object -----------------------------


@torch.no_grad()
def share(tensor):
    tensor.share_memory_()


@torch.no_grad()
def enlarge_the_storage(tensor):
    storage = resizable_storage(tensor)
    storage.resize_(storage.nbytes() + 4096)


@torch.no_grad()
def give_the_storage_back_for_a_while(tensor):
    storage, kept = resizable_storage(tensor), tensor.clone()
    size = storage.nbytes()
    storage.resize_(0)
    between = torch.ones(size, dtype=torch.uint8)  # where it lay
    storage.resize_(size)
    tensor.copy_(kept)
    del between


@torch.no_grad()
def set_another_storage(tensor):
    tensor.set_(tensor.clone())


def assign_data(tensor):
    tensor.data = tensor.data.clone()


MOVES = [
    share,
    enlarge_the_storage,
    give_the_storage_back_for_a_while,
    set_another_storage,
    assign_data,
]


def pair(target, count):
    """Ranger on the target and on the reference, with equal parameters; every fifth complex."""
    shape = (5, 3) if target.small else (40, 30)
    dtypes = [torch.complex64 if i % 5 == 4 else torch.float32 for i in range(count)]
    a, b = twins([torch.randn(shape, dtype=dtype) for dtype in dtypes], target.move)
    return Ranger(a, k=2, backend=target.backend), Ranger(b, k=2, backend="reference"), a, b


def step_both(target, native, reference, a, b, when):
    give_gradients([torch.randn_like(p, device="cpu") for p in a], a, b, move=target.move)
    native.step()
    reference.step()
    assert_same(native, reference, a, b, when)


def check_moved_between_steps(target, move, name):
    native, reference, a, b = pair(target, 10 if target.slow else 100)
    for step in range(6):
        step_both(target, native, reference, a, b, f"{move.__name__} of {name}, step {step}")
        for optimizer, params in ((native, a), (reference, b)):
            param = params[(2 + 37 * step) % len(params)]
            move({"param": param, **optimizer.state[param]}[name])


@pytest.mark.parametrize("name", ["param", *STATE])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_step_writes_to_where_a_tensor_lies_now(elsewhere, move, name):
    elsewhere.run(check_moved_between_steps, move, name)


def check_sent_to_another_process(target):
    queue = torch.multiprocessing.get_context("spawn").Queue()
    native, reference, a, b = pair(target, 5)
    for step in range(4):
        step_both(target, native, reference, a, b, f"step {step}")
        for optimizer in (native, reference):
            queue.put(optimizer.state_dict())  # shares all its memory
            queue.get(timeout=60)


def test_a_state_dict_that_was_sent_to_another_process_is_still_the_state(elsewhere):
    elsewhere.run(check_sent_to_another_process)


def check_swapped_objects(target):
    native, reference, a, b = pair(target, 5)
    for step in range(4):
        step_both(target, native, reference, a, b, f"step {step}")
        for optimizer, params in ((native, a), (reference, b)):
            torch.utils.swap_tensors(params[1], Parameter(params[1].detach() * 2))
            state = optimizer.state[params[2]]
            torch.utils.swap_tensors(state["exp_avg"], state["exp_avg"] * 2)


def test_tensors_that_an_optimizer_has_stepped_can_be_swapped(target):
    check_swapped_objects(target)


# --- within slow_weights() ----------------------------------------------------------------------


def share_the_model(optimizer, params):
    nn.ParameterList(params).share_memory()


def send_the_model(optimizer, params):
    queue = torch.multiprocessing.get_context("spawn").Queue()
    queue.put(nn.ParameterList(params))
    queue.get(timeout=60)


def assign_all(optimizer, params):
    for param in params:
        assign_data(param)


def enlarge_all(optimizer, params):
    for param in params:
        enlarge_the_storage(param)


def share_the_slow_weights(optimizer, params):
    for param in params:
        share(optimizer.state[param]["slow_param"])


def enlarge_the_slow_weights(optimizer, params):
    for param in params:
        enlarge_the_storage(optimizer.state[param]["slow_param"])


WITHIN = [
    share_the_model,
    send_the_model,
    assign_all,
    enlarge_all,
    share_the_slow_weights,
    enlarge_the_slow_weights,
]


def check_moved_within(target, change):
    native, reference, a, b = pair(target, 5)
    for step in range(3):
        step_both(target, native, reference, a, b, f"step {step}")
    fast = [param.detach().clone() for param in a]
    slow = [native.state[param]["slow_param"].clone() for param in a]
    for optimizer, params in ((native, a), (reference, b)):
        with optimizer.slow_weights():
            change(optimizer, params)
            for param, value in zip(params, slow, strict=True):
                assert_same_bits(param, value, "inside")
    for param, value in zip(a, fast, strict=True):
        assert_same_bits(param, value, "afterwards")
    assert_same(native, reference, a, b, "afterwards")
    for step in range(3):
        step_both(target, native, reference, a, b, f"step {step} afterwards")


@pytest.mark.parametrize("change", WITHIN, ids=lambda change: change.__name__)
def test_parameters_moved_on_slow_weights_get_their_fast_ones_back(elsewhere, change):
    elsewhere.run(check_moved_within, change)


def check_moved_within_without_slow_weights(target):
    for move in (convert, assign_data):
        a, b = twins([torch.randn(40, 30) for _ in range(3)], target.move)
        native = Ranger(a, k=2, backend=target.backend)
        reference = Ranger(b, k=2, backend="reference")
        for optimizer, params in ((native, a), (reference, b)):
            optimizer.load_state_dict(adamw_checkpoint(3, 40, 30))
            with optimizer.slow_weights():
                for param in params:
                    move(param)
        for step in range(3):
            step_both(target, native, reference, a, b, f"{move.__name__}, step {step}")


def convert(tensor):
    model = nn.ParameterList([tensor])
    model.bfloat16()
    model.float()


def test_parameters_without_slow_weights_can_be_moved_within(elsewhere):
    elsewhere.run(check_moved_within_without_slow_weights)


# --- memory that is not there -------------------------------------------------------------------


def make_ranger(params, backend):
    return Ranger(params, lr=0.1, k=2, backend=backend)


def make_lookahead(params, backend):
    return Lookahead(RAdam(params, lr=0.1, backend=backend), k=2, backend=backend)


def place(tensor, offset):
    """Gives a tensor memory of its own, so many elements from where its storage begins."""
    base = torch.zeros(offset + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    tensor.data = base[offset:].view(tensor.shape).copy_(tensor.detach())


def check_unallocated(target, backend, build, name, offset, call):
    """``call`` with one tensor's storage given back, and again once it is there."""
    dtype = torch.bfloat16 if name == "residual" else torch.float32
    a, b = twins([torch.randn(6, dtype=dtype) for _ in range(3)], target.move)
    optimizer, twin = build(a, backend or target.backend), build(b, "reference")
    for _ in range(3):
        give_gradients([torch.randn(6, dtype=dtype) for _ in a], a, b, move=target.move)
        optimizer.step()
        twin.step()
    tensor = {"param": a[1], "grad": a[1].grad, **optimizer.state[a[1]]}[name]
    place(tensor, offset)
    call(optimizer)
    call(twin)
    if not tensor.untyped_storage().resizable():  # NumPy has looked at it
        place(tensor, offset)
    storage, kept = tensor.untyped_storage(), tensor.detach().clone()
    size = storage.nbytes()
    others = [t for p in a for t in (p, *optimizer.state[p].values()) if t is not tensor]
    before = [t.detach().clone() for t in others]
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        call(optimizer)
    for value, other in zip(before, others, strict=True):
        assert_same_bits(other, value, "after the error")
    storage.resize_(size)
    with torch.no_grad():
        tensor.copy_(kept)
    for _ in range(3):
        call(optimizer)
        call(twin)
        assert_same(optimizer, twin, a, b, "after the memory is back")


def step(optimizer):
    optimizer.step()


def enter_slow_weights(optimizer):
    with optimizer.slow_weights():
        pass


def check_all_unallocated(target, backend, name):
    for offset in (0, 3):
        check_unallocated(target, backend, make_ranger, name, offset, step)
    if name in ("param", "slow_param"):
        check_unallocated(target, backend, make_ranger, name, 0, enter_slow_weights)
        check_unallocated(target, backend, make_lookahead, name, 0, step)


NEEDED = ["param", "grad", *STATE]


@pytest.mark.parametrize("name", NEEDED)
def test_a_step_without_the_memory_it_needs_is_refused_whole(elsewhere, name):
    elsewhere.run(check_all_unallocated, None, name)


@pytest.mark.parametrize("name", [*NEEDED, "residual"])
def test_a_step_of_the_reference_without_its_memory_is_refused_whole(processes, name):
    processes["cpu-1-thread"].run(check_all_unallocated, "reference", name)


def check_resting_unallocated(target):
    native, reference, a, b = pair(target, 3)
    step_both(target, native, reference, a, b, "before")
    tensors = [p for params in (a, b) for p in (params[0],)]
    tensors += [o.state[p[0]]["exp_avg"] for o, p in ((native, a), (reference, b))]
    kept = [t.detach().clone() for t in tensors]
    sizes = [resizable_storage(t).nbytes() for t in tensors]
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    for _ in range(3):
        gradients = [None, *(torch.randn_like(p, device="cpu") for p in a[1:])]
        give_gradients(gradients, a, b, move=target.move)
        native.step()
        reference.step()
    for tensor, value, size in zip(tensors, kept, sizes, strict=True):
        tensor.untyped_storage().resize_(size)
        with torch.no_grad():
            tensor.copy_(value)
    step_both(target, native, reference, a, b, "afterwards")


def test_a_parameter_that_rests_needs_no_memory(elsewhere):
    elsewhere.run(check_resting_unallocated)


# --- other threads ------------------------------------------------------------------------------


def check_changed_meanwhile(target):
    size = 300 if target.small else 500_000
    params = [Parameter(target.move(torch.ones(size))) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Ranger(params, k=2, backend=target.backend)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    until = time.monotonic() + 1.5
    problems = []
    chance = random.Random(0)

    def meddle():
        for i in itertools.count():
            if time.monotonic() > until:
                return
            time.sleep(chance.uniform(0, 0.005))  # so that a step gets as far as its kernels
            group = optimizer.param_groups[0]
            try:
                if i % 4 == 0:
                    for param in list(group["params"]):
                        param.data = param.data.clone()
                        param.grad = torch.ones_like(param)
                elif i % 4 == 1:
                    optimizer.state.clear()
                elif i % 4 == 2:
                    new = [Parameter(p.detach().clone()) for p in group["params"]]
                    for param in new:
                        param.grad = torch.ones_like(param)
                    group["params"] = new
                else:
                    optimizer.load_state_dict(copy.deepcopy(saved))
            except RuntimeError:
                pass
            except Exception as error:
                problems.append(error)

    meddler = threading.Thread(target=meddle)
    meddler.start()
    while meddler.is_alive():
        with contextlib.suppress(RuntimeError):  # it may notice
            optimizer.step()
    assert not problems, problems[0]
    optimizer.step()


def test_whatever_another_thread_does_a_step_under_way_has_its_memory(elsewhere):
    elsewhere.run(check_changed_meanwhile)
