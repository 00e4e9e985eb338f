"""What became of PTX, read from machine code: no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from emulation.programs import checked

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.M)
ENTRY = r"\.visible \.entry "
# What ends correctly rounded after fused steps of its own.
EXACT = re.compile(r"\b(div|sqrt|rcp)\.rn\.(f32|f64)\b")


def cuobjdump() -> str:
    """The toolkit's, or the one in Triton's wheel; without either the test is skipped."""
    triton = importlib.util.find_spec("triton")
    path = None
    if triton is not None and triton.origin is not None:
        path = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump, neither of a CUDA toolkit nor in Triton's wheel")
    return tool


def operations(cubin: Path) -> dict[str, list[str]]:
    """The names of each function's instructions."""
    functions = checked([cuobjdump(), "-sass", cubin]).split("Function : ")[1:]
    return {text.split(maxsplit=1)[0]: INSTRUCTION.findall(text) for text in functions}


def fused(names: list[str]) -> Counter[str]:
    """Multiply-adds of float32, pairs (FFMA2) among them, and of float64."""
    return Counter(name[:4] for name in names if re.match("[FD]FMA", name))


def divisions_and_roots(ptx: str) -> str:
    """PTX of kernels by the same names, each with as many divisions and roots and nothing else.

    Assembled for the same GPU by the same tool, they are fused as often as the kernels may be.
    """
    header, *kernels = re.split(ENTRY, ptx)
    lines = re.findall(r"^\.(?:version|target|address_size) .*", header, re.M)
    for kernel in kernels:
        (name,) = re.findall(r"^\w+", kernel)
        lines.append(f".visible .entry {name}(.param .u64 at) {{")
        lines.append(".reg .b64 %at; .reg .f32 %f32_<3>; .reg .f64 %f64_<3>;")
        lines.append("ld.param.u64 %at, [at];")
        for operation, dtype in EXACT.findall(kernel):
            out, a, b = (f"%{dtype}_{i}" for i in range(3))
            lines += [f"ld.volatile.{dtype} {operand}, [%at];" for operand in (a, b)]
            operands = f"{a}, {b}" if operation == "div" else a
            lines.append(f"{operation}.rn.{dtype} {out}, {operands};")
            lines.append(f"st.volatile.{dtype} [%at], {out};")
        lines.append("ret; }")
    return "\n".join(lines) + "\n"
