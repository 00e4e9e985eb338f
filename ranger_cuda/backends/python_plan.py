"""What launches from Python need of ``_C.StepPlan``, where there is no extension."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors import DTensor, local, plain, plain_grad

GRAD = 1  # of the streams


class TensorRow(NamedTuple):
    """One parameter, as device tables have it (``csrc/plan.h``). Addresses are in bytes, strides in
    elements and in the order of the parameter's memory, dimensions of one element left out."""

    numel: int
    is_float64: bool
    group: int
    step: int  # address of its count
    sizes: list[int]
    data: list[int]  # addresses of parameter, gradient, exp_avg, exp_avg_sq, slow_param; 0: none
    strides: list[list[int]]  # of the same; empty: its elements are consecutive


def consecutive(sizes: Sequence[int]) -> list[int]:
    """The strides of elements side by side."""
    strides = [1] * len(sizes)
    for i in range(len(sizes) - 1, 0, -1):
        strides[i - 1] = strides[i] * sizes[i]
    return strides


class PythonPlan:
    """Finds the rows of an optimizer's parameters again and checks them at every step.

    The methods and their arguments are those of ``_C.StepPlan``.
    """

    def __init__(self) -> None:
        # While it is filled: all parameters, and the state of those that are rows.
        self._params: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._group_of: list[int] = []
        self._idle: list[int] = []  # positions
        self._names: list[list[str]] = []  # for each row, of the state that the kernels read
        self._rows: list[_Row] = []
        self._gradients: list[Tensor] = []  # alive until the launch is over
        self._layout_changes = 0

    def add_row(
        self,
        param: Tensor,
        group: int,
        name: str,
        backend: str,
        state: dict[str, Any],
        streams: Sequence[str | None],
        step_name: str,
    ) -> None:
        """A parameter that this plan's kernels move."""
        parts = [None if key is None else state[key] for key in streams]
        position = len(self._params)
        self._rows.append(_Row(param, parts, state[step_name], position, group, name))
        self._names.append([key for key in (*streams, step_name) if key is not None])
        self._states.append(state)
        self.add_foreign(param, group)

    def add_idle(self, param: Tensor, group: int) -> None:
        """A parameter without state: the plan holds as long as it has no gradient."""
        self._idle.append(len(self._params))
        self.add_foreign(param, group)

    def add_foreign(self, param: Tensor, group: int) -> None:
        """A parameter that is none of this plan's business."""
        self._params.append(param)
        self._group_of.append(group)

    def finish(self, optimizer_state: dict[Tensor, Any]) -> None:
        """All parameters have been added."""
        self._known = _Known(self._params)
        its = [self._params[row.position] for row in self._rows]
        self._known_rows = _Known(its, memory=True)
        self._known_state = _Known(self._state_of(self._states), memory=True)
        self._params = []
        self._states = []

    def _state_of(self, states: list[dict[str, Any]]) -> list[Any]:
        pairs = zip(states, self._names, strict=True)
        return [state.get(name) for state, names in pairs for name in names]

    def collect(
        self,
        param_groups: list[dict[str, Any]],
        optimizer_state: dict[Tensor, Any],
        moved: list[bool] | None = None,
    ) -> bool:
        """Whether the plan still describes this optimizer; if so, what moves now is noted."""
        self._gradients = []
        params = [param for group in param_groups for param in group["params"]]
        group_of = [i for i, group in enumerate(param_groups) for _ in group["params"]]
        if group_of != self._group_of or not self._known.are(params):
            return False
        its = [params[row.position] for row in self._rows]
        state = self._state_of([optimizer_state.get(param, {}) for param in its])
        if not (self._known_rows.are(its) and self._known_state.are(state)):
            return False
        gradients = [param.grad if moved is None else None for param in params]
        if moved is None:
            moved = [gradient is not None for gradient in gradients]
        if any(moved[position] for position in self._idle):
            return False
        for row, param in zip(self._rows, its, strict=True):
            gradient = gradients[row.position]
            row.gradient = int(moved[row.position])
            if gradient is not None:
                self._bind(row, param, gradient)
        return True

    def _bind(self, row: _Row, param: Tensor, gradient: Tensor) -> None:
        if not row.reads(gradient):
            gradient = plain_grad(param, row.name)
        row.gradient = gradient.data_ptr() or 1
        self._gradients.append(gradient)
        stride = gradient.stride()
        if stride != row.gradient_stride:
            row.gradient_stride = stride
            strides = row.in_order(stride)
            self._layout_changes += strides != row.strides[GRAD]
            row.strides[GRAD] = strides

    def rows(self) -> list[TensorRow]:
        """Each row for device tables, with its gradient's strides as they were collected last."""
        return [row.described() for row in self._rows]

    def gradients(self) -> list[int]:
        """For each row its gradient's address in the step that was collected; 0 where it rests, 1
        where there is nothing to read."""
        return [row.gradient for row in self._rows]

    def layout_changes(self) -> int:
        """How many times a gradient had other strides than before."""
        return self._layout_changes

    def hold(self) -> object:
        """Keeps the rows' state alive as long as it is there itself."""
        state = self._known_state.tensors()
        if any(tensor is None for tensor in state):
            raise RuntimeError(
                "the optimizer's state was replaced while a step was under way, in another thread "
                "or a hook; let one at a time"
            )
        return state

    def moved(self) -> list[Tensor]:
        """The parameters that move in the step that was collected."""
        params = zip(self._rows, self._known_rows.tensors(), strict=True)
        return [param for row, param in params if row.gradient and param is not None]

    def release(self) -> None:
        """Let go of the gradients of the step that was collected."""
        self._gradients = []


