"""Loading a checkpoint without ``torch.optim``'s cast of every floating state to the
parameter's dtype, which would make float32 moments and slow weights of a bfloat16 model bfloat16.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

from . import eval_mode, formats, hyperparameters
from .codecs import Codec
from .formats import Format
from .new_state import new_part
from .tensors import DTensor, check_allocated, is_count, local, plain, shown

COUNTS = ("step", "lookahead_step")
LOOKAHEAD = (
    "slow_param",
    "slow_residual",
    "outer_momentum_buffer",
    "lookahead_step",
    eval_mode.FAST,
)
# Keys of other optimizers' groups that say what a step is; any other key means nothing to a step.
FOREIGN_KEYS = (
    *("amsgrad", "momentum_decay", "N_sma_threshhold", "schedule_decay"),
    *("clip_exp", "caution", "wd_ratio", "ns_steps"),
)


class Shielded:
    """A parameter's saved state, which ``torch.optim`` hands through untouched."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def shield_state(
    optimizer: Optimizer, state_dict: dict[str, Any], *, names: Sequence[str], strict: bool
) -> dict[str, Any]:
    """A load_state_dict pre-hook: check what is to be loaded and shield it from the cast.

    Args:
        names: of the streams that the optimizer's rule has.
        strict: whether what the optimizer does not know is an error.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter's state is not one of RAdam,
            Ranger or Adam, or is for another parameter.
        RuntimeError: a state has no memory. Nothing has been changed in either case.
    """
    params = parameters(state_dict, optimizer.param_groups)
    eval_mode.check_saved(state_dict, getattr(optimizer, "_options", {}))
    lookahead = "slow_param" in names
    foreign = []
    groups = []
    for i, (saved, group) in enumerate(
        zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ):
        saved = dict(saved)
        if lookahead:
            hyperparameters.rename_lookahead(saved)
        with naming(i):
            saved = hyperparameters.with_whole_period(saved)
            hyperparameters.check({**optimizer.defaults, **group, **saved}, lookahead=lookahead)
        keys = [key for key in FOREIGN_KEYS if not any(saved.get(key) is x for x in (None, False))]
        foreign += [f"{key!r} of group {i}" for key in keys]
        groups.append({key: value for key, value in saved.items() if key not in keys})

    state: dict[Any, Any] = {}
    for key, value in state_dict["state"].items():
        if key not in params:
            if has_tensors(value):
                foreign.append(f"the state of {key!r}, which no group names")
            else:
                state[key] = copy.deepcopy(value)
            continue
        lacking = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in value]
        if lacking and any(name in value for name in ("step", *formats.PARTS)):
            raise ValueError(
                f"loaded state dict: the state of parameter {key} has {list(value)} but no "
                f"{lacking[0]!r}; load a checkpoint of Ranger, RAdam, Adam or AdamW"
            )
        known = {"step", eval_mode.FAST, *formats.known_parts(params[key].dtype, names)}
        for rest in ("exp_avg_scale", "exp_avg_sq_scale"):
            stream = value.get(rest.removesuffix("_scale"))
            if isinstance(stream, Tensor) and stream.dtype == torch.uint8 and rest not in value:
                raise ValueError(
                    f"loaded state dict: the state of parameter {key} has 8-bit moments but no "
                    f"{rest!r}, without which they mean nothing"
                )
        kept = {}
        for name, item in value.items():
            if name in known:
                check_value(name, item, params[key], key)
            elif name in formats.PARTS or name in LOOKAHEAD:
                continue  # of another precision, or of another kind of optimizer
            elif isinstance(item, Tensor):
                foreign.append(repr(name))
                continue
            kept[name] = item
        state[key] = Shielded(kept)
    who = type(optimizer).__name__
    report(foreign, who, strict)
    slow = any("slow_param" in state_dict["state"].get(key, ()) for key in params)
    if slow and not lookahead:
        warnings.warn(
            f"loaded state dict: 'slow_param' was left out, as {who} has no slow weights; to go on "
            "with them, load it into Ranger or Lookahead",
            UserWarning,
            stacklevel=2,
        )
    return {**state_dict, "state": state, "param_groups": groups}


