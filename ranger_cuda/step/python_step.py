"""One step, as far as Python deals with it: the checks, the state that is lacking, the reference's
rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import support
from ..backends.reference import Row
from ..state.hyperparameters import CENTRALIZED_DIMS
from ..state.new_state import without_slow_weight
from ..state.tensors import (
    check_allocated,
    check_state,
    is_capturing,
    is_count,
    is_fsdp1_s,
    local,
    on_accelerator,
    plain_grad,
    shard_of,
)
from .algorithms import Algorithm, Member, is_at_rest, members
from .native import Groups, State

NewState = Callable[[Tensor, dict[str, Any], dict[str, Any], torch.device], dict[str, Any]]
ON_HOST = ("cpu", "reference")  # backends that move parameters from the host


def device_of_count(backend: str, param: Tensor) -> torch.device:
    """Where a parameter's steps are counted: where its kernels run."""
    return torch.device("cpu") if backend in ON_HOST else param.device


def check_count(state: dict[str, Any], step_name: str, name: str) -> None:
    """Raise if a state's step count is none. On a device nobody looks at it."""
    count = state.get(step_name, 0)
    check_allocated(count, f"state {step_name!r} of {name}")
    if not on_accelerator(count) and not is_count(count):
        raise RuntimeError(
            f"state {step_name!r} of {name} is {count}, but it counts steps: a whole number, at "
            "least 0"
        )


class PythonStep:
    """What moves in one step, as far as Python deals with it."""

    def __init__(
        self,
        algorithm: Algorithm,
        param_groups: Groups,
        state: State,
        moved: list[bool] | None,
        unmoved: set[Tensor],
        first_place: int,
    ) -> None:
        self.algorithm = algorithm
        self.param_groups = param_groups
        self.state = state
        self.moved = moved
        self.first_place = first_place
        self.unmoved = unmoved  # whose slow weights are made anew
        self.at_rest: set[Tensor] = set()  # who have them now, and still do not move
        self.missing: dict[Tensor, dict[str, Any]] = {}
        self.backends: dict[int, str] = {}  # by position, as what follows
        self.gradients: dict[int, Tensor] = {}
        self._before: dict[Tensor, dict[str, Any] | None] = {}

    def movers(self) -> list[int]:
        """The positions of all that move; a parameter that a group names twice moves once."""
        seen: set[Tensor] = set()
        found = []
        for position, (param, _, _) in enumerate(members(self.param_groups)):
            moves = param.grad is not None if self.moved is None else self.moved[position]
            if moves and param not in seen:
                found.append(position)
            seen.add(param)
        return found

    def to_make_anew(self) -> list[int]:
        """The positions of movers whose slow weights are still to be made anew."""
        found = list(members(self.param_groups))
        left = self.unmoved - self.missing.keys()
        return [position for position in self.movers() if found[position].param in left]

    def check(
        self, position: int, member: Member, requested: str | None, new_state: NewState
    ) -> None:
        """Check a parameter that Python deals with, and make what its state lacks."""
        param, group, name = member
        where = local(param)
        backend = self.backends[position] = support.choose(requested, where, name)
        if self.moved is None:
            self.gradients[position] = plain_grad(param, name)
            self._check_slices(member)
        step_device = device_of_count(backend, where)
        known = dict(self.state.get(param, {}))
        if param in self.unmoved:
            known = without_slow_weight(known)
        format = self.algorithm.format_for(
            param, self.param_groups[group], self.state.get(param, {})
        )
        for part in format.param.rest:
            check_allocated(known.get(part.name), f"state {part.name!r} of {name}")
        check_count(known, self.algorithm.step_name, name)  # before it moves: kernels do not
        with torch.inference_mode(False):  # state made in it could not be written outside
            missing = new_state(param, self.param_groups[group], known, step_device)
        if missing and where.device.type != "cpu" and is_capturing():
            raise RuntimeError(
                f"the state of {name} is not complete yet, and made now it would be made anew at "
                "every replay of the graph: take a step with lr above 0 before the capture"
            )
        streams = self.algorithm.streams_of(self.param_groups[group])
        check_state(param, {**known, **missing}, format.parts(streams), name)
        if missing:
            self.missing[param] = missing
        if "slow_param" in missing and is_at_rest(self.param_groups[group]):
            self.at_rest.add(param)

    def _check_slices(self, member: Member) -> None:
        param, group, name = member
        centralize = self.param_groups[group].get("centralize")
        if centralize is None:
            return
        if is_fsdp1_s(param):
            why = "FullyShardedDataParallel keeps it flat; fully_shard keeps slices whole"
        elif not self._is_centralized(param, group):
            return
        elif param.is_complex():
            why = "it is complex"
        elif not shard_of(param)[1]:
            why = "its shards cut the slices along its first dimension"
        else:
            return
        raise RuntimeError(
            f"centralize={centralize!r} does not go with {name}: {why}. Put it into a group with "
            "centralize=None"
        )

    def _is_centralized(self, param: Tensor, group: int) -> bool:
        dims = CENTRALIZED_DIMS[self.param_groups[group].get("centralize")]
        return self.moved is None and param.dim() >= dims

    def row(self, position: int, member: Member) -> Row:
        """A parameter that the reference moves."""
        param, group, name = member
        if self.moved is None and position not in self.gradients:
            self.gradients[position] = plain_grad(param, name)
        state = self.state[param]
        format = self.algorithm.format_for(param, self.param_groups[group], state)
        grad = self.gradients.get(position)
        place = self.first_place + position
        return Row(
            param,
            grad,
            state,
            group,
            format,
            place,
            shard_of(param)[0],
            self._is_centralized(param, group),
        )

    def commit(self) -> None:
        """Give parameters the state that was made for them."""
        for param, missing in self.missing.items():
            known = self.state.get(param)
            self._before[param] = None if known is None else dict(known)
            self.state.setdefault(param, {}).update(missing)

    def undo(self) -> None:
        """Take it away again."""
        for param, before in self._before.items():
            if before is None:
                del self.state[param]
            else:
                self.state[param].clear()
                self.state[param].update(before)
