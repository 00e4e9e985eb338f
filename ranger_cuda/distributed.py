"""An optimizer's part of a checkpoint of torch.distributed.checkpoint, of whatever optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from .convert import check_target, convert_checkpoint

Path = tuple[Any, ...]  # the keys and indices under which a value was saved


def load_distributed_checkpoint(
    model: Module,
    optimizer: Optimizer,
    checkpoint_id: str | os.PathLike[str],
    key: str = "optimizer",
) -> None:
    """Load an optimizer's state from a checkpoint of ``torch.distributed.checkpoint``.

    It may be of AdamW or another optimizer that :func:`convert_checkpoint` knows, from any number
    of ranks: each rank reads its shards. (``dcp.load`` alone asks for ``slow_param`` and for keys
    of groups that a checkpoint of AdamW does not have.) ::

        saved = {"model": ..., "optimizer": get_optimizer_state_dict(model, adamw)}
        dcp.save(saved, checkpoint_id=path)

        optimizer = ranger_cuda.Ranger(model.parameters())
        ranger_cuda.load_distributed_checkpoint(model, optimizer, path)

    The model's weights are not loaded here, and may be before or after: slow weights that the
    checkpoint has not start from the parameters as they are at the next step.

    Args:
        model: the one whose parameters ``optimizer`` has; sharded, or not.
        optimizer: a :class:`Ranger`, :class:`RAdam` or :class:`Lookahead`.
        checkpoint_id: the checkpoint's folder, the same on every rank.
        key: under which the optimizer was saved; with dots where it is nested ("app.optimizer").
            Also with ``flatten_optimizer_state_dict=True``.

    Raises:
        ValueError: the checkpoint has nothing under ``key``, lacks a parameter, or cannot be
            converted. Parameters, hyperparameters and state that was there are unchanged then.
        TypeError: ``optimizer`` is not of this package.
        torch.distributed.checkpoint.CheckpointException: the checkpoint cannot be read.
    """
    check_target(optimizer)
    metadata = dcp.FileSystemReader(checkpoint_id).read_metadata()
    saved_paths = metadata.planner_data or {}
    start = tuple(key.split("."))
    paths = {
        name: keys[len(start) :]
        for name, keys in saved_paths.items()
        if keys[: len(start)] == start
    }
    if not paths:
        found = dict.fromkeys(str(keys[0]) for keys in saved_paths.values())
        raise ValueError(
            f"{checkpoint_id} has nothing under {key!r}; it has {', '.join(map(repr, found))}"
        )
    wanted: Any = get_optimizer_state_dict(model, optimizer)
    fully_qualified = [group["params"] for group in wanted["param_groups"]]
    paths = {name: _unflattened(keys) for name, keys in paths.items()}
    weights = get_model_state_dict(model)
    flat: dict[str, Any] = {}
    for name, keys in paths.items():
        saved = metadata.state_dict_metadata[name]
        if isinstance(saved, TensorStorageMetadata):
            own = wanted["state"].get(keys[1], {}).get(keys[2]) if len(keys) == 3 else None
            flat[name] = _place(saved, own, weights.get(keys[1]))
        else:
            flat[name] = None
    dcp.load(flat, checkpoint_id=checkpoint_id)
    state_dict = _nested({keys: flat[name] for name, keys in paths.items()}, fully_qualified)
    lacking = {name for names in fully_qualified for name in names}
    lacking -= {name for group in state_dict["param_groups"] for name in group["params"]}
    if lacking:
        raise ValueError(
            f"{checkpoint_id} has no optimizer state of {', '.join(sorted(lacking))}; load a "
            "checkpoint of the same model"
        )
    set_optimizer_state_dict(model, optimizer, convert_checkpoint(state_dict, optimizer))


def _unflattened(keys: Path) -> Path:
    """A path as it is without ``flatten_optimizer_state_dict``, which joins all with dots."""
    if len(keys) != 1:
        return keys
    kind, _, rest = str(keys[0]).partition(".")
    return (kind, *rest.rsplit(".", 1))


def _place(saved: TensorStorageMetadata, own: Any, weight: Any) -> Tensor:
    """Memory for a saved tensor, spread over ranks as the optimizer's own or the parameter is."""
    dtype = saved.properties.dtype
    for like in (own, weight):
        if isinstance(like, Tensor) and like.shape == saved.size:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=dtype)


def _nested(values: Mapping[Path, Any], groups: Iterable[list[str]]) -> dict[str, Any]:
    """A state dict from its values by their paths; its groups are the optimizer's, if they were
    saved for each parameter."""
    state: dict[str, Any] = {}
    saved: dict[Any, dict[str, Any]] = {}
    for (kind, which, *rest), value in values.items():
        target = state if kind == "state" else saved
        (name,) = rest
        target.setdefault(which, {})[name] = value
    if all(isinstance(which, int) for which in saved):
        return {"state": state, "param_groups": [saved[i] for i in sorted(saved)]}
    param_groups = [
        {**saved[names[0]], "params": [name for name in names if name in saved]}
        for names in groups
        if names and names[0] in saved
    ]
    return {"state": state, "param_groups": param_groups}
