"""From an optimizer's groups and state to the backends that move its parameters.

A step is two calls. ``collect`` finds the parameters that move, checks them and creates missing
state; whatever is wrong raises here, before anything is changed. ``launch`` moves them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import support
from .backends import reference
from .backends.python_plan import PythonPlan
from .backends.reference import Row
from .backends.triton_plan import TritonPlan
from .hyperparameters import Hyperparameters
from .scaling import NO_SCALING, Scaling, Signals
from .schedule import grad_scale
from .tensors import (
    check_param,
    check_state,
    is_capturing,
    is_count,
    local,
    on_accelerator,
    overlapping,
    plain,
    plain_grad,
)

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]
NewState = Callable[[Tensor, dict[str, Any], dict[str, Any], torch.device], dict[str, Any]]


class Member(NamedTuple):
    """A parameter and where it stands."""

    param: Tensor
    group: int
    name: str  # what error messages call it


def members(param_groups: Groups) -> Iterator[Member]:
    """Every parameter, in the order of the groups."""
    for i, group in enumerate(param_groups):
        names = group.get("param_names")
        for j, param in enumerate(group["params"]):
            name = f"{names[j]!r}" if names else f"parameter {j} of group {i}"
            yield Member(param, i, name)


class Rule(NamedTuple):
    """What a backend does with a parameter that moves."""

    name: str  # of ranger_cuda._C.StepPlan.Rule
    step_name: str  # the state that counts steps
    streams: tuple[str | None, str | None, str | None]  # exp_avg, exp_avg_sq, slow_param
    reference: Callable[[Sequence[Row], Sequence[Hyperparameters], Sequence[float]], None]


RADAM = Rule("RADAM", "step", ("exp_avg", "exp_avg_sq", None), reference.radam_step)
RANGER = Rule("RADAM", "step", ("exp_avg", "exp_avg_sq", "slow_param"), reference.radam_step)
LOOKAHEAD = Rule(
    "LOOKAHEAD", "lookahead_step", (None, None, "slow_param"), reference.lookahead_step
)


def _movers(moved: list[bool] | None) -> Callable[[int, Tensor], bool]:
    """Whether the parameter at a position moves; see :meth:`Dispatcher.collect`."""
    if moved is None:
        return lambda position, param: param.grad is not None
    return lambda position, param: moved[position]


class _Completion:
    """Checks parameters one by one, and gives them the state they lack once all are right."""

    def __init__(self, rule: Rule, param_groups: Groups, state: State, new_state: NewState) -> None:
        self._rule = rule
        self._groups = param_groups
        self._state = state
        self._new_state = new_state
        self._missing: dict[Tensor, dict[str, Any]] = {}
        self._before: dict[Tensor, dict[str, Any] | None] = {}
        self.rows: list[tuple[Member, Tensor | None]] = []  # the reference's, and their gradients

    def add(self, member: Member, backend: str, *, reads_grad: bool) -> None:
        """Check a parameter that ``backend`` moves, and its gradient if that is read."""
        param, group, name = member
        check_param(param, name)
        gradient = plain_grad(param, name) if reads_grad else None
        where = local(param)
        on_host = backend in ("cpu", "reference")
        step_device = torch.device("cpu") if on_host else where.device
        known = self._state.get(param, {})
        # Before it moves: on a device nobody looks at it.
        count = known.get(self._rule.step_name, 0)
        if not on_accelerator(count) and not is_count(count):
            raise RuntimeError(
                f"state {self._rule.step_name!r} of {name} is {count}, but it counts steps: a "
                "whole number, at least 0"
            )
        with torch.inference_mode(False):  # state made in it could not be written outside
            missing = self._new_state(param, self._groups[group], known, step_device)
        if missing and where.device.type != "cpu" and is_capturing():
            raise RuntimeError(
                f"the state of {name} does not exist yet, and made now it would be made anew at "
                "every replay of the graph: take a step before the capture"
            )
        check_state(param, {**known, **missing}, self._rule.streams, name)
        if missing:
            self._missing[param] = missing
        if backend == "reference":
            self.rows.append((member, gradient))

    def commit(self) -> None:
        """Nothing was wrong."""
        for param, missing in self._missing.items():
            known = self._state.get(param)
            self._before[param] = None if known is None else dict(known)
            self._state.setdefault(param, {}).update(missing)

    def undo(self) -> None:
        """Something was, after all."""
        for param, before in self._before.items():
            if before is None:
                del self._state[param]
            else:
                self._state[param].clear()
                self._state[param].update(before)


class Dispatcher:
    """Holds the native plan of one optimizer and notices when it no longer fits.

    Args:
        rule: what moves the parameters.
        backend: what the user asked for, or None.

    Neither it nor its plan refers back to the optimizer: deleting that frees its state at once.
    """

    def __init__(self, rule: Rule, backend: str | None) -> None:
        self._rule = rule
        self._backend = backend
        self._captured: list[Any] = []  # tables that graphs read, plan or no plan
        self._busy = threading.Lock()
        self.reset()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the length of a step, or of a swap and back: nobody else collects or launches.

        Raises:
            RuntimeError: another thread, or a hook, is at it.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "another step of this optimizer is under way, in another thread or a hook; let one "
                "at a time"
            )
        try:
            yield
        finally:
            self._busy.release()

    def reset(self) -> None:
        """Forget the plan: the next step makes a new one."""
        self._plans: list[Any] = []
        self._foreign: list[tuple[int, Member]] = []  # position and member: reference backend
        self._rows: list[Row] = []

    def collect(
        self,
        param_groups: Groups,
        state: State,
        new_state: NewState,
        moved: list[bool] | None = None,
    ) -> None:
        """Find and check what moves in this step.

        Args:
            new_state: ``new_state(param, group, state, step_device)`` returns what ``state``
                lacks, the step count on ``step_device``; it may allocate, and must change nothing.
            moved: for each parameter, in the order of the groups, whether it moves. None: those
                that have a gradient do, and the rule reads it.
        Raises:
            RuntimeError, ValueError: a parameter, gradient or state that cannot be used. Nothing
                has been changed then.
        """
        self._rows = []
        moves = _movers(moved)
        complete = _Completion(self._rule, param_groups, state, new_state)
        if self._plans and self._collect_native(param_groups, state, moved):
            for position, member in self._foreign:
                if moves(position, member.param):
                    complete.add(member, "reference", reads_grad=moved is None)
            complete.commit()
        else:
            self.reset()
            try:
                self._make_plan(param_groups, state, complete, moved)
                fits = self._collect_native(param_groups, state, moved)
            except BaseException:  # a table or a kernel that cannot be had
                self.reset()
                complete.undo()
                raise
            if not fits:
                raise RuntimeError(
                    "the parameters changed while the step was being prepared; do not change an "
                    "optimizer from another thread while it steps"
                )
        self._rows = [
            Row(param, gradient, state[param], group)
            for (param, group, _), gradient in complete.rows
        ]
        if self._moves_from_host() and is_capturing():
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: some parameters are moved from the "
                "host (by the CPU's kernels or the reference backend, as low-precision ones and "
                "those that share memory are), which a replay would not do"
            )

    def _moves_from_host(self) -> bool:
        return bool(self._rows) or any(plan.has_cpu_rows() for plan in self._plans)

    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
        self._rows = []
        for plan in self._plans:
            plan.release()

    def _collect_native(self, *args: Any) -> bool:
        try:
            return all(plan.collect(*args) for plan in self._plans)
        except torch.OutOfMemoryError:
            if is_capturing():
                raise
            torch.cuda.empty_cache()  # a compiled plan's tables are not torch's allocator's
            return all(plan.collect(*args) for plan in self._plans)

    def launch(self, hypers: Sequence[Hyperparameters], scaling: Scaling = NO_SCALING) -> None:
        """Move what :meth:`collect` found.

        What is on an accelerator is read there, by its kernels. Only where parameters are moved
        from the host does this wait for it.

        Args:
            hypers: the hyperparameters of each group.
        Raises:
            RuntimeError: the state was replaced since then. Nothing has been changed.
        """
        held = [plan.hold() for plan in self._plans]  # whatever others do to the state meanwhile
        signals = [
            [Signals.of(hypers, scaling, support.device(index)) for index in plan.devices()]
            for plan in self._plans
        ]
        unscale = norm = 1.0
        from_host = self._moves_from_host()
        if from_host:
            if scaling.found_inf is not None and scaling.found_inf.item() != 0.0:
                self.release()
                return
            scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
            unscale = 1.0 / scale if scale else math.inf  # as on a device
            norm = 0.0 if scaling.norm is None else float(scaling.norm)
        hypers = [
            hyper._replace(
                lr=float(hyper.lr) if from_host or not isinstance(hyper.lr, Tensor) else 0.0
            )
            for hyper in hypers
        ]
        for plan, its_signals in zip(self._plans, signals, strict=True):
            moved = plan.moved()
            plan.launch(hypers, unscale, norm, its_signals, torch.get_num_threads())
            # A backward pass through what was there before is an error, as in PyTorch.
            increment_version(moved)
        if self._rows:
            scales = [grad_scale(hyper, unscale, norm) for hyper in hypers]
            self._rule.reference(self._rows, hypers, scales)
            self._rows = []
        del held

    @contextmanager
    def swapped(self, param_groups: Groups, state: State, new_state: NewState) -> Iterator[None]:
        """Within the context parameters and slow weights, where there are any, change places."""
        with self.alone(), ExitStack() as undo:  # all of it is undone, whatever fails on the way
            self._swap(undo, param_groups, state, new_state)
            yield

    def _swap(
        self, undo: ExitStack, param_groups: Groups, state: State, new_state: NewState
    ) -> None:
        has_slow = ["slow_param" in state.get(param, {}) for param, _, _ in members(param_groups)]
        self.collect(param_groups, state, new_state, has_slow)
        rows, self._rows = self._rows, []
        # Whatever becomes of the parameters within, the memory that is swapped back is alive.
        held = [
            (param, plain(param), plain(state[param]["slow_param"]))
            for (param, _, _), has in zip(members(param_groups), has_slow, strict=True)
            if has
        ]

        def copy_back() -> None:
            for param, before, _ in held:
                now = plain(param)
                if now.data_ptr() != before.data_ptr() or now.dtype != before.dtype:
                    with torch.no_grad():
                        now.copy_(before)  # it was moved or converted within

        def moved_again(plan: Any) -> None:
            increment_version(plan.moved())

        threads = torch.get_num_threads()
        undo.callback(copy_back)
        for plan in self._plans:
            plan.swap(threads)
            undo.callback(moved_again, plan)
            undo.callback(plan.swap, threads)
            moved_again(plan)
        undo.enter_context(
            reference.swapped([(row.param, row.state["slow_param"]) for row in rows])
        )

    def _make_plan(
        self,
        param_groups: Groups,
        state: State,
        complete: _Completion,
        moved: list[bool] | None,
    ) -> None:
        found = list(members(param_groups))
        moves = _movers(moved)
        # In parallel, parameters that share memory would race for it.
        in_turn = overlapping([param for param, _, _ in found])
        backends: dict[Tensor, str] = {}
        for position, member in enumerate(found):
            param = member.param
            rests = not moves(position, param)
            # A parameter that a group names twice moves once.
            if param in backends or (rests and self._rule.step_name not in state.get(param, {})):
                continue
            try:
                backend = support.choose(self._backend, local(param), member.name)
                backend = "reference" if param in in_turn else backend
                if backend != "reference" or not rests:
                    complete.add(member, backend, reads_grad=moved is None and not rests)
            except (RuntimeError, ValueError):
                if not rests:
                    raise
                continue  # what is wrong with it is said once it moves
            backends[param] = backend
            if backend == "reference":
                self._foreign.append((position, member))
        complete.commit()
        if {"cpu", "cuda"} & set(backends.values()):
            self._plans.append(self._fill(("cpu", "cuda"), found, state, backends))
        its = [param for param, backend in backends.items() if backend == "triton"]
        if its:
            rows = self._fill(("triton",), found, state, backends)
            devices = [local(param).device for param in its]
            self._plans.append(TritonPlan(self._rule.name, rows, devices, self._captured))

    def _step_plan(self) -> Any:
        """The compiled one, or what stands in for it where there is no extension."""
        extension: Any = support.extension()
        if isinstance(extension, support.Obstacle):
            return PythonPlan()
        return extension.StepPlan(
            getattr(extension.StepPlan.Rule, self._rule.name),
            Tensor.__dlpack_c_exchange_api__,
            plain,
            plain_grad,
        )

    def _fill(
        self, its: tuple[str, ...], found: list[Member], state: State, backends: dict[Tensor, str]
    ) -> Any:
        """A plan of what the backends ``its`` move; its rows are in the order of ``backends``."""
        plan = self._step_plan()
        planned: set[Tensor] = set()
        for param, group, name in found:
            if param not in backends:
                plan.add_idle(param, group)
            elif backends[param] not in its or param in planned:
                plan.add_foreign(param, group)
            else:
                plan.add_row(
                    param,
                    group,
                    name,
                    backends[param],
                    state[param],
                    self._rule.streams,
                    self._rule.step_name,
                )
                planned.add(param)
        plan.finish(state)
        return plan
