"""Loading a checkpoint without ``torch.optim``'s cast of every floating state to the
parameter's dtype, which would make float32 moments and slow weights of a bfloat16 model bfloat16.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import hyperparameters
from .tensors import is_count, local, state_dtype

# State of the parameter's shape: its precision is the parameter's, or its own.
MOMENTS = ("exp_avg", "exp_avg_sq", "slow_param")
MASTERS = {"residual": torch.int16, "master": torch.float32}


class Shielded:
    """A parameter's saved state, which ``torch.optim`` hands through untouched."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def shield_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: check what is to be loaded and shield it from the cast.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter's state is not one of RAdam,
            Ranger or Adam, or is for another shape. Nothing has been changed then.
    """
    params: dict[Any, Tensor] = {}
    for i, (saved, group) in enumerate(
        zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    ):
        params.update(zip(saved["params"], group["params"], strict=False))
        saved = dict(saved)
        lookahead = "lookahead_k" in optimizer.defaults
        if lookahead:
            hyperparameters.rename_lookahead(saved)
        try:
            hyperparameters.check({**optimizer.defaults, **group, **saved}, lookahead=lookahead)
        except (TypeError, ValueError) as error:
            raise ValueError(f"loaded state dict, parameter group {i}: {error}") from error
    state = {}
    for key, value in state_dict["state"].items():
        if key in params and isinstance(value, dict):
            _check(value, params[key], key)
            value = Shielded(value)
        state[key] = value
    return {**state_dict, "state": state}


def _check(state: dict[str, Any], param: Tensor, key: Any) -> None:
    lacking = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in state]
    if state and lacking:
        raise ValueError(
            f"loaded state dict: the state of parameter {key} has {sorted(state)} but no "
            f"{lacking[0]!r}; load a checkpoint of Ranger, RAdam, Adam or AdamW"
        )
    check_values(state, param, key)


def check_values(state: dict[str, Any], param: Tensor, key: Any) -> None:
    """Raise if a saved state is no step count, or of a parameter of another shape.

    Raises:
        ValueError: says which, what it is and what it should be.
    """
    for name, value in state.items():
        if name.endswith("step"):
            if not is_count(value):
                raise ValueError(
                    f"loaded state dict: {name!r} of parameter {key} is {value!r}, but it counts "
                    "steps: a whole number, at least 0"
                )
        elif name in MOMENTS or name in MASTERS:
            shape = tuple(value.shape) if isinstance(value, Tensor) else f"none: it is {value!r}"
            if shape != tuple(param.shape):
                raise ValueError(
                    f"loaded state dict: {name!r} of parameter {key} has shape {shape}, but the "
                    f"parameter has shape {tuple(param.shape)}"
                )


def restore_state(param: Tensor, saved: Shielded) -> dict[str, Any]:
    """The state of ``param``: on its device, and each tensor in the precision it is kept in."""
    # Names that were read from a file are not the interned ones, which are compared faster.
    return {
        sys.intern(str(name)): restore_value(param, name, value)
        for name, value in saved.state.items()
    }


def restore_value(param: Tensor, name: str, value: Any) -> Any:
    """One state value of ``param``, where and as it is kept."""
    if name.endswith("step"):
        return step_tensor(value)
    if not isinstance(value, Tensor):
        return value
    dtype = state_dtype(param) if name in MOMENTS else MASTERS.get(name, value.dtype)
    return value.to(param.device, dtype)


CPU = torch.device("cpu")


def step_tensor(value: Any = 0.0, device: torch.device = CPU) -> Tensor:
    """A step count as it is kept: a float32 scalar, on the CPU as in ``torch.optim``, or where the
    kernels that count run."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        # A copy: a checkpoint's own must not count along.
        return local(value.detach()).reshape(()).to(device, torch.float32, copy=True)
    value = local(value).item() if isinstance(value, Tensor) else value
    return torch.full((), float(value), dtype=torch.float32, device=device)


def is_step_tensor(value: Any, device: torch.device = CPU) -> bool:
    """Whether ``value`` is a step count as it is kept on ``device``."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.device == device
        and value.dim() == 0
    )
