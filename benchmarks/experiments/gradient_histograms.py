"""RAdam's motive: without warmup, Adam's first steps distort the distribution of the gradients.

Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (ICLR 2020), figure 2: the
histograms of absolute gradients of a Transformer, stacked over the steps, for Adam without and with
warmup and for RAdam. Here: a Transformer of the paper's kind (norms behind the residuals, Xavier
initialisation) and today's kind (norms in front, GPT-2's), on the source of Python's library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import Job, Results, figures, seeds, tasks
from .contestants import STYLES
from .trials import Trial

TITLE = "Absolute gradients in the first steps (RAdam, figure 2)"

LEARNING_RATE = 4e-3
WARMUP = 100
CONTESTANTS = [
    {"name": "Adam", "lr": LEARNING_RATE},
    {"name": "Adam, warmup", "lr": LEARNING_RATE, "warmup": WARMUP},
    {"name": "RAdam", "lr": LEARNING_RATE},
]
TASKS = {"post-norm gpt": "post-norm", "deep gpt": "pre-norm"}
SHOWN = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)  # steps
LOWEST, HIGHEST, BINS = -12.0, 1.0, 52  # of log10 |gradient|


def jobs(quick: bool, results: Results) -> list[Job]:
    """One for each kind of Transformer and seed."""
    return [
        {"task": task, "seed": seed, "steps": 10 if quick else 200, "contestants": CONTESTANTS}
        for task in TASKS
        for seed in seeds(quick)
    ]


def run(job: Job) -> dict[str, Any]:
    """Histograms and medians of the gradients as every step finds them."""
    task = tasks.load(job["task"])
    return {"curves": [_observe(task, contestant, job) for contestant in job["contestants"]]}


def _observe(task: tasks.Task, contestant: dict[str, Any], job: Job) -> dict[str, Any]:
    trial = Trial(task, contestant, job["seed"], job["steps"])
    median: list[float] = []
    histograms: list[list[int]] = []

    def observe(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in trial.model.parameters() if p.grad is not None]
        sizes = torch.cat(gradients).abs()
        logarithms = sizes[sizes > 0].log10()  # 0: what the batch does not reach, or underflow
        median.append(logarithms.median().item())
        if len(median) in SHOWN:
            histogram = logarithms.histc(BINS, LOWEST, HIGHEST)
            histograms.append([int(count) for count in histogram])

    trial.optimizer.register_step_pre_hook(observe)
    for step in range(job["steps"]):
        trial.step(task.batch(job["seed"], step))
    trial.evaluate()
    return {"median": median, "histograms": histograms, **trial.curve}


def draw(results: Results) -> Figure:
    """A ridge of histograms for each optimizer, and the medians of all."""
    figure, panels = figures.new(2, 4, (15, 8))
    for row, (task, label) in zip(panels, TASKS.items(), strict=True):
        for i, contestant in enumerate(CONTESTANTS):
            curves = _curves(results, task, i)
            style = STYLES[contestant["name"]]
            _ridge(row[i], [curve["histograms"] for curve in curves], style.colour)
            row[i].set_title(f"{contestant['name']}, {label}", fontsize=10)
            medians = figures.values(curves, "median")
            steps = range(1, medians.shape[1] + 1)
            figures.band(row[3], steps, medians, color=style.colour, label=contestant["name"])
        row[0].set_ylabel("step")
        row[3].set_title("median over all parameters", fontsize=10)
        row[3].set_ylabel("log₁₀ |gradient|, mean ± s.d. of the seeds")
        row[3].legend(frameon=False)
    for axes in panels[1, :3]:
        axes.set_xlabel("log₁₀ |gradient|")
    panels[1, 3].set_xlabel("step")
    return figure


def _ridge(axes: Axes, histograms: list[list[list[int]]], colour: str) -> None:
    """Densities of the mean over seeds, the first step at the bottom."""
    counts = np.mean(histograms, axis=0)
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    for level in range(len(counts))[::-1]:
        density = counts[level] / counts[level].sum()
        axes.fill_between(
            centres,
            level,
            level + 12 * density,
            facecolor=colour,
            edgecolor="white",
            linewidth=0.8,
            alpha=0.85,
            zorder=2 - level / 100,
        )
    axes.set_yticks(range(len(counts)), SHOWN[: len(counts)])
    axes.set_xlim(LOWEST, HIGHEST)
    axes.set_ylim(-0.5, len(counts) + 1.5)


def table(results: Results) -> str:
    """Where the gradients, and the training, have gone."""
    rows = []
    for task, label in TASKS.items():
        for i, contestant in enumerate(CONTESTANTS):
            curves = _curves(results, task, i)
            medians = figures.values(curves, "median")
            rows.append(
                [
                    label,
                    contestant["name"],
                    *(figures.spread(medians[:, at], 2) for at in (0, 9, -1)),
                    figures.spread(figures.final(curves)),
                ]
            )
    last = results[0][0]["steps"]
    header = ["Transformer", "optimizer", "log₁₀ median, step 1", "step 10", f"step {last}"]
    return figures.markdown([*header, "validation loss then"], rows)


def _curves(results: Results, task: str, contestant: int) -> list[dict[str, Any]]:
    return [result["curves"][contestant] for job, result in results if job["task"] == task]
