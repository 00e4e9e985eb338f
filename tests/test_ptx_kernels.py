"""The compiled kernels in whole steps: defects that are planted are found, and costs counted."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import Parameter

from emulation.programs import CSRC
from helpers import assert_same, give_gradients, twins
from ptx.build import compile_to_ptx, kernel_library
from ptx.device import device
from ptx.translate import Untranslatable
from ranger_cuda import Ranger
from ranger_cuda.backends import triton_tables
from targets import (
    compiled_binary,
    emulated_binary,
    fresh_triton,
    load,
    open_target,
    triton_on_the_cpu,
)
from test_cuda_scale import GROUP

ARCHITECTURE = 90
CHUNK = 8192
# 34 tensors and the 18 words of their group fill the smallest arguments.
COUNTS = (*range(1, 37), 9_001, 3_003)


@pytest.fixture
def target(request, monkeypatch):
    """A compiled target, by the name of its backend."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_target(f"compiled-{request.param}-{ARCHITECTURE}", monkeypatch)
    torch.set_num_threads(before)


@pytest.fixture
def cuda(monkeypatch):
    return open_target(f"compiled-cuda-{ARCHITECTURE}", monkeypatch)


def placed(count, shift=0, dtype=torch.float32):
    """Random numbers, so many elements behind a 64-byte boundary, and others around them."""
    around = torch.randn(count + 64, dtype=dtype)
    first = -(around.data_ptr() // around.element_size()) % 16 + shift
    return around[first : first + count]


def memory_of(optimizer):
    """All that a step may touch."""
    tensors = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            tensors += [param, param.grad, *optimizer.state[param].values()]
    return [tensor.detach() for tensor in tensors]


def check(backend, bounded=False):
    """Steps like the reference's, with streams on a boundary and behind one; within bounds."""
    b = [Parameter(torch.randn(count)) for count in COUNTS]
    second = Ranger(b, k=2, backend="reference")
    give_gradients([torch.randn(count) for count in COUNTS], b)
    second.step()
    a = [Parameter(placed(count, i % 3 == 1)) for i, count in enumerate(COUNTS)]
    for param, other in zip(a, b, strict=True):
        param.data.copy_(other.data)
    first = Ranger(a, k=2, backend=backend)
    first.load_state_dict(second.state_dict())
    for step in range(1, 5):
        give_gradients([placed(p.numel(), (i + step) % 2) for i, p in enumerate(a)], a, b)
        with device().bounded(memory_of(first)) if bounded else nullcontext():
            first.step()
        second.step()
        assert_same(first, second, a, b, f"step {step}")


def test_a_process_that_has_the_emulated_extension_runs_the_compiled_one_too():
    binaries = emulated_binary(), compiled_binary()
    assert [Path(load(binary).__file__) for binary in binaries] == [*binaries]


# --- planted defects -----------------------------------------------------------------------------


class Defect(NamedTuple):
    """A text of a header in csrc/cuda/, what to put in its place, and what is said of it."""

    text: str
    instead: str
    evidence: str


DEFECTS = {
    "no_barrier": Defect("thread.barrier();", "", "nothing was written: load"),
    "misaligned_stream_read_wide": Defect(
        "if (aligned_) {\n      pack", "if (true) {\n      pack", "misaligned: load"
    ),
    "misaligned_stream_written_wide": Defect(
        "if (aligned_) {\n      *", "if (true) {\n      *", "misaligned: store"
    ),
    "gradient_behind_the_arguments": Defect(
        "* kGroupWords + i]", "* kGroupWords + i + 1]", "out of range: load of .* at parameter"
    ),
    "packs_too_many": Defect(
        "count / kWidth * kWidth", "(count + kWidth - 1) / kWidth * kWidth", "nobody's: load"
    ),
    "no_sync": Defect("(flags & kSync) != 0,", "false,", "step 1, parameter 0: "),
}
WANTED = "|".join(
    (
        "ScheduleKernelILi(52|500)E",
        "SquaresKernelILb0|TotalKernel",
        r"\dRadamKernel.*Float32ELb0E",
        "SlowKernel.*4BitsIfE.*Lb0ENS0_4SwapE",
    )
)


@pytest.mark.parametrize("target", ["cuda", "triton"], indirect=True)
def test_steps_are_the_reference_s_at_any_alignment_and_stay_within_their_memory(target):
    check(target.backend, bounded=target.backend == "cuda")  # Triton's tables are torch's memory


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "packs_too_many" else pytest.mark.ptx)
        for name in DEFECTS
    ],
)
def test_a_planted_defect_of_the_kernels_is_found(cuda, tmp_path, name):
    defect = DEFECTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    sources = {file: file.read_text() for file in (csrc / "cuda").glob("*.h")}
    (file,) = [file for file, source in sources.items() if defect.text in source]
    assert sources[file].count(defect.text) == 1, f"{defect.text!r} is not there once"
    file.write_text(sources[file].replace(defect.text, defect.instead))
    ptx = compile_to_ptx(ARCHITECTURE, csrc=csrc)
    device().use(device().open(kernel_library(ptx, WANTED)))
    with pytest.raises((RuntimeError, AssertionError), match=defect.evidence):
        check("cuda", bounded=True)


