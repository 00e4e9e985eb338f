"""Small runs of `python -m ranger_cuda train`, and whether two are the same."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import ranger_cuda
from ranger_cuda.cli import main

STEPS = 32  # no multiple of k = 6: the last one is in the middle of a Lookahead cycle
OPTIMIZERS = ["ranger", "lookahead-adamw", "radam"]
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "2"]
TINY += ["--data", argparse.__file__, "--threads", "1", "--device", "cpu", "--seed", "3"]
TINY += ["--steps", str(STEPS), "--evaluate-every", "10", "--checkpoint-every", "1"]
TINY += ["--optimizers", *OPTIMIZERS]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(ranger_cuda.__file__).parents[1])}


def train(out: Path, *flags: str) -> int:
    return main(["train", "--out", str(out), *flags])


def saved(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(out: Path, expected: Path) -> None:
    """Same steps, losses, weights and optimizer states, bit for bit; only times may differ."""
    ours, theirs = saved(out), saved(expected)
    assert ours["step"] == theirs["step"]
    for name, run in theirs["runs"].items():
        for key in ("loss", "evaluated_at", "validation_loss", "slow_validation_loss"):
            assert ours["runs"][name]["history"][key] == run["history"][key], (name, key)
        left, right = flat(ours["runs"][name]["model"]), flat(run["model"])
        left |= flat(ours["runs"][name]["optimizer"]["state"])
        right |= flat(run["optimizer"]["state"])
        assert left.keys() == right.keys()
        assert [key for key in right if not equal(left[key], right[key])] == []


def flat(state: object, path: str = "") -> dict[str, object]:
    """Every leaf of nested dicts and lists under its path."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, item in items for k, v in flat(item, f"{path}/{key}").items()}
    return {path: state}


def equal(left: object, right: object) -> bool:
    if isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right
