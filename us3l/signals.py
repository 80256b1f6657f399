"""Signals that stop a run between two steps, so that it can save its state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def catch_signals() -> Iterator[list[signal.Signals]]:
    """SIGINT and SIGTERM are added to the list instead of breaking off a step; a second one acts at once."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python delivers signals to the main thread alone
        return
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, handle)
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
