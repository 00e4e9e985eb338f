"""Running an experiment's jobs in processes, and writing what came out."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranger_cuda.cli.training import reproducible

from . import Job
from .store import Store


def module(name: str) -> Any:
    """The experiment of that name."""
    return importlib.import_module(f".{name}", __package__)


def carry_out(
    name: str, out: Path, processes: int, quick: bool, fresh: bool, console: Console
) -> None:
    """Run what is missing of an experiment; then draw it and print its table."""
    experiment = module(name)
    path = out / f"{name}.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    store = Store(path)
    planned: list[Job] = []
    with Progress(
        TextColumn(name),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("jobs, ETA"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("")
        while (more := experiment.jobs(quick, store.results(planned))) != planned:
            planned = more
            missing = store.missing(planned)
            progress.update(task, total=len(planned), completed=len(planned) - len(missing))
            if missing:
                store.prepare()
            with closing(_finished(name, missing, processes)) as finished:
                for job, result in finished:
                    store.add(job, result)
                    progress.advance(task)
    results = store.results(planned)
    figure = experiment.draw(results)
    figure.suptitle(experiment.TITLE, fontsize=12)
    figure.savefig(path.with_suffix(".png"))
    print(f"{experiment.TITLE}\n\n{experiment.table(results)}\nWrote {name}.png to {out}\n")


def _finished(name: str, jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run the jobs and give each as it finishes, with its result."""
    if processes == 1:
        for job in jobs:
            yield job, _run(name, job)
        return
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; one may answer
    with ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, ignored) as pool:
        futures = {pool.submit(_run, name, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            for process in active_children():  # or their jobs would be waited for
                process.terminate()
            raise


def _run(name: str, job: Job) -> dict[str, Any]:
    with reproducible(threads=1):
        return module(name).run(job)
