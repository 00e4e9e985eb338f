"""What Triton's launcher reads, holds and lets go, launches among it that are under way."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_same, assert_same_bits, give_gradients, twins, with_gradients
from ranger_cuda import Ranger
from ranger_cuda.backends import triton_launcher, triton_tables
from ranger_cuda.backends.triton_rows import TensorRow, number_words, word
from ranger_cuda.state.tensors import plain_grad
from targets import interpreted_kernels

triton = pytest.importorskip("triton")


# --- memory --------------------------------------------------------------------------------------


def test_one_tensor_given_other_memory_is_seen_at_once(interpreted):
    """However many there are, and complex ones beside it."""
    tensors = [torch.randn(3, dtype=torch.complex64)] + [torch.randn(3) for _ in range(99)]
    a, b = twins(tensors)
    first, second = Ranger(a, k=2, backend="triton"), Ranger(b, k=2, backend="reference")
    for step in range(4):
        for optimizer, params in ((first, a), (second, b)):
            for value in optimizer.state[params[70]].values() if step == 1 else ():
                value.data = value.data.clone()
            for value in optimizer.state[params[0]].values() if step == 2 else ():
                value.data = value.data.clone()
        give_gradients([torch.ones_like(t) for t in tensors], a, b)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {step}")


def test_a_gradient_lives_as_long_as_its_step(interpreted, monkeypatch):
    """Copies of it, too: the launch finds them alive, and nobody keeps them."""
    copies, alive = [], []

    def copying(param):
        gradient = plain_grad(param)
        copies.append(weakref.ref(gradient))
        return gradient

    monkeypatch.setattr("ranger_cuda.step.native.plain_grad", copying)
    kernels = interpreted_kernels()
    real = kernels.radam_kernel

    class Watched:
        def __getitem__(self, grid):
            alive.extend(copy() is not None for copy in copies)
            return real[grid]

    params = with_gradients(torch.randn(4), torch.randn(4, dtype=torch.complex64))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    copies.clear()
    monkeypatch.setattr(kernels, "radam_kernel", Watched())
    params[1].grad = torch.ones(4, dtype=torch.complex64).conj()
    gradients = [weakref.ref(param.grad) for param in params]
    optimizer.step()
    assert copies
    assert alive
    assert all(alive)
    assert not any(copy() for copy in copies)
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None, None]


def test_a_step_that_is_not_taken_lets_its_gradients_go(interpreted):
    params = with_gradients(torch.randn(4), torch.randn(4))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    gradients = [weakref.ref(param.grad) for param in params]
    optimizer._dispatcher.collect(optimizer.param_groups, optimizer.state, None)
    optimizer._dispatcher.release()
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None, None]


def test_a_load_during_a_launch_leaves_it_its_memory(interpreted, monkeypatch):
    """As another thread may: Triton's launches let others run."""
    kernels = interpreted_kernels()
    real = kernels.radam_kernel
    (param,) = params = with_gradients(torch.randn(70))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    before = [weakref.ref(value.untyped_storage()) for value in optimizer.state[param].values()]
    alive = []

    class Meanwhile:
        def __getitem__(self, grid):
            def launch(*args, **options):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                alive.extend(storage() is not None for storage in before)
                if all(alive):  # it would write to memory that is another's
                    real[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "radam_kernel", Meanwhile())
    optimizer.step()
    assert alive == [True] * 4


class Streams:
    """A GPU's current stream, and which tensors were recorded for which."""

    def __init__(self, patch):
        self.current = "first"
        self.recorded: set[tuple[int, str]] = set()
        patch.setattr(
            triton_tables.DeviceTables, "_current_stream", lambda tables: self.current, raising=True
        )
        patch.setattr(
            torch.Tensor,
            "record_stream",
            lambda tensor, stream: self.recorded.add((tensor.data_ptr(), stream)),
        )


def test_tables_outlive_what_other_streams_read(interpreted, monkeypatch):
    """Freed, memory goes to the stream it was made on, unless it is recorded for the others."""
    streams = Streams(monkeypatch)
    params = with_gradients(torch.randn(5), torch.randn(6, 8)[:, ::2])
    optimizer = Ranger(params, k=2, centralize="all", backend="triton")
    optimizer.step()
    assert not streams.recorded
    tables = optimizer._dispatcher._native.launchers[0].kernels._tables
    on_device = [*tables._tables, tables._squares, tables._slices, tables.layouts]
    on_device = {t.data_ptr() for t in (*on_device, tables._before, tables._layouts_before)}
    assert len(on_device) == 9
    streams.current = "second"
    optimizer.step()
    assert streams.recorded == {(address, "second") for address in on_device}


