"""The operations by name, each with its weight and the optimizers that it suits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .world import VARIANTS, Draw, World

EVERY = tuple(VARIANTS)
OURS = tuple(name for name, variant in VARIANTS.items() if variant.is_ours)
FUSED = tuple(name for name, variant in VARIANTS.items() if variant.is_fused)
WITH_SLOW = tuple(name for name, variant in VARIANTS.items() if variant.has_slow)


class Operation(NamedTuple):
    """``run(side, draw)`` for one side after the other, or ``run(world, draw)`` for both at once.

    It returns False if there is nothing that it could do here.
    """

    run: Callable[[Any, Draw], bool | None]
    weight: int
    variants: tuple[str, ...]
    on_both: bool

    def __call__(self, world: World, seed: int) -> bool:
        if self.on_both:
            return self.run(world, Draw(seed)) is not False
        did = [self.run(side, Draw(seed)) is not False for side in world.sides]
        assert did[0] == did[1], "only one side could do it"
        return did[0]


OPERATIONS: dict[str, Operation] = {}


def operation(
    weight: int = 3, variants: Iterable[str] = EVERY, *, on_both: bool = False
) -> Callable[[Callable[..., bool | None]], Callable[..., bool | None]]:
    """Register an operation under its function's name."""

    def register(run: Callable[..., bool | None]) -> Callable[..., bool | None]:
        OPERATIONS[run.__name__] = Operation(run, weight, tuple(variants), on_both)
        return run

    return register
