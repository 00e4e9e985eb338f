"""What the kernels see of a tensor: plain, real, strided, on one device."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import formats
from .codecs import Part

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
else:  # a torch built without it has none of these to tell apart

    class FSDPModule:  # type: ignore[no-redef]
        """Never a module's."""

    class DTensor(Tensor):  # type: ignore[no-redef]
        """Never instantiated."""


HOST = ("cpu",)  # types of devices whose memory the host reads without waiting


def on_accelerator(value: Any) -> bool:
    """Whether ``value`` is a tensor that the host cannot read without waiting for a device."""
    return isinstance(value, Tensor) and value.device.type not in HOST


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a graph."""
    return any(
        module.is_available() and module.is_current_stream_capturing()
        for module in (torch.cuda, torch.xpu)
        if hasattr(module, "is_current_stream_capturing")  # XPU's is younger than its module
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        shard = tensor.to_local()
    # A shard that is still being communicated is a wrapper around the tensor to wait for.
    return shard.wait() if hasattr(shard, "wait") else shard


def shard_of(param: Tensor) -> tuple[int, bool, int]:
    """Where in the whole parameter this rank's elements begin, counted in row-major order; whether
    they are whole slices along the first dimension; and how many dimensions it has.

    The first is 0 where they do not lie side by side there: a DTensor sharded along another
    dimension than its first.
    """
    if not isinstance(param, DTensor):
        return 0, True, param.dim()
    whole_slices = all(
        placement.is_replicate()
        or (isinstance(placement, Shard) and placement.dim % param.dim() == 0)
        for placement in param.placements
    )
    first = 0
    if whole_slices and param.dim():
        _, offset = compute_local_shape_and_global_offset(
            param.shape, param.device_mesh, param.placements
        )
        first = offset[0] * param.shape[1:].numel()
    return first, whole_slices, param.dim()


def is_fsdp1_s(param: Tensor) -> bool:
    """Whether ``param`` is a flat parameter of FullyShardedDataParallel, or (``use_orig_params``) a
    view of one: a plain tensor, but of this rank alone."""
    return "_fsdp_flattened" in vars(param)  # which torch marks them with


def plain(tensor: Tensor) -> Tensor:
    """A real, detached view of this rank's memory: complex numbers become pairs."""
    tensor = local(tensor.detach())
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def plain_grad(param: Tensor, name: str = "the parameter") -> Tensor:
    """The gradient of ``param`` as the kernels may read it: real, strided, same device.

    Copies only where the memory does not hold the values themselves (a lazy conjugate or
    negation, a DTensor laid out otherwise than its parameter, integers).

    Args:
        param: a parameter whose ``grad`` is not None.
        name: what error messages call the parameter.

    Raises:
        RuntimeError: the gradient is sparse, without memory, or does not fit the parameter.
    """
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is {grad.layout}, and sparse gradients are not supported; "
            "make it dense (sparse=False in torch.nn.Embedding, or param.grad.to_dense())"
        )
    if isinstance(param, DTensor) != isinstance(grad, DTensor):
        raise RuntimeError(
            f"{name} is a {type(param).__name__} and its gradient a {type(grad).__name__}; both "
            "must be DTensors, or neither"
        )
    if isinstance(param, DTensor) and isinstance(grad, DTensor):
        if grad.device_mesh != param.device_mesh:
            raise RuntimeError(f"{name} and its gradient are on different device meshes")
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
    grad = local(grad.detach())
    check_allocated(grad, f"the gradient of {name}")
    target = local(param.detach())
    if grad.shape != target.shape or grad.device != target.device:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)} on {grad.device}, but the "
            f"parameter has shape {tuple(target.shape)} on {target.device}; call zero_grad() "
            "after moving or resizing a model"
        )
    if grad.is_complex() != target.is_complex():
        raise RuntimeError(
            f"the gradient of {name} is {grad.dtype}, but the parameter is {target.dtype}"
        )
    grad = grad.resolve_conj().resolve_neg()
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    if grad.dtype in formats.GRAD_DTYPES:
        return grad
    return grad.to(formats.value_dtype(target.dtype))


