"""Which backend serves what: one table, which dispatch, the tests and ``info`` read."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..state import formats

DIAGNOSTIC = "python -m ranger_cuda info"
_HERE = Path(__file__).parents[1].resolve()  # the package
BUILD_ANEW = "in a clone: pip install --force-reinstall --no-deps ."


BackendName = Literal["cuda", "triton", "cpu", "reference"]


class Backend(NamedTuple):
    """A row of the table."""

    name: str
    devices: tuple[str, ...] | None  # device types; None: all
    dtypes: tuple[torch.dtype, ...]  # of parameters
    what: str


_ALL = formats.dtypes()

# In the order in which backend=None tries them.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", ("cuda",), _ALL, "CUDA kernels, one launch for the whole model"),
        Backend(
            "triton",
            ("cuda", "xpu"),
            _ALL,
            "Triton kernels, for GPUs without a CUDA toolkit at install time",
        ),
        Backend("cpu", ("cpu",), _ALL, "native C++, one parallel pass over the whole model"),
        Backend(
            "reference",
            None,
            _ALL,
            "plain PyTorch, one parameter at a time; the spec of the others",
        ),
    )
}


class Obstacle(NamedTuple):
    """Why a backend cannot run here, and what would fix it."""

    cause: str
    fix: str


@functools.cache
def extension() -> ModuleType | Obstacle:
    """The compiled module ``ranger_cuda._C``, or why there is none."""
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return Obstacle(
            f"torch {torch.__version__} has no DLPack C exchange API",
            "install torch 2.10 or newer",
        )
    try:
        return importlib.import_module("ranger_cuda._C")
    except ModuleNotFoundError:
        here, installed = _HERE, _installed_elsewhere()
        if installed is not None:
            return Obstacle(
                f"Python found the source tree first, {here}, where the extension is not; the "
                f"installed package is {installed}",
                "start Python in another folder, or install the clone itself: pip install -e .",
            )
        return Obstacle(
            "the extension ranger_cuda._C was not compiled",
            f"install a C++ compiler, then, {BUILD_ANEW}, without RANGER_BACKENDS=none",
        )
    except ImportError as error:
        return Obstacle(
            f"the extension ranger_cuda._C could not be loaded: {error}",
            f"build it anew on this machine, {BUILD_ANEW}",
        )


def _installed_elsewhere() -> Path | None:
    """Another copy of this package on Python's path, which has the extension."""
    for entry in sys.path:
        package = Path(entry, _HERE.name).resolve()
        built = any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
        if built and package != _HERE:
            return package
    return None


def obstacle(name: str) -> Obstacle | None:
    """Why backend ``name`` cannot run on this machine; None if it can."""
    if name == "reference":
        return None
    found = extension()  # which also finds the rows of Triton's kernels; it needs no CUDA for that
    if isinstance(found, Obstacle):
        return found
    if name == "triton":
        return _triton_obstacle()
    return _cuda_obstacle(found) if name == "cuda" else None


@functools.cache
def _cuda_obstacle(extension: ModuleType) -> Obstacle | None:
    if not torch.cuda.is_available():
        return _no_gpu("CUDA device")  # before what is needed to build for one
    built = extension.build_info()
    if not built["cuda"]:
        return Obstacle(
            f"the extension has no CUDA kernels: {built['cuda_reason']}",
            "install the CUDA toolkit (nvcc 12.1 or newer), then build anew with "
            f"RANGER_BACKENDS=cuda, {BUILD_ANEW}",
        )
    if not built["cuda_device"]["devices"]:
        return Obstacle(
            f"no CUDA device can be used: {built['cuda_device']['error']}",
            f"look at what nvidia-smi says: a GPU must be visible, and its driver serve CUDA "
            f"{built['cuda']}",
        )
    return None


def _no_gpu(what: str) -> Obstacle:
    """Why torch finds no GPU."""
    if torch.version.cuda is None:
        return Obstacle(
            f"torch {torch.__version__} finds no {what}",
            "install a build of torch for your GPU, see https://pytorch.org/get-started/locally/",
        )
    try:
        torch.cuda.init()
        reason = "no GPU is visible"
    except RuntimeError as error:  # it tells a missing driver from an old one and from no GPU
        reason = str(error).strip().split(". ")[0].rstrip(".")
    return Obstacle(
        f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, but finds no driver "
        f"or no GPU here: {reason}",
        "install NVIDIA's driver, or a newer one, until nvidia-smi lists the GPU (in a container, "
        "start it with --gpus all), and see that CUDA_VISIBLE_DEVICES does not hide it; the CPU "
        "backend works without",
    )


