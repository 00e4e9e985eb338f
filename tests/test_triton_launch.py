"""How Triton's launcher compiles, launches and keeps memory, on a GPU that does nothing."""

from __future__ import annotations

import copy
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from helpers import assert_same, assert_same_bits, give_gradients, twins, with_gradients
from ranger_cuda import Lookahead, RAdam, Ranger
from ranger_cuda.backends import support, triton_launcher, triton_tables
from targets import interpreted_kernels

triton = pytest.importorskip("triton")


def leave_float32_to_the_cpu(patch):
    """So that one optimizer has a compiled launcher, which comes first, and Triton's."""
    patch.setattr("ranger_cuda.state.tensors.HOST", ("cpu",))
    double = support.BACKENDS["triton"]._replace(dtypes=(torch.float64,))
    patch.setitem(support.BACKENDS, "triton", double)


# --- compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [False, True])
def test_the_first_step_compiles_all_that_any_later_one_needs(gpu, monkeypatch, wrapper):
    """Whatever hyperparameters, scaling, clipping, addresses, captures and swaps come later."""
    params = with_gradients(
        torch.randn(5000), torch.randn(6, 8)[:, ::2], torch.randn(9, dtype=torch.float64)
    )
    options = {"max_grad_norm": 1e6, "centralize": "all", "backend": "triton"}
    if wrapper:
        optimizer = Lookahead(RAdam(params, **options), k=2, backend="triton")
        inner = optimizer.optimizer
    else:
        optimizer = inner = Ranger(params, k=2, **options)
    optimizer.step()
    first = list(gpu.loaded)
    step = {"schedule_kernel", "radam_kernel", "slow_kernel"}
    assert set(first) == step | {"squares_kernel", "total_kernel", "centralize_kernel"}
    assert gpu.fusing == []

    numbers = torch.ones(8), torch.ones(8, dtype=torch.float64)
    for step in range(12):
        inner.param_groups[0].update(lr=0.1 / (step + 1), eps=1e-6 * (step + 1), weight_decay=step)
        if step % 4 == 2:
            inner.param_groups[0]["lr"] = numbers[step % 3 == 0][step % 8]
        if step > 3 and not wrapper:
            inner.found_inf = numbers[step % 2][step % 8]  # of either type, at any alignment
            inner.grad_scale = numbers[step % 3 == 0][1]
            inner.param_groups[0]["max_grad_norm"] = 0.5
        monkeypatch.setattr(triton_launcher, "is_capturing", lambda step=step: step in (8, 9))
        odd = torch.randn(5001)[1:]
        params[0].grad = odd if step % 2 else odd.clone()
        optimizer.step()
        monkeypatch.setattr(triton_launcher, "is_capturing", lambda: False)
        with optimizer.slow_weights():
            pass
    optimizer.add_param_group({"params": with_gradients(torch.randn(3)), "lr": 0.5})
    optimizer.step()
    assert gpu.loaded == first


def test_a_model_without_slow_weights_compiles_no_kernel_for_them(gpu):
    optimizer = RAdam(with_gradients(torch.randn(50)), backend="triton")
    optimizer.step()
    assert sorted(gpu.loaded) == ["radam_kernel", "schedule_kernel"]


def test_a_step_is_a_launch_for_the_schedule_and_one_for_the_model(gpu):
    optimizer = Ranger(with_gradients(*(torch.randn(n) for n in range(1, 100))), backend="triton")
    optimizer.step()
    gpu.launched.clear()
    optimizer.step()
    assert gpu.launched == ["schedule_kernel", "radam_kernel"]


# --- a failure changes nothing -------------------------------------------------------------------


class Failing:
    """A kernel whose launches fail: all, or one after ``calls`` that do not."""

    def __init__(self, kernel, calls=None):
        self.kernel = kernel
        self.calls = calls

    def __getitem__(self, grid):
        def launch(*args, **options):
            if self.calls is None or self.calls == 0:
                self.calls = None if self.calls is None else -1
                raise RuntimeError("it cannot be launched")
            self.calls -= 1
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("name", ["schedule_kernel", "radam_kernel", "slow_kernel"])
@pytest.mark.parametrize("wrapper", [False, True])
def test_a_kernel_that_cannot_be_compiled_fails_before_anything_moves(
    interpreted, monkeypatch, name, wrapper
):
    kernels = interpreted_kernels()
    params = with_gradients(torch.randn(5), torch.randn(70))
    optimizer = Ranger(params, backend="triton")
    if wrapper:
        inner = RAdam(params, backend="reference")
        optimizer = Lookahead(inner, k=1, backend="triton")
    before = [p.detach().clone() for p in params]
    monkeypatch.setattr(kernels, name, Failing(getattr(kernels, name)))
    if wrapper and name == "radam_kernel":
        optimizer.step()  # which it does not launch
        return
    with pytest.raises(RuntimeError, match="cannot be launched"):
        optimizer.step()
    for p, value in zip(params, before, strict=True):
        assert_same_bits(p, value, "parameter")
    assert not optimizer.state, "made anew from what the parameters are by then"