def test_a_step_s_inputs_never_overwrite_those_on_their_way(interpreted, monkeypatch):
    params = with_gradients(torch.randn(5))
    optimizer = Ranger(params, backend="triton")
    hosts = []
    upload = triton_tables.DeviceTables._upload

    def watched(tables, *given):
        host, before = tables._host, tables._last_inputs
        found = upload(tables, *given)
        hosts.append((host, tables._last_inputs is not before))
        return found

    monkeypatch.setattr(triton_tables.DeviceTables, "_upload", watched)
    for _ in range(4):
        params[0].grad = torch.randn(5)
        optimizer.step()
    assert len({host.data_ptr() for host, _ in hosts}) == 4
    hosts.clear()
    for _ in range(3):
        optimizer.step()  # the same gradients, where they were
    assert [differs for _, differs in hosts] == [False] * 3


def test_tables_that_a_graph_reads_are_kept_once(interpreted, monkeypatch):
    params = with_gradients(torch.randn(5))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    monkeypatch.setattr(triton_launcher, "is_capturing", lambda: True)
    for _ in range(3):
        optimizer.step()
    captured = optimizer._dispatcher._captured
    assert len(captured) == 1
    optimizer._dispatcher.reset()
    assert captured is optimizer._dispatcher._captured
    assert len(captured) == 1


