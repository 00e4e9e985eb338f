"""Where a result is worse than an older one, by more than the noise of both."""

from __future__ import annotations

from typing import Any, NamedTuple

from .contestants import ADAMW, CONTESTANTS, OUR_PACKAGE, OURS

OURSELVES = {c.name for c in CONTESTANTS if c.package == OUR_PACKAGE}
KINDS = {"kept": "", "fresh": ", new gradients"}
# An allowance: two processes of the same code differ, too, for their memory lies elsewhere.
BETWEEN_RUNS = 1.03


class Spread(NamedTuple):
    """A ratio's quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each ratio that got worse, and each row that vanished; what the new run was not
    asked for is not missed.

    Worse is a ratio whose whole interquartile range lies above the old one's, by more than two runs
    of the same code differ.
    """
    lines = []
    asked = new.get("arguments", {})
    for name, before in old["workloads"].items():
        if name not in asked.get("workloads", [name]):
            continue
        rows = new["workloads"].get(name, {}).get("rows", {})
        for who in [who for who in before["rows"] if who not in asked.get("skip", [])]:
            key = "of_adamw" if who in OURSELVES else "ratio"
            for kind, said in KINDS.items():
                then, now = (spread(r, who, kind, key) for r in (before["rows"], rows))
                if then and not now:
                    why = rows.get(who, {}).get("missing", "not in the new result")
                    lines.append(f"  {name}, {who}{said}: vanished: {why}")
                    break
                if then and now and now.low > then.high * BETWEEN_RUNS:
                    over = f"its time over {ADAMW}'s" if who in OURSELVES else f"{OURS}'s over its"
                    lines.append(f"  {name}, {who}{said}: {over}: {then} -> {now}")
    return lines


def surroundings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else differs: it may be the cause."""
    before, after = old["environment"], new["environment"]
    return [
        f"  note: another {key.replace('_', ' ')}: {before[key]} -> {after.get(key)}"
        for key in ("device", "threads", "torch", "torch_kernel_arguments", "packages")
        if key in before and before[key] != after.get(key)
    ]


def spread(rows: dict[str, Any], who: str, kind: str, key: str) -> Spread | None:
    """Quartiles of a contestant's ratio; where only times' are recorded, the widest they allow."""
    row = _row(rows, who, kind)
    if key not in row:
        return None
    if f"{key}_quartiles" in row:
        low, high = row[f"{key}_quartiles"]
        return Spread(low, row[key], high)
    above, below = (OURS, who) if key == "ratio" else (who, ADAMW)
    (a, b), (c, d) = (_row(rows, x, kind)["ms_quartiles"] for x in (above, below))
    return Spread(a / d, row[key], b / c)


def _row(rows: dict[str, Any], who: str, kind: str) -> dict[str, Any]:
    row = rows.get(who, {})
    return row if kind == "kept" else row.get("fresh", {})
