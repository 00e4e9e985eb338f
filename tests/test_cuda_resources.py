"""What nvcc makes of the CUDA kernels, read from PTX and machine code: no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from emulation.programs import CSRC, checked, cmake_flags

ARCHITECTURES = (80, 90, 100, 120)
ROW_KERNEL = re.compile(
    r"(Radam)KernelINS_7formats\d+(\w+?)ELb([01])()E"
    r"|(Slow)KernelINS_5PlainI([fd])EES4_[fd]Li\dELb([01])ENS0_\d+(\w+?)E"
)


class Kernel(NamedTuple):
    """An instantiation: Radam, Slow or Schedule."""

    name: str
    dtype: str = ""
    strided: bool = False
    detail: str = ""  # the rule, or how many words

    @staticmethod
    def of(mangled: str) -> Kernel:
        match = ROW_KERNEL.search(mangled)
        if match is None:
            (words,) = re.findall(r"ScheduleKernelILi(\d+)E", mangled)
            return Kernel("Schedule", detail=words)
        name, dtype, strided, detail = [group for group in match.groups() if group is not None]
        dtype = {"f": "float32", "d": "float64"}.get(dtype, dtype.lower())
        return Kernel(name, dtype, strided == "1", detail)


KERNELS = {
    *(Kernel("Schedule", detail=words) for words in ("53", "501", "1013", "2037", "4084")),
    *(
        Kernel(name, dtype, strided, detail)
        for name, strided, details in (
            ("Radam", False, ("",)),
            ("Radam", True, ("",)),
            ("Slow", False, ("Interpolation", "Swap")),
            ("Slow", True, ("Interpolation", "Swap")),
        )
        for detail in details
        for dtype in ("float32", "float64")
    ),
}

# Registers of a thread: with 64, four blocks of 256 threads are on a multiprocessor at once, with
# 128, two. Measured, the most of all architectures: 62, 120; 72, 82; 44, 36; 47, 48; 66.
REGISTERS = {
    ("Radam", "float32", False): 64,
    ("Radam", "float64", False): 120,
    ("Radam", "float32", True): 72,
    ("Radam", "float64", True): 84,
    ("Slow", "float32", False): 48,
    ("Slow", "float64", False): 40,
    ("Slow", "float32", True): 48,
    ("Slow", "float64", True): 48,
    ("Schedule", "", False): 68,
}
# 16-byte accesses of a thread to each stream, side by side.
PACKS = {"float32": 2, "float64": 1}

ARITHMETIC = ("add", "sub", "mul", "div", "sqrt", "rcp")
# Moves, comparisons, signs, and conversions that round to nearest or not at all.
HARMLESS = r"(ld|st|mov|selp|setp|neg|abs)\.(?!.*ftz)|cvt\.(rn\.)?f\d\d\.|cvt\.rzi\.s64\.f32$"


class Compiled(NamedTuple):
    """A kernel of one architecture: its resources and its instructions' names."""

    usage: dict[str, int]
    operations: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, operation) is not None for operation in self.operations)


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return shutil.which("cuobjdump")
    binaries = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(binaries))


def nvcc(output: Path, *options: str) -> Path:
    flags = [flag for flag in cmake_flags("RANGER_CUDA_FLAGS") if not flag.startswith("-Xcompiler")]
    checked(["nvcc", "-std=c++17", *flags, *options, CSRC / "cuda/launch.cu", "-o", output])
    return output


def by_kernel(text: str, separator: str) -> dict[Kernel, str]:
    """The parts of a listing, each of which begins with a mangled name."""
    parts = [part.lstrip() for part in re.split(separator, text)[1:]]
    listed = {Kernel.of(part.split(maxsplit=1)[0]): part for part in parts}
    assert len(listed) == len(parts)
    return listed


