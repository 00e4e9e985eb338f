"""The total norm of gradients, which the step clips by without writing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.scaling import Scaling
from ..state.tensors import DTensor, is_capturing, is_fsdp1_s
from .algorithms import members
from .python_step import PythonStep

NONFINITE = ("propagate", "skip", "raise")  # what becomes of a step whose norm is not finite

# Of the gradients of a step, the sums of their squares, of which there are some: of those whose
# places have True, or of all if the list is empty.
Squares = Callable[[Sequence[bool]], list[Tensor]]


def measured(step: PythonStep, squares: Squares, scaling: Scaling, nonfinite: str) -> Scaling:
    """``scaling`` with the norm of the gradients, and with what is to be done if it is infinite or
    NaN: one of ``NONFINITE``. Only "raise" waits for a device.

    Raises:
        RuntimeError: a norm that is not finite, if that is to be raised; or see :func:`total_norm`.
    """
    norm = total_norm(step, squares)
    found = scaling.found_inf
    if nonfinite == "skip":
        skip = (~norm.isfinite()).float()
        both = skip if found is None else torch.maximum(skip, found.to(skip))
        scaling = scaling._replace(found_inf=both)
    elif nonfinite == "raise":
        if is_capturing():
            raise RuntimeError(
                'nonfinite_grad_norm="raise" waits for the norm of the gradients, and cannot be '
                'captured in a CUDA graph; use "skip"'
            )
        overflow = found is not None and bool(found != 0.0)  # GradScaler's, which it expects
        if not (norm.isfinite() or overflow):
            raise RuntimeError(
                f"the norm of the gradients is {norm.item()}; nothing has been changed. Look for "
                'what made it so, or skip such steps with nonfinite_grad_norm="skip"'
            )
    return scaling._replace(norm=norm)


@torch.no_grad()
def total_norm(step: PythonStep, squares: Squares) -> Tensor:
    """The 2-norm of all gradients taken together, over all ranks for those of DTensors.

    In float64, in an order that is fixed on one device and layout; outside the numerical contract.

    Returns:
        a float64 scalar on a device that gradients are on; nothing waits for it.

    Raises:
        RuntimeError: a parameter is known to be one rank's part of what the norm should be over.
    """
    found = list(members(step.param_groups))
    of_mesh: dict[Any, list[int]] = {}
    for position in step.movers():
        param = found[position].param
        if is_fsdp1_s(param):
            raise RuntimeError(
                "max_grad_norm would clip by the norm of one rank's shards under "
                "FullyShardedDataParallel, and by another on every rank: leave it None and "
                "call model.clip_grad_norm_(...) before the step, or shard with "
                "torch.distributed.fsdp.fully_shard"
            )
        mesh = (param.device_mesh, param.placements) if isinstance(param, DTensor) else None
        of_mesh.setdefault(mesh, []).append(position)
    sums = []
    for mesh, positions in of_mesh.items():
        counts = [False] * len(found) if len(of_mesh) > 1 else []
        for position in positions if counts else ():
            counts[position] = True
        own = _sum(squares(counts), found[positions[0]].param.device)
        if mesh is not None:
            own = _over_ranks(own, *mesh)
        sums.append(own)
    return _sum(sums, sums[0].device if sums else torch.device("cpu")).sqrt()


def _sum(numbers: list[Tensor], device: torch.device) -> Tensor:
    there = [number.to(device, non_blocking=True) for number in numbers]
    if len(there) == 1:
        return there[0]
    return sum(there, torch.zeros((), dtype=torch.float64, device=device))


def _over_ranks(own: Tensor, mesh: Any, placements: Any) -> Tensor:
    """The sum over what each rank has of its shards, each of which counts once."""
    from torch.distributed.tensor import Partial, Replicate

    parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(own, mesh, parts).full_tensor()
