"""What a finished run leaves behind: a table, a chart, and the numbers behind both."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.table import Table

import ranger_cuda

from .corpus import Corpus
from .errors import CommandError
from .optimizers import OPTIMIZERS
from .parallel import started_ranks
from .settings import Settings, as_dict
from .training import SMOOTHING, History, Run

# Okabe and Ito's palette: distinct with every kind of colour vision, and in print.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

SUMMARY, HISTORY, CHART = "summary.json", "history.csv", "loss.png"

_COLUMNS = (
    "optimizer",
    "step",
    "train_loss",
    "seconds",
    "optimizer_seconds",
    "validation_loss",
    "slow_validation_loss",
)

# What the table's headings leave out.
LEGEND = f"""\
Losses are in nats per byte. Train: the mean of the last {SMOOTHING} steps. Val.: on
held-out text, with the weights as the last step left them. Slow val.: the same
with Lookahead's slow weights, which are what it trains: where there is a slow
val. loss, compare that with the others' val. loss. Optimizer step: the median
time of optimizer.step().
"""


def describe(settings: Settings, text: Corpus, parameters: int) -> str:
    """What is trained, on what and how, in two lines."""
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    on = settings.device
    if on == "cpu":
        on = f"{settings.threads} CPU thread{'s' * (settings.threads != 1)}"
    if settings.parallel != "none":
        on += f" each of {started_ranks()} ranks ({settings.parallel}), {settings.slices} slices"
    return (
        f"GPT of {size} parameters ({settings.layers} layers, width {settings.width}) "
        f"on {text.description}\n"
        f"{settings.batch_size} x {settings.context} bytes a step, seed {settings.seed}, {on}"
    )


def files_in(out: Path) -> list[Path]:
    """Where a run's results lie in its output folder."""
    return [out / name for name in (SUMMARY, HISTORY, CHART)]


def make_room(out: Path) -> None:
    """Make the output folder, and remove the results of an earlier run from it.

    Raises:
        CommandError: one of both is impossible.
    """
    doing = f"make the folder {out}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in files_in(out):
            doing = f"remove {path}"
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"cannot {doing}: {error.strerror}; choose another --out") from error


def summarise(run: Run, settings: Settings) -> dict[str, Any]:
    """One optimizer's results as plain numbers."""
    history = run.history
    slow = history.slow_validation_loss
    return {
        "optimizer": run.name,
        "implementation": OPTIMIZERS[run.name].what,
        "lr": settings.lr[run.name],
        "train_loss": history.recent_loss,
        "validation_loss": history.validation_loss[-1],
        "slow_validation_loss": slow[-1] if slow else None,
        "median_optimizer_step_seconds": median(history.optimizer_seconds),
        "training_seconds": sum(history.seconds),
    }