@pytest.mark.parametrize(
    ("option", "evidence"),
    [
        ("-fmad=true", r"^(add|mul)\.f(32|64) "),
        pytest.param("-ftz=true", r"\.ftz\.", marks=pytest.mark.ptx),
    ],
)
def test_arithmetic_that_rounds_otherwise_is_refused(option, evidence):
    with pytest.raises(Untranslatable, match=evidence):
        kernel_library(compile_to_ptx(ARCHITECTURE, option), WANTED)


@pytest.mark.parametrize("target", ["triton"], indirect=True)
def test_an_alignment_that_triton_s_kernels_claim_is_checked(target, tmp_path, monkeypatch):
    """One pointer for both branches has in both the alignment that is claimed in one."""
    text = "load_any(word, i, mask, dtype, T, False)\n    else:"
    modules = fresh_triton()
    memory, kernels = modules["triton_memory"], modules["triton_kernels"]
    source = Path(memory.__file__).read_text()
    assert source.count(text) == 1
    file = tmp_path / "memory.py"
    file.write_text(source.replace(text, text.replace("False", "True")))
    name = "ranger_cuda.backends.claiming_memory"  # it imports what is beside it
    spec = importlib.util.spec_from_file_location(name, file)
    claiming = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claiming)
    kernels.load_grad = claiming.load_grad
    triton_on_the_cpu(monkeypatch, kernels)
    with pytest.raises(RuntimeError, match="misaligned: load of 16 bytes"):
        check("triton")


@pytest.mark.parametrize("target", ["triton"], indirect=True)
def test_triton_s_contraction_is_refused(target, monkeypatch):
    options = triton_tables.options
    fused = {"enable_fp_fusion": True}
    triton_on_the_cpu(monkeypatch, fresh_triton()["triton_kernels"])
    monkeypatch.setattr(triton_tables, "options", lambda *given: options(*given) | fused)
    with pytest.raises(Untranslatable, match=r"fma|^(add|sub|mul)\.f(32|64) "):
        check("triton")


# --- what a step costs ---------------------------------------------------------------------------


def wide_and_other(launch):
    """The sites of a launch whose lanes each ask for 16 bytes, and the others."""
    wide = [site for site in launch.sites if site.bytes == 16 * site.lanes]
    return wide, [site for site in launch.sites if site not in wide]


def counted_step(backend, step, shift=0):
    """What is launched in the given step of a tensor of a few whole chunks."""
    param = Parameter(placed(3 * CHUNK))
    optimizer = Ranger([param], k=2, backend=backend)
    for _ in range(step):
        param.grad = placed(3 * CHUNK, shift)
        with device().counting() as launches:
            optimizer.step()
    return launches[-2:]  # Triton's first ones try the kernels out


