"""The Triton backend: what its compiler makes of the kernels, and how they are launched."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from emulation.programs import checked
from helpers import assert_same, give_gradients, twins
from machine_code import cuobjdump, divisions_and_roots, fused, operations
from ranger_cuda import Ranger
from ranger_cuda.backends import support, triton_launcher, triton_tables, triton_words
from ranger_cuda.state import formats
from targets import fresh_triton, release

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
driver = pytest.importorskip("triton.runtime.driver").driver
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

CUDA = {capability: GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)}
ALL = pytest.mark.parametrize(
    "target",
    [  # the newest, whose assembler has fused, and the one before
        pytest.param(target, id=f"sm_{sm}", marks=() if sm in (90, 100) else pytest.mark.ptx)
        for sm, target in CUDA.items()
    ],
)
AMD = GPUTarget("hip", "gfx942", 64)
WIDE = r"v4\.[bf]32|v2\.[bf]64"
BY_NAME = {format.name: format for format in formats.FORMATS}
# Each codec, and what takes most registers.
LOW = pytest.mark.parametrize(
    "format",
    [
        BY_NAME[name]
        for name in (
            "bfloat16_exact",
            "bfloat16_nearest",
            "float16_nearest",
            "float16_exact_bfloat16",
            "float16_stochastic_bfloat16",
            "bfloat16_stochastic_8bit",
            "bfloat16_stochastic24_8bit",
        )
    ],
    ids=lambda format: format.name,
)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def compiled(kernel, target, format=torch.float32, strided=False, **more):
    """A kernel's machine code for ``target``, with the options that the launcher gives.

    Args:
        format: of its rows, or the dtype of their parameters.
    """
    kernels = triton_tables.load_kernels()
    function = getattr(kernels, kernel)
    format = format if isinstance(format, formats.Format) else formats.of(format)
    launch = triton_tables.Launch(format, strided, 0, 1, 0, 1)
    options = triton_tables.options(kernels, launch, more.get("SWAP", False)) | more
    if kernel == "radam_kernel":
        options |= triton_tables.moment_options(launch)
    constants = {name: value for name, value in options.items() if name in function.arg_names}
    types = {"chunks": "*i32", "first_chunk": "i32", "scratch": "i64"}
    types |= {"slices": "*i32", "first_slice": "i32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i64")
        for name in function.arg_names
    }
    source = compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
    flags = {name: value for name, value in options.items() if name not in constants}
    return compile_on(target, source, flags)


def compiled_schedule(target):
    function = triton_tables.load_kernels().schedule_kernel
    numbers = ("count", "is_pull")
    signature = {name: "i32" if name in numbers else "*i64" for name in function.arg_names}
    source = compiler.ASTSource(
        fn=function,
        signature=signature | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": triton_tables.SCHEDULE_BLOCK},
    )
    return compile_on(target, source, {"enable_fp_fusion": False})


def compile_on(target, source, options):
    """As on a machine with such a GPU, which the kernels may ask about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: target))
        return triton.compile(source, target=target, options=options)


def assert_rounds_as_written(ptx):
    assert not re.search(r"\bfma\.", ptx)
    assert not re.search(r"\.(approx|full|ftz)\b", ptx)


@FLOATS
@ALL
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


def assert_registers_leave_room(target, format, folder, most=96):
    """For five programs of 128 threads; strided, for three. Nothing is spilled."""
    for strided, registers in ((False, most), (True, 168)):
        binary = folder / f"{strided}.cubin"
        binary.write_bytes(compiled("radam_kernel", target, format, strided).asm["cubin"])
        usage = dict(re.findall(r"([A-Z]+):(\d+)", checked([cuobjdump(), "-res-usage", binary])))
        assert int(usage["REG"]) <= registers
        assert usage["STACK"] == usage["LOCAL"] == "0"


@FLOATS
@ALL
def test_registers_leave_room_and_nothing_is_spilled(target, dtype, tmp_path):
    """Each thread has 128 bytes on their way."""
    assert_registers_leave_room(target, dtype, tmp_path)


@LOW
def test_registers_of_low_precision_leave_room_too(format, tmp_path):
    """For four programs of what takes most: with Triton 3.9 it is 102 registers, with 3.7 96."""
    takes_most = format.name == "bfloat16_stochastic24_8bit"
    assert_registers_leave_room(CUDA[90], format, tmp_path, most=128 if takes_most else 96)


