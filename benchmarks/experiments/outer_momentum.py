"""Momentum of Lookahead's slow weights against none, and against AdamW without Lookahead.

Kallusky et al. (SNOO, arXiv:2510.15830) report that Nesterov's momentum on what k steps did is what
makes DiLoCo better than AdamW. Here with their k of about 30, on two small tasks. Every contestant
is tuned over as many settings, on seeds that are not reported.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from . import Job, Results, figures, reported, seeds, trials, tuning_seeds
from .contestants import STYLES, Contestant, tuned

TITLE = "Momentum of slow weights (SNOO) against Ranger and AdamW"

WEIGHT_DECAY = 0.01
STEPS = 900
EVERY = 90  # cycles of 6 and of 30 end there: fast weights are slow weights
K = 30  # with momentum
ADAM, RANGER = "AdamW, warmup + cosine", "Ranger, cosine"
RANGER_MOMENTUM, ADAM_MOMENTUM = "Ranger, outer momentum", "Lookahead(AdamW), outer momentum"

# Lowest learning rates: of 12, a factor of √2 apart, without momentum; with it of 4, a factor of 2
# apart, for each pair of α and momentum.
RATES = {
    "gpt": {ADAM: 5e-4, RANGER: 2e-3, RANGER_MOMENTUM: 4e-3, ADAM_MOMENTUM: 2e-3},
    "convnet": {ADAM: 1e-2, RANGER: 2e-2, RANGER_MOMENTUM: 4e-2, ADAM_MOMENTUM: 4e-2},
}
SETTINGS = 12
TUNING_SEEDS = {"gpt": 2, "convnet": 1}  # the same for every contestant; more take too long
# (α, momentum, what the rates are multiplied by): a cycle goes α / (1 - momentum) times as far in
# the long run, 1.2, 2 and 7 times, so that more momentum wants less of a rate.
OUTER = ((0.7, 0.4, 1.0), (0.7, 0.65, 0.5), (0.7, 0.9, 0.25))
AGAINST = (
    (RANGER, ADAM),
    (RANGER_MOMENTUM, ADAM),
    (ADAM_MOMENTUM, ADAM),
    (RANGER_MOMENTUM, RANGER),
)

run = trials.run


def _settings(task: str, steps: int) -> list[list[Contestant]]:
    """What is tuned over: a row a setting, a contestant a column."""
    warmups = {ADAM: steps // 10, ADAM_MOMENTUM: steps // 10, RANGER: 0, RANGER_MOMENTUM: 0}
    columns = []
    for name, lowest in RATES[task].items():
        base = {"name": name, "warmup": warmups[name], "cosine": True, "weight_decay": WEIGHT_DECAY}
        if name in (ADAM, RANGER):
            column = [{**base, "lr": lowest * 2 ** (i / 2)} for i in range(SETTINGS)]
        else:
            column = [
                {**base, "lr": lowest * scale * 2**i, "k": K, "alpha": a, "outer_momentum": m}
                for (a, m, scale), i in product(OUTER, range(SETTINGS // len(OUTER)))
            ]
        columns.append([{**setting, "lr": float(f"{setting['lr']:.2g}")} for setting in column])
    return [list(row) for row in zip(*columns, strict=True)]


def jobs(quick: bool, results: Results) -> list[Job]:
    """A sweep on the tuning seeds, and then the best of each on the others."""
    planned = []
    steps = K if quick else STEPS
    for task in RATES:
        settings = _settings(task, steps)
        sizes = {"task": task, "steps": steps, "evaluate_every": steps}
        sweep: list[Job] = [
            {**sizes, "seed": seed, "contestants": setting}
            for seed in tuning_seeds(quick)[: TUNING_SEEDS[task]]
            for setting in (settings[4:6] if quick else settings)
        ]
        planned += sweep
        if best := tuned(sweep, results):
            sizes["evaluate_every"] = K if quick else EVERY
            planned += [{**sizes, "seed": seed, "contestants": best} for seed in seeds(quick)]
    return planned


def _losses(results: Results, task: str) -> dict[str, np.ndarray]:
    """A row a seed of each contestant's validation losses."""
    final = reported(results, task)
    return {
        contestant["name"]: figures.values([r["curves"][i] for _, r in final], "validation_loss")
        for i, contestant in enumerate(final[0][0]["contestants"])
    }


def draw(results: Results) -> Figure:
    """Validation loss of each task against steps."""
    figure, (panels,) = figures.new(1, 2, (12, 4.6))
    for axes, task in zip(panels, RATES, strict=True):
        job = reported(results, task)[0][0]
        losses = _losses(results, task)
        for name, rows in losses.items():
            look = {"color": STYLES[name].colour, "linestyle": STYLES[name].line, "label": name}
            figures.band(axes, figures.evaluated_at(job), rows, **look)
        # The first steps are far above what is to be told apart.
        top = np.nanmax([rows[:, :3][:, -1].mean() for rows in losses.values()])
        axes.set_ylim(0.98 * min(np.nanmin(rows) for rows in losses.values()), 1.02 * top)
        axes.set_title(task, fontsize=11)
        axes.set_xlabel("step")
    panels[0].set_ylabel("validation loss (nats), mean ± s.d. of the seeds")
    panels[0].legend(frameon=False)
    return figure


def table(results: Results) -> str:
    """Where each ends; and who is better, seed by seed, with p-values."""
    rows, compared, p_values = [], [], []
    for task in RATES:
        losses = {name: rows[:, -1] for name, rows in _losses(results, task).items()}
        for c in reported(results, task)[0][0]["contestants"]:
            outer = [f"{c[key]:g}" if key in c else "" for key in ("k", "alpha", "outer_momentum")]
            loss = figures.spread(losses[c["name"]])
            rows.append([task, c["name"], f"{c['lr']:g}", *outer, loss])
        for name, other in AGAINST:
            less = losses[name] - losses[other]
            p_values.append(_p_value(losses[name], losses[other]))
            compared.append([task, name, other, figures.spread(less)])
    for row, p, corrected in zip(compared, p_values, _holm(p_values), strict=True):
        row += [f"{p:.2g}", f"{corrected:.2g}"]
    header = ["task", "optimizer", "lr", "k", "α", "momentum", "validation loss"]
    differences = ["task", "optimizer", "against", "difference of losses", "p", "p, Holm"]
    return figures.markdown(header, rows) + "\n" + figures.markdown(differences, compared)


def _p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Of Student's t-test of pairs, two-sided."""
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def _holm(p_values: list[float]) -> np.ndarray:
    """Holm's correction for as many tests (1979)."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * factors), 1)
    return corrected
