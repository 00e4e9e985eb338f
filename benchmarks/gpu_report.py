"""What a person wants to know of a result of gpu_step_time.py: tables and promises."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from step_time import ADAMW, OURS, judge

TRITON = "ranger triton"
LARGE = ["1e9", "2.5e8", "64 x 1024^2"]
# (who, other, workloads; None: all): at most this fraction of the other's time.
PROMISES: list[tuple[str, str, list[str] | None, float]] = [
    (OURS, ADAMW, LARGE, 1.0),
    (OURS, ADAMW, ["1000 x 1024"], 0.1),
    (OURS, ADAMW, ["resnet50", "vit-l/16", "gpt2", "llama-1b"], 0.9),
    ("radam", ADAMW, LARGE, 0.93),
    (TRITON, OURS, LARGE, 1.1),
    (TRITON, "optimi Ranger", None, 1.0),
    (TRITON, "flashoptim AdamW float32", None, 1.0),
    (TRITON, "flashoptim AdamW 8-bit", None, 1.0),
]
OF_COPY = ("1e9", 0.97)  # ours reaches this fraction of a copy's bandwidth


def promises(result: dict[str, Any]) -> list[str]:
    """Each promise on each workload that was reached, and whether it was kept."""
    lines = []
    for name, found in result["workloads"].items():
        rows = found.get("rows", {})
        for who, other, where, limit in PROMISES:
            if where is not None and name not in where:
                continue
            if not {who, other} <= rows.keys():
                continue
            pairs = zip(*(rows[x].get("samples", []) for x in (who, other)), strict=False)
            ratios = [mine / its for mine, its in pairs]
            value = median(ratios) if ratios else None
            lines.append(judge(f"{name}: time of {who} against {other}", value, limit)[1])
        if name == OF_COPY[0] and "gb_per_s" in rows.get(OURS, {}):
            value = result["copy"]["gb_per_s"] / rows[OURS]["gb_per_s"]
            lines.append(judge(f"{name}: time against a copy's", value, 1 / OF_COPY[1])[1])
    return lines


def as_table(name: str, found: dict[str, Any], turn: int, copy: dict[str, Any]) -> str:
    """One turn of a workload; the factor is the other's time over ours."""
    if "missing" in found:
        return f"\n{name}: {found['missing']}"
    rows = dict(found.get("again", {}).get(str(turn), {}))
    rows |= {who: row for who, row in found["rows"].items() if row.get("turn") == turn}
    lines = [
        f"\n{name}: {found['tensors']} tensors, {found['parameters']:,} parameters; "
        f"verified: {found['verified']}; {found['gpu']}",
        f"  {'':<26} {'step, ms':>9} [min, max]; host, ms; over ours; of AdamW fused; "
        "of copy; bytes allocated",
    ]
    for who, row in rows.items():
        if "ms" not in row:
            lines.append(f"  {who:<26} not measured: {row.get('missing')}")
            continue
        of_copy = row["gb_per_s"] / copy["gb_per_s"] if "gb_per_s" in row else math.nan
        lines.append(f"{as_line(who, row)} {of_copy:7.1%} {row.get('bytes_allocated', -1):>14,} B")
        if "fresh" in row:
            lines.append(as_line("  new gradients", row["fresh"]))
    for who, row in found.get("graph", {}).items() if turn == 0 else ():
        shown = f"{row['ms']:9.4f} {row['ms_range']}" if "ms" in row else row["missing"]
        lines.append(f"  {who + ', CUDA graph':<26} {shown}")
    cycle = rows.get(OURS, {}).get("ms_of_cycle")
    if cycle:
        lines.append(f"  {OURS}, step by step: {', '.join(f'{ms:.4f}' for ms in cycle)}")
    return "\n".join(lines)


def as_line(who: str, row: dict[str, Any]) -> str:
    """A contestant's times and ratios."""
    low, high = row["ms_range"]
    return (
        f"  {who:<26} {row['ms']:9.4f} [{low:.4f}, {high:.4f}] {row['host_ms']:9.4f}"
        f"{1 / row.get('ratio', math.nan):8.2f} x {row.get('of_adamw', math.nan):7.3f}"
    )
