"""Ranger in low precision against float32: the same start, batches and learning rate."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from . import Job, Results, figures, reported, seeds, trials
from .contestants import STYLES, Contestant

TITLE = "bfloat16 parameters and low-precision moments against float32"

TASK = "gpt"
STEPS, EVERY = 2016, 168  # whole cycles: fast weights are slow weights where one ends
LEARNING_RATE, WEIGHT_DECAY = 1.6e-2, 0.01  # Ranger's best in `comparison`, in float32

# weight_rounding of bfloat16 parameters, and state_dtype; float32 parameters have no rounding.
FORMATS: dict[str, tuple[str | None, str]] = {
    "float32": (None, "float32"),
    "float32, 8-bit moments": (None, "8bit"),
    "exact": ("exact", "float32"),
    "exact, bfloat16 moments": ("exact", "bfloat16"),
    "exact, 8-bit moments": ("exact", "8bit"),
    "stochastic24": ("stochastic24", "float32"),
    "stochastic24, 8-bit moments": ("stochastic24", "8bit"),
    "stochastic": ("stochastic", "float32"),
    "stochastic, 8-bit moments": ("stochastic", "8bit"),
    "nearest": ("nearest", "float32"),
}

run = trials.run


def _contestant(name: str) -> Contestant:
    weight_rounding, state_dtype = FORMATS[name]
    options: Contestant = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    if weight_rounding is not None:
        options |= {"dtype": "bfloat16", "weight_rounding": weight_rounding}
    return {"name": name, "state_dtype": state_dtype, **options}


def jobs(quick: bool, results: Results) -> list[Job]:
    """One a seed."""
    sizes = (
        {"steps": 12, "evaluate_every": 6} if quick else {"steps": STEPS, "evaluate_every": EVERY}
    )
    contestants = [_contestant(name) for name in FORMATS]
    return [
        {"task": TASK, **sizes, "seed": seed, "contestants": contestants} for seed in seeds(quick)
    ]


def _losses(results: Results) -> dict[str, np.ndarray]:
    """A row a seed of each format's validation losses."""
    return {
        name: figures.values([r["curves"][i] for _, r in results], "validation_loss")
        for i, name in enumerate(FORMATS)
    }


def draw(results: Results) -> Figure:
    """Validation loss less that of float32, seed by seed, against steps."""
    final = reported(results, TASK)
    losses = _losses(final)
    steps = figures.evaluated_at(final[0][0])
    figure, panels = figures.new(1, 2, (14, 5))
    for name, of_format in losses.items():
        style = STYLES[name]
        look = {"color": style.colour, "linestyle": style.line, "label": name}
        figures.band(panels[0][0], steps, of_format, **look)
        if name != "float32":
            figures.band(panels[0][1], steps, of_format - losses["float32"], **look)
    panels[0][0].set_ylabel("validation loss (nats), mean ± s.d. of the seeds")
    panels[0][1].set_ylabel("less that of float32, seed by seed")
    panels[0][1].axhline(0, color="black", linewidth=0.8)
    panels[0][0].set_ylim(top=np.nanmax(losses["float32"][:, 1]))
    for axes in panels[0]:
        axes.set_xlabel("step")
    panels[0][0].legend(frameon=False)
    return figure


def table(results: Results) -> str:
    """Where each ends; against float32 seed by seed, which share batches and the start."""
    final = reported(results, TASK)
    losses = {name: rows[:, -1] for name, rows in _losses(final).items()}
    rows = []
    for name, (weight_rounding, _) in FORMATS.items():
        less = losses[name] - losses["float32"]
        other = name != "float32"
        rows.append(
            [
                "float32" if weight_rounding is None else "bfloat16",
                name,
                figures.spread(losses[name]),
                figures.spread(less) if other else "",
                figures.spread(100 * less / losses["float32"], 2) + " %" if other else "",
            ]
        )
    header = ["parameters", "format", "validation loss", "less float32's", "of float32's"]
    return figures.markdown(header, rows)
