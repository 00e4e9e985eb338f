"""Ctrl-C before the training, and Ctrl-C and SIGTERM as a request to stop after a step."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While active, the first SIGINT or SIGTERM is remembered instead of ending the process.

    The second one ends it as usual, for someone who does not want to wait for the step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._previous = {
            number: handler
            for number, handler in handlers.items()
            if handler not in (None, signal.SIG_IGN)  # nohup and & ask to be left alone
        }

    def __enter__(self) -> Interrupt:
        for number in self._previous:
            signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class QuickExit:
    """Within the context, for imports, Ctrl-C ends the process with one line.

    Not by an exception: an import may take it for its own failure, and what it calls back may have
    it printed and forgotten.
    """

    def __init__(self) -> None:
        self._previous: Any = None

    def __enter__(self) -> None:
        try:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in nohup and &
                self._previous = signal.signal(signal.SIGINT, self._exit)
        except ValueError:  # not the main thread, which alone has handlers
            pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    @staticmethod
    def _exit(number: int, frame: FrameType | None) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(130)
