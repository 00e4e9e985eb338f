"""What the papers on RAdam and Lookahead show, shown again: ``python -m benchmarks.experiments``.

An experiment is a module with

- ``TITLE``: one line;
- ``jobs(quick, results)``: what has to be run, given the results so far; asked again until it names
  nothing new, so that later jobs may depend on earlier ones. ``quick`` is for a look and the tests;
- ``run(job)``: runs one of them, in a process of its own;
- ``draw(results)``: the figure;
- ``table(results)``: the numbers, as a Markdown table.

A job and its result are plain values that JSON can hold.
"""

from typing import Any

Job = dict[str, Any]
Results = list[tuple[Job, dict[str, Any]]]

EXPERIMENTS = (
    "gradient_histograms",
    "learning_rates",
    "lookahead_plane",
    "lookahead_sweep",
    "comparison",
    "low_precision",
    "outer_momentum",
)


def seeds(quick: bool) -> tuple[int, ...]:
    """Those that are reported."""
    return (0, 1) if quick else (0, 1, 2, 3, 4)


def tuning_seeds(quick: bool) -> tuple[int, ...]:
    """Those that learning rates are chosen on; never reported."""
    return (100,) if quick else (100, 101)


def reported(results: Results, task: str) -> Results:
    """A task's jobs on the seeds that are reported."""
    return [
        (job, result)
        for job, result in results
        if job["task"] == task and job["seed"] in seeds(quick=False)
    ]
