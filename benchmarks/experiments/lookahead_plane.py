"""Lookahead seen in the plane of its weights.

Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (NeurIPS 2019). Figure 1: test
accuracy in the plane through the first, middle and last fast weights of a cycle, with the slow
weights' path marked (there CIFAR-100 and a ResNet). Also from there: accuracy after every fast
update and every interpolation. And, over many cycles and seeds, the accuracy along the path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from . import Job, Results, figures, seeds, tasks
from .trials import Trial

TITLE = "Lookahead in the plane of fast and slow weights (Lookahead, figure 1)"

K, ALPHA = 10, 0.5
LEARNING_RATE = 0.1
WARM = 600  # steps before, about ten passes over the images
CYCLES = 30  # whose accuracy is measured along the path
TRACED = 6  # cycles in which every step is
ALONG = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25]


def jobs(quick: bool, results: Results) -> list[Job]:
    """One for each seed; the picture is the first one's."""
    return [
        {
            "task": "convnet",
            "seed": seed,
            "contestant": {"name": "Lookahead(SGD)", "lr": LEARNING_RATE, "k": K, "alpha": ALPHA},
            "warm": K if quick else WARM,
            "cycles": 2 if quick else CYCLES,
            "grid": (5 if quick else 31) if seed == seeds(quick)[0] else 0,  # points a side
        }
        for seed in seeds(quick)
    ]


def run(job: Job) -> dict[str, Any]:
    """Train, and then look at cycle after cycle."""
    task = tasks.load(job["task"])
    trial = Trial(task, job["contestant"], job["seed"], steps=0)
    fast: list[Tensor] = []

    def keep(*_: Any) -> None:  # before the interpolation, if there is one
        fast.append(parameters_to_vector(trial.model.parameters()).detach())

    trial.optimizer.optimizer.register_step_post_hook(keep)
    accuracy = _Accuracy(task, job["seed"])
    trace: list[float] = []
    along: list[list[float]] = []
    surface = None
    for step in range(job["warm"] + job["cycles"] * K):
        if step % K == 0:
            fast = [parameters_to_vector(trial.model.parameters()).detach()]
        trial.step(task.batch(job["seed"], step))
        if step >= job["warm"] and step % K == K - 1:
            slow, last = fast[0], fast[-1]
            along.append([accuracy(slow + alpha * (last - slow)) for alpha in ALONG])
            if len(trace) < TRACED * (K + 1):
                trace += [accuracy(weights) for weights in fast]
            if job["grid"] and surface is None:
                surface = _surface(fast, accuracy, job["grid"])
    return {"trace": trace, "along": along, "surface": surface}


class _Accuracy:
    """Held-out accuracy of a vector of weights."""

    def __init__(self, task: tasks.Task, seed: int) -> None:
        self._task = task
        self._model = task.model(seed)

    def __call__(self, weights: Tensor) -> float:
        vector_to_parameters(weights, self._model.parameters())
        return self._task.evaluate(self._model)[1]


def _surface(fast: list[Tensor], accuracy: _Accuracy, points: int) -> dict[str, Any]:
    """Accuracy on a grid in the plane through the first, middle and last fast weights; unit axes,
    the first of them along the interpolation."""
    origin, middle, last = fast[0], fast[len(fast) // 2], fast[-1]
    x_axis = (last - origin) / (last - origin).norm()
    y_axis = middle - origin
    y_axis = y_axis - (y_axis @ x_axis) * x_axis
    y_axis = y_axis / y_axis.norm()
    path = torch.stack([torch.stack([(w - origin) @ x_axis, (w - origin) @ y_axis]) for w in fast])
    low, high = path.amin(0), path.amax(0)
    margin = 0.35 * (high - low).max()
    corners = zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    xs, ys = (torch.linspace(first, last, points) for first, last in corners)
    heights = [[accuracy(origin + x * x_axis + y * y_axis) for x in xs] for y in ys]
    return {"x": xs.tolist(), "y": ys.tolist(), "accuracy": heights, "path": path.tolist()}


def draw(results: Results) -> Figure:
    """The plane, the trace of one run, and the mean gain along the path."""
    figure, (panels,) = figures.new(1, 3, (17, 5.4))
    first = results[0][1]
    _draw_surface(figure, panels[0], first["surface"])
    _draw_trace(panels[1], first["trace"])
    gains = _gains(results)
    figures.band(panels[2], ALONG, 100 * gains, color="#CC79A7", marker="o")
    panels[2].axvline(ALPHA, color="0.4", linestyle=":", label=f"α = {ALPHA:g}")
    panels[2].axhline(0, color="0.4", linewidth=0.8)
    panels[2].set_xlabel("α: 0 the slow weights before, 1 the last fast weights")
    panels[2].set_ylabel("accuracy above the last fast weights' (points)")
    cycles = len(results[0][1]["along"])
    panels[2].set_title(f"along the path ({cycles} cycles, mean ± s.d. of the seeds)", fontsize=10)
    panels[2].legend(frameon=False)
    return figure


def _draw_surface(figure: Figure, axes: Axes, surface: dict[str, Any]) -> None:
    heights = 100 * np.array(surface["accuracy"])
    contours = axes.contourf(surface["x"], surface["y"], heights, levels=20, cmap="viridis")
    figure.colorbar(contours, ax=axes, label="held-out accuracy (%)")
    path = np.array(surface["path"])
    axes.plot(*path.T, "o--", color="#56B4E9", ms=4, label="fast weights")
    ends = np.array([path[0], path[0] + ALPHA * (path[-1] - path[0])])
    axes.plot(*path[[0, -1]].T, ":", color="white", label="interpolation path")
    axes.plot(*ends.T, "s-", color="#CC79A7", ms=7, label="slow weights, before and after")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_aspect("equal")
    axes.set_title("a cycle's first, middle and last fast weights", fontsize=10)
    axes.set_xlabel("distance along the interpolation")
    axes.set_ylabel("distance across")


def _draw_trace(axes: Axes, trace: list[float]) -> None:
    cycles = 100 * np.array(trace).reshape(-1, K + 1)
    for i, accuracies in enumerate(cycles):
        steps = np.arange(K + 1) + i * K
        label = "fast weights" if i == 0 else None
        axes.plot(steps, accuracies, ".-", color="#56B4E9", label=label)
    starts = np.arange(len(cycles)) * K
    axes.plot(starts, cycles[:, 0], "s", color="#CC79A7", ms=7, label="slow weights")
    axes.set_xlabel("fast updates")
    axes.set_ylabel("held-out accuracy (%)")
    axes.set_title("after every fast update", fontsize=10)
    axes.legend(frameon=False)


def _gains(results: Results) -> np.ndarray:
    """Accuracy along the path less that of the last fast weights: the mean of a seed's cycles."""
    along = np.array([result["along"] for _, result in results])
    return (along - along[:, :, [ALONG.index(1.0)]]).mean(1)


def table(results: Results) -> str:
    """Accuracy at the two ends of the path and where Lookahead stops."""
    along = 100 * np.array([result["along"] for _, result in results]).mean(1)
    gains = 100 * _gains(results)
    rows = [
        [f"{alpha:g}", figures.spread(along[:, i], 2), figures.spread(gains[:, i], 2)]
        for i, alpha in enumerate(ALONG)
        if alpha in (0.0, 0.25, ALPHA, 0.75, 1.0, 1.25)
    ]
    header = ["α", "accuracy (%)", "above the last fast weights' (points)"]
    return figures.markdown(header, rows)