def split_state(
    state: dict[Any, Any], params: dict[Any, Tensor], strict: bool
) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
    """A checkpoint's state as the inner optimizer's and Lookahead's, which is checked."""
    inner, ours, foreign = {}, {}, []
    for key, value in state.items():
        if isinstance(value, dict):
            mine = {name: value[name] for name in LOOKAHEAD if name in value}
            if mine and key not in params:
                foreign.append(f"the state of {key!r}, which no group names")
                continue
            if "slow_param" in value and "step" in value:  # Ranger counts a cycle by its steps
                mine.setdefault("lookahead_step", value["step"])
            for name, item in mine.items():
                check_value(name, item, params[key], key)
            others = [name for name in value if name not in mine and is_lookaheads(name)]
            foreign += map(repr, others)
            value = {n: v for n, v in value.items() if n not in mine and n not in others}
            ours[key] = mine
        inner[key] = value
    report(foreign, "Lookahead", strict)
    return inner, ours


def is_lookaheads(name: Any) -> bool:
    """Whether a state has the name of a Lookahead's, of ours or of another package's."""
    return isinstance(name, str) and name.startswith(("slow_", "lookahead_"))


def parameters(state_dict: Any, groups: Sequence[dict[str, Any]]) -> dict[Any, Tensor]:
    """The parameters of an optimizer's groups by what a checkpoint calls them.

    Raises:
        ValueError: it is no checkpoint, or one of other groups or parameters.
        RuntimeError: the memory of a tensor in it was given back.
    """
    check_kind(state_dict, dict, "it")
    for path, value in tree_flatten_with_path(state_dict)[0]:
        if isinstance(value, Tensor):
            check_allocated(local(value.detach()), f"loaded state dict: {keystr(path)}")
    for name, kind in (("state", dict), ("param_groups", (list, tuple))):
        check_kind(state_dict.get(name), kind, repr(name))
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict: it has {len(saved_groups)} parameter groups, but the optimizer "
            f"has {len(groups)}; make the optimizer with the groups of the one that was saved"
        )
    params: dict[Any, Tensor] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        where = f"parameter group {i}"
        check_kind(saved, dict, where)
        check_kind(saved.get("params"), (list, tuple), f"'params' of {where}")
        names = saved.get("param_names")
        check_kind(names, (list, tuple, type(None)), f"'param_names' of {where}")
        for what, found in (("parameters", saved["params"]), ("names", names)):
            if found is not None and len(found) != len(group["params"]):
                raise ValueError(
                    f"loaded state dict: {where} has {len(found)} {what}, but the optimizer's has "
                    f"{len(group['params'])} parameters; load a checkpoint of the same model"
                )
        for key, param in zip(saved["params"], group["params"], strict=True):
            check_kind(key, (int, str), f"what {where} calls a parameter")
            if params.setdefault(key, param) is not param:
                raise ValueError(
                    f"loaded state dict: two parameters are called {key!r}, the second in {where}; "
                    "each needs a number of its own"
                )
    for key in params:
        check_kind(state_dict["state"].get(key, {}), dict, f"the state of parameter {key}")
    return params


def check_kind(value: Any, kind: Any, what: str) -> None:
    """Raise unless a part of a checkpoint is of the type that ``state_dict()`` gives it."""
    if not isinstance(value, kind):
        raise ValueError(
            f"loaded state dict: {what} is {shown(value)}; load what an optimizer's "
            "state_dict() returned"
        )


