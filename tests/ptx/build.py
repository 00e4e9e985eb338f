"""From the sources to what runs: the runtime, the extension on it, and modules of kernels."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builds import made_once
from emulation.programs import CSRC, checked, cmake_flags

from .translate import translate

HERE = Path(__file__).parent
RUNTIME = ("runtime.cpp", "memory.cpp", "traffic.cpp")
GXX = ["g++", "-std=c++17", "-fPIC", "-shared", f"-I{HERE}"]
# The host's arithmetic as the kernel's: nothing is contracted, and integers wrap around.
EXACT = ["-O1", "-w", "-ffp-contract=off", "-fwrapv"]


def require(*programs: str) -> None:
    """Skips the test without them."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")


@functools.cache
def runtime_library() -> Path:
    require("g++")
    sources = [HERE / name for name in RUNTIME]
    options = ["-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libptx.so"]
    return made_once("libptx.so", lambda to: checked([*GXX, *options, *sources, "-o", to]))


def kernel_library(ptx: str, wanted: str = "") -> Path:
    """A module's kernels, or those of them that are wanted, translated and compiled."""
    require("g++")
    code = translate(ptx, wanted).code
    name = "kernels-" + hashlib.sha256(code.encode()).hexdigest()[:16]
    source = made_once(f"{name}.cpp", lambda to: to.write_text(code))
    return made_once(f"{name}.so", lambda to: checked([*GXX, *EXACT, source, "-o", to]))


def nvcc(source: Path, target: Path, *options: str) -> Path:
    """As CMake has it compiled; what comes later in ``options`` counts."""
    require("nvcc")
    flags = [flag for flag in cmake_flags("RANGER_CUDA_FLAGS") if not flag.startswith("-Xcompiler")]
    checked(["nvcc", "-std=c++17", *flags, *options, source, "-o", target])
    return target


def compile_to_ptx(architecture: int, *options: str, csrc: Path = CSRC) -> str:
    """All CUDA kernels, as nvcc makes them for ``sm_<architecture>``."""
    name = "-".join(["ptx", str(architecture), *options, hashlib.sha256(bytes(csrc)).hexdigest()])
    flags = ("-ptx", f"-arch=compute_{architecture}", *options)
    made = made_once(
        re.sub(r"[^\w-]", "_", name), lambda to: nvcc(csrc / "cuda/launch.cu", to, *flags)
    )
    return made.read_text()


def link_extension(emulated: Path) -> Path:
    """The extension whose CUDA backend launches translated kernels.

    nvcc compiles what talks to CUDA; all else is the objects of the emulated build in the folder.
    """
    require("nvcc")

    def link(target: Path) -> None:
        objects = [o for o in emulated.rglob("csrc/**/*.o") if o.parent.name != "cuda"]
        sources = [CSRC / f"cuda/{name}" for name in ("launch.cu", "runtime.cu", "device.cu")]
        sources += [CSRC / "cuda/geometry.cpp", HERE / "cudart.cpp"]
        options = ("-c", "-O1", "-gencode=arch=compute_75,code=compute_75", "-Xcompiler=-fPIC")
        places = [target.with_name(f"compiled-{source.stem}.o") for source in sources]
        with ThreadPoolExecutor() as pool:
            objects += pool.map(lambda *names: nvcc(*names, *options), sources, places)
        library = runtime_library()
        # Another libcudart, which torch may have loaded, is none of its business.
        linking = ["-Wl,-Bsymbolic", f"-Wl,-rpath,{library.parent}", "-lgomp"]
        checked([*GXX, *objects, library, *linking, "-o", target])

    return made_once("compiled_C.so", link)
