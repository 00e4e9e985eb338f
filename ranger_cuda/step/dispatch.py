"""From an optimizer's groups and state to the backends that move its parameters.

A step is two calls. ``collect`` finds the parameters that move and checks them; whatever is wrong
raises here, before anything is changed. ``launch`` moves them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..backends import support
from ..backends.reference import Row
from ..backends.scaling import NO_SCALING, Scaling
from ..backends.schedule import grad_scale
from ..state.hyperparameters import Hyperparameters
from ..state.new_state import SLOW_PARTS, take_snapshot
from ..state.tensors import (
    check_param,
    check_state,
    is_capturing,
    local,
)
from .algorithms import LOOKAHEAD, Algorithm, Member, members
from .interrupts import Deferred
from .native import Groups, Native, State, StepInputs
from .python_step import ON_HOST, NewState, PythonStep
from .swaps import Pairs, pairs_of, swapped


def check_no_capture() -> None:
    """Raise if a graph is being captured, where parameters are moved from the host."""
    if is_capturing():
        raise RuntimeError(
            "this step cannot be captured in a CUDA graph: some parameters are moved from the host "
            "(by the CPU's kernels or the reference backend, as those that share memory are), "
            "which a replay would not do"
        )


class Dispatcher:
    """Finds what moves in a step of one optimizer, checks it, and has it moved.

    Args:
        algorithm: what moves the parameters.
        backend: what the user asked for, or None.
        whole: the dispatcher of all of the optimizer's parameters; None: it is this one.
        first_place: of the first of those in the groups that this one is given.

    It does not refer back to the optimizer, and between steps to no tensor but parameters that are
    ``unmoved``: deleting an optimizer, or its state, frees the memory at once.

    Attributes:
        unmoved: the parameters whose slow weights were made in a step with lr = 0, as
            torch.distributed.checkpoint makes one into empty state. Weights may be loaded
            after it: until a step with another lr, each step makes these slow weights anew.
    """

    unmoved: set[Tensor]

    def __init__(
        self,
        algorithm: Algorithm,
        backend: str | None,
        whole: Dispatcher | None = None,
        first_place: int = 0,
    ) -> None:
        self._algorithm = algorithm
        self._backend = backend
        self._first_place = first_place
        self.unmoved = set()
        # Tables that graphs read, launcher or no launcher.
        self._captured: list[Any] = [] if whole is None else whole._captured
        self._tried: set[Any] = set() if whole is None else whole._tried
        self._lock = threading.Lock()
        self.reset()

    def alone(self) -> threading.Lock:
        """The lock of a step, or of a swap and back, during which nobody else collects or launches.

        To be used as ``with dispatcher.alone():``, which takes and frees it whatever interrupts.

        Raises:
            RuntimeError: another thread, or a hook, is at it.
        """
        if self._lock.locked():  # two threads that both find it free go one after the other
            raise RuntimeError(
                "another step of this optimizer is under way, in another thread or a hook; let one "
                "at a time"
            )
        return self._lock

    def at(self, place: int) -> Dispatcher:
        """One that moves the parameter at this place, alone, with the bits that this one would."""
        return Dispatcher(self._algorithm, self._backend, self, place)

    def reset(self) -> None:
        """Forget what launchers keep on devices: the next step makes it anew."""
        self._native = self._new_native()
        self.release()

    def _new_native(self) -> Native | None:
        if self._backend == "reference" or isinstance(support.extension(), support.Obstacle):
            return None
        algorithm = self._algorithm
        return Native(
            algorithm.name,
            algorithm.streams,
            algorithm.step_name,
            self._backend,
            self._first_place,
            self._captured,
            self._tried,
        )

    def release(self) -> None:
        """Let go of what was collected."""
        self._step: PythonStep | None = None
        self._rows: list[Row] = []
        if self._native is not None:
            self._native.release()

    # --- a step ---------------------------------------------------------------------------------

    def step(
        self,
        param_groups: Groups,
        state: State,
        new_state: NewState,
        hypers: Sequence[Hyperparameters],
        scaling: Scaling = NO_SCALING,
        moved: list[bool] | None = None,
    ) -> None:
        """Find what moves, check it, and move it: all of it, or nothing if anything is wrong.

        What is on an accelerator is read there, by its kernels. Only where parameters are moved
        from the host does this wait for it.

        Args:
            new_state: ``new_state(param, group, state, step_device)`` returns what ``state``
                lacks, the step count on ``step_device``; it may allocate, and must change nothing.
            hypers: the hyperparameters of each group.
            moved: for each parameter, in the order of the groups, whether it moves. None: those
                that have a gradient do, and the rule reads it.
        Raises:
            RuntimeError, ValueError: a parameter, gradient or state that cannot be used.
        """
        try:
            native = self._native
            if native is not None and native.is_one(param_groups) and not self._to_make_anew():
                if native.on_host():
                    check_no_capture()
                inputs = StepInputs.of(hypers, scaling, on_host=native.on_host())
                if inputs is None or native.step(param_groups, state, moved, inputs):
                    return
            self.collect(param_groups, state, new_state, moved)
            self.launch(hypers, scaling)
        finally:
            self.release()

    def _to_make_anew(self) -> set[Tensor]:
        """The parameters whose slow weights this step makes anew."""
        if (
            not self.unmoved or self._algorithm is LOOKAHEAD
        ):  # which makes them before the inner step
            return set()
        return {param for param in self.unmoved if param.grad is not None}

    def collect(
        self,
        param_groups: Groups,
        state: State,
        new_state: NewState,
        moved: list[bool] | None = None,
    ) -> None:
        """The first half of :meth:`step`: check, and make the state that is missing, which changes
        nothing."""
        self.release()
        step = self._step = PythonStep(
            self._algorithm,
            param_groups,
            state,
            moved,
            self._to_make_anew(),
            self._first_place,
        )
        rest = self._find(step)
        from_host = self._native is not None and self._native.on_host()
        if rest:
            found = list(members(param_groups))
            for position, _ in rest:
                check_param(found[position].param, found[position].name)
            if self._serve(step, [found[position] for position, _ in rest]):
                rest = self._find(step)
            for position, shares in rest:
                step.check(position, found[position], self._backend, new_state)
                from_host = from_host or shares or step.backends[position] in ON_HOST
        if from_host:
            check_no_capture()
        if not step.missing:
            self._get_ready(step, rest)

    def _find(self, step: PythonStep) -> list[tuple[int, bool]]:
        """Have the roster find its rows; those that move and are none, by position, and whether
        that is because they share memory."""
        if self._native is None:
            return [(position, False) for position in step.movers()]
        # What another thread gives other memory meanwhile, a launch must not find freed.
        hold = len(sys._current_frames()) > 1
        rest = self._native.roster.collect(step.param_groups, step.state, step.moved, hold)
        if step.unmoved:
            rest = (dict.fromkeys(step.to_make_anew(), False) | dict(rest)).items()
        return sorted(rest)

    def _serve(self, step: PythonStep, found: list[Member]) -> bool:
        """Make sure that there are launchers for these; whether there are new ones."""
        if self._native is None:
            return False
        new = False
        for param, group, name in found:
            support.choose(self._backend, local(param), name)  # or there is no format either
            options = step.param_groups[group]
            # The first that fits counts: with what lies beside the parameter, if that is there.
            whole = self._algorithm.format_of(param, options)
            present = self._algorithm.format_for(param, options, step.state.get(param, {}))
            for format in (whole, present):
                rounding = format.weight_rounding and options.get("weight_rounding")
                new = self._native.serve(param, name, format, rounding or "") or new
        return new

    def _get_ready(self, step: PythonStep, rest: list[tuple[int, bool]]) -> None:
        """What the roster leaves, with all its state, is the reference's."""
        if rest:
            found = list(members(step.param_groups))
            rows: dict[int, Row] = {}
            for position, shares in rest:
                if not shares and step.backends.get(position) != "reference":
                    raise RuntimeError(
                        f"{found[position].name} changed while the step was being prepared; do not "
                        "change an optimizer from another thread while it steps"
                    )
                rows[position] = step.row(position, found[position])
            if self._native is not None:  # who shares memory with these moves in turn with them
                tensors = [tensor for row in rows.values() for tensor in row.tensors()]
                for position in self._native.roster.leave_out(tensors):
                    rows[position] = step.row(position, found[position])
            self._rows = [rows[position] for position in sorted(rows)]
        if self._native is not None:
            self._native.prepare()

    def rehearse(self) -> None:
        """Try what a launch of what was collected needs, without it. State that is missing stays in
        the ``state`` that was given."""
        step = self._step
        assert step is not None
        if step.missing:
            step.commit()
            self._get_ready(step, self._find(step))

    def try_memory(self) -> None:
        """Take the memory that a launch of what was collected needs besides, and give it back, so
        that it is there."""
        if self._native is not None:
            self._native.reserve()
            self._native.unreserve()

    def undo(self) -> None:
        """Take the state away again that :meth:`rehearse` left."""
        if self._step is not None:
            self._step.undo()

    def launch(
        self,
        hypers: Sequence[Hyperparameters],
        scaling: Scaling = NO_SCALING,
        measure: Callable[[Dispatcher, Scaling], Scaling] | None = None,
    ) -> None:
        """The second half of :meth:`step`: move what was collected, whatever interrupts.

        Args:
            measure: returns ``scaling`` with the norm of the gradients; it may raise.
        """
        step, native = self._step, self._native
        assert step is not None
        with Deferred():
            try:
                if step.missing:
                    step.commit()
                    self._get_ready(step, self._find(step))
                if measure is not None:
                    scaling = measure(self, scaling)
                on_host = bool(self._rows) or (native is not None and native.on_host())
                inputs = StepInputs.of(hypers, scaling, on_host=on_host)
                if native is not None:
                    native.reserve()
            except BaseException:  # a table, memory or a kernel that cannot be had
                step.undo()
                raise
            if inputs is None:
                step.undo()
                return
            if native is not None:
                native.launch(inputs)
            if self._rows:
                scales = [
                    grad_scale(hyper, inputs.unscale, inputs.norm) for hyper in inputs.numbers
                ]
                self._algorithm.reference(self._rows, inputs.numbers, scales)
            if step.unmoved or step.at_rest:
                self.unmoved = self.unmoved - step.unmoved | step.at_rest

    def moving(self) -> list[Tensor]:
        """The parameters that were collected."""
        moved = [] if self._native is None else self._native.roster.moved()
        return moved + [row.param for row in self._rows]

    def place_of(self) -> dict[Tensor, int]:
        """Where each parameter stands, counted through the groups."""
        assert self._step is not None
        places: dict[Tensor, int] = {}
        for place, member in enumerate(members(self._step.param_groups)):
            places.setdefault(member.param, place)  # one that is named twice moves at its first
        return places

    def squares(self, places: set[int] | None = None) -> list[Tensor]:
        """Sums of the squares of the gradients that were collected, float64 scalars: of each device
        one or more. They come before the launch, and nothing waits for them.

        Args:
            places: of the parameters that count; None: all do.
        """
        sums = [] if self._native is None else self._native.squares(places)
        for row in self._rows:
            if places is None or row.place in places:
                assert row.grad is not None
                grad = row.grad.to(row.format.value)  # as the step reads it
                sums.append(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
        return sums

    # --- slow weights ---------------------------------------------------------------------------

    @torch.no_grad()
    def reset_slow_weights(
        self, param_groups: Groups, state: State, *, only_unmoved: bool = False
    ) -> None:
        """Each slow weight becomes the value that its parameter's next step starts from.

        Interrupts are the caller's to defer.
        """
        if only_unmoved:
            if self.unmoved:
                self._reset_unmoved(param_groups, state)
            return
        pairs = pairs_of(self._algorithm, param_groups, state)
        for param, group, _ in members(param_groups):
            if param not in pairs:
                continue
            format = self._algorithm.format_of(param, param_groups[group])
            take_snapshot(format, param, state[param])
            if "outer_momentum_buffer" in state[param]:
                state[param]["outer_momentum_buffer"].zero_()

    def _reset_unmoved(self, param_groups: Groups, state: State) -> None:
        for param, group, name in members(param_groups):
            if param not in self.unmoved or "slow_param" not in state.get(param, {}):
                continue
            format = self._algorithm.format_of(param, param_groups[group])
            try:
                check_state(param, state[param], format.of("slow_param"), name, SLOW_PARTS)
            except RuntimeError:  # the model was converted; the next step makes it anyway
                for part in SLOW_PARTS:
                    state[param].pop(part, None)
            else:
                take_snapshot(format, param, state[param])

    def slow_pairs(self, param_groups: Groups, state: State) -> Pairs:
        """Parameters and slow weights that can be used, where there are any."""
        return pairs_of(self._algorithm, param_groups, state)

    def swapped(self, param_groups: Groups, state: State) -> AbstractContextManager[None]:
        """Within the context parameters and slow weights, where there are any, change places.

        Interrupts are the caller's to defer.
        """
        pairs = self.slow_pairs(param_groups, state)
        for param in self.unmoved & pairs.keys():  # which are their slow weights
            del pairs[param]
        return swapped(self._new_native(), pairs)
