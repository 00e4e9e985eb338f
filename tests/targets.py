"""Where kernels run: each compiled backend on the devices there are, the CUDA kernels emulated on
the CPU, so that every machine runs their source, and what nvcc and Triton compile, translated."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import Tensor

from builds import hash_of, kept
from ptx import build
from ptx.device import device
from ranger_cuda.backends import support, triton_tables
from ranger_cuda.state import formats, tensors

ROOT = Path(__file__).parent.parent


class Target(NamedTuple):
    """A backend and the device of its parameters."""

    backend: str
    device: torch.device
    small: bool = False  # too slow for large tensors; small ones have many chunks there
    slow: bool = False  # too slow for many tensors or steps, and for more than a few chunks

    def move(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device: the same strides, gaps and lazy negation or conjugation."""
        if self.device.type == "cpu":
            return tensor
        negative, conjugate = tensor.is_neg(), tensor.is_conj()
        if conjugate:
            tensor = tensor.conj()
        if negative:
            tensor = tensor._neg_view()
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        moved = storage.to(self.device).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        if negative:
            moved = moved._neg_view()
        return moved.conj() if conjugate else moved


NAMES = ("cpu-1-thread", "cpu-2-threads", "emulated", "cuda", "interpreted", "triton")
# What nvcc and Triton compile, for one architecture, and for each whose code may differ.
COMPILED = ("compiled-cuda-90", "compiled-triton-90")
ARCHITECTURES = (75, 80, 90, 100, 120)
ALL_COMPILED = tuple(
    f"compiled-{backend}-{sm}" for backend in ("cuda", "triton") for sm in ARCHITECTURES
)
ALL_NAMES = (*NAMES, *ALL_COMPILED)


def build_emulation(folder: Path, *options: str) -> Path:
    """Compiles the extension in ``folder``, with its CUDA backend for the CPU."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DRANGER_EMULATE_CUDA=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return binary_in(folder)


def binary_in(folder: Path) -> Path:
    (binary,) = folder.glob("_C*.so")
    return binary


@functools.cache
def emulation() -> Path:
    """The folder of a build that is compiled in a third of the time, and kept."""
    quick = ("-DRANGER_QUICK=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")

    def make(folder: Path) -> None:
        # Where the last one was built: Ninja compiles what has changed since.
        work = folder.parent / f"work-{sys.implementation.cache_tag}"
        build_emulation(work, *quick)
        shutil.copytree(work, folder)

    return kept("emulation", emulation_key(*quick), make)


def emulation_key(*options: str) -> str:
    """A hash of all that decides what the emulated extension is."""
    folders = (ROOT / "csrc", ROOT / "cmake", ROOT / "tests/emulation")
    sources = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    sources = [path for path in sources if path.suffix not in (".py", ".pyc")]
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    version = subprocess.run(compiler, capture_output=True, text=True).stdout
    tools = [f"{name} {release_of(name)}" for name in ("pybind11", "apache-tvm-ffi", "cmake")]
    flags = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")]
    python = (sys.executable, str(sysconfig.get_config_var("EXT_SUFFIX")), sys.version)
    return hash_of([*sources, ROOT / "CMakeLists.txt"], *options, version, *tools, *flags, *python)


def release_of(package: str) -> str:
    """The version that is installed, if one is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def emulated_binary() -> Path:
    """The extension with its CUDA backend compiled for the CPU, as a file."""
    if built := os.environ.get("RANGER_EMULATED_EXTENSION"):
        return Path(built)
    return binary_in(emulation())


@functools.cache
def compiled_binary() -> Path:
    """The extension whose CUDA backend launches translated kernels."""
    return build.link_extension(emulation())


