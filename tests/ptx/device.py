"""The device that runs translated kernels: launches, what they may touch, and what they cost."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .build import runtime_library


class Traffic(NamedTuple):
    """What one instruction asked of global memory in a launch. A request is a warp's."""

    store: bool
    requests: int
    lanes: int
    bytes: int  # that the lanes asked for
    sectors: int  # of 32 bytes, that the requests touched


class Launch(NamedTuple):
    kernel: str
    blocks: int
    sites: list[Traffic]

    @property
    def bytes(self) -> int:
        return sum(site.bytes for site in self.sites)


class Device:
    """One in each process; a module is kernels that were loaded together."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("open", "find"):
            getattr(self._library, f"ptx_{name}").restype = ctypes.c_void_p
        for name in ("launch", "report"):
            getattr(self._library, f"ptx_{name}").restype = ctypes.c_char_p
        self.open = functools.cache(self._open)

    def _open(self, kernels: Path) -> ctypes.c_void_p:
        module = self._library.ptx_open(str(kernels).encode())
        assert module, f"{kernels} cannot be loaded"
        return ctypes.c_void_p(module)

    def use(self, module: ctypes.c_void_p) -> None:
        """Launches of compiled code are of this module's kernels from now on."""
        self._library.ptx_use(module)

    def find(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        kernel = self._library.ptx_find(module, name.encode())
        assert kernel, f"there is no kernel {name}"
        return ctypes.c_void_p(kernel)

    def launch(
        self, kernel: ctypes.c_void_p, blocks: int, threads: int, values: Sequence[Any]
    ) -> None:
        """Raises a RuntimeError that tells of a fault."""
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        fault = self._library.ptx_launch(kernel, blocks, threads, pointers)
        if fault is not None:
            raise RuntimeError(fault.decode())

    @contextlib.contextmanager
    def driver(self, version: int) -> Iterator[None]:
        """Of another version."""
        found = ctypes.c_int.in_dll(self._library, "ptx_driver_version")
        before, found.value = found.value, version
        yield
        found.value = before

    @contextlib.contextmanager
    def bounded(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """A fault for each access outside of these tensors and of the device's own tables."""
        allowed = list(tensors)
        for tensor in allowed:
            begin, size = tensor.data_ptr(), span(tensor) * tensor.element_size()
            self._library.ptx_allow(ctypes.c_uint64(begin), ctypes.c_uint64(size))
        self._library.ptx_bound(1)
        try:
            yield
        finally:
            self._library.ptx_bound(0)
            for tensor in allowed:
                self._library.ptx_forbid(ctypes.c_uint64(tensor.data_ptr()))

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[Launch]]:
        """The launches within the context, once it is left."""
        launches: list[Launch] = []
        self._library.ptx_count(1)
        try:
            yield launches
            for kernel, blocks, sites in json.loads(self._library.ptx_report()):
                launches.append(Launch(kernel, blocks, [Traffic(*site) for site in sites]))
        finally:
            self._library.ptx_count(0)


def span(tensor: Tensor) -> int:
    """Elements from the first to the last, gaps included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@functools.cache
def device() -> Device:
    return Device(runtime_library())
