"""The state that a parameter has before its first update, and its slow weight as of now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .codecs import GROUP, Codec, Part
from .formats import STREAMS, Format
from .tensors import DTensor, local, plain


def new_part(part: Part, param: Tensor) -> Tensor:
    """A tensor of the state of ``param``, before its first update.

    Raises:
        ValueError: ``param`` is a shard that cuts groups of elements apart.
    """
    keep, dtype = torch.preserve_format, part.dtype_for(param)
    if part.is_grouped:
        return _new_groups(part, param)
    if part.starts_as_param:
        return param.detach().to(dtype, copy=True, memory_format=keep)
    return torch.zeros_like(param, dtype=dtype, memory_format=keep, requires_grad=False)


def _new_groups(part: Part, param: Tensor) -> Tensor:
    shape = part.shape_for(param.shape)
    if not isinstance(param, DTensor):
        return torch.zeros(shape, dtype=part.dtype, device=param.device)
    whole = len(shape) == len(param.shape) and param.shape[-1] % GROUP == 0
    if whole:
        groups = torch.distributed.tensor.zeros(
            shape, dtype=part.dtype, device_mesh=param.device_mesh, placements=param.placements
        )
        its = local(param.detach())
        if tuple(local(groups).shape) == part.shape_for(its.shape):
            return groups
    raise ValueError(
        f'state_dtype="8bit" keeps a scale for {GROUP} elements side by side, and a shard of shape '
        f"{tuple(local(param.detach()).shape)} of a parameter of shape {tuple(param.shape)} cuts "
        "them apart; use state_dtype=torch.bfloat16, or shard another dimension than the last, of "
        f"a multiple of {GROUP} elements"
    )


def value_of(format: Format, param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """What the next step of ``param`` starts from."""
    whole = all(part.name in state for part in format.param.rest)
    return format.param.decode(param, state, format.value) if whole else param.to(format.value)


@torch.no_grad()
def take_snapshot(format: Format, param: Tensor, state: Mapping[str, Any]) -> None:
    """Write to the slow weight in ``state`` the value that the next step of ``param`` starts from.

    Where ``state`` has no rest of the parameter, which that step then makes, it is the parameter.
    """
    tensors = {n: plain(value) for n, value in state.items() if isinstance(value, Tensor)}
    value = value_of(format, plain(param), tensors)
    # A slow weight has room for all that its parameter has: nothing is rounded.
    nothing = torch.zeros_like(value, dtype=torch.int32) if format.slow_param.is_random else None
    format.slow_param.encode(value, tensors["slow_param"], tensors, nothing)


@torch.no_grad()
def decoded(format: Format, param: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The values of ``param`` and of the streams in ``state``: real, of this rank, new memory."""
    flat = {n: plain(value).reshape(-1) for n, value in state.items() if isinstance(value, Tensor)}
    values = {"param": value_of(format, plain(param).reshape(-1), flat)}
    for stream in STREAMS:
        if stream in flat:
            codec: Codec = getattr(format, stream)
            values[stream] = codec.decode(flat[stream], flat, format.value)
    return {stream: value.clone().view(plain(param).shape) for stream, value in values.items()}


SLOW_PARTS = ("slow_param", "slow_residual")  # of a state: its slow weight


def without_slow_weight(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a slow weight is made from anew."""
    return {name: value for name, value in state.items() if name not in SLOW_PARTS}


def new_state(
    format: Format, param: Tensor, state: Mapping[str, Any], streams: tuple[str | None, ...]
) -> dict[str, Tensor]:
    """What ``state`` lacks of the parts of ``param``, and of these streams of it."""
    moments = [stream for stream in streams if stream != "slow_param"]
    new = {
        part.name: new_part(part, param) for part in format.parts(moments) if part.name not in state
    }
    if "slow_param" in streams and any(p.name not in state for p in format.of("slow_param")):
        new |= new_slow_weight(format, param, {**state, **new})
    return new


def new_slow_weight(format: Format, param: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A slow weight: ``param`` as it is."""
    new = {part.name: new_part(part, param) for part in format.of("slow_param")}
    take_snapshot(format, param, {**state, **new})
    return new