class _Known:
    """Tensors to find again in a later step, and where they lay.

    It holds none of them. Once one is gone it finds nothing, so that an ``id`` or an address that
    is used again is not taken for the old tensor.

    Args:
        memory: whether to compare where they lie, too.
    """

    def __init__(self, tensors: Sequence[Tensor], *, memory: bool = False) -> None:
        self._gone: list[Any] = []
        self._watches = [weakref.ref(tensor, self._gone.append) for tensor in tensors]
        self._ids = [*map(id, tensors)]
        self._sharded = memory and any(isinstance(tensor, DTensor) for tensor in tensors)
        self._memory = memory
        self._lay = self._lie(tensors)

    def _lie(self, tensors: Sequence[Tensor]) -> list[Any]:
        if not self._memory:
            return []
        if self._sharded:
            tensors = [*map(local, tensors)]
        # One attribute of all tensors at a time: most of what a step costs the host is here.
        lie: list[Any] = [tensor.data_ptr() for tensor in tensors]
        lie += [tensor.shape for tensor in tensors]
        lie += [tensor.stride() for tensor in tensors]
        lie += [tensor.dtype for tensor in tensors]
        lie += [tensor.device for tensor in tensors]
        return lie

    def are(self, tensors: Sequence[Any]) -> bool:
        """Whether these are they, in this order, and lie where they lay."""
        same = not self._gone and self._ids == [*map(id, tensors)]
        return same and self._lay == self._lie(tensors)

    def tensors(self) -> list[Tensor | None]:
        """They; None for one that is gone."""
        return [watch() for watch in self._watches]


class _Row:
    """One parameter, as it was when the plan was made."""

    def __init__(
        self,
        param: Tensor,
        state: Sequence[Tensor | None],
        step: Tensor,
        position: int,
        group: int,
        name: str,
    ) -> None:
        real = plain(param)
        streams = (real, None, *(None if part is None else plain(part) for part in state))
        self.position = position  # among all parameters
        self.group = group
        self.name = name
        self.dtype = real.dtype
        self.device = real.device
        self.shape = real.shape
        # Dimensions of more than one element, in the order of memory (csrc/plan.h).
        dims = [dim for dim in range(real.dim()) if real.shape[dim] != 1]
        self.order = sorted(dims, key=lambda dim: -real.stride()[dim])
        self.sizes = [real.shape[dim] for dim in self.order]
        self.data = [0 if part is None else part.data_ptr() for part in streams]
        self.strides = [[] if part is None else self.in_order(part.stride()) for part in streams]
        self.step = plain(step).data_ptr()
        self.gradient_stride: tuple[int, ...] = ()  # as its tensor had it last
        self.gradient = 0

    def in_order(self, stride: tuple[int, ...]) -> list[int]:
        """The strides of a tensor, as a ``TensorRow`` has them."""
        ordered = [stride[dim] for dim in self.order]
        return [] if ordered == consecutive(self.sizes) else ordered

    def reads(self, gradient: Tensor) -> bool:
        """Whether the kernels can read a gradient as it is."""
        return (
            type(gradient) is Tensor
            and gradient.dtype == self.dtype
            and gradient.device == self.device
            and gradient.layout == torch.strided
            and gradient.shape == self.shape
            and not gradient.is_neg()
        )

    def described(self) -> TensorRow:
        """For device tables."""
        return TensorRow(
            self.shape.numel(),
            self.dtype == torch.float64,
            self.group,
            self.step,
            self.sizes,
            self.data,
            self.strides,
        )
