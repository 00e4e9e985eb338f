"""The CUDA backend: what it reads on the device, how it launches, and CUDA's own conventions."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_same, assert_same_bits, give_gradients, twins
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.backends import support
from ranger_cuda.state.tensors import DTensor, plain, plain_grad, shard_of
from ranger_cuda.step import dispatch
from ranger_cuda.step.algorithms import RANGER

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
each_class = pytest.mark.parametrize("cls", [RAdam, Ranger])


def pair(cls, target, shapes=((5, 4), (3,), (), (301,)), **options):
    """The same optimizer on the target and on the reference, and their parameters."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    a, b = twins(made, target.move)
    return cls(a, backend=target.backend, **options), cls(b, backend="reference", **options), a, b


def random_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in params]


def step_both(first, second, a, b, target, seed):
    give_gradients(random_gradients(b, seed), a, b, move=target.move)
    first.step()
    second.step()
    assert_same(first, second, a, b, f"step {seed}")


# --- what is read on the device ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1024.0, 3.0])
@each_class
def test_an_overflowed_step_changes_nothing(device_target, cls, scale):
    first, second, a, b = pair(cls, device_target, weight_decay=0.1)
    for seed in range(14):
        overflowed = seed in (0, 3, 4, 5, 11)
        for optimizer, device in ((first, device_target.device), (second, torch.device("cpu"))):
            optimizer.found_inf = torch.tensor(float(overflowed), device=device)
            optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=device)
        gradients = random_gradients(b, seed)
        if overflowed:
            gradients[0].view(-1)[0] = float("inf")
        give_gradients(gradients, a, b, move=device_target.move)
        before = [p.detach().clone() for p in a], copy.deepcopy(first.state_dict()["state"])
        first.step()
        second.step()
        if overflowed:
            for p, q in zip(a, before[0], strict=True):
                assert_same_bits(p, q, "parameter")
            for key, saved in before[1].items():
                for name, value in saved.items():
                    assert_same_bits(first.state_dict()["state"][key][name], value, name)
        if second.state:
            assert_same(first, second, a, b, f"step {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_class
def test_a_tensor_learning_rate_is_read_at_every_step(device_target, cls, dtype):
    rates = [torch.tensor(0.1, dtype=dtype, device=d) for d in (device_target.device, "cpu")]
    first, second, a, b = pair(cls, device_target, weight_decay=0.1)
    first.param_groups[0]["lr"], second.param_groups[0]["lr"] = rates
    for seed in range(8):
        for rate in rates:
            rate.fill_(0.1 / (seed + 1))
        step_both(first, second, a, b, device_target, seed)


def test_the_norm_is_clipped_to_on_the_device(device_target):
    limits = (0.5, 1e6, None)
    generator = torch.Generator().manual_seed(0)
    a, b = twins([torch.randn(50, generator=generator) for _ in limits], device_target.move)
    first, second = (
        RAdam(
            [{"params": [p], "max_grad_norm": n} for p, n in zip(params, limits, strict=True)],
            backend=backend,
        )
        for params, backend in ((a, device_target.backend), (b, "reference"))
    )
    for seed in range(8):
        give_gradients(random_gradients(b, seed), a, b, move=device_target.move)
        first.step()
        second.step()
        if device_target.device.type == "cpu":
            assert_same(first, second, a, b, f"step {seed}")
            continue
        for p, q in zip(a, b, strict=True):  # the norm is a reduction: another order on a GPU
            assert torch.allclose(p.cpu(), q, rtol=1e-5, atol=1e-7)
            m, n = first.state[p]["exp_avg"].cpu(), second.state[q]["exp_avg"]
            assert torch.allclose(m, n, rtol=1e-5, atol=1e-9)


# --- how it launches -----------------------------------------------------------------------------


def test_more_tensors_and_groups_than_a_launch_takes(device_target):
    generator = torch.Generator().manual_seed(0)
    count = 100 if device_target.slow else 700
    made = [torch.randn(i % 7, generator=generator) for i in range(count)]
    a, b = twins(made, device_target.move)

    def grouped(params):
        options = [{"lr": 0.01 * (i + 1), "k": 1 + i % 4} for i in range(70)]
        return [{"params": params[i::70], **option} for i, option in enumerate(options)]

    first = Ranger(grouped(a), backend=device_target.backend)
    second = Ranger(grouped(b), backend="reference")
    for seed in range(7):
        gradients = random_gradients(b, seed)
        gradients[seed::5] = [None] * len(gradients[seed::5])
        give_gradients(gradients, a, b, move=device_target.move)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {seed}")


def test_slow_weights_are_swapped_in_and_back(device_target):
    for make in (
        lambda params, backend: Ranger(params, k=3, backend=backend),
        lambda params, backend: Lookahead(RAdam(params, backend=backend), k=3, backend=backend),
    ):
        params = [
            torch.nn.Parameter(device_target.move(torch.randn(shape)))
            for shape in [(), (7,), (300,), (0,)]
        ]
        params.append(torch.nn.Parameter(device_target.move(torch.randn(6, 8)[:, ::2])))
        optimizer = make(params, device_target.backend)
        for seed in range(4):
            for param, gradient in zip(params, random_gradients(params, seed), strict=True):
                param.grad = gradient.to(param.device)
            optimizer.step()
        fast = [p.detach().clone() for p in params]
        slow = [optimizer.state[p]["slow_param"].clone() for p in params]
        with optimizer.slow_weights():
            for p, value in zip(params, slow, strict=True):
                assert_same_bits(p, value, "slow")
        for p, value, kept in zip(params, fast, slow, strict=True):
            assert_same_bits(p, value, "fast")
            assert_same_bits(optimizer.state[p]["slow_param"], kept, "slow")
        optimizer.step()


def test_a_failing_call_of_cuda_is_an_exception_that_names_it():
    """Here without a driver: rows for a device that there is not."""
    extension = support.extension()
    if support.obstacle("cuda") is None or not extension.build_info()["cuda"]:
        pytest.skip("needs CUDA kernels and no device")
    roster = extension.Roster(
        torch.Tensor.__dlpack_c_exchange_api__,
        RANGER.streams,
        "step",
        DTensor,
        plain,
        plain_grad,
        shard_of,
    )
    launcher = extension.CudaLauncher(extension.Rule.RADAM, 0, 0)
    with pytest.raises(RuntimeError, match=r"^cu\w+: .*\(error \d+, cudaError\w+\)"):
        launcher.prepare(roster)


# --- on a GPU only -------------------------------------------------------------------------------


def gpu_params(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).cuda())
        for shape in shapes or ((64, 33), (7,), (), (5000,))
    ]


