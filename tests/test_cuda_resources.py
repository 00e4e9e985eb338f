"""What nvcc makes of the CUDA kernels, read from PTX and machine code: no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from emulation.programs import CSRC, checked, cmake_flags
from machine_code import ENTRY, cuobjdump, divisions_and_roots, fused, operations

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
    """A kernel of one architecture: its resources, its instructions' names, and its PTX."""

    usage: dict[str, int]
    operations: list[str]
    ptx: str
    allowed: Counter[str]  # the fused multiply-adds of its divisions and roots

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, operation) is not None for operation in self.operations)


def nvcc(source: Path, folder: Path, architecture: int) -> Path:
    """The machine code; the PTX that it was made of lies beside it."""
    flags = [flag for flag in cmake_flags("RANGER_CUDA_FLAGS") if not flag.startswith("-Xcompiler")]
    flags += ["-std=c++17", "--keep", "--keep-dir", folder, "-cubin", f"-arch=sm_{architecture}"]
    cubin = folder / f"{source.stem}.cubin"
    checked(["nvcc", *flags, source, "-o", cubin])
    return cubin


def by_kernel(text: str, separator: str) -> dict[Kernel, str]:
    """The parts of a listing, each of which begins with a mangled name."""
    parts = [part.lstrip() for part in re.split(separator, text)[1:]]
    listed = {Kernel.of(part.split(maxsplit=1)[0]): part for part in parts}
    assert len(listed) == len(parts)
    return listed


def disassemble(folder: Path, architecture: int) -> dict[Kernel, Compiled]:
    cubin = nvcc(CSRC / "cuda/launch.cu", folder, architecture)
    usage = by_kernel(checked([cuobjdump(), "-res-usage", cubin]), r"\n Function ")
    ptx = cubin.with_suffix(".ptx").read_text()
    of_kernel = by_kernel(ptx, ENTRY)
    exact = folder / "exact.ptx"
    exact.write_text(divisions_and_roots(ptx))
    allowed = operations(nvcc(exact, folder, architecture))
    return {
        Kernel.of(name): Compiled(
            {
                name: int(number)
                for name, number in re.findall(r"([A-Z]+):(\d+)", usage[Kernel.of(name)])
            },
            names,
            of_kernel[Kernel.of(name)],
            fused(allowed[name]),
        )
        for name, names in operations(cubin).items()
    }


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """For each architecture what its kernels became."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    cuobjdump()
    toolkit = re.findall(r"sm_(\d+)", checked(["nvcc", "--list-gpu-code"]))
    known = [sm for sm in ARCHITECTURES if str(sm) in toolkit]
    folders = [tmp_path_factory.mktemp(f"sm_{sm}") for sm in known]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(known, pool.map(disassemble, folders, known), strict=True))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
def compiled(request, machine_code):
    if request.param not in machine_code:
        pytest.skip(f"this nvcc knows no sm_{request.param}")
    return machine_code[request.param]


def test_every_kernel_is_there(compiled):
    assert set(compiled) == KERNELS


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
        before = code._replace(operations=code.operations[:first_store])
        assert before.count(WIDE_LOAD) >= loads * PACKS[kernel.dtype], kernel
        assert code.count(r"STG\.E\.(\w+\.)*128") >= stores * PACKS[kernel.dtype], kernel
        if kernel.name == "Radam":
            assert before.count(WIDE_LOAD) == code.count(WIDE_LOAD), kernel


WIDE_LOAD = r"LDG\.E\.(\w+\.)*128"


def test_addresses_are_known_to_be_global(compiled):
    for kernel, code in compiled.items():
        assert code.count("LDG") > 0, kernel
        assert code.count(r"(LD|ST|ATOM)(\.|$)") == 0, kernel


def test_every_operation_is_rounded_once(compiled):
    """In PTX, of which divisions and roots are made otherwise; there is no other fused operation in
    machine code, either."""
    for kernel, code in compiled.items():
        assert fused(code.operations) <= code.allowed, kernel
        arithmetic = set(re.findall(r"\s([a-z]\w*(?:\.\w+)*\.f(?:16|32|64)\w*)\s", code.ptx))
        exact = {f"{name}.rn.{dtype}" for name in ARITHMETIC for dtype in ("f32", "f64")}
        inexact = {name for name in arithmetic - exact if not re.match(HARMLESS, name)}
        assert inexact == set(), kernel
        if kernel.name == "Radam":
            own = kernel.dtype.replace("float", "f")
            assert {f"div.rn.{own}", f"sqrt.rn.{own}", f"mul.rn.{own}"} <= arithmetic, kernel
