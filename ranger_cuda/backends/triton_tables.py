"""What the Triton kernels read on a device, and their launches.

The tables are those of ``csrc/cuda/tables.h``, made with NumPy. All that stays from step to step is
on the device; a step uploads its inputs, if they differ, and launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state import formats
from .reference import LANES
from .triton_rows import FORMATS, TensorRow, layout_words, parts_of, word

if TYPE_CHECKING:
    pass

# Elements of a program, a power of two times BLOCK; and those that its threads hold at a time.
CHUNK = 8192
BLOCK = {torch.float32: 1024, torch.float64: 512}
ALIGNMENT = 16
SCHEDULE_BLOCK = 128
NUM_WARPS = 4


def load_kernels() -> ModuleType:
    """The kernels; Triton is imported where they are first needed."""
    from . import triton_kernels

    return triton_kernels


class Launch(NamedTuple):
    """The chunks of all tensors of one kind."""

    format: formats.Format
    strided: bool
    first_chunk: int
    chunks: int
    first_slice: int
    slices: int


class Tables(NamedTuple):
    """What the kernels read, on the device (``triton_words.py`` has the words)."""

    records: Tensor
    scalars: Tensor
    chunks: Tensor
    inputs: Tensor


class DeviceTables:
    """The tables of one device's rows, and its launches (``csrc/cuda/geometry.h``)."""

    def __init__(
        self,
        rule: str,
        rows: Sequence[TensorRow],
        groups: int,
        device: torch.device,
        tried: set[Any],
    ) -> None:
        self.device = device
        self._rule = rule
        self._stream = self._current_stream()
        kind_of = [(row.format, any(row.strides)) for row in rows]
        order = sorted(range(len(rows)), key=kind_of.__getitem__)  # as they stand there
        self._order = np.array(order, dtype=np.intp)
        self._places = np.array([row.place for row in rows], dtype=np.intp)
        kinds = [kind_of[i] for i in order]
        ordered = [rows[i] for i in order]
        slices = [row.slices for row in ordered]
        sizes = [row.numel * FORMATS[row.format].value.itemsize for row in ordered]
        rounded = [
            -(-n // ALIGNMENT) * ALIGNMENT if m else 0 for n, m in zip(sizes, slices, strict=True)
        ]
        ends = np.cumsum([0, *rounded])
        self._scratch_of = np.where(slices, ends[:-1], -1)  # bytes from the first; -1: none
        self.scratch_size = int(ends[-1])
        self._slices = self._to_device(parts_of(slices))
        records, self.layouts = self._records(ordered, kinds)
        self._before, self._layouts_before = records, self.layouts  # the step
        if self.scratch_size:
            in_step = [row.centralized() for row in ordered]
            records, self.layouts = self._records(in_step, kinds)
        self._has_slow = any(row.data[4] for row in ordered)
        chunks = [-(-row.numel // CHUNK) for row in ordered]
        table = parts_of(chunks)
        kernels = load_kernels()
        input_words = kernels.SIGNAL_WORDS.value + groups * kernels.GROUP_WORDS.value
        inputs = np.zeros(len(rows) + input_words, dtype=np.int64)
        scalars = np.zeros((len(rows), kernels.SCALAR_WORDS.value), dtype=np.int64)
        arrays = (scalars, table, inputs)
        self._tables = Tables(records, *(self._to_device(array) for array in arrays))
        self._squares = self._to_device(np.zeros(len(table)))  # of each chunk's gradients
        self.launches = []
        for kind in dict.fromkeys(kinds):
            first = kinds.index(kind)
            its = slice(first, first + kinds.count(kind))
            parts = (sum(chunks[:first]), sum(chunks[its]), sum(slices[:first]), sum(slices[its]))
            if parts[1]:
                self.launches.append(Launch(FORMATS[kind[0]], kind[1], *parts))
        self.gradients = np.zeros(len(rows), dtype=np.int64)  # addresses, in the order of ``rows``
        self._last_inputs = inputs
        self._host: Tensor | None = None
        self._raw: tuple[Tensor, Tensor] | None = None
        self._capturing = False
        self._try_out(tried)

    def _records(
        self, rows: Sequence[TensorRow], kinds: Sequence[tuple[str, bool]]
    ) -> tuple[Tensor, Tensor]:
        """The rows' records, and the layouts that they refer to, on the device."""
        words: list[int] = []
        places = []
        for row, (_, strided) in zip(rows, kinds, strict=True):
            places.append(len(words) if strided else -1)
            if strided:
                words += layout_words(row)
        layouts = self._to_device(np.array(words or [0], dtype=np.int64))
        records = np.zeros((len(rows), load_kernels().ROW_WORDS.value), dtype=np.int64)
        for record, row, place, scratch in zip(
            records, rows, places, self._scratch_of, strict=True
        ):
            is_float64 = FORMATS[row.format].value == torch.float64
            record[:] = [
                *(word(address) for address in row.data),
                row.numel,
                word(row.step),
                0 if place < 0 else word(layouts.data_ptr() + 8 * place),
                row.first,
                row.slice,
                scratch,
                row.group | is_float64 << 32 | row.grad_dtype << 48,
                row.place,
            ]
        return self._to_device(records), layouts

    def _try_out(self, tried: set[Any]) -> None:
        """Compile and load all kernels, torch's too, over tables of zeros, in which nothing moves.

        A step must not fail in its middle, and a capture must find them loaded. Those of the norm
        are compiled by the first step that takes one, which it does before it changes anything.
        """
        zeros = self._to_device(np.zeros(64, dtype=np.int64))
        nothing = Tables(zeros, zeros, zeros.view(torch.int32), zeros)
        with on_device(self.device):
            if self.device not in tried:
                write_words([0] * 8, self.device)
                self._count_steps(nothing, 0)
                tried.add(self.device)
            for launch in self.launches:
                kind = (self.device, launch.format.name, launch.strided, self._has_slow)
                if kind not in tried:
                    one = launch._replace(first_chunk=0, chunks=1, first_slice=0, slices=1)
                    self._run_rule(one, nothing)
                    if self._has_slow and is_swapped(launch.format):
                        self._slow(one, nothing, swap=True)
                    tried.add(kind)
                self._try_centralization(launch, zeros, tried)

    def _try_centralization(self, launch: Launch, zeros: Tensor, tried: set[Any]) -> None:
        kind = (self.device, "centralize", launch.format.value, launch.strided)
        if launch.slices and kind not in tried:
            one = launch._replace(first_slice=0, slices=1)
            self._centralize(one, zeros, zeros, zeros.view(torch.int32), 0)
            tried.add(kind)

    def reserve(self, *, capturing: bool) -> None:
        """Get ready for a launch: the host's memory for its inputs, so that it allocates none.

        Fresh each time: the last one may still be on its way to the device.
        """
        self._capturing = capturing
        self._host = None if capturing else self._host_words(len(self._tables.inputs))
        self._raw = None
        if self.scratch_size and not capturing:
            self._raw = self._room_for_addresses()

    def launch(self, words: Sequence[int], scratch: Tensor | None) -> None:
        """Count a step of what moves, and run the rule on it. Nothing waits for the device.

        Args:
            words: the schedule kernel's inputs besides the addresses in ``gradients``.
            scratch: memory of ``scratch_size`` bytes, for gradients that are centralized.
        """
        gradients = self.gradients[self._order]
        if scratch is not None:
            addresses = self._addresses(gradients, self._raw)
            self._raw = None
            at = scratch.data_ptr()
            for launch in self.launches:
                if launch.slices:
                    self._centralize(launch, self._before, addresses, self._slices, at)
            moved = (self._scratch_of >= 0) & (gradients != 0)
            gradients = np.where(moved, self._scratch_of + word(at), gradients)
        tables = self._tables._replace(inputs=self._upload(gradients, words))
        self._count_steps(tables, len(self._order))
        for launch in self.launches:
            self._run_rule(launch, tables)

    def squares(self, places: Sequence[int], total: Tensor) -> None:
        """Write to ``total`` the sum of the squares of ``gradients``.

        Args:
            places: of the parameters that count; empty: all do.
        """
        gradients = self.gradients
        if places:
            gradients = np.where(np.isin(self._places, places), gradients, 0)
        addresses = self._addresses(gradients[self._order])
        kernels = load_kernels()
        shared = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
        for launch in self.launches:
            kernels.squares_kernel[(launch.chunks,)](
                self._before,
                addresses,
                self._tables.chunks,
                launch.first_chunk,
                self._squares,
                T=triton_dtype(kernels, launch.format.value),
                STRIDED=launch.strided,
                CHUNK=CHUNK,
                BLOCK=BLOCK[launch.format.value],
                **shared,
            )
        kernels.total_kernel[(1,)](self._squares, len(self._squares), total, BLOCK=1024, **shared)

    def _addresses(
        self, gradients: np.ndarray, room: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Of gradients, on the device, for a kernel that comes before the step."""
        if self._capturing:
            return write_words(gradients.tolist(), self.device)
        host, there = room or self._room_for_addresses()
        host.numpy()[:] = gradients
        return there.copy_(host, non_blocking=True)

    def _room_for_addresses(self) -> tuple[Tensor, Tensor]:
        host = self._host_words(len(self._order))
        return host, torch.empty_like(host, device=self.device)

    def _host_words(self, count: int) -> Tensor:
        pinned = self.device.type != "cpu"
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _centralize(
        self, launch: Launch, records: Tensor, addresses: Tensor, slices: Tensor, scratch: int
    ) -> None:
        kernels = load_kernels()
        kernels.centralize_kernel[(launch.slices,)](
            records,
            addresses,
            slices,
            launch.first_slice,
            scratch,
            T=triton_dtype(kernels, launch.format.value),
            STRIDED=launch.strided,
            LANES=LANES,
            num_warps=1,
            enable_fp_fusion=False,
        )

    def swap(self, launch: Launch) -> None:
        """The parameters of a launch and their slow weights change places."""
        self._slow(launch, self._tables, swap=True)

    def keep(self, captured: list[DeviceTables]) -> None:
        """Keep the tables' memory for as long as what is launched now may read it."""
        if self._capturing:
            if self not in captured:
                captured.append(self)
            return
        stream = self._current_stream()
        if stream != self._stream:  # on which it was made, and which it goes back to
            tables = (*self._tables, self._squares, self._slices, self._before)
            for table in (*tables, self.layouts, self._layouts_before):
                table.record_stream(stream)

    def _upload(self, gradients: np.ndarray, words: Sequence[int]) -> Tensor:
        """The gradients' addresses, and these words, on the device.

        In a capture they travel as arguments of launches, so that every replay has its own.
        """
        host, self._host = self._host, None
        inputs = np.concatenate([gradients, np.array(words, dtype=np.int64)])
        if host is None:
            return write_words(inputs.tolist(), self.device)
        if not np.array_equal(self._last_inputs, inputs):
            host.numpy()[:] = self._last_inputs = inputs
            self._tables.inputs.copy_(host, non_blocking=True)
        return self._tables.inputs

    def _count_steps(self, tables: Tables, count: int) -> None:
        grid = (-(-count // SCHEDULE_BLOCK) or 1,)
        load_kernels().schedule_kernel[grid](
            tables.records,
            tables.scalars,
            tables.inputs,
            count,
            int(self._rule == "LOOKAHEAD"),
            BLOCK=SCHEDULE_BLOCK,
            enable_fp_fusion=False,
        )

    def _run_rule(self, launch: Launch, tables: Tables) -> None:
        if self._rule == "LOOKAHEAD":
            self._slow(launch, tables, swap=False)
            return
        kernels = load_kernels()
        kernels.radam_kernel[(launch.chunks,)](
            *tables[:3],
            launch.first_chunk,
            **options(kernels, launch),
            **moment_options(launch),
        )

    def _slow(self, launch: Launch, tables: Tables, swap: bool) -> None:
        kernels = load_kernels()
        kernels.slow_kernel[(launch.chunks,)](
            *tables[:3], launch.first_chunk, SWAP=swap, **options(kernels, launch, swap)
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _current_stream(self) -> Any:
        if self.device.type == "cpu":
            return None  # Triton's interpreter
        return torch.get_device_module(self.device).current_stream(self.device)


def write_words(words: list[int], device: torch.device) -> Tensor:
    """A table of ``words``, written by launches that carry them.

    One of torch's takes 96 numbers or more, for as many tensors; one of Triton's, few.
    """
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), words)
    return table


def options(kernels: ModuleType, launch: Launch, swap: bool = False) -> dict[str, Any]:
    """What a kernel of this kind is compiled with; ``swap``: one that only moves bits."""
    format = launch.format
    return {
        "T": triton_dtype(kernels, format.value),
        "PARAM_CODEC": format.param.name,
        "SLOW_CODEC": format.slow_param.name,
        "STRIDED": launch.strided,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK[format.value] if swap else block_of(launch),
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def moment_options(launch: Launch) -> dict[str, Any]:
    """The same, of a kernel that moves moments."""
    return {
        "EXP_AVG_CODEC": launch.format.exp_avg.name,
        "EXP_AVG_SQ_CODEC": launch.format.exp_avg_sq.name,
    }


def is_swapped(format: formats.Format) -> bool:
    """Whether a parameter and its slow weight are of one dtype, and change places."""
    return format.param.dtype == format.slow_param.dtype


def block_of(launch: Launch) -> int:
    """Elements of a block; random bits and groups take registers, and leave room for half, and so
    do the places of strided ones."""
    halves = int(launch.format.counts_elements) + int(launch.strided)
    return BLOCK[launch.format.value] >> halves


def triton_dtype(kernels: ModuleType, dtype: torch.dtype) -> Any:
    """Triton's name for a dtype of torch's."""
    return getattr(kernels.tl, str(dtype).removeprefix("torch."))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the context, kernels are launched on ``device``."""
    if device.type == "cpu":
        return contextlib.nullcontext()  # Triton's interpreter
    return torch.get_device_module(device).device(device)
