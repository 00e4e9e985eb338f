"""Finished jobs, a line of JSON each: the raw result, and what an interrupted run goes on from."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..machine import processor
from . import Job, Results, tasks


class UnusableError(Exception):
    """The finished jobs cannot be read, or were run with something else than what is here."""


class Store:
    """The results of one experiment in ``path``, whose first line says what they were run with.

    Raises:
        UnusableError: a line is none of a run's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        self._environment: dict[str, Any] | None = None
        content = path.read_bytes() if path.exists() else b""
        self._whole = content.rfind(b"\n") + 1  # what killed a run may have cut a line short
        self._is_cut = self._whole < len(content)
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._environment = dict(entry["environment"])
                else:
                    self._results[_key(entry["job"])] = dict(entry["result"])
            except (ValueError, TypeError, KeyError) as error:
                raise UnusableError(
                    f"line {number} of {path} is not what a run writes; repair it, start over with "
                    "--fresh, or choose another --out"
                ) from error

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not finished."""
        return [job for job in jobs if _key(job) not in self._results]

    def results(self, jobs: Iterable[Job]) -> Results:
        """Those that are."""
        return [(job, self._results[_key(job)]) for job in jobs if _key(job) in self._results]

    def prepare(self) -> None:
        """Get ready for more results.

        Raises:
            UnusableError: those that are there come from elsewhere.
        """
        here = environment()
        if self._environment is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"environment": here}) + "\n")
            self._environment = here
        elif self._is_cut:
            os.truncate(self._path, self._whole)
        self._is_cut = False
        differences = [
            f"{name} was {self._environment.get(name)} and is {value}"
            for name, value in here.items()
            if self._environment.get(name) != value
        ]
        if differences:
            raise UnusableError(
                f"{self._path} is unfinished and comes from elsewhere ({'; '.join(differences)}); "
                "start over with --fresh, or choose another --out"
            )

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Save a finished job."""
        result = _plain(result)
        self._results[_key(job)] = result
        with self._path.open("a") as file:
            file.write(json.dumps({"job": job, "result": result}) + "\n")


def environment() -> dict[str, Any]:
    """What may change the last bits of a result, and its times."""
    packages = ("ranger_cuda", "torch", "numpy", "mlxtend")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "data": {name: tasks.load(name).digest[:16] for name in ("gpt", "convnet")},
    }


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def _plain(value: Any) -> Any:
    """Six digits, and null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
