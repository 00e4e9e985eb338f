"""torchtitan: its container of optimizers, with ours among those that it makes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from ..radam import RAdam
from ..ranger import Ranger
from .missing import stand_in

try:
    from torchtitan.components.optimizer import OptimizersContainer
except ImportError as error:
    OptimizersContainer = stand_in("RangerOptimizersContainer", "torchtitan", error)
    OptimizersContainer.Config = stand_in("RangerOptimizersContainer.Config", "torchtitan", error)


class RangerOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's ``OptimizersContainer`` that also knows "Ranger" and "RAdam"::

        config.optimizer = RangerOptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(
                    pattern=".*", optimizer_name="Ranger", optimizer_kwargs={"lr": 4e-3}
                )
            ],
        )

    ``optimizer_kwargs`` are those of a group, ``lookahead_k`` among them; what is the optimizer's
    as a whole (``backend``, ``state_dtype``) goes into
    ``optimizer_factory_kwargs_by_name={"Ranger": {...}}``. ``implementation`` changes nothing but
    the groups' keys: every step is fused. ``implementation="fused_opt_states_bf16"`` is Adam's; use
    ``state_dtype=torch.bfloat16``.

    Raises:
        ModuleNotFoundError: torchtitan cannot be imported, when a configuration or a container is
            made.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """As that of torchtitan's container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        known: dict[str, Any] = {"Ranger": Ranger, "RAdam": RAdam}
        return known.get(name) or OptimizersContainer._resolve_optimizer_factory(name)
