"""Eval mode as state and groups have it, so that checkpoints and copies take it along.

In eval mode a parameter with a slow weight holds that, rounded to its dtype, and its own value
is in its state. A checkpoint saved then resumes whichever weights the model was given: ``train()``
takes the parameter from the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tensors import shown

KEY = "eval_mode"  # of every group of an optimizer that opted in: loaders go by the keys they find
FAST = "fast_param"  # a parameter's value while its slow weight is in its place


def mark(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
    """Give groups that lack it the key, if the optimizer opted in."""
    if has_opted_in(options):
        for group in groups:
            group.setdefault(KEY, False)


def has_opted_in(options: Mapping[str, Any]) -> bool:
    """Whether an optimizer was made with ``eval_with_slow_weights=True``."""
    return options.get("eval_with_slow_weights", False)  # an older pickle has none


def is_on(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
    """Whether an optimizer is in eval mode. A group that was added since says no."""
    return has_opted_in(options) and any(group.get(KEY) for group in groups)


def check_saved(state_dict: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Raise if a checkpoint was saved in eval mode and cannot be resumed.

    Args:
        options: the optimizer's.

    Raises:
        ValueError: the fast weights would be lost.
    """
    for i, group in enumerate(state_dict["param_groups"]):
        in_eval_mode = group.get(KEY, False)
        if not isinstance(in_eval_mode, bool):
            raise ValueError(
                f"loaded state dict, parameter group {i}: Invalid {KEY} value: "
                f"{shown(in_eval_mode)}; it is True or False"
            )
        if in_eval_mode and not has_opted_in(options):
            raise ValueError(
                "loaded state dict: it was saved in eval mode, when the parameters held their slow "
                "weights. Load it into an optimizer made with eval_with_slow_weights=True, or call "
                "optimizer.train() before saving"
            )
        for key in group["params"]:
            state = state_dict["state"].get(key, {})
            if in_eval_mode and "slow_param" in state and FAST not in state:
                raise ValueError(
                    f"loaded state dict: it was saved in eval mode, but the state of parameter "
                    f"{key} has no {FAST!r}, without which its fast weight is lost. "
                    "torch.distributed.checkpoint leaves it out where the optimizer that loads is "
                    "in train mode: call optimizer.train() before saving"
                )
            if FAST in state and not in_eval_mode:
                raise ValueError(
                    f"loaded state dict: the state of parameter {key} has a {FAST!r}, but "
                    f"{KEY!r} of its group is not True; load what an optimizer's state_dict() "
                    "returned"
                )
