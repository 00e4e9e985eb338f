"""The hyperparameters of a parameter group: read, checked, and said clearly when wrong."""

from __future__ import annotations

import contextlib
import math
import operator
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from . import formats, tensors
from .tensors import shown

# Groups do not know their parameters' dtypes: what float32 cannot hold is no hyperparameter.
LARGEST = torch.finfo(torch.float32).max


class Hyperparameters(NamedTuple):
    """One group's hyperparameters as plain numbers, in the order of ``csrc/rule/schedule.h``."""

    lr: float | Tensor  # a tensor on an accelerator stays there: reading it would synchronise
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    rho_threshold: float
    alpha: float
    outer_momentum: float
    low: float  # bounds of the parameter; infinite: none
    high: float
    k: int  # 0: no Lookahead
    max_grad_norm: float  # infinity: no clipping
    decoupled_weight_decay: bool
    maximize: bool
    outer_nesterov: bool = True
    seed: int = 0  # of 64 bits, signed


# What a group calls Lookahead's, and what a constructor does.
LOOKAHEAD = {
    "lookahead_k": "k",
    "lookahead_alpha": "alpha",
    "outer_momentum": "outer_momentum",
    "outer_nesterov": "outer_nesterov",
}

# Of how many dimensions at least a parameter is whose gradient a group's `centralize` means.
CENTRALIZED_DIMS = {None: math.inf, "conv": 4, "all": 2}

_PACKED = struct.Struct("=10dqd4q")


def packed(groups: Iterable[Hyperparameters]) -> bytes:
    """The hyperparameters of all groups as the kernels have them, 8 bytes each."""
    return b"".join(_PACKED.pack(*group) for group in groups)


def rename_lookahead(group: dict[str, Any]) -> None:
    """Give ``k`` and ``alpha``, as the constructor calls them, the names they have in a group.

    There ``alpha`` alone may be another library's, which sets it to the smoothing of RMSprop.
    """
    for name in ("k", "alpha"):
        if name in group and f"lookahead_{name}" not in group:
            group[f"lookahead_{name}"] = group.pop(name)


def read(group: Mapping[str, Any], *, lookahead: bool) -> Hyperparameters:
    """Read a parameter group. Nothing is checked here; see :func:`check`."""
    beta1, beta2 = group["betas"]
    lr, max_grad_norm = group["lr"], group["max_grad_norm"]
    return Hyperparameters(
        lr if tensors.on_accelerator(lr) else _number(lr),
        _number(beta1),
        _number(beta2),
        _number(group["eps"]),
        _number(group["weight_decay"]),
        _number(group["rho_threshold"]),
        _number(group["lookahead_alpha"]) if lookahead else 1.0,
        _number(group["outer_momentum"]) if lookahead else 0.0,
        *_bounds(group["bounds"]),
        operator.index(group["lookahead_k"]) if lookahead else 0,
        math.inf if max_grad_norm is None else float(max_grad_norm),
        bool(group["decoupled_weight_decay"]),
        bool(group["maximize"]),
        bool(group["outer_nesterov"]) if lookahead else True,
        operator.index(group["seed"]),
    )


def _bounds(bounds: Any) -> tuple[float, float]:
    low, high = (None, None) if bounds is None else bounds
    return -math.inf if low is None else _number(low), math.inf if high is None else _number(high)


def _number(value: Any) -> float:
    if type(value) is float:  # as most are
        return value
    tensors.check_allocated(value, "a hyperparameter")
    is_array = isinstance(value, (numpy.ndarray, numpy.generic))
    is_other = value.dtype.kind not in "iuf" if is_array else _is_bool(value)
    if is_other or isinstance(value, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"{shown(value)} is no number")
    try:
        return float(value)
    except (OverflowError, RuntimeError) as error:  # a tensor's are RuntimeErrors
        raise TypeError(f"{shown(value)} is no number: {error}") from error


def _is_bool(value: Any) -> bool:
    is_bool_tensor = isinstance(value, Tensor) and value.dtype == torch.bool
    return is_bool_tensor or isinstance(value, (bool, numpy.bool_))


def _is_within(value: Any, least: float, most: float) -> bool:
    try:
        return least <= _number(value) <= most
    except (TypeError, ValueError):
        return False


