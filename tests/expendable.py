"""A process beside the tests' own, which may die of what it is asked to do."""

from __future__ import annotations

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from targets import open_target

SECONDS = 60  # longer than any call takes
# What is freed goes back to the system at once if it is as long as a page, and is overwritten if
# not: who uses it still dies of it, or is seen.
UNFORGIVING = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_PERTURB_": "165"}


class Expendable:
    """The process for one target; started when it is needed, and anew once it has died."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._process: Any = None
        self._pipe: Any = None

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call ``function(target, *args)`` there; the test fails if that raises, dies or hangs."""
        if self._process is None:
            self._start()
        self._pipe.send((function, args))
        try:
            problem = self._pipe.recv() if self._pipe.poll(SECONDS) else f"{SECONDS} s, no answer"
        except (EOFError, ConnectionResetError):
            self._process.join()
            problem = f"the process died with exit code {self._process.exitcode}"
            self._process = None
        if problem:
            self.stop()
            pytest.fail(problem, pytrace=False)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in UNFORGIVING.items():
                patch.setenv(name, value)
            self._process = context.Process(target=_serve, args=(theirs, self._target), daemon=True)
            self._process.start()
        theirs.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection, name: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1 if name == "cpu-1-thread" else 2)
    with pytest.MonkeyPatch.context() as patch:
        target = open_target(name, patch)
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:  # the tests are over
                return
            torch.manual_seed(0)
            try:
                function(target, *args)
                problem = ""
            except BaseException:
                problem = traceback.format_exc()
            pipe.send(problem)
