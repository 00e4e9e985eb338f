"""What is done to parameters that move, and where they stand in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..backends import reference
from ..backends.reference import Row
from ..state import formats
from ..state.formats import Format
from ..state.hyperparameters import Hyperparameters
from ..state.tensors import on_accelerator
from .native import Groups


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


class Name(str):
    """What error messages call a parameter, in place of a name that they quote."""

    __repr__ = str.__str__


def alone(member: Member, group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's group, without the others in it."""
    return {**group, "params": [member.param], "param_names": [Name(member.name)]}


def is_at_rest(group: dict[str, Any]) -> bool:
    """Whether a step moves no parameter of ``group``: its ``lr`` is 0. One on an accelerator is not
    read, which would wait for it."""
    lr = group.get("lr")
    return lr is not None and not on_accelerator(lr) and bool(lr == 0)


class Algorithm(NamedTuple):
    """What a backend does with a parameter that moves."""

    name: str  # of ranger_cuda._C.Rule
    step_name: str  # the state that counts steps
    # exp_avg, exp_avg_sq, slow_param and outer_momentum_buffer
    streams: tuple[str | None, str | None, str | None, str | None]
    reference: Callable[[Sequence[Row], Sequence[Hyperparameters], Sequence[float]], None]
    state_dtype: formats.StateDType = formats.STATE_DTYPES[0]  # of the moments

    def streams_of(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The streams of a group's parameters: without momentum slow weights have no buffer."""
        return self.streams if group.get("outer_momentum") else self.streams[:-1]

    def format_of(self, param: Tensor, group: dict[str, Any]) -> Format:
        """How ``param`` and its state are stored.

        A group of another package's optimizer rounds to nearest.

        Raises:
            ValueError: that cannot be, with the group's ``weight_rounding``.
        """
        weight_rounding = group.get("weight_rounding", "nearest")
        return formats.of_param(param, weight_rounding, self.state_dtype)

    def format_for(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Format:
        """The same, as far as ``state`` goes: before an inner optimizer's first step there is
        nothing beside a parameter."""
        format = self.format_of(param, group)
        if self is LOOKAHEAD and any(part.name not in state for part in format.param.rest):
            bare = "stochastic" if format.slow_param.is_random else "nearest"
            return formats.of(param.dtype, bare)
        return format


_MOMENTS, _SLOW = ("exp_avg", "exp_avg_sq"), ("slow_param", "outer_momentum_buffer")
RADAM = Algorithm("RADAM", "step", (*_MOMENTS, None, None), reference.radam_step)
RANGER = Algorithm("RADAM", "step", (*_MOMENTS, *_SLOW), reference.radam_step)
LOOKAHEAD = Algorithm("LOOKAHEAD", "lookahead_step", (None, None, *_SLOW), reference.lookahead_step)