@LOW
def test_threads_have_the_same_elements_of_each_stream_whatever_they_are_stored_in(format):
    """Four at a time, of which 2 bytes each are 8. Groups lie in a warp: nothing goes through
    shared memory, nor do scales."""
    step = compiled("radam_kernel", CUDA[90], format).asm["ptx"]
    assert_rounds_as_written(step)
    assert "bar.sync" not in step
    streams = [format.param, format.exp_avg, format.exp_avg_sq, format.slow_param]
    types = [dtype for codec in streams for dtype in (codec.dtype, *(p.dtype for p in codec.rest))]
    for size, access in ((4, r"v4\.b32"), (2, r"v2\.b32"), (1, "b32")):
        count = sum(dtype.itemsize == size for dtype in types)
        grouped = sum(codec.is_grouped for codec in streams) if size == 1 else 0
        for kind in ("ld", "st"):
            assert len(re.findall(rf"{kind}\.global\.{access}", step)) >= count - grouped
    slow = compiled("slow_kernel", CUDA[90], format, SWAP=True).asm["ptx"]
    wide = r"\.global\.v4\.b32"
    assert len(re.findall("ld" + wide, slow)) >= 2
    assert len(re.findall("st" + wide, slow)) >= 2


@FLOATS
def test_what_is_not_wide_is_side_by_side_in_memory(dtype):
    """Neighbouring threads have neighbouring elements; otherwise Triton exchanges them through
    shared memory before a store."""
    kernels = [compiled("radam_kernel", CUDA[90], dtype)]
    kernels += [compiled("slow_kernel", CUDA[90], dtype, SWAP=swap) for swap in (False, True)]
    for kernel in kernels:
        assert "bar.sync" not in kernel.asm["ptx"]
        assert ".shared" not in kernel.asm["ptx"].replace(".shared .align", "")
        assert "convert_layout" not in kernel.asm["ttgir"]


@FLOATS
def test_strided_tensors_and_the_schedule_round_as_written(dtype):
    assert_rounds_as_written(compiled("radam_kernel", CUDA[90], dtype, strided=True).asm["ptx"])
    schedule = compiled_schedule(CUDA[90]).asm["ptx"]
    assert_rounds_as_written(schedule)
    assert "sqrt.rn.f64" in schedule
    assert "div.rn.f64" in schedule


def assembled(tool, ptx, target, folder):
    """Machine code of PTX: how often each kernel is fused."""
    source, cubin = folder / "kernels.ptx", folder / "kernels.cubin"
    source.write_text(ptx)
    gpu = nvidia.sm_arch_from_capability(target.arch)
    checked([tool, "--fmad=false", f"--gpu-name={gpu}", source, "-o", cubin])
    return {name: fused(names) for name, names in operations(cubin).items()}


def fused_and_allowed(kernel, target, folder):
    """Of what Triton made: how often it is fused, and how often its divisions and roots are."""
    cubin = folder / "its.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    ((name, names),) = operations(cubin).items()
    tool = nvidia.get_ptxas(target.arch).path  # the one that Triton calls
    exact = assembled(tool, divisions_and_roots(kernel.asm["ptx"]), target, folder)
    return fused(names), exact[name]


@ALL
def test_machine_code_fuses_multiply_adds_only_within_divisions_and_roots(target, tmp_path):
    kernels = [compiled_schedule(target), compiled("slow_kernel", target, SWAP=False)]
    kernels += [compiled("radam_kernel", target, strided=strided) for strided in (False, True)]
    for format in (torch.float64, BY_NAME["bfloat16_exact_8bit"], BY_NAME["float16_nearest"]):
        kernels.append(compiled("radam_kernel", target, format))
    for kernel in kernels:
        found, allowed = fused_and_allowed(kernel, target, tmp_path)
        assert found <= allowed, kernel.name


def test_contraction_is_seen_in_machine_code(tmp_path):
    kernel = compiled("radam_kernel", CUDA[90], enable_fp_fusion=True)
    found, allowed = fused_and_allowed(kernel, CUDA[90], tmp_path)
    assert not found <= allowed


@triton.jit
def plain_product(a, b):
    return a * b


