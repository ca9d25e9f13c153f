"""Ctrl-C and SIGTERM as a question that is answered where it does no harm."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asked_to_stop(patience: float = math.inf) -> Iterator[Callable[[], bool]]:
    """Whether either has come since; inside, neither interrupts, until Ctrl-C has come more often than `patience`."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def hear(number: int, _frame: Any) -> None:
        asked.append(number)
        if number == signal.SIGINT and asked.count(number) > patience:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():       # which alone may set handlers, and hears of them
        before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
