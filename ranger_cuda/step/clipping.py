"""The total norm of gradients, which the step clips by without writing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.scaling import Scaling
from ..state.tensors import DTensor, is_capturing, is_fsdp1_s

if TYPE_CHECKING:
    from .dispatch import Dispatcher

NONFINITE = ("propagate", "skip", "raise")  # what becomes of a step whose norm is not finite


def with_norm(norm: Tensor, scaling: Scaling, nonfinite: str) -> Scaling:
    """``scaling`` with the norm of the gradients, and with what is to be done if it is infinite or
    NaN: one of ``NONFINITE``. Only "raise" waits for a device.

    Raises:
        RuntimeError: a norm that is not finite, if that is to be raised.
    """
    found_inf = scaling.found_inf
    if nonfinite == "skip":
        skip = (~norm.isfinite()).float()
        both = skip if found_inf is None else torch.maximum(skip, found_inf.to(skip))
        scaling = scaling._replace(found_inf=both)
    elif nonfinite == "raise":
        if is_capturing():
            raise RuntimeError(
                'nonfinite_grad_norm="raise" waits for the norm of the gradients, and cannot be '
                'captured in a CUDA graph; use "skip"'
            )
        # GradScaler expects an overflow now and then.
        overflow = found_inf is not None and bool(found_inf != 0.0)
        if not (norm.isfinite() or overflow):
            raise RuntimeError(
                f"the norm of the gradients is {norm.item()}; nothing has been changed. Look for "
                'what made it so, or skip such steps with nonfinite_grad_norm="skip"'
            )
    return scaling._replace(norm=norm)


@torch.no_grad()
def total_norm(found: Dispatcher) -> Tensor:
    """The 2-norm of all gradients taken together, over all ranks for those of DTensors.

    In float64, in an order that is fixed on one device and layout; outside the numerical contract.

    Args:
        found: what has collected the parameters that move.

    Returns:
        a float64 scalar on a device that gradients are on; nothing waits for it.

    Raises:
        RuntimeError: a parameter is known to be one rank's part of what the norm should be over.
    """
    of_mesh: dict[Any, list[Tensor]] = {}
    plain: list[Tensor] = []
    for param in found.moving():
        if is_fsdp1_s(param):
            raise RuntimeError(
                "the norm that max_grad_norm and nonfinite_grad_norm go by would be that of one "
                "rank's shards under FullyShardedDataParallel, and another on every rank: leave "
                "them out and call model.clip_grad_norm_(...) before the step, or shard with "
                "torch.distributed.fsdp.fully_shard"
            )
        if isinstance(param, DTensor):
            of_mesh.setdefault((param.device_mesh, param.placements), []).append(param)
        else:
            plain.append(param)
    if plain or not of_mesh:
        of_mesh[None] = plain
    if len(of_mesh) == 1:
        places = dict.fromkeys(of_mesh)
    else:
        place_of = found.place_of()
        places = {mesh: {place_of[p] for p in params} for mesh, params in of_mesh.items()}
    sums = []
    for mesh, params in of_mesh.items():
        device = params[0].device if params else torch.device("cpu")
        own = _sum(found.squares(places[mesh]), device)
        sums.append(own if mesh is None else _over_ranks(own, *mesh))
    return _sum(sums, sums[0].device).sqrt()


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
