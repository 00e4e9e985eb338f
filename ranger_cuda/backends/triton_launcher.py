"""The Triton backend's launcher: what ``_C.CudaLauncher`` is to the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state.tensors import is_capturing
from .triton_rows import TensorRow, group_words, signal_words
from .triton_tables import DeviceTables, on_device

if TYPE_CHECKING:
    from .scaling import Signals


class TritonLauncher:
    """Moves the rows of one device with Triton's kernels.

    Args:
        rule: "RADAM" or "LOOKAHEAD", as of ``_C.Rule``.
        index: that of its rows among the launchers.
        device: where they are.
        captured: where tables go that a captured graph reads, to live as long as the list does.
        tried: what kernels have been compiled and loaded, by this launcher or another.
    """

    def __init__(
        self,
        rule: str,
        index: int,
        device: torch.device,
        captured: list[DeviceTables],
        tried: set[Any],
    ) -> None:
        self._rule = rule
        self._index = index
        self._device = device
        self._captured = captured
        self._tables: DeviceTables | None = None
        self._made_for: tuple[int, int] | None = None  # the rows' version, and how many groups
        self._tried = tried

    def prepare(self, roster: Any) -> None:
        """Get the tables ready for a launch of what ``roster`` has collected."""
        with on_device(self._device):
            capturing = is_capturing()
        made_for = (roster.version, roster.group_count)
        if made_for != self._made_for:
            if capturing:
                raise RuntimeError(
                    "what a graph is to do cannot be made ready in a capture: take a step before "
                    "it, with gradients laid out as in the capture, and swap slow weights outside"
                )
            rows = [TensorRow(*row) for row in roster.rows(self._index)]
            with torch.inference_mode(False):  # tables made in it could not be written outside
                self._tables = DeviceTables(
                    self._rule, rows, roster.group_count, self._device, self._tried
                )
            self._made_for = made_for
        assert self._tables is not None
        self._tables.reserve(capturing=capturing)

    @property
    def scratch_size(self) -> int:
        """How many bytes of the device gradients take that are centralized."""
        return 0 if self._tables is None else self._tables.scratch_size

    def launch(self, roster: Any, numbers: bytes, signals: Signals, scratch: Tensor | None) -> None:
        """Count a step for the rows that move, and run the rule on them.

        Args:
            numbers: the hyperparameters of all groups, packed.
            scratch: memory of ``scratch_size`` bytes; None: there are none.
        """
        tables = self._tables
        assert tables is not None
        roster.gradients(self._index, tables.gradients)
        words = signal_words(signals) + group_words(numbers, signals.lr)
        with on_device(self._device):
            tables.keep(self._captured)
            tables.launch(words, scratch)

    def squares(self, roster: Any, places: Sequence[int], total: Tensor) -> None:
        """Write to ``total`` the sum of the squares of the gradients of the rows that move.

        Args:
            places: of the parameters that count; empty: all do.
        """
        tables = self._tables
        assert tables is not None
        roster.gradients(self._index, tables.gradients)
        with on_device(self._device):
            tables.keep(self._captured)
            tables.squares(places, total)

    def swap(self, roster: Any) -> None:
        """Parameters and slow weights of the pairs change places: all, or none if it fails."""
        tables = self._tables
        assert tables is not None
        done = []
        with on_device(self._device):
            tables.keep(self._captured)
            try:
                for launch in tables.launches:
                    tables.swap(launch)
                    done.append(launch)
            except BaseException:
                for launch in done:
                    tables.swap(launch)
                raise
