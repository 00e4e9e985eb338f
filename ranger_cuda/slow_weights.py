"""Evaluation on the slow weights: swapped in, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .dispatch import Dispatcher, NewState


class SlowWeights:
    """What an optimizer with slow weights adds to ``torch.optim.Optimizer``."""

    param_groups: list[dict[str, Any]]
    state: Any
    _dispatcher: Dispatcher
    _new_state: NewState
    _slow_weights_are_in = False

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Evaluate on the slow weights::

            with optimizer.slow_weights():
                validate(model)

        Within the context every parameter holds its slow weight; on leaving it, whatever happens
        within, each gets its own bits back. It is for reading: what is written to a parameter in
        between does not last. A parameter that has not been stepped yet stays as it is. ``step``,
        ``state_dict``, ``load_state_dict`` and copies of the optimizer are refused in between.

        Raises:
            RuntimeError: the slow weights are swapped in already.
        """
        self._check_ready("slow_weights()")
        with self._dispatcher.swapped(self.param_groups, self.state, self._new_state):
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