@pytest.mark.parametrize("target", [CUDA[100], CUDA[120]], ids=["sm_100", "sm_120"])
def test_no_older_assembler_fuses_products_and_sums(target, tmp_path, monkeypatch):
    """Before 13.1 they do with pairs (``mul.rn.f32x2``), which plain products are made to."""
    tool = shutil.which("ptxas")
    release = re.search(r"release (\d+)\.(\d+)", checked([tool, "--version"]) if tool else "")
    if release is None or not (12, 9) <= tuple(map(int, release.groups())) < (13, 1):
        pytest.skip("no ptxas 12.9 or 13.0")

    def counts():
        ptx = compiled("radam_kernel", target).asm["ptx"]
        ptx = re.sub(r"\.version .*", ".version 8.8", ptx)
        made = [assembled(tool, p, target, tmp_path) for p in (ptx, divisions_and_roots(ptx))]
        return [count["radam_kernel"] for count in made]

    found, allowed = counts()
    assert found <= allowed
    modules = fresh_triton()
    modules["triton_rule"].product = plain_product
    monkeypatch.setattr(triton_tables, "load_kernels", lambda: modules["triton_kernels"])
    found, allowed = counts()
    assert not found <= allowed


@FLOATS
def test_amd_s_code_has_16_byte_accesses_too(dtype):
    step = compiled("radam_kernel", AMD, dtype).asm["amdgcn"]
    assert len(re.findall("global_load_dwordx4", step)) >= 5
    assert len(re.findall("global_store_dwordx4", step)) >= 4
    swap = compiled("slow_kernel", AMD, dtype, SWAP=True).asm["amdgcn"]
    assert len(re.findall("global_load_dwordx4", swap)) >= 2
    assert len(re.findall("global_store_dwordx4", swap)) >= 2


@pytest.mark.skipif(release(triton) < (3, 7), reason="the backend asks for 3.7 on AMD")
def test_amd_s_code_fuses_multiply_adds_only_within_divisions_and_roots():
    def counts(**options):
        code = compiled("radam_kernel", AMD, **options).asm["amdgcn"]
        fused = len(re.findall(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_f32", code))
        return fused, code.count("v_div_fixup_f32"), code.count("v_sqrt_f32")

    fused, divisions, roots = counts()
    assert divisions == roots > 0
    assert fused == 5 * divisions + 2 * roots  # of their expansions, which end correctly rounded
    assert counts(enable_fp_fusion=True)[0] > fused


@pytest.mark.parametrize("target", [CUDA[90], AMD], ids=["sm_90", "gfx942"])
def test_the_other_kernels_compile(target):
    """Triton's interpreter takes what its compiler does not."""
    assert compiled_schedule(target).asm
    eight = BY_NAME["bfloat16_stochastic24_8bit"], BY_NAME["float16_exact_8bit"]
    for dtype in (torch.float32, torch.float64, *eight):
        assert compiled("radam_kernel", target, dtype, strided=True).asm
        for strided in (False, True):
            options = {"LANES": triton_tables.LANES, "num_warps": 1}
            assert compiled("centralize_kernel", target, dtype, strided, **options).asm
        for swap in (False, True):
            assert compiled("slow_kernel", target, dtype, strided=True, SWAP=swap).asm


def test_the_tables_are_those_of_the_compiled_backend():
    extension = support.extension()
    if isinstance(extension, support.Obstacle):
        pytest.skip(extension.cause)
    words = ("row_words", "rest_of", "numel", "step", "layout", "first", "slice")
    words += ("scratch", "group", "place", "seed")
    words += ("scalar_words", "coefficients", "keys", "group_words")
    here = {name: getattr(triton_words, name.upper()).value for name in words}
    flags = ("active", "rectified", "l2", "sync", "outer", "bounded")
    here |= {name: getattr(triton_words, name.upper()).value for name in flags}
    assert extension.table_layout() == here


def test_a_captured_step_has_its_tables_in_the_graph(interpreted, monkeypatch):
    """Emulated: the words go through launches, as they do in a capture."""
    a, b = twins([torch.randn(n) for n in (3, 70, 1, 0, 9, 5, 6, 7, 8, 2)])
    first, second = Ranger(a, k=2, backend="triton"), Ranger(b, k=2, backend="reference")
    for seed in range(5):
        if seed == 2:
            monkeypatch.setattr(triton_launcher, "is_capturing", lambda: True)
        generator = torch.Generator().manual_seed(seed)
        give_gradients([torch.randn(p.shape, generator=generator) for p in b], a, b)
        first.step()
        second.step()
        assert_same(first, second, a, b, f"step {seed}")