def test_a_capture_calls_nothing_of_torch_s_that_the_first_step_did_not(gpu, monkeypatch):
    """A kernel that is loaded for the first time may not be in a capture; and a call for all words,
    not one for each."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

        def __init__(self):
            super().__init__()
            self.names: list[str] = []

    params = with_gradients(*(torch.randn(3) for _ in range(40)))
    optimizer = Ranger(params, backend="triton")
    with Calls() as first:
        optimizer.step()
    monkeypatch.setattr(triton_launcher, "is_capturing", lambda: True)
    with Calls() as captured:
        optimizer.step()
    writes = [name for name in captured.names if "detach" not in name and "profiler" not in name]
    assert writes == ["aten.zeros.default", "aten.unbind.int", "aten._foreach_add_.ScalarList"]
    assert set(writes) <= set(first.names)


def test_tables_are_not_made_in_a_capture(interpreted, monkeypatch):
    params = with_gradients(torch.randn(5, 4))
    optimizer = Ranger(params, backend="triton")
    optimizer.step()
    params[0].grad = torch.randn(4, 5).t()  # other strides, other tables
    monkeypatch.setattr(triton_launcher, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be made ready in a capture"):
        optimizer.step()
    monkeypatch.undo()
    assert optimizer.state[params[0]]["step"] == 1


def test_a_group_without_parameters_may_come_and_go(interpreted):
    a, b = twins([torch.randn(5)])
    first, second = Ranger(a, backend="triton"), Ranger(b, backend="reference")
    for step in range(6):
        for optimizer in (first, second):
            if step == 2:
                optimizer.param_groups.insert(1, {**optimizer.param_groups[0], "params": []})
            if step == 4:
                optimizer.param_groups.pop()
        give_gradients([torch.randn(5)], a, b)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {step}")


def test_everything_is_launched_on_the_tensors_device(gpu, monkeypatch):
    inside = []

    class Inside:
        def __init__(self, device):
            pass

        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    where = []
    real = gpu.launcher_cls
    gpu.launcher_cls = lambda *args: lambda *_: (where.append(bool(inside)), real(*args)(*_))
    for module in (triton_tables, triton_launcher):
        monkeypatch.setattr(module, "on_device", Inside)
    optimizer = Ranger(with_gradients(torch.randn(5)), backend="triton")
    optimizer.step()
    with optimizer.slow_weights():
        pass
    assert len(where) > 6
    assert all(where)


def test_addresses_in_the_upper_half_are_words_in_two_s_complement(interpreted, monkeypatch):
    upper = 2**64 - 64
    data = [upper, 0, upper, upper, upper, upper] + [0] * 6
    row = TensorRow(4, "float32", 0, 0, upper, 96, 2, 3, [4], data, [[]] * 12)
    tables = triton_tables.DeviceTables("RADAM", [row], 1, torch.device("cpu"), set())
    streams = [-64, 0, -64, -64, -64, -64] + [0] * 6
    assert tables._tables.records.tolist() == [[*streams, 4, -64, 0, 96, 2, 0, 0, 3]]
    number = SimpleNamespace(data_ptr=lambda: upper, dtype=torch.float64)
    assert number_words(number) == [-64, 1]

    optimizer = Ranger(with_gradients(torch.randn(5)), backend="triton")
    optimizer.step()
    (launcher,) = optimizer._dispatcher._native.launchers
    monkeypatch.setattr(triton_tables.DeviceTables, "launch", lambda *args: None)
    addresses = launcher.kernels._tables.gradients
    optimizer.step()
    assert addresses.tolist() == [optimizer.param_groups[0]["params"][0].grad.data_ptr()]


def test_a_tensor_of_more_than_2_to_the_31_elements_is_addressed_right():
    """One chunk far inside of it, with base addresses moved back, so that only the chunk exists."""
    kernels = interpreted_kernels()
    codecs = "PARAM_CODEC", "EXP_AVG_CODEC", "EXP_AVG_SQ_CODEC", "SLOW_CODEC"
    chunk, index, length = 64, 2**31 // 64 + 5, 50
    begin = index * chunk
    streams = [torch.rand(length) for _ in range(6)]  # p, g, m, v, slow, b
    expected = [stream.clone() for stream in streams]
    layout = torch.tensor([1, begin + length] + [1] * 12)
    for strided in (False, True):
        words = [word((s.data_ptr() - 4 * begin) % 2**64) for s in streams]
        beside = [0] * 6
        record = torch.tensor([[*words, *beside, begin + length, 0, layout.data_ptr(), 0, 0, 0]])
        record[0, 1] = 0
        flags = kernels.ACTIVE.value | kernels.RECTIFIED.value
        flags |= kernels.SYNC.value | kernels.OUTER.value
        scalars = torch.zeros(1, kernels.SCALAR_WORDS.value, dtype=torch.int64)
        scalars[0, 0], scalars[0, 1] = flags, words[1]
        c = torch.tensor([1.0, 0.0, 0.9, 0.1, 0.99, 0.01, 1e-8, 1.0, 0.1, 0.5, 0.9, 1.0])
        scalars[0, 2:14].view(torch.float32)[::2] = c
        kernels.radam_kernel[(1,)](
            record,
            scalars,
            torch.tensor([[0, index]], dtype=torch.int32),
            0,
            T=kernels.tl.float32,
            **dict.fromkeys(codecs, "Float32"),
            STRIDED=strided,
            CHUNK=chunk,
            BLOCK=32,
            enable_fp_fusion=False,
        )
        p, g, m, v, slow, b = expected
        m = c[2] * m + c[3] * g
        v = c[4] * v + c[5] * (g * g)
        u = m / (torch.from_numpy(np.sqrt(v.numpy())) + c[6])
        p = p - c[8] * u
        b = c[10] * b + (slow - p)
        slow = slow - c[9] * ((slow - p) + c[10] * b)
        expected = [slow, g, m, v, slow, b]
        for found, wanted in zip(streams, expected, strict=True):
            assert_same_bits(found, wanted, f"{strided=}")


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.ptx)]
)
def test_streams_may_each_lie_at_any_multiple_of_their_elements_size(interpreted, dtype):
    item = dtype.itemsize

    def at(offset, values):
        """``values`` at an address of ``offset`` elements behind a multiple of 64 bytes."""
        room = torch.zeros(values.numel() + 64, dtype=values.dtype)
        start = -(room.data_ptr() // item) % (64 // item) + offset
        return room[start : start + values.numel()].copy_(values)

    def run(name, offsets):
        a, b = twins([torch.randn(70, dtype=dtype)])
        a[0].data = at(offsets[0], a[0].data)
        first, second = Ranger(a, k=2, backend="triton"), Ranger(b, k=2, backend="reference")
        for step in range(4):
            gradient = torch.randn(70, dtype=dtype)
            a[0].grad, b[0].grad = at(offsets[1], gradient), gradient
            if step == 1:
                state = first.state[a[0]]
                keys = ("exp_avg", "exp_avg_sq", "slow_param")
                for key, offset in zip(keys, offsets[2:], strict=True):
                    state[key] = at(offset, state[key])
            first.step()
            second.step()
            assert_same(first, second, a, b, f"{name}, step {step}")
        with first.slow_weights(), second.slow_weights():
            assert_same_bits(a[0], b[0], name)
        assert_same(first, second, a, b, f"{name}, after a swap")

    for offset in (0, 1):
        run(f"alike at {offset}", [offset] * 5)
    for stream in range(1, 5):
        offsets = [1] * 5
        offsets[stream] = 0
        run(f"stream {stream} lies otherwise", offsets)
