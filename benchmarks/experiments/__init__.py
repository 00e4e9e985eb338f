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
)
