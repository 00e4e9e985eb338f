"""The Triton backend's plan: what ``_C.StepPlan`` is to the compiled kernels, in Python.

It needs nothing compiled: torch for memory and streams, NumPy for the tables. Each step, what there
is is compared with what there was when the plan was made.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tensors import is_capturing, local, plain, plain_grad
from .triton_tables import DeviceTables, Launch, group_words, on_device, signal_words, word

if TYPE_CHECKING:
    from ..hyperparameters import Hyperparameters
    from ..scaling import Signals

BUSY = "another step of this optimizer is under way, in another thread or a hook; let one at a time"


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions of more than one element, the largest stride first (``csrc/plan.h``)."""
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1]
    strides = tensor.stride()
    return sorted(dims, key=lambda dim: -strides[dim])


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
        # What moves now, and its gradient; from a collect to its launch.
        self._active: dict[Row, Tensor | None] | None = None
        self._groups = 0
        self._tried: set[Any] = set()  # what has been compiled and loaded
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
            raise RuntimeError(BUSY)
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
        active: dict[Row, Tensor | None] = {}
        self._active = None
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
                active[row] = None if moved is not None else self._gradient(row, param)
        capturing = self._is_capturing()
        for device in self._devices:
            if device not in self._tables:
                if capturing:
                    raise RuntimeError(
                        "the plan of this step cannot be made in a capture: take a step before it, "
                        "with gradients laid out as in the capture"
                    )
                rows = [row for row in self._rows if row.device == device]
                with torch.inference_mode(False):  # tables made in it could not be written outside
                    self._tables[device] = DeviceTables(
                        self._rule, rows, self._groups, device, self._tried
                    )
            self._tables[device].reserve(capturing=capturing)
        self._active = active
        return True

    def _is_capturing(self) -> bool:
        """Whether a graph is being captured, on all devices or on none."""
        answers = set()
        for device in self._devices:
            with on_device(device):
                answers.add(is_capturing())
        if len(answers) > 1:
            raise RuntimeError(
                "this step cannot be captured in a graph: the parameters are on several devices "
                f"({', '.join(map(str, self._devices))}), and the capture is not on all of them"
            )
        return True in answers

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
            active, self._active = self._active, None
            if active is None:
                raise RuntimeError(BUSY)  # it has taken the step that was collected
            for device, signal in zip(self._devices, signals, strict=True):
                tables = self._tables[device]
                # 1 for a parameter that moves without: the rule reads none, or it is empty.
                told = [self._address(active[row]) if row in active else 0 for row in tables.rows]
                told += signal_words(signal) + group_words(hypers, signal.lr)
                with on_device(device):
                    tables.keep(self._captured)
                    tables.launch(told)

    @staticmethod
    def _address(gradient: Tensor | None) -> int:
        return 1 if gradient is None else word(gradient.data_ptr()) or 1

    def moved(self) -> list[Tensor]:
        """The parameters that move in the step that was collected."""
        params = (row.known() for row in self._active or ())
        return [param for param in params if param is not None]

    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
        if not self._busy.locked():
            self._active = None

    def swap(self, num_threads: int) -> None:
        """Parameters and slow weights change places, those of all rows, or of none if it fails.

        After a ``collect``.
        """
        with self._alone(), contextlib.ExitStack() as undo:
            for device in self._devices:
                tables = self._tables[device]
                with on_device(device):
                    tables.keep(self._captured)
                for launch in tables.launches:
                    self._swap(tables, launch)
                    undo.callback(self._swap, tables, launch)
            undo.pop_all()

    @staticmethod
    def _swap(tables: DeviceTables, launch: Launch) -> None:
        with on_device(tables.device):
            tables.swap(launch)
