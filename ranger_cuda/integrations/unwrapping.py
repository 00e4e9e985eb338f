"""From a trainer's wrapper to the optimizer inside of it."""

from __future__ import annotations

from typing import Any

from ..lookahead import Lookahead
from ..radam import RAdam
from ..ranger import Ranger

# What wrappers call what they wrap: Accelerate, DeepSpeed, Lightning; ZeroRedundancyOptimizer;
# fastai.
NAMES = ("optimizer", "optim", "opt")


def unwrap(optimizer: Any) -> Ranger | RAdam | Lookahead:
    """The optimizer of this package inside of a trainer's wrappers.

    Known are those of Accelerate (``AcceleratedOptimizer``, ``DeepSpeedOptimizerWrapper``),
    DeepSpeed (its engine and its ZeRO optimizers), Lightning (``LightningOptimizer``), fastai
    (``OptimWrapper``), ``torch.distributed.optim.ZeroRedundancyOptimizer`` (this rank's part), and
    torchtitan's ``OptimizersContainer``, if it has one optimizer. None of them is imported.

    What the wrapper does besides is the wrapper's: call its ``step``, ``zero_grad`` and
    ``state_dict``, and of the optimizer inside what only that has, such as ``slow_weights()``.

    Args:
        optimizer: a wrapper, or one of this package's optimizers, which is returned as it is.

    Returns:
        A ``Ranger``, ``RAdam`` or ``Lookahead``.

    Raises:
        TypeError: there is none inside of it.
        ValueError: there are several, so that it is yours to choose.

    Example:
        >>> import torch
        >>> from ranger_cuda import Ranger
        >>> from ranger_cuda.integrations import unwrap
        >>> ranger = Ranger(torch.nn.Linear(2, 1).parameters())
        >>> unwrap(ranger) is ranger
        True
    """
    inside, seen = optimizer, []
    while not isinstance(inside, (Ranger, RAdam, Lookahead)):
        seen.append(inside)
        several = getattr(inside, "optimizers", None)
        if isinstance(several, (list, tuple)):
            if len(several) > 1:
                raise ValueError(
                    f"{type(inside).__name__} has {len(several)} optimizers; unwrap one of its "
                    "`optimizers`"
                )
            found = list(several)
        else:
            found = [getattr(inside, name, None) for name in NAMES]
        found = [each for each in found if each is not None and each not in seen]
        if not found:
            raise TypeError(
                "unwrap() found no Ranger, RAdam or Lookahead of ranger_cuda in "
                + ", inside of it ".join(type(each).__name__ for each in seen)
                + "; give it the optimizer that the trainer made of one"
            )
        inside = found[0]
    return inside
