"""A result as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save(result: dict[str, Any], out: Path | None) -> None:
    """Keep what there is so far: whole, whenever this process is killed."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = out.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1, default=str) + "\n")
        new.replace(out)


def load(path: Path) -> dict[str, Any]:
    """A result. In the oldest a workload is its rows, without anything around them."""
    result = json.loads(path.read_text())
    for name, found in result["workloads"].items():
        if "rows" not in found:
            result["workloads"][name] = {"rows": found}
    return result
