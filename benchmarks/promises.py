"""What we promise of the step's time, and whether a result keeps it."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

from .contestants import ADAMW, LOW, LOWEST, OURS, PURE, TRITON


class Promise(NamedTuple):
    """At most this fraction of another's time."""

    gpu: bool
    who: str
    other: str
    workloads: list[str] | None  # None: all
    limit: float


LARGE = ["1e9", "2.5e8", "64 x 1024^2"]
MODELS = ["resnet50", "vit-l/16", "gpt2", "llama-1b"]
PROMISES = [
    Promise(False, OURS, ADAMW, ["64 x 1024^2"], 1.0),
    Promise(False, OURS, "optimi Ranger", ["64 x 1024^2"], 1 / 2),
    Promise(False, OURS, "pytorch-optimizer Ranger", ["64 x 1024^2"], 1 / 4),
    Promise(False, OURS, ADAMW, ["1000 x 64^2"], 1 / 2),
    Promise(False, OURS, ADAMW, ["1000 x 1"], 1 / 4.5),
    Promise(False, LOW, PURE, ["64 x 1024^2"], 1.3),
    Promise(False, LOWEST, PURE, ["64 x 1024^2"], 1.6),
    Promise(True, OURS, ADAMW, LARGE, 1.0),
    Promise(True, LOWEST, ADAMW, LARGE, 0.4),
    Promise(True, OURS, ADAMW, ["1000 x 1024"], 0.1),
    Promise(True, OURS, ADAMW, MODELS, 0.9),
    Promise(True, "radam", ADAMW, LARGE, 0.93),
    Promise(True, TRITON, OURS, LARGE, 1.1),
    Promise(True, TRITON, "optimi Ranger", None, 1.0),
    Promise(True, TRITON, "flashoptim AdamW float32", None, 1.0),
    Promise(True, TRITON, "flashoptim AdamW 8-bit", None, 1.0),
]
OF_COPY = ("1e9", 0.97)  # on a GPU ours reaches this fraction of a copy's bandwidth


def judged(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """Each promise on each workload that was measured, as :func:`judge` has it."""
    gpu = result.get("arguments", {}).get("device", "cpu") == "cuda"
    found = []
    for name, rows in ((name, found["rows"]) for name, found in result["workloads"].items()):
        for promise in PROMISES:
            _, who, other, where, limit = promise
            if promise.gpu == gpu and name in (where or [name]) and {who, other} <= rows.keys():
                what = f"{name}: time of {who} against {other}"
                found.append(judge(what, fraction(rows, who, other), limit))
        mine = rows.get(OURS, {})
        if gpu and name == OF_COPY[0] and "gb_per_s" in mine:
            value = result["copy"]["gb_per_s"] / mine["gb_per_s"]
            found.append(judge(f"{name}: time against a copy's", value, 1 / OF_COPY[1]))
        if "bytes_allocated" in mine:
            what = f"{name}: bytes allocated in a cycle"
            found.append(judge(what, mine["bytes_allocated"], 0))
    return found


def fraction(rows: dict[str, dict[str, Any]], who: str, other: str) -> float | None:
    """Median over the rounds of a contestant's time over another's that raced beside it."""
    if who == OURS:
        return rows[other].get("ratio")
    pairs = zip(*(rows[x].get("samples", []) for x in (who, other)), strict=False)
    ratios = [mine / its for mine, its in pairs]
    return median(ratios) if ratios else None


def judge(what: str, value: float | None, limit: float) -> tuple[bool, str]:
    """Whether a promise is kept, and a line that says so."""
    kept = value is not None and value <= limit
    shown = "not measured" if value is None else f"{value:.3f}"
    return kept, f"  {'kept  ' if kept else 'BROKEN'} {what}: {shown}, at most {limit:.3f}"