@pytest.mark.parametrize("target", ["cuda", "triton"], indirect=True)
@pytest.mark.parametrize(("step", "loads", "stores"), [(1, 4, 3), (2, 5, 4)], ids=["step", "sync"])
def test_an_element_costs_28_bytes_and_36_on_a_sync_step(target, step, loads, stores):
    schedule, main = counted_step(target.backend, step)
    assert main.blocks == 3
    wide, other = wide_and_other(main)
    for store, streams in ((False, loads), (True, stores)):
        sites = [site for site in wide if site.store == store]
        assert sum(site.bytes for site in sites) == streams * 4 * 3 * CHUNK
    for site in wide:  # a warp's 512 bytes are in 16 sectors
        assert site.lanes == 32 * site.requests
        assert site.sectors == 16 * site.requests
    assert not any(site.store for site in other)
    tables = sum(site.sectors for site in other) + sum(site.sectors for site in schedule.sites)
    assert tables < 0.02 * sum(site.sectors for site in wide)


@pytest.mark.parametrize("target", ["cuda", "triton"], indirect=True)
def test_a_gradient_behind_a_boundary_costs_its_own_stream_s_width_only(target):
    _, main = counted_step(target.backend, 2, shift=1)
    wide, other = wide_and_other(main)
    assert sum(site.bytes for site in wide) == (36 - 4) * 3 * CHUNK
    gradient = [site for site in other if site.requests == max(s.requests for s in other)]
    assert sum(site.bytes for site in gradient) == 4 * 3 * CHUNK
    # In single elements, four times the requests; those of neighbours are of the same sectors.
    assert sum(site.requests for site in gradient) == 4 * 3 * CHUNK // (4 * 32)
    assert all(site.sectors <= 17 * site.requests for site in gradient)


@pytest.mark.parametrize("target", ["triton"], indirect=True)
def test_triton_launches_a_schedule_and_one_kernel_for_all_tensors(target):
    params = [Parameter(torch.randn(n % 5 + 1)) for n in range(600)]
    optimizer = Ranger(params, backend="triton")
    for _ in range(2):
        give_gradients([torch.randn(p.shape) for p in params], params)
        with device().counting() as launches:
            optimizer.step()
    assert [launch.kernel for launch in launches] == ["schedule_kernel", "radam_kernel"]


# Tensors that fill the arguments of each size with their group; one more takes the next size.
TIERS = {words: words - GROUP for words in (52, 500, 1012, 2036, 4083)}
R580, R525 = 13000, 12000


@pytest.mark.parametrize(
    ("driver", "count", "words"),
    [(R580, count, (words,)) for words, count in TIERS.items()]
    + [(R580, TIERS[52] + 1, (500,)), (R580, TIERS[4083] + 1, (4083, 52))]
    + [(R525, TIERS[500] * n + more, (500,) * n + (52,) * more) for n, more in ((1, 0), (1, 1))]
    + [(R525, TIERS[500] * 2 + 1, (500, 500, 52))],
)
def test_a_step_is_a_launch_for_the_model_and_one_for_the_gradients_that_arguments_hold(
    cuda, driver, count, words
):
    a, b = twins([torch.randn(i % 3 + 1) for i in range(count)])
    with device().driver(driver):
        first, second = Ranger(a, k=2, backend="cuda"), Ranger(b, k=2, backend="reference")
        for step in range(2):
            give_gradients([torch.randn(p.shape) for p in b], a, b)
            with device().counting() if step == 1 else nullcontext() as launches:
                first.step()
            second.step()
            assert_same(first, second, a, b, f"step {step}")
    *schedules, main = [launch.kernel for launch in launches]
    assert len(schedules) == len(words)
    for kernel, size in zip(schedules, words, strict=True):
        assert f"ScheduleKernelILi{size}E" in kernel
    assert "Float32ELb0E" in main
