"""How far the training is: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .training import Run

_PLAIN_LINES = 12  # over a whole run, beside the first step


class Display:
    """Shows the runs after every step. Use it as a context manager around the training."""

    def __init__(
        self,
        console: Console,
        runs: list[Run],
        first_step: int,
        steps: int,
        is_quiet: bool = False,
    ) -> None:
        self._is_quiet = is_quiet
        self._runs = runs
        self._first_step = first_step
        self._steps = steps
        self._line_every = max(1, steps // _PLAIN_LINES)
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps, ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step)
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=4)
            if console.is_terminal and not (console.is_dumb_terminal or is_quiet)
            else None
        )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._progress.update(self._task, completed=step)
        if self._live is None and not self._is_quiet and self._is_line_due(step):
            print(self._line(step), flush=True)

    def _is_line_due(self, step: int) -> bool:
        return step % self._line_every == 0 or step in (self._first_step + 1, self._steps)

    def _line(self, step: int) -> str:
        pace = (time.monotonic() - self._started) / (step - self._first_step)
        losses = "  ".join(f"{run.name} {run.history.recent_loss:.3f}" for run in self._runs)
        remaining = f"{pace * (self._steps - step):.0f} s"
        return (
            f"step {step}/{self._steps}  loss: {losses}  {pace * 1e3:.0f} ms/step  ETA {remaining}"
        )

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2))
        table.add_column("")
        for title in ("train loss", "validation loss", "step", "of it, optimizer"):
            table.add_column(title, justify="right")
        for run in self._runs:
            history = run.history
            if not history.loss:
                continue
            table.add_row(
                run.name,
                f"{history.recent_loss:.3f}",
                f"{history.validation_loss[-1]:.3f}" if history.validation_loss else "",
                f"{history.seconds[-1] * 1e3:.1f} ms",
                f"{history.optimizer_seconds[-1] * 1e3:.2f} ms",
            )
        return Group(self._progress, table)
