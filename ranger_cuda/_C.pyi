"""Types of the compiled extension; see csrc/bindings.cpp."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

class StepPlan:
    class Rule(Enum):
        RADAM = ...
        LOOKAHEAD = ...

    def __init__(
        self,
        rule: Rule,
        exchange_api: object,
        plain: Callable[[Tensor], Tensor],
        plain_grad: Callable[[Tensor, str], Tensor],
    ) -> None: ...
    def add_row(
        self,
        param: Tensor,
        group: int,
        name: str,
        backend: str,
        state: dict[str, Any],
        streams: Sequence[str | None],
        step_name: str,
    ) -> None: ...
    def add_idle(self, param: Tensor, group: int) -> None: ...
    def add_foreign(self, param: Tensor, group: int) -> None: ...
    def finish(self, optimizer_state: dict[Tensor, Any]) -> None: ...
    def collect(
        self,
        param_groups: list[dict[str, Any]],
        optimizer_state: dict[Tensor, Any],
        moved: list[bool] | None = None,
    ) -> bool: ...
    def devices(self) -> list[int]: ...
    def has_cpu_rows(self) -> bool: ...
    def launch(
        self,
        hypers: Sequence[tuple[Any, ...]],
        unscale: float,
        norm: float,
        signals: Sequence[tuple[Any, ...]],
        num_threads: int,
    ) -> None: ...
    def release(self) -> None: ...
    def swap(self, num_threads: int) -> None: ...

def schedule(hyper: tuple[Any, ...], step: int) -> tuple[bool, float, float, bool]: ...
def table_layout() -> dict[str, int]: ...
def build_info() -> dict[str, Any]: ...
