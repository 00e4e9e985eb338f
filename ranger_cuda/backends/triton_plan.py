"""The Triton backend's plan: what ``_C.StepPlan`` is to the compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tensors import is_capturing
from .python_plan import TensorRow
from .triton_tables import DeviceTables, Launch, group_words, on_device, signal_words, word

if TYPE_CHECKING:
    from ..hyperparameters import Hyperparameters
    from ..scaling import Signals
    from .python_plan import PythonPlan


class TritonPlan:
    """The rows of one optimizer that Triton's kernels move.

    Args:
        rule: "RADAM" or "LOOKAHEAD", as of ``_C.StepPlan.Rule``.
        rows: finds the rows and their gradients: a filled ``_C.StepPlan`` or ``PythonPlan``.
        device_of: the device of each row.
        captured: where tables go that a captured graph reads, to live as long as the list does.
    """

    def __init__(
        self,
        rule: str,
        rows: PythonPlan,
        device_of: list[torch.device],
        captured: list[DeviceTables],
    ) -> None:
        self._rule = rule
        self._rows = rows
        self._captured = captured
        self._device_of = device_of
        self._devices = list(dict.fromkeys(device_of))
        self._tables: dict[torch.device, DeviceTables] = {}
        self._made_for: tuple[int, int] | None = None  # the number of groups, and of layout changes
        self._tried: set[Any] = set()  # what has been compiled and loaded

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
        if not self._rows.collect(param_groups, optimizer_state, moved):
            return False
        made_for = (len(param_groups), self._rows.layout_changes())
        if made_for != self._made_for:
            self._tables.clear()
            self._made_for = made_for
        self._prepare(groups=len(param_groups))
        return True

    def _prepare(self, groups: int) -> None:
        """Get all tables ready for a launch."""
        capturing = self._is_capturing()
        missing = any(device not in self._tables for device in self._devices)
        described = [TensorRow(*row) for row in self._rows.rows()] if missing else []
        for device in self._devices:
            if device not in self._tables:
                if capturing:
                    raise RuntimeError(
                        "the plan of this step cannot be made in a capture: take a step before it, "
                        "with gradients laid out as in the capture"
                    )
                rows = {i: row for i, row in enumerate(described) if self._device_of[i] == device}
                with torch.inference_mode(False):  # tables made in it could not be written outside
                    self._tables[device] = DeviceTables(
                        self._rule, rows, groups, device, self._tried
                    )
            self._tables[device].reserve(capturing=capturing)

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
        gradients = self._rows.gradients()
        try:
            for device, signal in zip(self._devices, signals, strict=True):
                tables = self._tables[device]
                told = [word(gradients[row]) for row in tables.order]
                told += signal_words(signal) + group_words(hypers, signal.lr)
                with on_device(device):
                    tables.keep(self._captured)
                    tables.launch(told)
        finally:
            self._rows.release()

    def hold(self) -> object:
        """Keeps the rows' state alive as long as it is there itself."""
        return self._rows.hold()

    def moved(self) -> list[Tensor]:
        """The parameters that move in the step that was collected."""
        return self._rows.moved()

    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
        self._rows.release()

    def swap(self, num_threads: int) -> None:
        """Parameters and slow weights change places, those of all rows, or of none if it fails.

        After a ``collect``; the caller holds their memory.
        """
        with contextlib.ExitStack() as undo:
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
