"""The total norm of gradients, which the step clips by without writing them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..state.formats import is_low
from ..state.tensors import DTensor, is_fsdp1_s


@torch.no_grad()
def total_norm(param_groups: list[dict[str, Any]]) -> Tensor:
    """The 2-norm of all gradients taken together, over all ranks for those of DTensors.

    As ``torch.nn.utils.clip_grad_norm_(model.parameters(), ...)`` takes it. A reduction:
    deterministic on one device and layout, and outside the numerical contract.

    Returns:
        a scalar on the first gradient's device; nothing waits for it.

    Raises:
        RuntimeError: a parameter is known to be one rank's part of what the norm should be over.
    """
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                if is_fsdp1_s(param):
                    raise RuntimeError(
                        "max_grad_norm would clip by the norm of one rank's shards under "
                        "FullyShardedDataParallel, and by another on every rank: leave it None and "
                        "call model.clip_grad_norm_(...) before the step, or shard with "
                        "torch.distributed.fsdp.fully_shard"
                    )
                grad = param.grad.detach()
                if is_low(grad.dtype):  # whose norm may be infinite though they are not
                    grad = torch.linalg.vector_norm(grad, dtype=torch.float32)
                by_mesh[grad.device_mesh if isinstance(grad, DTensor) else None].append(grad)
    norms = [get_total_norm(same_mesh) for same_mesh in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(norms) == 1:
        return norms[0]
    return get_total_norm([norm.double() for norm in norms])
