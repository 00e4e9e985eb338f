"""What moves parameters by kernels: a roster of their rows, and launchers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..backends import support
from ..backends.scaling import Scaling, Signals
from ..backends.triton_launcher import TritonLauncher
from ..state.formats import Format
from ..state.hyperparameters import Hyperparameters, packed
from ..state.tensors import DTensor, is_capturing, local, plain, plain_grad, shard_of

Groups = Sequence[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]


class StepInputs(NamedTuple):
    """What launchers need to know of a step besides its tensors."""

    hypers: Sequence[Hyperparameters]  # of each group
    numbers: Sequence[Hyperparameters]  # the same, with learning rates as numbers
    scaling: Scaling  # what device launchers read on their devices
    unscale: float  # what the host's go by, as the next
    norm: float

    @classmethod
    def of(
        cls, hypers: Sequence[Hyperparameters], scaling: Scaling, *, on_host: bool
    ) -> StepInputs | None:
        """All of it, and None if the step is skipped. Waits for devices only if ``on_host``."""
        unscale = norm = 1.0
        if on_host:
            if scaling.found_inf is not None and scaling.found_inf.item() != 0.0:
                return None
            scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
            unscale = 1.0 / scale if scale else math.inf  # as on a device
            norm = 0.0 if scaling.norm is None else float(scaling.norm)
        numbers = [
            hyper._replace(lr=float(hyper.lr) if on_host else 0.0)
            if isinstance(hyper.lr, Tensor)
            else hyper
            for hyper in hypers
        ]
        return cls(hypers, numbers, scaling, unscale, norm)


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
        streams: the names of the state tensors exp_avg, exp_avg_sq, slow_param and
            outer_momentum_buffer; None where the rule has none.
        step_name: the name of the state that counts steps.
        backend: what the user asked for, or None.
        first_place: of the first parameter of the groups, if these are not all of an optimizer's.
        captured, tried: what Triton's launchers leave to those that come after them: tables that a
            captured graph reads, and the kernels that are compiled and loaded.
    """

    def __init__(
        self,
        rule: str,
        streams: Sequence[str | None],
        step_name: str,
        backend: str | None,
        first_place: int,
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
        self._scratch: dict[int, Tensor] = {}  # of launchers, for the step under way
        self._kinds: set[tuple[torch.device, str, str]] = set()
        self.roster = extension.Roster(
            Tensor.__dlpack_c_exchange_api__,
            streams,
            step_name,
            DTensor,
            plain,
            plain_grad,
            shard_of,
            first_place,
        )

    def serve(self, param: Tensor, name: str, format: Format, weight_rounding: str = "") -> bool:
        """Find a launcher for parameters like this one that are stored as ``format`` says; whether
        they had none before.

        Args:
            weight_rounding: that of their group; empty: whatever it is.

        Raises:
            ValueError: no backend serves it.
        """
        where = local(param)
        backend = support.choose(self._backend, where, name)
        kind = (where.device, format.name, weight_rounding)
        if backend == "reference" or kind in self._kinds:
            return False
        its = plain(where)
        if is_traceable_wrapper_subclass(its):
            return False  # its memory is other tensors', which torch knows
        launcher = self._launcher(backend, where.device)
        self.roster.serve(its, weight_rounding, launcher, format.name)
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
        return index

    def on_host(self) -> bool:
        """Whether any launcher is the CPU's."""
        return any(launcher.backend == "cpu" for launcher in self.launchers)

    def is_one(self, param_groups: Groups) -> bool:
        """Whether :meth:`step` may do: there is one launcher, it is compiled, and needs no scratch
        memory."""
        if len(self.launchers) != 1:
            return False
        backend = self.launchers[0].backend
        return backend == "cpu" or (
            backend == "cuda" and not any(group.get("centralize") for group in param_groups)
        )

    def step(
        self, param_groups: Groups, state: State, moved: list[bool] | None, inputs: StepInputs
    ) -> bool:
        """Find what moves and move it in a single call, which nothing interrupts, if one compiled
        launcher moves all of it. Otherwise nothing has been changed.

        Arguments as of ``_C.Roster.collect`` and of :meth:`launch`.
        """
        ((backend, device, kernels),) = self.launchers
        found = self.roster, param_groups, state, moved, packed(inputs.numbers)
        if backend == "cpu":
            rest = kernels.step(*found, inputs.unscale, inputs.norm, torch.get_num_threads())
        else:
            rest = kernels.step(*found, Signals.of(inputs.hypers, inputs.scaling, device))
        if not rest:
            increment_version(self.roster.moved())
        return not rest

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

    def reserve(self) -> None:
        """Take the memory that :meth:`launch` needs besides, and that is free after it."""
        for index, (backend, device, kernels) in enumerate(self.launchers):
            if backend != "cpu" and kernels.scratch_size:
                size = kernels.scratch_size
                self._scratch[index] = torch.empty(size, dtype=torch.uint8, device=device)

    def unreserve(self) -> None:
        """Give that memory back."""
        self._scratch.clear()

    def release(self) -> None:
        """Let go of what was collected and reserved."""
        self.unreserve()
        self.roster.release()

    def squares(self, places: Collection[int] | None) -> list[Tensor]:
        """As :meth:`Dispatcher.squares`, of these rows: one of each launcher."""
        of = [] if places is None else sorted(places)
        sums = []
        for backend, device, kernels in self.launchers:
            if backend == "cpu":
                value = kernels.squares(self.roster, of, torch.get_num_threads())
                sums.append(torch.tensor(value, dtype=torch.float64, device="cpu"))
            else:
                sums.append(torch.zeros((), dtype=torch.float64, device=device))
                kernels.squares(self.roster, of, sums[-1])
        return sums

    def launch(self, inputs: StepInputs) -> None:
        """Count a step for what was collected, and run the rule on it."""
        moved = self.roster.moved()
        numbers = packed(inputs.numbers)
        # The host's last, which works while the devices do.
        in_turn = sorted(enumerate(self.launchers), key=lambda each: each[1].backend == "cpu")
        for index, (backend, device, kernels) in in_turn:
            if backend == "cpu":
                threads = torch.get_num_threads()
                kernels.launch(self.roster, numbers, inputs.unscale, inputs.norm, threads)
            else:
                signals = Signals.of(inputs.hypers, inputs.scaling, device)
                kernels.launch(self.roster, numbers, signals, self._scratch.get(index))
        self.unreserve()
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
