"""What launches of Triton's kernels are told of tensors: rows, and the words of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state import formats

if TYPE_CHECKING:
    from .scaling import Signals

FORMATS = {format.name: format for format in formats.FORMATS}
GRAD = 1  # of a row's tensors, the gradient


def word(address: int) -> int:
    """An address as a table has it: in two's complement, for devices that use the upper half."""
    return address - (1 << 64) if address >> 63 else address


class TensorRow(NamedTuple):
    """One parameter, as ``_C.Roster`` tells of it (``csrc/formats/rows.h``).

    Addresses are in bytes, strides in elements and in the order of the parameter's memory,
    dimensions of one element left out.
    """

    numel: int
    format: str  # of ranger_cuda.state.formats
    grad_dtype: int  # its place in formats.GRAD_DTYPES
    group: int
    step: int  # address of its count
    first: int  # of its elements, in the whole parameter that it is a shard of
    slice: int  # elements that share a mean their gradients are centralized by; 0: none
    place: int  # counted through the groups
    sizes: list[int]  # empty where all streams are consecutive, as their strides
    # Addresses of parameter, gradient, exp_avg, exp_avg_sq and slow_param, then of what is stored
    # beside each; 0: none.
    data: list[int]
    strides: list[list[int]]  # of the same; empty: its elements are consecutive

    @property
    def slices(self) -> int:
        """How many slices of gradients are centralized."""
        return self.numel // self.slice if self.slice else 0

    def centralized(self) -> TensorRow:
        """What the step reads where gradients are centralized: values side by side."""
        if not self.slice:
            return self
        strides = [[] if i == GRAD else its for i, its in enumerate(self.strides)]
        dtype = formats.GRAD_DTYPES.index(FORMATS[self.format].value)
        return self._replace(grad_dtype=dtype, strides=strides)


def consecutive(sizes: Sequence[int]) -> list[int]:
    """The strides of elements side by side."""
    strides = [1] * len(sizes)
    for i in range(len(sizes) - 1, 0, -1):
        strides[i - 1] = strides[i] * sizes[i]
    return strides


def parts_of(counts: Sequence[int]) -> np.ndarray:
    """For each part of a row, the row and which of its parts it is."""
    table = np.zeros((sum(counts), 2), dtype=np.int32)
    table[:, 0] = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum([0, *counts])
    table[:, 1] = np.arange(len(table)) - firsts[table[:, 0]]
    return table


def layout_words(row: TensorRow) -> list[int]:
    """Number of dimensions, sizes, and the strides of each stream."""
    strides = [n for stride in row.strides for n in stride or consecutive(row.sizes)]
    return [len(row.sizes), *row.sizes, *strides]


def number_words(number: Tensor | None) -> list[int]:
    """Where a number is on the device, and whether it is float64."""
    if number is None:
        return [0, 0]
    return [word(number.data_ptr()), int(number.dtype == torch.float64)]


def signal_words(signals: Signals) -> list[int]:
    """What a device's kernels read there, as the schedule kernel takes it."""
    return [
        *number_words(signals.grad_scale),
        *number_words(signals.found_inf),
        *number_words(signals.norm),
    ]


def group_words(numbers: bytes, lrs: Sequence[Tensor | None]) -> list[int]:
    """The hyperparameters of all groups, packed, as the schedule kernel reads them."""
    words = []
    for hyper, lr in zip(np.frombuffer(numbers, np.int64).reshape(len(lrs), -1), lrs, strict=True):
        words += [*hyper.tolist(), *number_words(lr)]
    return words
