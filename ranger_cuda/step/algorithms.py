"""What is done to parameters that move, and where they stand in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
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


def is_at_rest(group: dict[str, Any]) -> bool:
    """Whether a step moves no parameter of ``group``: its ``lr`` is 0. One on an accelerator is not
    read, which would wait for it."""
    lr = group.get("lr")
    return lr is not None and not on_accelerator(lr) and bool(lr == 0)


class Algorithm(NamedTuple):
    """What a backend does with a parameter that moves."""

    name: str  # of ranger_cuda._C.Rule
    step_name: str  # the state that counts steps
    streams: tuple[str | None, str | None, str | None]  # exp_avg, exp_avg_sq, slow_param
    reference: Callable[[Sequence[Row], Sequence[Hyperparameters], Sequence[float]], None]
    state_dtype: torch.dtype = formats.STATE_DTYPES[0]  # of the moments

    def format_of(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Format:
        """How ``param`` and its state are stored."""
        if self.step_name == "step":
            return formats.of(param.dtype, group["weight_rounding"], self.state_dtype)
        exact = formats.of(param.dtype)  # where the inner optimizer keeps the rest of parameters
        kept = all(part.name in state for part in exact.param.rest)
        return exact if kept else formats.of(param.dtype, "nearest")


RADAM = Algorithm("RADAM", "step", ("exp_avg", "exp_avg_sq", None), reference.radam_step)
RANGER = Algorithm("RADAM", "step", ("exp_avg", "exp_avg_sq", "slow_param"), reference.radam_step)
LOOKAHEAD = Algorithm(
    "LOOKAHEAD", "lookahead_step", (None, None, "slow_param"), reference.lookahead_step
)
