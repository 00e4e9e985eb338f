"""What the figures and tables of all experiments have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import Job


def new(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, as an array of ``rows`` x ``columns``."""
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def values(curves: Iterable[dict[str, Any]], column: str) -> np.ndarray:
    """One row a curve; NaN where it had diverged."""
    return np.array([curve[column] for curve in curves], dtype=float)


def final(curves: Iterable[dict[str, Any]], column: str = "validation_loss") -> np.ndarray:
    """The last of each curve."""
    return values(curves, column)[:, -1]


def evaluated_at(job: Job) -> range:
    """The steps of a curve's entries."""
    return range(job["evaluate_every"], job["steps"] + 1, job["evaluate_every"])


def band(axes: Axes, x: Sequence[float], rows: np.ndarray, **style: Any) -> None:
    """The mean over seeds (rows), and one standard deviation around it."""
    mean, deviation = rows.mean(0), rows.std(0, ddof=1)
    axes.plot(x, mean, **style)
    axes.fill_between(
        x, mean - deviation, mean + deviation, color=style.get("color"), alpha=0.18, linewidth=0
    )


def spread(rows: Iterable[float], digits: int = 3) -> str:
    """``mean ± standard deviation`` over seeds, or how many of them diverged."""
    numbers = np.array(list(rows), dtype=float)
    lost = int(np.isnan(numbers).sum())
    if lost:
        return f"diverged ({lost} of {len(numbers)})"
    return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=1):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
