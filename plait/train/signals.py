"""Ctrl-C and SIGTERM, kept until a step is done."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Signals:
    """Inside `with`, the first signal is noted in `received`; a second one raises KeyboardInterrupt at once.

    In a thread other than the main one, where Python cannot catch signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
