"""Evaluation on the slow weights: swapped in, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .tensors import plain


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the context each parameter holds its slow weight; afterwards its own bits again.

    Args:
        pairs: parameters and their slow weights, of the same shape. Where the dtypes agree, the
            two change places, one tensor's worth of extra memory at a time; a low-precision
            parameter is set aside and gets its slow weight rounded to nearest.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for param, slow in pairs:
            p, s = plain(param), plain(slow)
            aside = s if p.dtype == s.dtype else p.clone()
            if aside is not s:
                p.copy_(s)
            else:
                exchange(p, s)
            undo.append((p, aside))
        yield
    finally:
        for p, aside in reversed(undo):
            exchange(p, aside)


@torch.no_grad()
def exchange(a: Tensor, b: Tensor) -> None:
    """Swap the values of two tensors of the same shape and dtype, in place."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


class SlowWeights:
    """What an optimizer with slow weights adds to ``torch.optim.Optimizer``."""

    param_groups: list[dict[str, Any]]
    state: Any
    _slow_weights_are_in = False

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Evaluate on the slow weights::

            with optimizer.slow_weights():
                validate(model)

        Within the context every parameter holds its slow weight; on leaving it, whatever happens
        within, each gets its own bits back. A parameter that has not been stepped yet stays as it
        is. ``step``, ``state_dict``, ``load_state_dict`` and copies of the optimizer are refused in
        between.

        Raises:
            RuntimeError: the slow weights are swapped in already.
        """
        self._check_ready("slow_weights()")
        pairs = {
            param: self.state[param]["slow_param"]
            for group in self.param_groups
            for param in group["params"]
            if "slow_param" in self.state.get(param, {})
        }
        with swapped(pairs.items()):
            self._slow_weights_are_in = True
            try:
                yield
            finally:
                self._slow_weights_are_in = False

    def _check_ready(self, call: str) -> None:
        if self._slow_weights_are_in:
            raise RuntimeError(
                f"{call} inside `with optimizer.slow_weights()`: the parameters hold their slow "
                "weights now; leave the context first"
            )
