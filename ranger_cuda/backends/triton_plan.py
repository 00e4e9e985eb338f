"""The Triton backend's plan: what ``_C.StepPlan`` is to the compiled kernels, in Python.

It needs nothing compiled: torch for memory and streams, NumPy for the tables, which are those of
``csrc/cuda/tables.h``. Everything that stays from step to step is on the device; a step compares,
uploads the addresses that changed, and launches.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tensors import is_capturing, local, plain, plain_grad

if TYPE_CHECKING:
    from ..hyperparameters import Hyperparameters
    from ..scaling import Signals

# Elements of a program, a power of two times BLOCK; and those that its threads hold at a time.
CHUNK = 8192
BLOCK = {torch.float32: 1024, torch.float64: 512}
SCHEDULE_BLOCK = 128
NUM_WARPS = 4

# Of what a step is told (triton_kernels.py), in words.
SIGNAL_WORDS, GROUP_WORDS = 6, 13


def load_kernels() -> ModuleType:
    """The kernels; Triton is imported where they are first needed."""
    from . import triton_kernels

    return triton_kernels


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions of more than one element, the largest stride first (``csrc/plan.h``)."""
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1]
    strides = tensor.stride()
    return sorted(dims, key=lambda dim: -strides[dim])


def word(address: int) -> int:
    """An address as a table has it: in two's complement, for devices that use the upper half."""
    return address - (1 << 64) if address >> 63 else address


class Memory:
    """Where a tensor lies. The tensor itself is not held: what it is now is compared each step."""

    def __init__(self, tensor: Tensor) -> None:
        where = local(tensor)
        self.key = (where.data_ptr(), where.shape)
        self.geometry = (where.dtype, where.device, where.stride())
        real = plain(tensor)
        self.address = word(real.data_ptr())
        self.shape = real.shape
        self.stride = real.stride()

    def is_that_of(self, tensor: Tensor, *, same_object: bool = False) -> bool:
        """Whether ``tensor`` lies there; for the same object, not all has to be asked."""
        where = local(tensor)
        if self.key != (where.data_ptr(), where.shape):
            return False
        return same_object or self.geometry == (where.dtype, where.device, where.stride())


