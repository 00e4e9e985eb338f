"""From an optimizer's groups and state to the backends that move its parameters.

A step is two calls. ``collect`` finds the parameters that move, checks them and creates missing
state; whatever is wrong raises here, before anything is changed. ``launch`` moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import support
from .backends import reference
from .backends.reference import Row
from .hyperparameters import Hyperparameters
from .tensors import check_param, check_state, local, plain, plain_grad

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]
NewState = Callable[[Tensor, dict[str, Any], dict[str, Any]], dict[str, Any]]


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
        self.reset()

    def reset(self) -> None:
        """Forget the plan: the next step makes a new one."""
        self._plan: Any = None
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
            new_state: ``new_state(param, group, state)`` returns what ``state`` lacks; it may
                allocate, and must change nothing.
            moved: for each parameter, in the order of the groups, whether it moves. None: those
                that have a gradient do, and the rule reads it.
        Raises:
            RuntimeError, ValueError: a parameter, gradient or state that cannot be used. Nothing
                has been changed then.
        """
        if self._plan is None or not self._plan.collect(param_groups, state, moved):
            self.reset()
            self._make_plan(param_groups, state, new_state, moved)
            if self._plan is not None and not self._plan.collect(param_groups, state, moved):
                raise RuntimeError(
                    "the parameters changed while the step was being prepared; do not change an "
                    "optimizer from another thread while it steps"
                )
        self._rows = [
            Row(param, plain_grad(param, name) if moved is None else None, state[param], group)
            for position, (param, group, name) in self._foreign
            if (param.grad is not None if moved is None else moved[position])
        ]

    def launch(self, hypers: Sequence[Hyperparameters], grad_scales: Sequence[float]) -> None:
        """Move what :meth:`collect` found."""
        if self._plan is not None:
            self._plan.launch(hypers, grad_scales, torch.get_num_threads())
        if self._rows:
            self._rule.reference(self._rows, hypers, grad_scales)
            self._rows = []

    def _make_plan(
        self, param_groups: Groups, state: State, new_state: NewState, moved: list[bool] | None
    ) -> None:
        found = list(members(param_groups))
        chosen: dict[Tensor, str] = {}
        missing: dict[Tensor, dict[str, Any]] = {}
        foreign: list[tuple[int, Member]] = []
        for position, member in enumerate(found):
            param, group, name = member
            known = state.get(param, {})
            moves = param.grad is not None if moved is None else moved[position]
            # A parameter that a group names twice moves once.
            if param in chosen or not (moves or self._rule.step_name in known):
                continue
            check_param(param, name)
            if moves and moved is None:
                plain_grad(param, name)
            chosen[param] = support.choose(self._backend, local(param), name)
            missing[param] = new_state(param, param_groups[group], known)
            check_state(param, {**known, **missing[param]}, self._rule.streams, name)
            if chosen[param] == "reference":
                foreign.append((position, member))
        for param, new in missing.items():
            state.setdefault(param, {}).update(new)
        self._foreign = foreign
        if len(foreign) < len(chosen):
            self._plan = self._native_plan(found, state, chosen)

    def _native_plan(self, found: list[Member], state: State, chosen: dict[Tensor, str]) -> Any:
        extension: Any = support.extension()
        plan = extension.StepPlan(
            getattr(extension.StepPlan.Rule, self._rule.name),
            Tensor.__dlpack_c_exchange_api__,
            plain,
            plain_grad,
        )
        planned: set[Tensor] = set()
        for param, group, name in found:
            if param not in chosen:
                plan.add_idle(param, group)
            elif chosen[param] == "reference" or param in planned:
                plan.add_foreign(param, group)
            else:
                plan.add_row(
                    param, group, name, state[param], self._rule.streams, self._rule.step_name
                )
                planned.add(param)
        plan.finish(state)
        return plan
