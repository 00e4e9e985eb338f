"""The Triton backend: what its compiler makes of the kernels, and how its plan launches them."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from helpers import assert_same, give_gradients, twins
from ranger_cuda import Ranger, support
from ranger_cuda.backends import triton_plan
from targets import interpreted_kernels, open_target

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

CUDA = {capability: GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
AMD = GPUTarget("hip", "gfx942", 64)
WIDE = r"v4\.[bf]32|v2\.[bf]64"
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture
def interpreted(monkeypatch):
    return open_target("interpreted", monkeypatch)


def compiled(kernel, target, dtype=torch.float32, strided=False, **more):
    """A kernel's machine code for ``target``, with the options that the plan gives."""
    kernels = triton_plan.load_kernels()
    function = getattr(kernels, kernel)
    options = triton_plan.options(kernels, triton_plan.Launch(dtype, strided, 0, 1)) | more
    constants = {name: value for name, value in options.items() if name in function.arg_names}
    types = {"chunks": "*i32", "first_chunk": "i32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i64")
        for name in function.arg_names
    }
    source = compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
    flags = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=target, options=flags)


def compiled_schedule(target):
    function = triton_plan.load_kernels().schedule_kernel
    types = {"count": "i32", "grad_scale": "*fp32", "found_inf": "*fp32", "norm": "*fp64"}
    signature = {name: types.get(name, "*i64") for name in function.arg_names}
    source = compiler.ASTSource(
        fn=function,
        signature=signature | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": triton_plan.SCHEDULE_BLOCK},
    )
    return triton.compile(source, target=target, options={"enable_fp_fusion": False})


def assert_rounds_as_written(ptx):
    assert not re.search(r"\bfma\.", ptx)
    assert not re.search(r"\.(approx|full|ftz)\b", ptx)


@FLOATS
@pytest.mark.parametrize("target", CUDA.values(), ids=CUDA)
def test_every_stream_is_read_and_written_16_bytes_at_a_time(target, dtype):
    step = compiled("radam_kernel", target, dtype).asm["ptx"]
    assert_rounds_as_written(step)
    assert len(re.findall(rf"ld\.global\.({WIDE})", step)) >= 5  # p, g, m, v, slow
    assert len(re.findall(rf"st\.global\.({WIDE})", step)) >= 4
    for swap in (False, True):
        slow = compiled("slow_kernel", target, dtype, SWAP=swap).asm["ptx"]
        assert_rounds_as_written(slow)
        assert len(re.findall(rf"ld\.global\.({WIDE})", slow)) >= 2
        assert len(re.findall(rf"st\.global\.({WIDE})", slow)) >= 2


@FLOATS
def test_strided_tensors_and_the_schedule_round_as_written(dtype):
    assert_rounds_as_written(compiled("radam_kernel", CUDA[90], dtype, strided=True).asm["ptx"])
    schedule = compiled_schedule(CUDA[90]).asm["ptx"]
    assert_rounds_as_written(schedule)
    assert "sqrt.rn.f64" in schedule
    assert "div.rn.f64" in schedule


def test_the_kernels_compile_for_amd():
    for strided in (False, True):
        for dtype in (torch.float32, torch.float64):
            assert "hsaco" in compiled("radam_kernel", AMD, dtype, strided).asm
        assert "hsaco" in compiled("slow_kernel", AMD, strided=strided, SWAP=True).asm
    assert "hsaco" in compiled_schedule(AMD).asm


def test_the_tables_are_those_of_the_compiled_backend():
    extension = support.extension()
    if isinstance(extension, support.Obstacle):
        pytest.skip(extension.cause)
    kernels = triton_plan.load_kernels()
    words = ("row_words", "numel", "step", "layout", "group", "scalar_words", "coefficients")
    here = {name: getattr(kernels, name.upper()).value for name in words}
    flags = ("active", "rectified", "l2", "sync")
    here |= {name: getattr(kernels, name.upper()).value for name in flags}
    assert extension.table_layout() == here


class Recorder:
    """Stands before a kernel and notes what it is compiled for: all but the memory it is given."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.variants = set()

    def __getitem__(self, grid):
        def launch(*args, **options):
            values = (type(a) if isinstance(a, torch.Tensor) else a for a in args)
            self.variants.add((*values, *sorted((k, str(v)) for k, v in options.items())))
            return self.kernel[grid](*args, **options)

        return launch


def test_no_hyperparameter_is_compiled_in(interpreted, monkeypatch):
    kernels = interpreted_kernels()
    recorders = [Recorder(kernels.schedule_kernel), Recorder(kernels.radam_kernel)]
    monkeypatch.setattr(kernels, "schedule_kernel", recorders[0])
    monkeypatch.setattr(kernels, "radam_kernel", recorders[1])
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(70))]
    optimizer = Ranger(params, k=2, backend="triton")
    for step in range(8):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), eps=1e-6 * (step + 1))
        optimizer.step()
    assert [len(recorder.variants) for recorder in recorders] == [1, 1]


def test_a_captured_step_has_its_tables_in_the_graph(interpreted, monkeypatch):
    """Emulated: the words go through launches, as they do in a capture."""
    a, b = twins([torch.randn(n) for n in (3, 70, 1, 0, 9, 5, 6, 7, 8, 2)])
    first, second = Ranger(a, k=2, backend="triton"), Ranger(b, k=2, backend="reference")
    for seed in range(5):
        if seed == 2:
            monkeypatch.setattr(triton_plan, "is_capturing", lambda: True)
        generator = torch.Generator().manual_seed(seed)
        give_gradients([torch.randn(p.shape, generator=generator) for p in b], a, b)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {seed}")


def test_a_missing_or_old_triton_says_what_to_install(monkeypatch):
    def obstacle():
        support._triton_obstacle.cache_clear()
        return support.obstacle("triton")

    try:
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        assert "3.5.1 is too old" in obstacle().cause
        monkeypatch.setitem(sys.modules, "triton", None)
        assert "pip install triton" in obstacle().fix
    finally:
        support._triton_obstacle.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_learning_rate_change_compiles_nothing():
    compilations = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compilations.append(kwargs)
    try:
        params = [torch.nn.Parameter(torch.randn(5000, device="cuda"))]
        optimizer = Ranger(params, k=2, backend="triton")
        for step in range(12):
            params[0].grad = torch.randn(5000, device="cuda")
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
            if step == 1:
                compilations.clear()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compilations