@functools.cache
def interpreted_kernels() -> ModuleType:
    """The Triton kernels, made for Triton's interpreter beside those for a GPU."""
    triton = pytest.importorskip("triton")
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip(f"Triton {triton.__version__}'s interpreter cannot use NumPy 2.4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        modules = fresh_triton()
    # Which the interpreter applies to arrays; any other, to one number after the other.
    modules["triton_codecs"].larger = triton.language.standard._elementwise_max
    for name in ("triton_norm", "triton_centralize"):
        modules[name].added = triton.language.standard._sum_combine
    return modules["triton_kernels"]


def release(module: ModuleType) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def fresh_triton() -> dict[str, ModuleType]:
    """The modules of Triton's code once more, by name, not compiled yet."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for part in (
            "words",
            "codecs",
            "rule",
            "schedule",
            "memory",
            "norm",
            "centralize",
            "kernels",
        ):  # as they import
            name = f"triton_{part}"
            spec = importlib.util.find_spec(f"ranger_cuda.backends.{name}")
            found[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, found[name])
            spec.loader.exec_module(found[name])
    return found


def triton_on_the_cpu(patch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Let backend="triton" launch ``kernels`` for parameters on the CPU."""
    triton = support.BACKENDS["triton"]._replace(devices=("cpu",))
    patch.setattr(tensors, "HOST", ())  # a tensor's value is the kernels' to read
    patch.setitem(support.BACKENDS, "triton", triton)
    patch.setattr(support, "_triton_obstacle", lambda: None)
    patch.setattr(triton_tables, "load_kernels", lambda: kernels)


@functools.cache
def kernels_compiled_for(architecture: int) -> ModuleType:
    """The Triton kernels, which are compiled as they are first launched."""
    pytest.importorskip("triton")
    return fresh_triton()["triton_kernels"]


@functools.cache
def load(binary: Path) -> ModuleType:
    # A name of its own: pybind11 gives the module that it made first under a name once more.
    spec = importlib.util.spec_from_file_location(f"{binary}._C", binary)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# By their mangled names; to compile all for the CPU takes minutes.
PLAIN_KERNELS = r"ScheduleKernel|SquaresKernel|TotalKernel|CentralizeKernel|\d(Radam|Slow)Kernel"


def kernels_of(format: formats.Format) -> str:
    """The kernels that low-precision rows of a format need, as a pattern."""
    params = "LowParameters" if formats.is_low(format.param.dtype) else "Float32Parameters"
    moments = "PlainIf" if format.exp_avg.name == "Float32" else format.exp_avg.name
    others = "ScheduleKernel|SquaresKernel|TotalKernel|CentralizeKernel|SlowKernel"
    return rf"{others}|WideRadamKernel.*{params}.*{moments}"


def open_target(name: str, patch: pytest.MonkeyPatch, kernels: str = PLAIN_KERNELS) -> Target:
    """The target of this name; skips the test where there is no such device.

    Args:
        kernels: of nvcc's, those that are wanted where they run on the CPU.
    """
    if name.startswith("cpu"):
        return Target("cpu", torch.device("cpu"))
    if name in ("cuda", "triton"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return Target(name, torch.device("cuda"))
    if name == "interpreted":
        triton_on_the_cpu(patch, interpreted_kernels())
        patch.setattr(triton_tables, "CHUNK", 256)
        patch.setattr(triton_tables, "BLOCK", {torch.float32: 128, torch.float64: 32})
        return Target("triton", torch.device("cpu"), small=True, slow=True)
    if name.startswith("compiled-triton"):
        return compiled_triton(int(name.split("-")[2]), patch)
    if name.startswith("compiled-cuda"):
        ptx = build.compile_to_ptx(int(name.split("-")[2]))
        device().use(device().open(build.kernel_library(ptx, kernels)))
        return cuda_on_the_cpu(patch, load(compiled_binary()))._replace(slow=True)
    return cuda_on_the_cpu(patch, load(emulated_binary()))._replace(small=True)


def compiled_triton(architecture: int, patch: pytest.MonkeyPatch) -> Target:
    """What Triton compiles for ``sm_<architecture>``, on the CPU."""
    triton_on_the_cpu(patch, kernels_compiled_for(architecture))
    from ptx.triton_gpu import TranslatingGPU

    TranslatingGPU(architecture).install(patch)
    return Target("triton", torch.device("cpu"), slow=True)


def cuda_on_the_cpu(patch: pytest.MonkeyPatch, extension: ModuleType) -> Target:
    """Let backend="cuda" launch the kernels of ``extension`` for parameters on the CPU."""
    patch.setattr(tensors, "HOST", ())
    cuda = support.BACKENDS["cuda"]._replace(devices=("cpu",))
    patch.setitem(support.BACKENDS, "cuda", cuda)
    patch.setattr(support, "extension", lambda: extension)
    patch.setattr(support, "_cuda_obstacle", lambda extension: None)
    return Target("cuda", torch.device("cpu"))
