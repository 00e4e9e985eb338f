"""Lookahead's second claim: it is not sensitive to its two hyperparameters.

Zhang et al. (NeurIPS 2019), section 5, vary k and α. Here Ranger does, on both tasks,
against the same RAdam without Lookahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import Job, Results, figures, trials

TITLE = "k and α of Lookahead (Lookahead, section 5)"

K = (3, 6, 12, 24)
ALPHA = (0.2, 0.5, 0.8)
LEARNING_RATES = {"gpt": 4e-3, "convnet": 4e-2}
STEPS = {"gpt": 960, "convnet": 720}  # multiples of every k: fast weights end as slow ones
RANGER = {"betas": [0.95, 0.999], "eps": 1e-5}  # its defaults, for RAdam, too

run = trials.run


def jobs(quick: bool, results: Results) -> list[Job]:
    """One for each task, k and seed: RAdam once, and Ranger with every α."""
    planned = []
    for task, rate in LEARNING_RATES.items():
        steps = 24 if quick else STEPS[task]
        for seed in figures.QUICK_SEEDS if quick else figures.SEEDS:
            sizes = {"task": task, "seed": seed, "steps": steps, "evaluate_every": steps}
            planned.append({**sizes, "contestants": [{"name": "RAdam", "lr": rate, **RANGER}]})
            for k in K:
                ranger = {"name": "Ranger", "lr": rate, "k": k}
                planned.append({**sizes, "contestants": [{**ranger, "alpha": a} for a in ALPHA]})
    return planned


def draw(results: Results) -> Figure:
    """A grid of k and α for each task."""
    figure, (panels,) = figures.new(1, 2, (13, 4.6))
    for axes, task in zip(panels, LEARNING_RATES, strict=True):
        radam, grid = _losses(results, task)
        gain = np.array([[(grid[k, a] - radam).mean() for k in K] for a in ALPHA])
        limit = max(abs(gain).max(), 1e-6)
        image = axes.imshow(gain, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for y, alpha in enumerate(ALPHA):
            for x, k in enumerate(K):
                colour = "white" if abs(gain[y, x]) > limit / 2 else "black"
                text = figures.spread(grid[k, alpha])
                axes.text(x, y, text, ha="center", va="center", color=colour)
        axes.grid(visible=False)
        axes.set_xticks(range(len(K)), K)
        axes.set_yticks(range(len(ALPHA)), ALPHA)
        axes.set_xlabel("k")
        axes.set_ylabel("α")
        axes.set_title(f"{task}: validation loss at the end; RAdam {figures.spread(radam)}")
        figure.colorbar(image, ax=axes, label="less RAdam's loss (blue: Ranger is better)")
    return figure


def table(results: Results) -> str:
    """The loss at the end, and the difference to RAdam seed by seed."""
    rows = []
    for task in LEARNING_RATES:
        radam, grid = _losses(results, task)
        rows.append([task, "RAdam", "", "", figures.spread(radam), ""])
        for (k, alpha), losses in grid.items():
            difference = figures.spread(losses - radam)
            rows.append([task, "Ranger", str(k), str(alpha), figures.spread(losses), difference])
    header = ["task", "optimizer", "k", "α", "validation loss", "less RAdam's"]
    return figures.markdown(header, rows)


def _losses(results: Results, task: str) -> tuple[np.ndarray, dict[tuple[int, float], np.ndarray]]:
    """RAdam's final losses, one a seed, and those of Ranger for each k and α."""
    by_setting: dict[Any, list[float]] = {}
    for job, result in results:
        if job["task"] == task:
            for contestant, curve in zip(job["contestants"], result["curves"], strict=True):
                setting = (contestant.get("k"), contestant.get("alpha"))
                by_setting.setdefault(setting, []).append(curve["validation_loss"][-1])
    losses = {key: np.array(values, dtype=float) for key, values in by_setting.items()}
    return losses.pop((None, None)), losses
