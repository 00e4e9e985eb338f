"""Drivers for Triton of GPUs that are not there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from .build import kernel_library
from .device import device
from .translate import Parameter, translate

ARGUMENTS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
WARP = 32

# Triton 3.8 asks the driver to unload kernels; these are collected after theirs has gone.
if hasattr(CompiledKernel, "__del__"):
    del CompiledKernel.__del__


class IdleGPU:
    """Loads what is compiled and runs nothing."""

    def __init__(self, capability: int = 90) -> None:
        self.utils = self
        self.capability = capability
        self.loaded: list[str] = []
        self.launched: list[str] = []
        self.fusing: list[str] = []  # what may round once where the contract rounds twice

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, Any, int, int, int]:
        self.loaded.append(name)
        return object(), self.function_of(name), 32, 0, 1024

    def function_of(self, name: str) -> Any:
        return object()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        if metadata.enable_fp_fusion:
            self.fusing.append(source.fn.__name__)
        return lambda *_: self.launched.append(source.fn.__name__)


class Function(NamedTuple):
    kernel: ctypes.c_void_p
    parameters: list[Parameter]


class TranslatingGPU(IdleGPU):
    """Runs the PTX of what is compiled for ``sm_<capability>`` on the CPU."""

    def install(self, patch: Any) -> None:
        """As Triton's driver; it is told of the files that a kernel is loaded from."""
        patch.setattr(driver, "_active", self)
        patch.setattr(knobs.runtime, "kernel_load_start_hook", self._before_load)

    def _before_load(self, module: Any, function: Any, name: str, files: Any, hash: Any) -> None:
        (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
        self._ptx = Path(path).read_text()

    def function_of(self, name: str) -> Function:
        ((found, parameters),) = translate(self._ptx).kernels.items()
        module = device().open(kernel_library(self._ptx))
        return Function(device().find(module, found), parameters)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = [source.signature[name] for name in source.fn.arg_names]
        threads = WARP * metadata.num_warps

        def launch(x: int, y: int, z: int, stream: Any, function: Function, *rest: Any) -> None:
            assert (y, z) == (1, 1)
            given = zip(rest[-len(types) :], types, strict=True)
            values = [argument(value, t) for value, t in given if t != "constexpr"]
            scratch = function.parameters[len(values) :]  # memory that no kernel here asks for
            values += [ctypes.c_uint64(0)] * len(scratch)
            assert [ctypes.sizeof(v) for v in values] == [p.size for p in function.parameters]
            device().launch(function.kernel, x, threads, values)
            self.launched.append(source.fn.__name__)

        return launch


def argument(value: Any, t: str) -> Any:
    """As a kernel's parameter of Triton's type ``t``."""
    if t.startswith("*"):
        return ctypes.c_uint64(value.data_ptr())
    return ARGUMENTS[t](value)