class Row:
    """One parameter, as it was when the plan was made."""

    def __init__(
        self,
        param: Tensor,
        group: int,
        name: str,
        state: dict[str, Any],
        streams: Sequence[str | None],
        step_name: str,
    ) -> None:
        real = plain(param)
        self.known = weakref.ref(param)
        self.group = group
        self.name = name
        self.dtype = real.dtype
        self.device = real.device
        self.numel = real.numel()
        self.order = memory_order(real)
        self.param = Memory(param)
        self.streams = [None if key is None else Memory(state[key]) for key in streams]
        self.step = Memory(state[step_name])
        known = zip((*streams, step_name), (*self.streams, self.step), strict=True)
        self.state: list[tuple[str, weakref.ref[Tensor], Memory]] = [
            (key, weakref.ref(state[key]), memory)
            for key, memory in known
            if key is not None and memory is not None
        ]
        self.has_slow = streams[2] is not None
        self.gradient_stride = self.param.stride  # until one is seen

    def fits(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether parameter and state are what and where they were."""
        for key, known, memory in self.state:
            if key not in state:
                return False
            tensor = known()
            if tensor is None or state[key] is not tensor:
                return False
            if not memory.is_that_of(tensor, same_object=True):
                return False
        return self.param.is_that_of(param)

    def gradient(self, param: Tensor) -> Tensor:
        """The gradient as the kernels read it."""
        gradient = param.grad
        assert gradient is not None
        ready = (
            type(gradient) is Tensor
            and gradient.dtype == self.dtype
            and gradient.device == self.device
            and gradient.layout == torch.strided
            and gradient.shape == self.param.shape
            and not gradient.is_neg()
        )
        return gradient if ready else plain_grad(param, self.name)

    def strides(self) -> list[list[int]]:
        """Of each stream, in the parameter's memory order; side by side where there is none."""
        consecutive = [1] * len(self.order)
        for i in range(len(self.order) - 1, 0, -1):
            consecutive[i - 1] = consecutive[i] * self.param.shape[self.order[i]]
        given = [None if memory is None else memory.stride for memory in self.streams]
        return [
            consecutive if stride is None else [stride[dim] for dim in self.order]
            for stride in (self.param.stride, self.gradient_stride, *given, None)
        ]

    @property
    def is_strided(self) -> bool:
        """Whether the elements of a stream are not side by side."""
        *streams, consecutive = self.strides()
        return any(stride != consecutive for stride in streams)

    def layout_words(self) -> list[int]:
        """Number of dimensions, sizes, and the strides of each stream."""
        *streams, _ = self.strides()
        sizes = [self.param.shape[dim] for dim in self.order]
        return [len(self.order), *sizes, *(n for stride in streams for n in stride)]


class Launch(NamedTuple):
    """The chunks of all tensors of one kind."""

    dtype: torch.dtype
    strided: bool
    first_chunk: int
    chunks: int


class DeviceTables:
    """The tables of one device's rows, and its launches (``csrc/cuda/geometry.h``)."""

    def __init__(self, rule: str, rows: list[Row], groups: int, device: torch.device) -> None:
        self.device = device
        self._rule = rule
        self._stream = self._current_stream()
        kind_of = {row: (row.dtype, row.is_strided) for row in rows}
        self.rows = sorted(rows, key=lambda row: (row.dtype.itemsize, kind_of[row][1]))
        words: list[int] = []
        places = []
        for row in self.rows:
            strided = kind_of[row][1]
            places.append(len(words) if strided else -1)
            if strided:
                words += row.layout_words()
        self.layouts = self._to_device(np.array(words or [0], dtype=np.int64))
        records = np.zeros((len(self.rows), 9), dtype=np.int64)
        for record, row, place in zip(records, self.rows, places, strict=True):
            memories = (row.param, None, *row.streams)
            record[:5] = [0 if memory is None else memory.address for memory in memories]
            record[5] = row.numel
            record[6] = row.step.address
            record[7] = 0 if place < 0 else word(self.layouts.data_ptr() + 8 * place)
            record[8] = row.group | (row.dtype == torch.float64) << 32
        chunks = [-(-row.numel // CHUNK) for row in self.rows]
        table = np.zeros((sum(chunks), 2), dtype=np.int32)
        table[:, 0] = np.repeat(np.arange(len(self.rows)), chunks)
        firsts = np.concatenate([[0], np.cumsum(chunks)])
        table[:, 1] = np.arange(len(table)) - firsts[table[:, 0]]
        self.records = self._to_device(records)
        self.scalars = self._to_device(np.zeros((len(self.rows), 11), dtype=np.int64))
        self.chunks = self._to_device(table)
        kinds = [kind_of[row] for row in self.rows]
        self.launches = []
        for kind in dict.fromkeys(kinds):
            first = kinds.index(kind)
            begin, end = int(firsts[first]), int(firsts[first + kinds.count(kind)])
            if end > begin:
                self.launches.append(Launch(*kind, begin, end - begin))
        self._told: list[int] = []
        length = len(self.rows) + SIGNAL_WORDS + groups * GROUP_WORDS
        self._table = self._to_device(np.zeros(length, dtype=np.int64))
        self._host: Tensor | None = None
        self._try_out()

    def _try_out(self) -> None:
        """Compile and load all kernels, over tables of zeros, in which nothing moves.

        A step must not fail in its middle, and a capture must find them loaded.
        """
        nothing = self._to_device(np.zeros(64, dtype=np.int64))
        chunks = nothing.view(torch.int32)
        with on_device(self.device):
            load_kernels().write_words[(1,)](nothing, 0, *[0] * 8, enable_fp_fusion=False)
            self._count_steps(nothing, nothing, nothing, 0)
            for launch in self.launches:
                one = launch._replace(first_chunk=0, chunks=1)
                if self._rule == "RADAM":
                    self._radam(one, nothing, nothing, chunks, nothing)
                if self._rule == "LOOKAHEAD":
                    self._slow(one, nothing, nothing, chunks, swap=False)
                if any(row.has_slow for row in self.rows):
                    self._slow(one, nothing, nothing, chunks, swap=True)

    def launch(self, told: list[int]) -> None:
        """Count a step of what moves, and run the rule on it. Nothing waits for the device."""
        table = self._tell(told)
        self._count_steps(self.records, self.scalars, table, len(self.rows))
        for launch in self.launches:
            if self._rule == "RADAM":
                self._radam(launch, self.records, self.scalars, self.chunks, table)
            else:
                self._slow(launch, self.records, self.scalars, self.chunks, swap=False)

    def swap(self) -> None:
        """All parameters and slow weights change places."""
        for launch in self.launches:
            self._slow(launch, self.records, self.scalars, self.chunks, swap=True)

    def used_now(self) -> None:
        """Keep the memory from the stream it was made on while the current one reads it."""
        stream = self._current_stream()
        if stream != self._stream and not is_capturing():
            for table in (self.records, self.scalars, self.chunks, self.layouts, self._table):
                table.record_stream(stream)

    def reserve(self) -> None:
        """The host's memory for what the next launch is told, which then allocates nothing.

        Fresh each time: the last one may still be on its way to the device.
        """
        if not is_capturing():
            pinned = self.device.type != "cpu"
            self._host = torch.empty(
                len(self._table), dtype=torch.int64, device="cpu", pin_memory=pinned
            )

    def _tell(self, told: list[int]) -> Tensor:
        """These words on the device.

        In a capture they travel as arguments of launches, so that every replay has its own.
        """
        if is_capturing():
            room = -(-len(told) // 8) * 8
            table = torch.empty(room, dtype=torch.int64, device=self.device)
            for first in range(0, len(told), 8):
                eight = (told[first : first + 8] + [0] * 8)[:8]
                load_kernels().write_words[(1,)](table, first, *eight, enable_fp_fusion=False)
            return table
        if self._told != told:
            assert self._host is not None
            self._host.numpy()[:] = told
            self._table.copy_(self._host, non_blocking=True)
            self._told = told
        return self._table

    def _count_steps(self, records: Tensor, scalars: Tensor, told: Tensor, count: int) -> None:
        grid = (-(-count // SCHEDULE_BLOCK) or 1,)
        load_kernels().schedule_kernel[grid](
            records, scalars, told, count, BLOCK=SCHEDULE_BLOCK, enable_fp_fusion=False
        )

    def _radam(
        self, launch: Launch, records: Tensor, scalars: Tensor, chunks: Tensor, told: Tensor
    ) -> None:
        kernels = load_kernels()
        kernels.radam_kernel[(launch.chunks,)](
            records, scalars, chunks, told, launch.first_chunk, **options(kernels, launch)
        )

    def _slow(
        self, launch: Launch, records: Tensor, scalars: Tensor, chunks: Tensor, swap: bool
    ) -> None:
        kernels = load_kernels()
        kernels.slow_kernel[(launch.chunks,)](
            records, scalars, chunks, launch.first_chunk, SWAP=swap, **options(kernels, launch)
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _current_stream(self) -> Any:
        if self.device.type == "cpu":
            return None  # Triton's interpreter
        return torch.get_device_module(self.device).current_stream(self.device)


class TritonPlan:
    """The rows of one optimizer that Triton's kernels move.

    Args:
        rule: "RADAM" or "LOOKAHEAD", as of ``_C.StepPlan.Rule``.
        captured: where tables go that a captured graph reads, to live as long as the list does.
    """

    def __init__(self, rule: str, captured: list[DeviceTables]) -> None:
        self._rule = rule
        self._captured = captured
        self._entries: list[tuple[weakref.ref[Tensor], int, str, int]] = []
        self._rows: list[Row] = []
        self._devices: list[torch.device] = []
        self._tables: dict[torch.device, DeviceTables] = {}
        self._active: dict[Row, Tensor | None] = {}  # what moves now, and its gradient
        self._groups = 0
        self._busy = threading.Lock()

    def add_row(
        self,
        param: Tensor,
        group: int,
        name: str,
        backend: str,
        state: dict[str, Any],
        streams: Sequence[str | None],
        step_name: str,
    ) -> None:
        """A parameter that this plan moves; as ``_C.StepPlan.add_row``."""
        self._entries.append((weakref.ref(param), group, "row", len(self._rows)))
        self._rows.append(Row(param, group, name, state, streams, step_name))

    def add_idle(self, param: Tensor, group: int) -> None:
        """A parameter without state: the plan holds as long as it has no gradient."""
        self._entries.append((weakref.ref(param), group, "idle", -1))

    def add_foreign(self, param: Tensor, group: int) -> None:
        """A parameter that is none of this plan's business."""
        self._entries.append((weakref.ref(param), group, "foreign", -1))

    def finish(self, optimizer_state: dict[Tensor, Any]) -> None:
        """All parameters have been added."""
        self._devices = list(dict.fromkeys(row.device for row in self._rows))

    def devices(self) -> list[torch.device]:
        """Those of the rows."""
        return self._devices

    def has_cpu_rows(self) -> bool:
        """None that the host moves."""
        return False

    def collect(
        self,
        param_groups: list[dict[str, Any]],
        optimizer_state: dict[Tensor, Any],
        moved: list[bool] | None = None,
    ) -> bool:
        """Whether the plan still describes this optimizer; if so, what moves now is noted."""
        with self._alone():
            return self._collect(param_groups, optimizer_state, moved)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another thread is stepping this optimizer; let one step at a time")
        try:
            yield
        finally:
            self._busy.release()

    def _collect(
        self,
        param_groups: list[dict[str, Any]],
        optimizer_state: dict[Tensor, Any],
        moved: list[bool] | None,
    ) -> bool:
        found: list[tuple[Tensor, int]] = [
            (param, i) for i, group in enumerate(param_groups) for param in group["params"]
        ]
        if len(found) != len(self._entries):
            return False
        if len(param_groups) != self._groups:
            self._groups = len(param_groups)
            self._tables.clear()  # they have room for the groups there were
        self._active = {}
        for position, ((param, group), entry) in enumerate(zip(found, self._entries, strict=True)):
            known, known_group, kind, index = entry
            if known() is not param or known_group != group:
                return False
            moves = param.grad is not None if moved is None else moved[position]
            if kind == "idle" and moves:
                return False
            if kind != "row":
                continue
            row = self._rows[index]
            state = optimizer_state.get(param)
            if state is None or not row.fits(param, state):
                return False
            if moves:
                self._active[row] = None if moved is not None else self._gradient(row, param)
        for device in self._devices:
            if device not in self._tables:
                if is_capturing():
                    raise RuntimeError(
                        "the plan of this step cannot be made in a capture: take a step before it, "
                        "with gradients laid out as in the capture"
                    )
                rows = [row for row in self._rows if row.device == device]
                with torch.inference_mode(False):  # tables made in it could not be written outside
                    self._tables[device] = DeviceTables(self._rule, rows, self._groups, device)
            self._tables[device].reserve()
        return True

    def _gradient(self, row: Row, param: Tensor) -> Tensor:
        gradient = row.gradient(param)
        stride = gradient.stride()
        if stride != row.gradient_stride:
            # That of a dimension of one element means nothing.
            if any(stride[dim] != row.gradient_stride[dim] for dim in row.order):
                self._tables.pop(row.device, None)  # they have the strides
            row.gradient_stride = stride
        return gradient

    def launch(
        self,
        hypers: Sequence[Hyperparameters],
        unscale: float,
        norm: float,
        signals: Sequence[Signals],
        num_threads: int,
    ) -> None:
        """Count a step for the collected rows and run the rule on them.

        ``unscale``, ``norm`` and ``num_threads`` are what kernels on the host go by.
        """
        with self._alone():
            try:
                for device, signal in zip(self._devices, signals, strict=True):
                    tables = self._tables[device]
                    # 1 for a parameter that moves without: the rule reads none, or it is empty.
                    told = [
                        self._address(self._active[row]) if row in self._active else 0
                        for row in tables.rows
                    ]
                    told += signal_words(signal) + group_words(hypers, signal.lr)
                    with on_device(device):
                        self._keep(tables)
                        tables.launch(told)
            finally:
                self._active = {}

    @staticmethod
    def _address(gradient: Tensor | None) -> int:
        return 1 if gradient is None else word(gradient.data_ptr()) or 1

    def moved(self) -> list[Tensor]:
        """The parameters that move in the step that was collected."""
        params = (row.known() for row in self._active)
        return [param for param in params if param is not None]

    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
        if not self._busy.locked():
            self._active = {}

    def swap(self, num_threads: int) -> None:
        """Parameters and slow weights change places, those of all rows. After a ``collect``."""
        with self._alone():
            for device in self._devices:
                with on_device(device):
                    self._keep(self._tables[device])
                    self._tables[device].swap()

    def _keep(self, tables: DeviceTables) -> None:
        tables.used_now()
        if is_capturing() and tables not in self._captured:
            self._captured.append(tables)


def options(kernels: ModuleType, launch: Launch) -> dict[str, Any]:
    """What a kernel of this kind is compiled with."""
    tl = kernels.tl
    return {
        "T": tl.float64 if launch.dtype == torch.float64 else tl.float32,
        "STRIDED": launch.strided,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK[launch.dtype],
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def number_words(number: Tensor | None) -> list[int]:
    """Where a number is on the device, and whether it is float64."""
    if number is None:
        return [0, 0]
    return [word(number.data_ptr()), int(number.dtype == torch.float64)]


def signal_words(signals: Signals) -> list[int]:
    """What a device's kernels read there, as the schedule kernel is told."""
    return [
        *number_words(signals.grad_scale),
        *number_words(signals.found_inf),
        *number_words(signals.norm),
    ]


def group_words(hypers: Sequence[Hyperparameters], lrs: Sequence[Tensor | None]) -> list[int]:
    """The hyperparameters of all groups, as the schedule kernel reads them."""
    words = []
    for hyper, lr in zip(hypers, lrs, strict=True):
        bits = np.array(hyper[:9], dtype=np.float64).view(np.int64)  # lr to max_grad_norm
        bits[7] = hyper.k
        words += bits.tolist()
        words += [int(hyper.decoupled_weight_decay), int(hyper.maximize)]
        words += number_words(lr)
    return words


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the context, kernels are launched on ``device``."""
    if device.type == "cpu":
        return contextlib.nullcontext()  # Triton's interpreter
    return torch.get_device_module(device).device(device)
