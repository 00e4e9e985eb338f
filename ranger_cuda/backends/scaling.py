"""What a step reads besides parameters, gradients and state, wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..state.hyperparameters import Hyperparameters
from ..state.tensors import local


class Scaling(NamedTuple):
    """What the gradients of a step are scaled by, as tensors wherever they are; None: not."""

    grad_scale: Tensor | None = None  # of GradScaler: the loss, and so the gradients, times this
    found_inf: Tensor | None = None  # of GradScaler: not 0 if the step is to be skipped
    norm: Tensor | None = None  # of all gradients, if a group clips


NO_SCALING = Scaling()


class Signals(NamedTuple):
    """What the kernels of one device read there: scalars, float32 or float64; None: nothing."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    norm: Tensor | None
    lr: list[Tensor | None]  # of each group; None: a number is known on the host

    @classmethod
    def of(
        cls, hypers: Sequence[Hyperparameters], scaling: Scaling, device: torch.device
    ) -> Signals:
        """Bring what is elsewhere to ``device``; nothing waits for it."""

        def there(value: Any) -> Tensor | None:
            if not isinstance(value, Tensor):
                return None
            dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            return local(value.detach()).to(device, dtype, non_blocking=True)

        return cls(
            there(scaling.grad_scale),
            there(scaling.found_inf),
            there(scaling.norm),
            [there(hyper.lr) for hyper in hypers],
        )
