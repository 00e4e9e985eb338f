"""Signals that wait: an interrupt leaves an optimizer as before or as after a call, never between.

Python runs the handlers of signals, such as that of Ctrl-C, between two instructions of the main
thread. A call into compiled code is one instruction; what takes more happens in :class:`Deferred`.
"""

from __future__ import annotations

import signal
import threading

# That of signal makes an enum of each answer, which takes thirty times as long.
from _signal import getsignal  # type: ignore[import-not-found]
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..backends import support

# Those with a name; the real-time ones are left to whoever uses them.
_NUMBERS = sorted(number for number in signal.valid_signals() if isinstance(number, signal.Signals))


class Deferred:
    """Within the context, handlers of signals wait; they run when it is left."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[int] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append(number)

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():  # others run no handlers
            try:
                for number in _NUMBERS:
                    handler = getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._note)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._handlers:  # put back, and forgotten only then
                number, handler = next(iter(self._handlers.items()))
                signal.signal(number, handler)
                del self._handlers[number]
            while self._waiting:
                signal.raise_signal(self._waiting.pop())
        except BaseException:  # of a handler that is back
            self.__exit__()
            raise

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
