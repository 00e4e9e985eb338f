"""What nvcc makes of the CUDA kernels, read from PTX and machine code: no GPU is needed."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from builds import made_once
from emulation.programs import checked
from machine_code import ENTRY, cuobjdump, divisions_and_roots, fused, operations
from ptx.build import compile_to_ptx

ARCHITECTURES = (80, 90, 100, 120)
ROW_KERNEL = re.compile(
    r"(?P<radam>\dRadamKernel)INS_7formats\d+(?P<format>\w+?)ELb(?P<strided>[01])E"
    r"|(?P<slow>SlowKernel)I\w*?(?:5Plain|4Bits)I(?P<value>[fdt])E\w*?ELb(?P<gaps>[01])ENS0_"
    r"\d+(?P<rule>\w+?)E"
    r"|(?P<wide>WideRadamKernel)INS0_10WideFormatINS0_\d+(?P<params>\w+?)ParametersE(?P<codecs>\w+)"
    r"|(?P<pull>LowInterpolationKernel)"
    r"|(?P<norm>SquaresKernel)ILb(?P<grad_strided>[01])E|(?P<total>TotalKernel)"
    r"|(?P<centralize>CentralizeKernel)"
)
MOMENTS = {"GroupedSigned": "8bit", "StochasticBFloat16": "bfloat16", "PlainIf": "float32"}


class Kernel(NamedTuple):
    """An instantiation: Radam, Slow, Wide (more than a number an element) or Schedule."""

    name: str
    dtype: str = ""  # of parameters
    strided: bool = False
    detail: str = ""  # the rule, the moments, or how many words

    @staticmethod
    def of(mangled: str) -> Kernel:
        match = ROW_KERNEL.search(mangled)
        if match is None:
            (words,) = re.findall(r"ScheduleKernelILi(\d+)E", mangled)
            return Kernel("Schedule", detail=words)
        if match["radam"]:
            return Kernel("Radam", match["format"].lower(), match["strided"] == "1")
        if match["slow"]:
            value = {"f": "float32", "d": "float64", "t": "16 bits"}[match["value"]]
            return Kernel("Slow", value, match["gaps"] == "1", match["rule"])
        if match["norm"]:
            return Kernel("Squares", "", match["grad_strided"] == "1")
        if match["centralize"]:
            return Kernel("Centralize")
        if match["total"]:
            return Kernel("Total")
        strided = "9Scattered" in mangled
        if match["pull"]:
            return Kernel("Wide", "low", strided, "Interpolation")
        (moments,) = (found for name, found in MOMENTS.items() if name in match["codecs"])
        return Kernel("Wide", match["params"].lower(), strided, moments)


KERNELS = {
    *(Kernel("Schedule", detail=words) for words in ("52", "500", "1012", "2036", "4083")),
    *(Kernel("Squares", "", strided) for strided in (False, True)),
    Kernel("Total"),
    Kernel("Centralize"),
    *(
        Kernel(*kernel)
        for strided in (False, True)
        for kernel in (
            *(("Radam", dtype, strided) for dtype in ("float32", "float64")),
            *(("Slow", dtype, strided, "Interpolation") for dtype in ("float32", "float64")),
            *(("Slow", dtype, strided, "Swap") for dtype in ("float32", "float64", "16 bits")),
            *(("Wide", "float32", strided, moments) for moments in ("bfloat16", "8bit")),
            *(("Wide", "low", strided, moments) for moments in MOMENTS.values()),
            ("Wide", "low", strided, "Interpolation"),
        )
    ),
}

# Registers of a thread: with 64, four blocks of 256 threads are on a multiprocessor at once, with
# 80, three, with 128, two.
REGISTERS = {
    ("Radam", "float32", False): 64,
    ("Radam", "float64", False): 128,
    ("Radam", "float32", True): 80,
    ("Radam", "float64", True): 96,
    ("Slow", "float32", False): 64,
    ("Slow", "float64", False): 56,
    ("Slow", "float32", True): 56,
    ("Slow", "float64", True): 56,
    ("Slow", "16 bits", False): 64,
    ("Slow", "16 bits", True): 48,
    ("Wide", "float32", False): 80,
    ("Wide", "low", False): 80,
    ("Wide", "float32", True): 128,
    ("Wide", "low", True): 128,
    ("Schedule", "", False): 80,
    ("Squares", "", False): 64,
    ("Squares", "", True): 64,
    ("Total", "", False): 64,
    ("Centralize", "", False): 80,
}
# 16-byte accesses of a thread to each stream, side by side.
PACKS = {"float32": 2, "float64": 1, "16 bits": 2}

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


def assemble(ptx: str, name: str, architecture: int) -> Path:
    """Its machine code."""

    def make(cubin: Path) -> None:
        source = cubin.with_suffix(".ptx")
        source.write_text(ptx)
        checked(["nvcc", "-cubin", f"-arch=sm_{architecture}", source, "-o", cubin])

    return made_once(f"{name}-{architecture}.cubin", make)


def by_kernel(text: str, separator: str) -> dict[Kernel, str]:
    """The parts of a listing, each of which begins with a mangled name."""
    parts = [part.lstrip() for part in re.split(separator, text)[1:]]
    listed = {Kernel.of(part.split(maxsplit=1)[0]): part for part in parts}
    assert len(listed) == len(parts)
    return listed


def disassemble(architecture: int) -> dict[Kernel, Compiled]:
    ptx = compile_to_ptx(architecture)
    cubin = assemble(ptx, "kernels", architecture)
    usage = by_kernel(checked([cuobjdump(), "-res-usage", cubin]), r"\n Function ")
    of_kernel = by_kernel(ptx, ENTRY)
    allowed = operations(assemble(divisions_and_roots(ptx), "exact", architecture))
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


@pytest.fixture(
    scope="module",
    # To compile for one takes half a minute: the others are `make ptx`'s.
    params=[
        pytest.param(sm, marks=() if sm in (90, 120) else pytest.mark.ptx) for sm in ARCHITECTURES
    ],
    ids=lambda sm: f"sm_{sm}",
)
def compiled(request):
    """What the kernels of an architecture became."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    cuobjdump()
    if f"sm_{request.param}" not in checked(["nvcc", "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc knows no sm_{request.param}")
    return disassemble(request.param)


def test_every_kernel_is_there(compiled):
    assert set(compiled) == KERNELS


def test_registers_leave_room_for_the_blocks_that_hide_latency(compiled):
    found = {kernel: code.usage["REG"] for kernel, code in compiled.items()}
    over = {k: n for k, n in found.items() if n > REGISTERS[k.name, k.dtype, k.strided]}
    assert over == {}


def test_nothing_is_spilled(compiled, request):
    for kernel, code in compiled.items():
        spilled = code.usage["STACK"], code.usage["LOCAL"], code.count("LDL|STL")
        # Two blocks leave 128 registers a thread, and this one needs three more; where float64 is
        # a 64th as fast as float32, that is nothing.
        few = kernel == Kernel("Radam", "float64") and request.node.callspec.id == "sm_120"
        most = (16, 0, 6) if few else (0, 0, 0)
        assert all(n <= limit for n, limit in zip(spilled, most, strict=True)), kernel


def test_consecutive_streams_move_16_bytes_an_access_and_all_are_loaded_before_one_is_stored(
    compiled,
):
    for kernel, code in compiled.items():
        if kernel.name not in ("Radam", "Slow") or kernel.strided:
            continue
        loads, stores = (5, 4) if kernel.name == "Radam" else (2, 2)
        first_store = next(i for i, name in enumerate(code.operations) if name.startswith("STG"))
        before = code._replace(operations=code.operations[:first_store])
        assert before.count(WIDE_LOAD) >= loads * PACKS[kernel.dtype], kernel
        assert code.count(r"STG\.E\.(\w+\.)*128") >= stores * PACKS[kernel.dtype], kernel
        if kernel.name == "Radam":
            assert before.count(WIDE_LOAD) == code.count(WIDE_LOAD), kernel


def test_the_norm_loads_16_bytes_an_access_and_several_side_by_side(compiled):
    code = compiled[Kernel("Squares")]
    first_sum = next(i for i, name in enumerate(code.operations) if name.startswith("DADD"))
    before = code._replace(operations=code.operations[:first_sum])
    assert before.count(WIDE_LOAD) >= 2


def test_low_precision_moves_a_pack_of_8_elements_an_access(compiled):
    """16 bytes where they have two, 8 where they have one; float32 takes two accesses."""
    least = {"float32": (4, 0), "bfloat16": (2, 0), "8bit": (0, 2), "Interpolation": (0, 0)}
    for kernel, code in compiled.items():
        if kernel.name != "Wide" or kernel.strided:
            continue
        wide, half = least[kernel.detail]  # of the moments
        wide += 2 if kernel.dtype == "float32" else 1  # and the parameter
        for access in (r"LDG\.E\.(\w+\.)*", r"STG\.E\.(\w+\.)*"):
            assert code.count(access + "128") >= wide, (kernel, access)
            assert code.count(access + "64") >= half, (kernel, access)


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
        if kernel.name == "Radam" or (kernel.name == "Wide" and kernel.detail in MOMENTS.values()):
            own = "f64" if kernel.dtype == "float64" else "f32"
            assert {f"div.rn.{own}", f"sqrt.rn.{own}", f"mul.rn.{own}"} <= arithmetic, kernel
