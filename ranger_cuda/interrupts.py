"""Signals that wait: an interrupt leaves an optimizer as before or as after a call, never between.

Python runs the handlers of signals, such as that of Ctrl-C, between two instructions of the main
thread. A call into compiled code is one instruction; what takes more happens in :class:`Deferred`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import support

# Those with a name; the real-time ones are left to whoever uses them.
_NUMBERS = sorted(number for number in signal.valid_signals() if isinstance(number, signal.Signals))


class Deferred:
    """Within the context, handlers of signals wait; they run when it is left."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waiting: list[int] = []
        self._active = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._active:
            self._waiting.append(number)
        else:  # it came while the handlers were put back
            self._handlers[number](number, frame)

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():  # others run no handlers
            self._active = True
            try:
                for number in _NUMBERS:
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._note)
            except BaseException:
                self._put_back()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            signal.raise_signal(number)

    def _put_back(self) -> None:
        self._active = False
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def interruptible(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call``, but handlers run while it does: for what is not the optimizer's own."""

        def called() -> Any:
            self.__exit__()
            try:
                return call()
            finally:
                self.__enter__()

        return called


def insist(function: Callable[[], None], is_done: Callable[[], bool]) -> Callable[..., None]:
    """A function that calls ``function``, again if an interrupt comes at its very first
    instruction, until ``is_done()``; in pure Python such an interrupt ends the call instead."""
    extension: Any = support.extension()
    if isinstance(extension, support.Obstacle):
        return lambda *_: function()
    return extension.insist(function, is_done)
