"""Lookahead's second claim: it is not sensitive to its two hyperparameters.

Zhang et al. (NeurIPS 2019), section 5, vary k and α. Here Ranger does, on both tasks, against the
same RAdam without Lookahead. α scales how far a cycle goes, so RAdam and each α have a learning
rate of their own, the best of a sweep (at k = 6) on seeds that are not reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import Job, Results, figures, reported, seeds, trials, tuning_seeds
from .contestants import Contestant, tuned

TITLE = "k and α of Lookahead (Lookahead, section 5)"

K = (3, 6, 12, 24)
ALPHA = (0.2, 0.5, 0.8)
RATES = {
    "gpt": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
    "convnet": [2e-2, 4e-2, 8e-2, 1.6e-1, 3.2e-1, 6.4e-1],
}
STEPS = {"gpt": 960, "convnet": 720}  # multiples of every k: fast weights end as slow ones
RANGER = {"betas": [0.95, 0.999], "eps": 1e-5}  # its defaults, for RAdam, too

run = trials.run


def _sweep(rate: float) -> list[Contestant]:
    rangers = [{"name": "Ranger", "lr": rate, "k": 6, "alpha": alpha} for alpha in ALPHA]
    return [{"name": "RAdam", "lr": rate, **RANGER}, *rangers]


def jobs(quick: bool, results: Results) -> list[Job]:
    """The sweep; then for each task and seed RAdam, and Ranger with every k and α."""
    planned = []
    for task, rates in RATES.items():
        steps = 24 if quick else STEPS[task]
        sizes = {"task": task, "steps": steps, "evaluate_every": steps}
        sweep: list[Job] = [
            {**sizes, "seed": seed, "contestants": _sweep(rate)}
            for rate in (rates[1:3] if quick else rates)
            for seed in tuning_seeds(quick)
        ]
        planned += sweep
        best = tuned(sweep, results)
        if best is None:
            continue
        radam, *rangers = best
        for seed in seeds(quick):
            planned.append({**sizes, "seed": seed, "contestants": [radam]})
            for k in K:
                contestants = [{**ranger, "k": k} for ranger in rangers]
                planned.append({**sizes, "seed": seed, "contestants": contestants})
    return planned


def draw(results: Results) -> Figure:
    """A grid of k and α for each task."""
    figure, (panels,) = figures.new(1, 2, (13, 4.6))
    for axes, task in zip(panels, RATES, strict=True):
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
        rates = _rates(results, task)
        axes.set_xticks(range(len(K)), K)
        axes.set_yticks(range(len(ALPHA)), [f"{a}\nlr {rates[a]:g}" for a in ALPHA])
        axes.set_xlabel("k")
        axes.set_ylabel("α")
        radam_s = f"RAdam {figures.spread(radam)} (lr {rates[None]:g})"
        axes.set_title(f"{task}: validation loss at the end; {radam_s}", fontsize=10)
        figure.colorbar(image, ax=axes, label="less RAdam's loss (blue: Ranger is better)")
    return figure


def table(results: Results) -> str:
    """The loss at the end, and the difference to RAdam seed by seed."""
    rows = []
    for task in RATES:
        radam, grid = _losses(results, task)
        rates = _rates(results, task)
        rows.append([task, "RAdam", "", "", f"{rates[None]:g}", figures.spread(radam), ""])
        for (k, alpha), losses in sorted(grid.items(), key=lambda entry: entry[0][::-1]):
            values = [str(k), str(alpha), f"{rates[alpha]:g}"]
            difference = figures.spread(losses - radam)
            rows.append([task, "Ranger", *values, figures.spread(losses), difference])
    header = ["task", "optimizer", "k", "α", "lr", "validation loss", "less RAdam's"]
    return figures.markdown(header, rows)


def _reported(results: Results, task: str) -> list[tuple[Contestant, dict[str, Any]]]:
    """The contestants of the reported seeds, and their curves."""
    return [
        pair
        for job, result in reported(results, task)
        for pair in zip(job["contestants"], result["curves"], strict=True)
    ]


def _rates(results: Results, task: str) -> dict[float | None, float]:
    """The learning rate of each α, and of RAdam (None)."""
    return {c.get("alpha"): c["lr"] for c, _ in _reported(results, task)}


def _losses(results: Results, task: str) -> tuple[np.ndarray, dict[tuple[int, float], np.ndarray]]:
    """RAdam's final losses, one a seed, and those of Ranger for each k and α."""
    by_setting: dict[Any, list[float]] = {}
    for contestant, curve in _reported(results, task):
        setting = (contestant.get("k"), contestant.get("alpha"))
        by_setting.setdefault(setting, []).append(curve["validation_loss"][-1])
    losses = {key: np.array(values, dtype=float) for key, values in by_setting.items()}
    return losses.pop((None, None)), losses
