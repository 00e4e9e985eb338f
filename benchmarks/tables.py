"""A result as Markdown."""

from __future__ import annotations

from typing import Any

from .contestants import OURS

COLUMNS = ("step, ms", "quartiles", "host, ms", "over ours", "of AdamW fused", "of copy", "bytes")


def heading(result: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    where = result["environment"]
    said = f"{where['device']}, {where['threads']} threads; torch {where['torch']}"
    if where.get("torch_kernel_arguments"):
        said += f", whose kernels take {where['torch_kernel_arguments'] / 1024:.0f} KB of arguments"
    copy = result.get("copy")
    return said + (f"; copy: {copy['gb_per_s']:.0f} GB/s" if copy else "")


def workload(
    name: str, found: dict[str, Any], copy: dict[str, Any] | None, turn: int | None = None
) -> str:
    """One turn of a workload, or all; "over ours" is the other's time over ours."""
    rows = dict(found.get("again", {}).get(str(turn), {}))
    rows |= {who: r for who, r in found["rows"].items() if turn in (None, r.get("turn"))}
    lines = [f"\n### {name}"]
    if "verified" in found:
        lines += [
            f"\n{found['tensors']} tensors, {found['parameters']:,} parameters; "
            f"verified: {found['verified']}; {found['gpu'] or 'CPU'}"
        ]
    if any("ms" in row for row in rows.values()):
        lines += ["", _line("", *COLUMNS), _line("---", *["---:"] * len(COLUMNS))]
    missing: dict[str, list[str]] = {}
    for who, row in rows.items():
        if "ms" not in row:
            missing.setdefault(row.get("missing", "unknown"), []).append(who)
            continue
        known = copy and "gb_per_s" in row
        of_copy = f"{row['gb_per_s'] / copy['gb_per_s']:.1%}" if known else ""
        lines.append(_line(who, *_cells(row), of_copy, f"{row['bytes_allocated']:,}"))
        if "fresh" in row:
            lines.append(_line("… new gradients", *_cells(row["fresh"]), "", ""))
    lines += [f"\nNot measured: {', '.join(who)}: {why}" for why, who in missing.items()]
    if cycle := rows.get(OURS, {}).get("ms_of_cycle"):
        lines.append(f"\n{OURS}, step by step: {', '.join(f'{ms:.4f}' for ms in cycle)} ms")
    return "\n".join(lines)


def brief(result: dict[str, Any]) -> list[str]:
    """A few lines of each workload: ours, and how many times longer the others take."""
    lines = [heading(result)]
    for name, found in result["workloads"].items():
        mine = found["rows"].get(OURS, {})
        if "ms" not in mine:
            lines.append(f"{name:<22} not measured: {mine.get('missing')}")
            continue
        of_copy = mine["gb_per_s"] / result["copy"]["gb_per_s"]
        lines.append(
            f"{name:<22} {mine['ms']:.4f} ms ({of_copy:.1%} of copy), host {mine['host_ms']:.4f} ms"
            + (f", new gradients {mine['fresh']['ms']:.4f} ms" if "fresh" in mine else "")
            + (f"; NOT VERIFIED: {found['verified']}" if found["verified"] != "yes" else "")
        )
        others = {w: r["ratio"] for w, r in found["rows"].items() if w != OURS and "ratio" in r}
        lines.append(f"{'':<22} " + ", ".join(f"{w} {1 / x:.2f}" for w, x in others.items()))
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    """A contestant's times and ratios."""
    host = f"{row['host_ms']:.4f}" if "host_ms" in row else ""
    over_ours = f"{1 / row['ratio']:.2f} ×" if "ratio" in row else ""
    of_adamw = f"{row['of_adamw']:.3f}" if "of_adamw" in row else ""
    low, high = row["ms_quartiles"]
    return [f"{row['ms']:.4f}", f"{low:.4f} to {high:.4f}", host, over_ours, of_adamw]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