def check_param(param: Tensor, name: str) -> None:
    """Raise if no backend could write to ``param`` in place.

    Raises:
        ValueError: it has no memory of its own for each of its elements.
        RuntimeError: its memory was given back.
    """
    where = local(param.detach())
    if where.layout != torch.strided or where.device.type == "meta":
        raise ValueError(
            f"{name} is a {where.layout} tensor on {where.device}; an optimizer needs dense "
            "memory to update: materialize the model before the first step"
        )
    check_allocated(where, name)
    if is_expanded(where):
        raise ValueError(
            f"{name} is an expanded tensor, several of whose elements share memory; make it "
            "contiguous: param.data = param.data.contiguous()"
        )
    if where.is_conj():
        raise ValueError(
            f"{name} is a lazy conjugate of its memory; resolve it: "
            "param.data = param.data.resolve_conj()"
        )


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements of ``tensor`` share memory, so that none can be written alone."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(n > 1 and not stride for n, stride in strides)


def check_allocated(value: Any, what: str) -> None:
    """Raise if ``value`` is a tensor whose memory was given back.

    Raises:
        RuntimeError: its storage was resized to 0, as wrappers do that shard or offload a model.
    """
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
        return  # what a wrapper stands for is torch's to look at
    if value.layout == torch.strided and value.numel() and not value.untyped_storage().nbytes():
        raise RuntimeError(
            f"{what} is not allocated: its storage was resized to 0. Bring its memory back before "
            "the step (out of the context that offloads or unshards the model, say)"
        )


class _Repr(reprlib.Repr):
    def repr1(self, x: Any, level: int) -> str:
        try:
            check_allocated(x, "")
        except RuntimeError:  # to read it would end the process
            return f"a tensor of shape {tuple(x.shape)} that is not allocated"
        return super().repr1(x, level)


def shown(value: Any) -> str:
    """``repr(value)`` for an error message: not too long, and of any tensor, allocated or not."""
    return _SHORT.repr(value)


_SHORT = _Repr()
_SHORT.maxdict, _SHORT.maxother, _SHORT.maxstring = 30, 200, 200


def is_count(value: Any) -> bool:
    """Whether ``value`` can be a number of steps: of any type that ``torch.optim`` ever had."""
    if isinstance(value, Tensor):
        value = local(value).item() if value.numel() == 1 and not value.is_complex() else None
    # float32 counts no further than 2^24; a step after these counts none.
    return isinstance(value, (int, float)) and 0 <= value <= 2**24 and float(value).is_integer()


def check_state(
    param: Tensor,
    state: dict[str, Any],
    parts: Iterable[Part],
    name: str,
    on_host: Iterable[str] = (),
) -> None:
    """Raise if what ``state`` has of ``parts`` no longer fits its parameter.

    Args:
        on_host: what may also be on the host.

    Raises:
        RuntimeError: a state tensor is on another device, or of another shape or precision.
    """
    target = local(param.detach())
    for part in parts:
        key = part.name
        if not isinstance(state.get(key), Tensor):
            raise RuntimeError(
                f"state {key!r} of {name} is {state.get(key)!r}, but it must be a tensor"
            )
        value = local(state[key])
        check_allocated(value, f"state {key!r} of {name}")
        found = (value.dtype, value.device, tuple(value.shape))
        device = target.device
        if key in on_host and value.device.type == "cpu":
            device = value.device
        wanted = (part.dtype_for(target), device, part.shape_for(target.shape))
        if found != wanted:
            raise RuntimeError(
                f"state {key!r} of {name} is {found[0]} on {found[1]} of shape {found[2]}, but the "
                f"parameter needs {wanted[0]} on {wanted[1]} of shape {wanted[2]}. After moving or "
                "converting a model, optimizer.load_state_dict(optimizer.state_dict()) brings the "
                "state along; a parameter of another shape needs a new optimizer"
            )
        if value.is_neg() or value.is_conj():
            raise RuntimeError(
                f"state {key!r} of {name} is a lazy negation or conjugate of its memory; resolve it"
            )
        if is_expanded(value):
            raise RuntimeError(
                f"state {key!r} of {name} is an expanded tensor, several of whose elements share "
                "memory; make it contiguous"
            )
