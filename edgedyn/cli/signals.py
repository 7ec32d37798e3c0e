"""SIGTERM and SIGHUP end a command as Ctrl-C does: its temporary files are removed on the way out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_CLEANING_S = 5.0  # a service manager may send both signals; the second must not break the clean-up


class Interruption:
    """The first signal that ended a command; 0 where none did."""

    number = 0
    _since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the command, as a handler of signals; repeats are ignored while it cleans up."""
        now = time.monotonic()
        if self.number and now - self._since < _CLEANING_S:
            return
        self.number, self._since = self.number or number, now
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; one that is ignored, as by nohup, stays so."""
    interruption = Interruption()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interruption)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