@functools.cache
def _triton_obstacle() -> Obstacle | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return Obstacle(
            f"Triton cannot be imported: {error}",
            "install it: pip install triton (3.6 or newer; torch's GPU builds bring it)",
        )
    # Before, divisions and roots flush denormals on NVIDIA's GPUs; before 3.7, AMD's roots do.
    least = (3, 7) if torch.version.hip else (3, 6)
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < least:
        return Obstacle(
            f"Triton {triton.__version__} is too old: its division and square root do not round "
            "correctly",
            f"install Triton {least[0]}.{least[1]} or newer",
        )
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return _no_gpu("GPU")
    if torch.xpu.is_available() and not torch.xpu.get_device_properties().has_fp64:
        return Obstacle(
            f"{torch.xpu.get_device_name()} has no float64, in which a step's scalars are computed",
            "leave backend at None: the reference backend runs there",
        )
    if triton.knobs.runtime.interpret:
        return Obstacle(
            "TRITON_INTERPRET is set, and Triton's interpreter cannot read a GPU's memory",
            "unset TRITON_INTERPRET",
        )
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # of many kinds: no C compiler, no driver for this vendor
        return Obstacle(
            f"Triton cannot use this GPU: {error}",
            "install a C compiler, which Triton calls when it runs (Debian: apt install gcc), and "
            "a Triton for this GPU",
        )
    return None


def device_type_here(backend: Backend) -> str:
    """The type of a device on this machine that ``backend`` serves, if it can run here."""
    here = {"cpu", "cuda" if torch.cuda.is_available() else "xpu"}
    return next(device for device in backend.devices or ("cpu",) if device in here)


def check_backend(name: BackendName | None) -> None:
    """Raise unless ``name`` is None or a backend that runs on this machine.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: there is, and it cannot run here; says why and what would fix it.
    """
    if name is None:
        return
    if name not in BACKENDS:
        known = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(
            f"Invalid backend: {name!r}; use None (chosen by device) or one of {known}"
        )
    why_not = obstacle(name)
    if why_not is not None:
        raise RuntimeError(
            f"backend={name!r} cannot run here: {why_not.cause}. {why_not.fix}. "
            f"`{DIAGNOSTIC}` says what can"
        )


def serves(backend: Backend, param: Tensor) -> bool:
    """Whether ``backend`` has kernels for ``param``'s device and dtype."""
    on_device = backend.devices is None or param.device.type in backend.devices
    # Neither a tensor that stands for the negative of its memory, nor one whose memory is other
    # tensors', is anything that a kernel can write to.
    plain = backend.name == "reference" or not (
        param.is_neg() or is_traceable_wrapper_subclass(param)
    )
    return on_device and param.dtype in backend.dtypes and plain


def choose(requested: str | None, param: Tensor, name: str) -> str:
    """The backend for ``param``: the first of the table that serves it, or the requested one.

    Args:
        requested: a backend's name, or None.
        name: what error messages call the parameter.
    Raises:
        ValueError: the requested backend, or every one, lacks the parameter's device or dtype.
    """
    candidates = BACKENDS.values() if requested is None else (BACKENDS[requested],)
    missed = None
    for backend in candidates:
        if not serves(backend, param):
            continue
        why_not = obstacle(backend.name)
        if why_not is None:
            if missed is not None and backend.name == "reference":
                _warn_of_reference(missed)
            return backend.name
        missed = why_not
    supported = "; ".join(f"{backend.name} ({describe(backend)})" for backend in candidates)
    raise ValueError(
        f"{name} is {param.dtype} on {param.device}, which backend={requested!r} does not serve; "
        f"supported: {supported}"
    )


@functools.cache
def _warn_of_reference(missed: Obstacle) -> None:
    """Say once that the kernels which would serve here cannot run."""
    warnings.warn(
        f"ranger_cuda moves parameters one at a time, by its slow reference backend: "
        f"{missed.cause}. {missed.fix}. `{DIAGNOSTIC}` says more; backend='reference' asks for it",
        stacklevel=2,
    )


def describe(backend: Backend) -> str:
    """One backend's row in words."""
    devices = "any device" if backend.devices is None else ", ".join(backend.devices)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
    return f"{devices}: {dtypes}"
