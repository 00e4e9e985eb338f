"""RAdam's claim: robust to the learning rate, with no warmup to tune.

Liu et al. (ICLR 2020), section 5: training curves of RAdam, Adam, Adam with warmup and SGD for
several learning rates. Here over two decades of them, and the final loss against them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from . import Job, Results, figures, seeds, trials
from .contestants import SGD, STYLES

TITLE = "Training curves and final loss over two decades of learning rates (RAdam, section 5)"

RATES = {
    "post-norm gpt": [float(f"{3e-4 * 10 ** (i / 4):.2g}") for i in range(9)],
    "convnet": [float(f"{3e-3 * 10 ** (i / 4):.2g}") for i in range(9)],
}
STEPS = {"post-norm gpt": 400, "convnet": 600}
WARMUP = 100
NAMES = ("Adam", "Adam, warmup", "RAdam", "SGD")
EVALUATIONS = 10
CLOSE = 0.1  # nats

run = trials.run


def jobs(quick: bool, results: Results) -> list[Job]:
    """One for each task, learning rate and seed; all optimizers in it."""
    return [
        {
            "task": task,
            "seed": seed,
            "steps": 6 if quick else STEPS[task],
            "evaluate_every": 2 if quick else STEPS[task] // EVALUATIONS,
            "contestants": [
                {"name": "Adam", "lr": rate},
                {"name": "Adam, warmup", "lr": rate, "warmup": WARMUP},
                {"name": "RAdam", "lr": rate},
                {"name": "SGD", "lr": rate * SGD},
            ],
        }
        for task, rates in RATES.items()
        for rate in (rates[::4] if quick else rates)
        for seed in seeds(quick)
    ]


def draw(results: Results) -> Figure:
    """A panel of curves for each optimizer, and the final losses of all."""
    figure, panels = figures.new(2, 5, (17, 7.5), sharey="row")
    for row, task in zip(panels, RATES, strict=True):
        steps = figures.evaluated_at(next(job for job, _ in results if job["task"] == task))
        for i, name in enumerate(NAMES):
            by_rate = _by_rate(results, task, i)
            for j, (rate, curves) in enumerate(by_rate.items()):
                colour = colormaps["viridis"](j / len(by_rate))
                losses = figures.values(curves, "validation_loss")
                figures.band(row[i], steps, losses, color=colour, label=f"{rate:g}")
            row[i].set_title(f"{name}, {task}", fontsize=10)
            row[i].set_xlabel("step")
            small = {"fontsize": 6, "title_fontsize": 6, "labelspacing": 0.2, "frameon": False}
            row[i].legend(title="learning rate", loc="upper right", **small)
            final = [figures.final(curves) for curves in by_rate.values()]
            figures.band(
                row[4],
                np.array(list(by_rate)) / (SGD if name == "SGD" else 1),
                np.transpose(final),
                color=STYLES[name].colour,
                marker="o",
                label=f"{name} (lr / {SGD})" if name == "SGD" else name,
            )
        row[0].set_ylabel("validation loss (nats), mean ± s.d. of the seeds")
        row[4].set_title("loss at the end", fontsize=10)
        row[4].set_xscale("log")
        row[4].set_xlabel("learning rate")
        row[4].legend(frameon=False, fontsize=8)
        row[4].set_ylim(top=_ceiling(results, task))
    return figure


def table(results: Results) -> str:
    """The best learning rate of each, and how wide the range is that comes close to it."""
    rows = []
    for task in RATES:
        for i, name in enumerate(NAMES):
            by_rate = _by_rate(results, task, i)
            rate, best = _best(by_rate)
            final = {r: figures.final(curves) for r, curves in by_rate.items()}
            near = [r for r, losses in final.items() if losses.mean() <= best + CLOSE]
            width = _range(near, list(final)) if near else "none"
            worst = figures.spread(final[max(final)])
            rows.append([task, name, f"{rate:g}", figures.spread(final[rate]), width, worst])
    header = ["task", "optimizer", "best lr", "validation loss there"]
    header += [f"lr within {CLOSE} nats of that", "loss at the top lr"]
    return figures.markdown(header, rows)


def _range(near: list[float], tried: list[float]) -> str:
    """From where to where, and the factor between; bounds where nothing beyond was tried."""
    low = "≤ " if near[0] == tried[0] else ""
    high = "≥ " if near[-1] == tried[-1] else ""
    factor = f"× {'≥ ' if low or high else ''}{near[-1] / near[0]:.1f}"
    return f"{low}{near[0]:g} to {high}{near[-1]:g} ({factor})"


def _by_rate(results: Results, task: str, contestant: int) -> dict[float, list[dict[str, Any]]]:
    """The curves of all seeds for each learning rate, in rising order."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for job, result in results:
        if job["task"] == task:
            rate = job["contestants"][contestant]["lr"]
            by_rate.setdefault(rate, []).append(result["curves"][contestant])
    return by_rate


def _best(by_rate: dict[float, list[dict[str, Any]]]) -> tuple[float, float]:
    """The learning rate of the lowest mean loss, and that loss."""
    means = {r: figures.final(curves).mean() for r, curves in by_rate.items()}
    rate = min(means, key=lambda r: np.nan_to_num(means[r], nan=np.inf))
    return rate, means[rate]


def _ceiling(results: Results, task: str) -> float:
    """Room for the worst of Adam's after the first evaluation, which has learned nothing yet."""
    first = [r["curves"][0]["validation_loss"][0] or 0.0 for j, r in results if j["task"] == task]
    return 1.1 * max(first)