def table(summaries: list[dict[str, Any]]) -> Table:
    """The results for the terminal."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("optimizer", no_wrap=True)
    titles = (
        "lr",
        "train\nloss",
        "val.\nloss",
        "slow\nval. loss",
        "optimizer\nstep",
        "training\ntime",
    )
    for title in titles:
        result.add_column(title, justify="right", no_wrap=True)
    for row in summaries:
        slow = row["slow_validation_loss"]
        result.add_row(
            row["optimizer"],
            f"{row['lr']:g}",
            f"{row['train_loss']:.3f}",
            f"{row['validation_loss']:.3f}",
            "-" if slow is None else f"{slow:.3f}",
            f"{row['median_optimizer_step_seconds'] * 1e3:.2f} ms",
            f"{row['training_seconds']:.1f} s",
        )
    return result


def write_numbers(
    out: Path, summaries: list[dict[str, Any]], runs: list[Run], settings: Settings, text: Corpus
) -> list[Path]:
    """Write ``summary.json`` and, one row for each step and optimizer, ``history.csv``."""
    summary = out / SUMMARY
    content = {
        "results": summaries,
        "settings": as_dict(settings),
        "text": {"description": text.description, "sha256": text.digest},
        "versions": {
            "ranger_cuda": getattr(ranger_cuda, "__version__", None),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": _device_name(settings.device),
    }
    summary.write_text(json.dumps(_finite(content), indent=2) + "\n")

    history = out / HISTORY
    with history.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run in runs:
            writer.writerows([run.name, *row] for row in _rows(run.history))
    return [summary, history]


def draw(out: Path, runs: list[Run], settings: Settings, title: str) -> Path:
    """Draw the loss against steps and against time, as ``loss.png``."""
    path = out / CHART
    figure = Figure(figsize=(12, 5.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for run, colour in zip(runs, _COLOURS, strict=False):
        seconds = list(accumulate(run.history.seconds))
        _draw_run(panels[0], range(1, len(seconds) + 1), run, colour)
        _draw_run(panels[1], seconds, run, colour)
    panels[0].set_xlabel("steps")
    panels[0].set_ylabel("loss (nats per byte)")
    panels[1].set_xlabel("training time of each optimizer (s), without evaluation")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    panels[0].set_ylim(*_loss_limits(runs))
    figure.legend(
        handles=_legend(runs, settings), loc="outside lower center", ncols=6, frameon=False
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    return path


def _draw_run(axes: Axes, x: Sequence[float], run: Run, colour: str) -> None:
    history = run.history
    at = [x[step - 1] for step in history.evaluated_at]
    smooth = _smooth(history.loss)
    axes.plot(x[-len(smooth) :], smooth, color=colour, alpha=0.45, linewidth=0.9)
    axes.plot(at, history.validation_loss, "o-", color=colour, ms=3.5, linewidth=1.4)
    if history.slow_validation_loss:
        axes.plot(at, history.slow_validation_loss, "o--", color=colour, mfc="w", ms=5)


def _legend(runs: list[Run], settings: Settings) -> list[Line2D]:
    """Colours stand for optimizers, line styles for what was measured."""
    handles = []
    for run, colour in zip(runs, _COLOURS, strict=False):
        label = f"{run.name} (lr {settings.lr[run.name]:g})"
        handles.append(Line2D([], [], color=colour, linewidth=4, label=label))
    grey: dict[str, Any] = {"color": "0.35"}
    label = f"training, mean of {_window(settings.steps)} steps"
    handles.append(Line2D([], [], **grey, alpha=0.6, linewidth=0.9, label=label))
    handles.append(Line2D([], [], **grey, marker="o", ms=3.5, label="validation"))
    if any(run.history.slow_validation_loss for run in runs):
        grey |= {"linestyle": "--", "marker": "o", "mfc": "w", "ms": 5}
        handles.append(Line2D([], [], **grey, label="validation, slow weights"))
    return handles


def _loss_limits(runs: list[Run]) -> tuple[float, float]:
    """Room for what happens after the first tenth, in which every loss falls from ln 256 = 5.5."""
    shown: list[float] = []
    for run in runs:
        history = run.history
        shown += _smooth(history.loss)[len(history.loss) // 10 :]
        shown += history.validation_loss[-1:] + history.slow_validation_loss[-1:]
    finite = [loss for loss in shown if math.isfinite(loss)] or [0.0, 6.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) + 0.01
    return low - margin, high + margin


def _window(steps: int) -> int:
    """Over how many steps to average, so that a long run is no band of noise."""
    return min(steps, max(SMOOTHING, steps // 40))


def _smooth(losses: list[float]) -> list[float]:
    """The mean of each step's window; the first steps have none."""
    window = _window(len(losses))
    sums = list(accumulate(losses, initial=0.0))
    return [(sums[i] - sums[i - window]) / window for i in range(window, len(sums))]


def _rows(history: History) -> list[tuple[Any, ...]]:
    fast = dict(zip(history.evaluated_at, history.validation_loss, strict=True))
    slow = dict(zip(history.evaluated_at, history.slow_validation_loss, strict=False))
    measured = zip(history.loss, history.seconds, history.optimizer_seconds, strict=True)
    return [(step, *row, fast.get(step), slow.get(step)) for step, row in enumerate(measured, 1)]


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