def disassemble(tool: str, folder: Path, architecture: int) -> dict[Kernel, Compiled]:
    cubin = nvcc(folder / f"{architecture}.cubin", "-cubin", f"-arch=sm_{architecture}")
    code = by_kernel(checked([tool, "-sass", cubin]), r"Function : ")
    usage = by_kernel(checked([tool, "-res-usage", cubin]), r"\n Function ")
    return {
        kernel: Compiled(
            {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage[kernel])},
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", part, re.M),
        )
        for kernel, part in code.items()
    }


@pytest.fixture(scope="module")
def toolkit():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    return set(re.findall(r"sm_(\d+)", checked(["nvcc", "--list-gpu-code"])))


@pytest.fixture(scope="module")
def machine_code(toolkit, tmp_path_factory):
    """For each architecture what its kernels became."""
    tool, folder = cuobjdump(), tmp_path_factory.mktemp("cubins")
    if tool is None:
        pytest.skip("no cuobjdump, neither of a CUDA toolkit nor of Triton")
    known = [architecture for architecture in ARCHITECTURES if str(architecture) in toolkit]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(known, pool.map(lambda sm: disassemble(tool, folder, sm), known), strict=True)
        )


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def compiled(request, machine_code):
    if request.param not in machine_code:
        pytest.skip(f"this nvcc knows no sm_{request.param}")
    return machine_code[request.param]


@pytest.fixture(scope="module")
def ptx(toolkit, tmp_path_factory):
    lowest = f"compute_{min(int(code) for code in toolkit)}"
    output = nvcc(tmp_path_factory.mktemp("ptx") / "launch.ptx", "-ptx", f"-arch={lowest}")
    return by_kernel(output.read_text(), r"\.visible \.entry ")


def test_every_kernel_is_there(compiled, ptx):
    assert set(compiled) == set(ptx) == KERNELS


def test_registers_leave_room_for_the_blocks_that_hide_latency(compiled):
    for kernel, code in compiled.items():
        budget = REGISTERS[kernel.name, kernel.dtype, kernel.strided]
        assert code.usage["REG"] <= budget, kernel


def test_nothing_is_spilled(compiled):
    for kernel, code in compiled.items():
        assert code.usage["STACK"] == code.usage["LOCAL"] == code.count("LDL|STL") == 0, kernel


def test_consecutive_streams_move_16_bytes_an_access_and_all_are_loaded_before_one_is_stored(
    compiled,
):
    for kernel, code in compiled.items():
        if kernel.name == "Schedule" or kernel.strided:
            continue
        loads, stores = (5, 4) if kernel.name == "Radam" else (2, 2)
        first_store = next(i for i, name in enumerate(code.operations) if name.startswith("STG"))
        before = Compiled(code.usage, code.operations[:first_store])
        assert before.count(WIDE_LOAD) >= loads * PACKS[kernel.dtype], kernel
        assert code.count(r"STG\.E\.(\w+\.)*128") >= stores * PACKS[kernel.dtype], kernel
        if kernel.name == "Radam":
            assert before.count(WIDE_LOAD) == code.count(WIDE_LOAD), kernel


WIDE_LOAD = r"LDG\.E\.(\w+\.)*128"


def test_addresses_are_known_to_be_global(compiled):
    for kernel, code in compiled.items():
        assert code.count("LDG") > 0, kernel
        assert code.count(r"(LD|ST|ATOM)(\.|$)") == 0, kernel


def test_every_operation_is_rounded_once(ptx):
    """In PTX: in machine code the subroutines of division and root fuse, and round correctly.

    Without .rn an addition and a multiplication may still be fused on the way there.
    """
    for kernel, part in ptx.items():
        arithmetic = set(re.findall(r"\s([a-z]\w*(?:\.\w+)*\.f(?:16|32|64)\w*)\s", part))
        exact = {f"{name}.rn.{dtype}" for name in ARITHMETIC for dtype in ("f32", "f64")}
        inexact = {name for name in arithmetic - exact if not re.match(HARMLESS, name)}
        assert inexact == set(), kernel
        if kernel.name == "Radam":
            own = kernel.dtype.replace("float", "f")
            assert {f"div.rn.{own}", f"sqrt.rn.{own}", f"mul.rn.{own}"} <= arithmetic, kernel