def test_memory_that_cannot_be_had_fails_before_anything_moves(interpreted, monkeypatch):
    """Beside a compiled backend's parameters, which come first."""
    leave_float32_to_the_cpu(monkeypatch)
    params = with_gradients(torch.randn(4), torch.randn(4, dtype=torch.float64))
    optimizer = Ranger(params)
    optimizer.step()
    assert len(optimizer._dispatcher._native.launchers) == 2
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])

    def fail(self, **_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(triton_tables.DeviceTables, "reserve", fail)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    for i, (p, value) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(p, value, "parameter")
        for name, saved in state[i].items():
            assert_same_bits(optimizer.state[p][name], saved, name)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_swap_that_fails_half_way_is_undone(interpreted, monkeypatch, compiled, failing):
    """Also where another kind of tensor, or a compiled backend's parameters, were swapped first;
    and on the way back all is tried that can be."""
    if compiled:
        leave_float32_to_the_cpu(monkeypatch)
    params = with_gradients(
        torch.randn(4), torch.randn(4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    )
    params[2].data = params[2].data[:, ::2]
    params[2].grad = params[2].grad[:, ::2]
    optimizer = Ranger(params, k=4, backend=None if compiled else "triton")
    optimizer.step()
    before = [p.detach().clone() for p in params]
    kernels = interpreted_kernels()
    kinds = 2 if compiled else 3
    entered = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "slow_kernel", Failing(kernels.slow_kernel, failing))
        with pytest.raises(RuntimeError, match="cannot be launched"), optimizer.slow_weights():
            entered.append(True)
    assert bool(entered) == (failing >= kinds)
    if not entered:
        for p, value in zip(params, before, strict=True):
            assert_same_bits(p, value, "parameter")
        with optimizer.slow_weights():
            assert not torch.equal(params[1], before[1])
        for p, value in zip(params, before, strict=True):
            assert_same_bits(p, value, "parameter")
    elif compiled:
        assert_same_bits(params[0], before[0], "parameter")


def test_a_swap_counts_as_a_change_in_place_both_ways(interpreted):
    params = with_gradients(torch.randn(4))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    versions = [params[0]._version]
    with optimizer.slow_weights():
        versions.append(params[0]._version)
    versions.append(params[0]._version)
    assert versions == sorted(set(versions))


def test_a_second_thread_is_refused(interpreted, monkeypatch):
    kernels = interpreted_kernels()
    a, b = twins([torch.randn(70)])
    optimizer, expected = Ranger(a, backend="triton"), Ranger(b, backend="reference")
    refusals = []

    class Meanwhile:
        def __getitem__(self, grid):
            def launch(*args, **options):
                kernels.radam_kernel = real
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
                return real[grid](*args, **options)

            return launch

    def other():
        try:
            optimizer.step()
        except RuntimeError as error:
            refusals.append(str(error))

    give_gradients([torch.randn(70)], a, b)
    optimizer.step()
    expected.step()
    real = kernels.radam_kernel
    monkeypatch.setattr(kernels, "radam_kernel", Meanwhile())
    optimizer.step()
    expected.step()
    assert len(refusals) == 1
    assert "another thread" in refusals[0]
    assert_same(optimizer, expected, a, b, "with a second thread")


# --- which machine -------------------------------------------------------------------------------


def test_triton_is_chosen_where_the_extension_has_no_cuda(monkeypatch):
    param = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_neg=lambda: False)
    monkeypatch.setattr(support, "_triton_obstacle", lambda: None)
    cause = support.Obstacle("the extension has no CUDA kernels", "build anew")
    monkeypatch.setattr(support, "obstacle", {"cuda": cause}.get)
    assert support.choose(None, param, "it") == "triton"
    monkeypatch.setattr(support, "obstacle", {}.get)
    assert support.choose(None, param, "it") == "cuda"


def triton_obstacle():
    support._triton_obstacle.cache_clear()
    return support.obstacle("triton")


def test_a_missing_or_old_triton_says_what_to_install(monkeypatch):
    try:
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        assert "3.5.1 is too old" in triton_obstacle().cause
        monkeypatch.setitem(sys.modules, "triton", None)
        assert "pip install triton" in triton_obstacle().fix
    finally:
        support._triton_obstacle.cache_clear()


def test_devices_that_triton_cannot_serve_here_say_why(monkeypatch):
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton keeps what an attribute is set to
        assert "TRITON_INTERPRET" in triton_obstacle().fix
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
        monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Arc", raising=False)
        small = SimpleNamespace(has_fp64=False)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda: small)
        assert "Arc has no float64" in triton_obstacle().cause
    finally:
        support._triton_obstacle.cache_clear()


def test_a_capture_on_any_vendor_s_device_is_seen(monkeypatch):
    from ranger_cuda.state import tensors

    assert not tensors.is_capturing()
    for module in (torch.cuda, torch.xpu):
        with monkeypatch.context() as patch:
            patch.setattr(module, "is_available", lambda: True)
            patch.setattr(module, "is_current_stream_capturing", lambda: True, raising=False)
            assert tensors.is_capturing()