@on_gpu
@each_backend
@each_class
def test_a_step_neither_waits_for_the_device_nor_allocates_on_it(cls, backend):
    params = gpu_params()
    optimizer = cls(params, lr=torch.tensor(0.1, device="cuda"), backend=backend)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert optimizer.state[params[0]]["step"].device.type == "cuda"


@on_gpu
@each_backend
def test_a_captured_step_replays_over_rectification_and_syncs_with_a_new_learning_rate(backend):
    made = [torch.randn(64, 33), torch.randn(7), torch.randn(5000)]
    a, b = twins(made, lambda t: t.cuda())
    rates = [torch.tensor(0.1, device=device) for device in ("cuda", "cpu")]
    first = Ranger(a, lr=rates[0], k=3, weight_decay=0.1, backend=backend)
    second = Ranger(b, lr=rates[1], k=3, weight_decay=0.1, backend="reference")
    static = [torch.zeros_like(p) for p in a]
    for p, gradient in zip(a, static, strict=True):
        p.grad = gradient

    def feed(seed):
        give_gradients(random_gradients(b, seed), b)
        for gradient, q in zip(static, b, strict=True):
            gradient.copy_(q.grad)
        for rate in rates:
            rate.fill_(0.1 / (1 + seed))

    feed(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first.step()
    torch.cuda.current_stream().wait_stream(stream)
    second.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    assert_same(first, second, a, b, "after the capture, which moves nothing")
    for seed in range(1, 14):
        feed(seed)
        graph.replay()
        second.step()
        assert_same(first, second, a, b, f"replay {seed}")
    # The graph keeps its tables alive, whatever becomes of the launcher.
    first._dispatcher.reset()
    feed(14)
    graph.replay()
    second.step()
    assert_same(first, second, a, b, "after the launcher is gone")


@on_gpu
@each_backend
def test_a_first_step_inside_a_capture_is_refused(backend):
    params = gpu_params()
    optimizer = Ranger(params, backend=backend)
    for param in params:
        param.grad = torch.randn_like(param)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="take a step before the capture"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
    torch.cuda.synchronize()
    assert not optimizer.state


@on_gpu
@each_backend
def test_a_step_runs_on_the_current_stream(backend):
    a, b = twins([torch.randn(1_000_000)], lambda t: t.cuda())
    first, second = Ranger(a, backend=backend), Ranger(b, backend="reference")
    stream = torch.cuda.Stream()
    for seed in range(8):
        give_gradients(random_gradients(b, seed), b)
        second.step()
        gradient = b[0].grad.pin_memory()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # anything on another stream would come first
            a[0].grad = gradient.to("cuda", non_blocking=True)
            first.step()
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(first, second, a, b, f"step {seed}")


@on_gpu
def test_devices_and_dtypes_mixed_in_one_group_move_together():
    made = [torch.randn(40), torch.randn(9).double(), torch.randn(33), torch.randn(6).bfloat16()]
    a, b = twins(made)
    a[0].data, a[1].data, a[3].data = a[0].data.cuda(), a[1].data.cuda(), a[3].data.cuda()
    first, second = Ranger(a, k=2), Ranger(b, k=2, backend="reference")
    for seed in range(8):
        gradients = [g.to(q.dtype) for g, q in zip(random_gradients(b, seed), b, strict=True)]
        give_gradients(gradients, b)
        for p, q in zip(a, b, strict=True):
            p.grad = q.grad.to(p.device)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {seed}")


@on_gpu
@each_backend
@each_class
def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(cls, backend):
    a, b = twins([torch.randn(40), torch.randn(3, 3)])
    first, second = cls(a), cls(b, backend="reference")
    for seed in range(12):
        if seed in (4, 8):
            device = "cuda" if seed == 4 else "cpu"
            saved = copy.deepcopy(first.state_dict())
            a = [torch.nn.Parameter(p.detach().to(device)) for p in a]
            first = cls(a, backend=backend if device == "cuda" else None)
            first.load_state_dict(saved)
        where = a[0].device
        give_gradients(random_gradients(b, seed), a, b, move=lambda g, where=where: g.to(where))
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {seed}")


@on_gpu
@each_backend
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_grad_scaler_skips_and_unscales(amp_scaling, backend):
    a, b = twins([torch.randn(40)], lambda t: t.cuda())
    first = Ranger(a, amp_scaling=amp_scaling, backend=backend)
    second = Ranger(b, backend="reference")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    for seed in range(9):
        overflowed = seed in (2, 3)
        (gradient,) = random_gradients(b, seed)
        a[0].grad = gradient.cuda() * scaler.get_scale()
        if overflowed:
            a[0].grad[0] = float("nan")
        scaler.step(first)
        scaler.update()
        if not overflowed:
            b[0].grad = gradient
            second.step()
            assert_same(first, second, a, b, f"step {seed}")


@on_gpu
def test_what_the_host_moves_is_not_captured():
    params = [*gpu_params((40,)), torch.nn.Parameter(torch.randn(7, device="cuda").bfloat16())]
    optimizer = Ranger(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    with (
        pytest.raises(RuntimeError, match="cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    torch.cuda.synchronize()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param, value, "after the refusal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_of_what_the_host_moves_is_refused(dtype, monkeypatch):
    """Emulated: the capture is only said to be under way."""
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = Ranger([param])
    optimizer.step()
    monkeypatch.setattr(dispatch, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
