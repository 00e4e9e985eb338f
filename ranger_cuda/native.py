"""What moves parameters by kernels: a roster of their rows, and launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import support
from .backends.triton_launcher import TritonLauncher
from .hyperparameters import Hyperparameters
from .scaling import Scaling, Signals
from .tensors import DTensor, is_capturing, local, plain, plain_grad


class Launcher(NamedTuple):
    """Who moves the rows of one device: ``prepare(roster)`` may fail, and changes nothing;
    ``launch(roster, ...)`` and ``swap(roster, ...)`` move them."""

    backend: str
    device: torch.device
    kernels: Any  # _C.CpuLauncher, _C.CudaLauncher, or TritonLauncher


class Native:
    """The rows of one optimizer that kernels move. It needs the extension.

    Args:
        rule: a name of ``_C.Rule``.
        streams: the names of the state tensors exp_avg, exp_avg_sq and slow_param; None where the
            rule has none.
        step_name: the name of the state that counts steps.
        backend: what the user asked for, or None.
        captured, tried: what Triton's launchers leave to those that come after them: tables that a
            captured graph reads, and the kernels that are compiled and loaded.
    """

    def __init__(
        self,
        rule: str,
        streams: Sequence[str | None],
        step_name: str,
        backend: str | None,
        captured: list[Any],
        tried: set[Any],
    ) -> None:
        extension: Any = support.extension()
        self._extension = extension
        self._rule = getattr(extension.Rule, rule)
        self._backend = backend
        self._captured = captured
        self._tried = tried
        self.launchers: list[Launcher] = []
        self._in_turn: list[Launcher] = []
        self._kinds: set[tuple[torch.device, torch.dtype]] = set()
        self.roster = extension.Roster(
            Tensor.__dlpack_c_exchange_api__,
            streams,
            step_name,
            DTensor,
            plain,
            plain_grad,
        )

    def serve(self, param: Tensor, name: str) -> bool:
        """Find a launcher for parameters like this one; whether they had none before.

        Raises:
            ValueError: no backend serves it.
        """
        where = local(param)
        backend = support.choose(self._backend, where, name)
        kind = (where.device, where.dtype)
        if backend == "reference" or kind in self._kinds:
            return False
        its = plain(where)
        if is_traceable_wrapper_subclass(its):
            return False  # its memory is other tensors', which torch knows
        self.roster.serve(its, self._launcher(backend, where.device))
        self._kinds.add(kind)
        return True

    def _launcher(self, backend: str, device: torch.device) -> int:
        for index, launcher in enumerate(self.launchers):
            if launcher.backend == backend and launcher.device == device:
                return index
        index = len(self.launchers)
        if backend == "cpu":
            kernels: Any = self._extension.CpuLauncher(self._rule, index)
        elif backend == "cuda":
            kernels = self._extension.CudaLauncher(self._rule, index, device.index or 0)
        else:
            kernels = TritonLauncher(self._rule.name, index, device, self._captured, self._tried)
        self.launchers.append(Launcher(backend, device, kernels))
        # The host's kernels run while the devices work.
        self._in_turn = sorted(self.launchers, key=lambda launcher: launcher.backend == "cpu")
        return index

    def on_host(self) -> bool:
        """Whether any launcher is the CPU's."""
        return any(launcher.backend == "cpu" for launcher in self.launchers)

    def is_one_call(self) -> bool:
        """Whether a launch is a single call, which nothing interrupts."""
        return len(self.launchers) == 1 and self.launchers[0].backend != "triton"

    def prepare(self) -> None:
        """Get ready for a launch of what the roster has collected. May fail; changes nothing."""
        for launcher in self.launchers:
            try:
                launcher.kernels.prepare(self.roster)
            except torch.OutOfMemoryError:
                if is_capturing():
                    raise
                torch.cuda.empty_cache()  # a launcher's tables are not torch's allocator's
                launcher.kernels.prepare(self.roster)

    def launch(
        self,
        hypers: Sequence[Hyperparameters],
        numbers: Sequence[Hyperparameters],
        scaling: Scaling,
        unscale: float,
        norm: float,
    ) -> None:
        """Count a step for what was collected, and run the rule on it.

        Args:
            hypers: of each group.
            numbers: the same, with learning rates as numbers.
            scaling: what device launchers read on their devices.
            unscale, norm: what the host's launcher goes by.
        """
        moved = self.roster.moved()
        for backend, device, kernels in self._in_turn:
            if backend == "cpu":
                kernels.launch(self.roster, numbers, unscale, norm, torch.get_num_threads())
            else:
                kernels.launch(self.roster, numbers, Signals.of(hypers, scaling, device))
        # A backward pass through what was there before is an error, as in PyTorch.
        increment_version(moved)

    def swap(self, launcher: Launcher) -> None:
        """The pairs of one launcher that the roster has collected change places."""
        moved = self.roster.moved()
        if launcher.backend == "cpu":
            launcher.kernels.swap(self.roster, torch.get_num_threads())
        else:
            launcher.kernels.swap(self.roster)
        increment_version(moved)