def check(group: Mapping[str, Any], *, lookahead: bool) -> Hyperparameters:
    """Read a parameter group and raise on the first value that no step may use.

    Args:
        lookahead: whether the optimizer has slow weights. A group of one without may still have
            ``lookahead_k`` and ``lookahead_alpha``, from a checkpoint of one with, and they mean
            nothing there.

    Raises:
        ValueError: a value is out of range; the message has the value, the rule and a way out.
        TypeError: a value is not a number.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but its shape is {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and lr.is_meta:
        raise TypeError(f"Tensor lr must be a number, but is on {lr.device} and has no value")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {shown(betas)}; give two numbers, like (0.95, 0.999)")
    check_max_grad_norm(group["max_grad_norm"])
    check_bounds(group["bounds"])
    for name in ("decoupled_weight_decay", "maximize"):
        check_choice(name, group[name], (True, False))
    if lookahead:
        check_lookahead(*(group[name] for name in LOOKAHEAD))
    try:
        hyper = read(group, lookahead=lookahead)
    except (TypeError, ValueError) as error:
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        raise TypeError(
            f"Every hyperparameter must be a number, in {shown(rest)}: {error}"
        ) from error
    if not (tensors.on_accelerator(hyper.lr) or 0.0 <= hyper.lr <= LARGEST):
        raise ValueError(
            f"Invalid learning rate: {lr}; it must be finite in float32 and at least 0"
        )
    for i, beta in enumerate((hyper.beta1, hyper.beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(
                f"Invalid beta parameter at index {i}: {betas[i]}; it must be in [0, 1)"
            )
    check_eps(hyper.eps)
    if not 0.0 <= hyper.weight_decay <= LARGEST:
        raise ValueError(
            f"Invalid weight_decay value: {group['weight_decay']}; it must be finite in float32 "
            "and at least 0"
        )
    if not hyper.rho_threshold >= 4.0:
        raise ValueError(
            f"Invalid rho_threshold value: {group['rho_threshold']}; it must be at least 4, "
            "where the rectification term becomes real (the paper's value; torch uses 5)"
        )
    check_choice("weight_rounding", group["weight_rounding"], formats.WEIGHT_ROUNDINGS)
    check_choice("centralize", group["centralize"], tuple(CENTRALIZED_DIMS))
    if not -(2**63) <= hyper.seed < 2**63:
        raise ValueError(f"Invalid seed value: {hyper.seed}; it must fit a signed 64-bit integer")
    return hyper


def with_whole_period(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group whose Lookahead period is an int, if it is a whole number: other formats have
    6.0, or a tensor, for 6."""
    if "lookahead_k" not in group:
        return group
    k = group["lookahead_k"]
    if isinstance(k, Tensor) and k.numel() == 1 and not k.is_meta:
        k = k.item()
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    return {**group, "lookahead_k": k}


def check_eps(eps: float) -> None:
    """Raise unless ``eps`` keeps a zero gradient from dividing by zero."""
    # Half of float32's smallest number and less rounds to 0, which is the same NaN as eps = 0.
    if not 2.0**-150 < eps <= LARGEST:
        raise ValueError(
            f"Invalid epsilon value: {eps}; it must be finite and above 0 in float32: with 0, a "
            "parameter whose gradient is exactly 0 becomes NaN. Use 1e-8 or more"
        )


def check_lookahead(
    k: Any, alpha: Any, outer_momentum: Any = 0.0, outer_nesterov: Any = True
) -> None:
    """Raise unless these are a Lookahead period, interpolation factor and momentum."""
    tensors.check_allocated(k, "k")
    try:
        period = 0 if _is_bool(k) else operator.index(k)
    except (TypeError, RuntimeError):  # a tensor's is a RuntimeError
        period = 0
    if not 1 <= period < 2**31:
        raise ValueError(
            f"Invalid k value: {shown(k)}; the Lookahead period is a whole number of steps, at "
            "least 1 and below 2**31"
        )
    if not _is_within(alpha, 0.0, 1.0):
        raise ValueError(
            f"Invalid alpha value: {shown(alpha)}; the Lookahead interpolation factor is in [0, 1]"
        )
    if not _is_within(outer_momentum, 0.0, math.nextafter(1.0, 0.0)):
        raise ValueError(
            f"Invalid outer_momentum value: {shown(outer_momentum)}; the momentum of slow weights "
            "is in [0, 1), 0 for none"
        )
    check_choice("outer_nesterov", outer_nesterov, (True, False))


def check_max_grad_norm(max_grad_norm: Any) -> None:
    """Raise unless ``max_grad_norm`` is a norm to clip to, or None."""
    least = math.ulp(0.0)
    if max_grad_norm is not None and not _is_within(max_grad_norm, least, math.inf):
        raise ValueError(
            f"Invalid max_grad_norm value: {shown(max_grad_norm)}; it must be above 0, or None for "
            "no clipping"
        )


def check_bounds(bounds: Any) -> None:
    """Raise unless these are a lowest and a highest value, each of which may be None, or None."""
    low, high = math.nan, math.nan
    if bounds is None or isinstance(bounds, (tuple, list, Tensor, numpy.ndarray)):
        with contextlib.suppress(TypeError, ValueError):
            low, high = _bounds(bounds)
    # Beyond what float32 holds a finite number would become an infinite parameter.
    from_low = low == -math.inf or abs(low) <= LARGEST
    to_high = high == math.inf or abs(high) <= LARGEST
    if not (low <= high and from_low and to_high):
        raise ValueError(
            f"Invalid bounds value: {shown(bounds)}; give the lowest and the highest value of a "
            "parameter, like (-1.0, 1.0), in float32's range, None for none"
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of those that this version has."""
    if isinstance(value, Tensor) or value not in choices:
        raise ValueError(
            f"Invalid {name} value: {shown(value)}; this version has "
            + ", ".join(repr(choice) for choice in choices)
        )
