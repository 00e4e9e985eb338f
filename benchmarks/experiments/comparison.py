"""Ranger against what it would replace: loss against steps and against time, five seeds.

The learning rate of each is the best of a sweep on seeds of its own, by the validation loss at the
end; the reported seeds have no say in it.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from . import Job, Results, figures, reported, seeds, trials, tuning_seeds
from .contestants import SGD, STYLES, Contestant, tuned

TITLE = "Ranger against AdamW, RAdam, Lookahead(AdamW) and SGD"

WEIGHT_DECAY = 0.01  # decoupled; SGD has none
STEPS = {"gpt": 1500, "convnet": 1200}
EVALUATIONS = 10
CYCLE = 6  # Lookahead's k
RATES = {
    "gpt": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
    "convnet": [5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1, 3.2e-1],
}

run = trials.run


def _contestants(rate: float, steps: int) -> list[Contestant]:
    warmup = steps // 10
    decay = {"weight_decay": WEIGHT_DECAY}
    return [
        {"name": "Ranger", "lr": rate, **decay},
        {"name": "Ranger, cosine", "lr": rate, "cosine": True, **decay},
        {"name": "AdamW", "lr": rate, **decay},
        {"name": "AdamW, warmup + cosine", "lr": rate, "warmup": warmup, "cosine": True, **decay},
        {"name": "RAdam", "lr": rate, **decay},
        {"name": "Lookahead(AdamW)", "lr": rate, **decay},
        {"name": "SGD", "lr": rate * SGD},
    ]


def jobs(quick: bool, results: Results) -> list[Job]:
    """A sweep on the tuning seeds, and then the best of each on the others."""
    planned = []
    for task, rates in RATES.items():
        steps = 24 if quick else STEPS[task]
        # Where a cycle ends, for fast weights are slow weights there.
        every = max(steps // EVALUATIONS // CYCLE, 1) * CYCLE
        sizes = {"task": task, "steps": steps, "evaluate_every": every}
        sweep: list[Job] = [
            {**sizes, "seed": seed, "contestants": _contestants(rate, steps)}
            for rate in (rates[1:3] if quick else rates)
            for seed in tuning_seeds(quick)
        ]
        planned += sweep
        if best := tuned(sweep, results):
            planned += [{**sizes, "seed": seed, "contestants": best} for seed in seeds(quick)]
    return planned


def draw(results: Results) -> Figure:
    """Validation loss of each task against steps and against seconds."""
    figure, panels = figures.new(2, 2, (14, 10), sharey="row")
    for row, task in zip(panels, RATES, strict=True):
        final = reported(results, task)
        job = final[0][0]
        steps = figures.evaluated_at(job)
        lowest, highest = np.inf, 0.0
        for i, contestant in enumerate(job["contestants"]):
            curves = [result["curves"][i] for _, result in final]
            losses = figures.values(curves, "validation_loss")
            style = STYLES[contestant["name"]]
            look = {"color": style.colour, "linestyle": style.line}
            label = f"{contestant['name']}, lr {contestant['lr']:g}"
            figures.band(row[0], steps, losses, label=label, **look)
            figures.band(row[1], figures.values(curves, "seconds").mean(0), losses, **look)
            lowest = min(lowest, np.nanmin(losses))
            highest = max(highest, np.nanmax(losses[:, 2:].mean(0)))
        row[0].set_title(task, fontsize=11)
        row[0].set_xlabel("step")
        row[1].set_xlabel("seconds of training, without evaluation, one thread")
        row[0].set_ylabel("validation loss (nats), mean ± s.d. of the seeds")
        row[0].set_ylim(0.98 * lowest, 1.02 * highest)
        row[0].legend(frameon=False)
    return figure


def table(results: Results) -> str:
    """Where each ends; against Ranger seed by seed, which share batches and the start."""
    rows = []
    for task in RATES:
        final = reported(results, task)
        contestants = final[0][0]["contestants"]
        rangers = [result["curves"][0] for _, result in final]
        ranger_losses = figures.final(rangers)
        ranger_seconds = figures.final(rangers, "seconds")
        for i, contestant in enumerate(contestants):
            curves = [result["curves"][i] for _, result in final]
            losses = figures.final(curves)
            seconds = figures.final(curves, "seconds")
            rows.append(
                [
                    task,
                    contestant["name"],
                    f"{contestant['lr']:g}",
                    figures.spread(figures.final(curves, "train_loss")),
                    figures.spread(losses),
                    figures.spread(100 * figures.final(curves, "accuracy"), 1) + " %",
                    figures.spread(losses - ranger_losses) if i else "",
                    figures.spread(seconds / ranger_seconds, 2) if i else "",
                ]
            )
    header = ["task", "optimizer", "lr", "train loss", "validation loss", "accuracy"]
    return figures.markdown([*header, "validation loss less Ranger's", "time over Ranger's"], rows)