@contextmanager
def naming(i: int) -> Iterator[None]:
    """Have errors say which group of the checkpoint is wrong."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"loaded state dict, parameter group {i}: {error}") from error


def has_tensors(value: Any) -> bool:
    """Whether a state is a tensor, or a dict that has one."""
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(each, Tensor) for each in values)


def report(foreign: Sequence[str], who: str, strict: bool) -> None:
    """Say what a checkpoint has that ``who`` cannot use: an error if ``strict``, or a warning.

    Raises:
        ValueError: there is such, and ``strict`` is set.
    """
    if not foreign:
        return
    what = ", ".join(dict.fromkeys(foreign))
    if strict:
        raise ValueError(
            f"loaded state dict: {who} does not know {what}, and its meaning would be lost. Load a "
            "checkpoint of the same kind of optimizer, rename it in a load_state_dict pre-hook, or "
            "leave it out: load_state_dict(state_dict, strict=False)"
        )
    message = f"loaded state dict: left out {what}, which {who} does not know"
    warnings.warn(message, UserWarning, stacklevel=3)


def check_value(name: str, value: Any, param: Tensor, key: Any) -> None:
    """Raise unless a saved value can be what ``name`` says of ``param``.

    Raises:
        ValueError: says which, what it is and what it should be.
    """
    what = f"loaded state dict: {name!r} of parameter {key}"
    if isinstance(value, Tensor) and (
        value.layout != torch.strided or (value.is_meta and not param.is_meta)
    ):
        raise ValueError(
            f"{what} is a {value.layout} tensor on {value.device}, but state is dense memory that "
            "holds its values"
        )
    if name in COUNTS:
        if not is_count(value):
            raise ValueError(
                f"{what} is {shown(value)}, but it counts steps: a whole number, at least 0"
            )
        return
    shape = tuple(value.shape) if isinstance(value, Tensor) else f"none: it is {shown(value)}"
    part = "slow_param" if name == eval_mode.FAST else name  # a parameter's value as well
    wanted = formats.PARTS[part].shape_for(param.shape)
    if shape != wanted:
        raise ValueError(
            f"{what} has shape {shape}, but the parameter has shape {tuple(param.shape)}"
            + ("" if wanted == tuple(param.shape) else f", so that it should have {wanted}")
        )
    dtypes = formats.dtypes_of(part)
    is_bits = part not in formats.STREAMS or value.dtype in (torch.uint8, torch.int8)
    if is_bits and value.dtype not in dtypes:
        raise ValueError(
            f"{what} is {value.dtype}, but it is the bits of a "
            + " or ".join(map(str, dtypes))
            + ", which no other dtype keeps; save and load state without casting it"
        )
    kind = param.is_complex(), not param.is_complex()
    if not is_bits and (value.is_complex(), value.is_floating_point()) != kind:
        raise ValueError(
            f"{what} is {value.dtype}, but the parameter is {param.dtype}; real parameters have "
            "floating-point state, and complex ones complex state"
        )
    if placement(value) != placement(param):
        raise ValueError(
            f"{what} is {placement(value)}, but the parameter is {placement(param)}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict reshards state"
        )


def placement(tensor: Tensor) -> Any:
    """How a tensor is spread over ranks, comparable and in words."""
    if not isinstance(tensor, DTensor):
        return "a tensor of one rank"
    return f"a DTensor, {tensor.placements} on {tensor.device_mesh}"


def restore_state(param: Tensor, saved: dict[str, Any], format: Format) -> dict[str, Any]:
    """The state of ``param``, in memory of its own: on its device, and stored as ``format`` says.

    What is stored otherwise in the checkpoint is rounded to nearest.
    """
    state: dict[str, Any] = {}
    with torch.inference_mode(False):  # what is made in it could not be written outside
        for name, value in saved.items():
            if name in COUNTS:
                state[name] = step_tensor(value)
            elif name == eval_mode.FAST:
                state[name] = value.detach().to(param.device, copy=True)
            elif name not in formats.PARTS:
                state[name] = copy.deepcopy(value)
        for part in format.param.rest:
            if part.name in saved:
                state[part.name] = _restore_rest(param, saved[part.name], part.dtype)
        for stream in formats.STREAMS:
            if stream in saved:
                state |= _restore_stream(param, stream, saved, format)
    # Names that were read from a file are not the interned ones, which are compared faster.
    return {sys.intern(str(n)) if isinstance(n, str) else n: v for n, v in state.items()}


def _restore_rest(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """What is stored beside a parameter, which is its bits: as 16 bits, or as the upper 8."""
    value = value.detach()
    if value.dtype == dtype:
        return value.to(param.device, copy=True)
    if value.dtype == torch.bfloat16:
        value = value.view(torch.int16)
    wide = value.int() * (256 if value.dtype == torch.int8 else 1)
    if dtype == torch.int8:
        return ((wide + 128) >> 8).clamp(max=127).to(param.device, dtype)
    return wide.to(param.device, torch.int16).view(dtype)


def _restore_stream(
    param: Tensor, stream: str, saved: dict[str, Any], format: Format
) -> dict[str, Tensor]:
    """A stream and the rest of it."""
    parts = format.of(stream)
    codec: Codec = getattr(format, stream)
    source = formats.codec_of(stream, saved)  # None: numbers
    if source == codec or (source is None and not codec.rest):
        return {
            part.name: saved[part.name].detach().to(param.device, part.dtype_for(param), copy=True)
            for part in parts
        }
    new = {part.name: new_part(part, param) for part in parts}
    given = {
        name: plain(value).to(param.device).reshape(-1)
        for name, value in saved.items()
        if isinstance(value, Tensor)
    }
    main = given[stream]
    value = main.float() if source is None else source.decode(main, given, torch.float32)
    flat = {name: plain(tensor).reshape(-1) for name, tensor in new.items()}
    half = torch.full_like(value, 0x8000, dtype=torch.int32)
    codec.encode(value, flat[stream], flat, half)
    for name, tensor in new.items():  # of which reshape() may have made a copy
        plain(tensor).copy_(flat[name].view_as(plain(tensor)))
    return new


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
