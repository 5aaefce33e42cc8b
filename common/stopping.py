"""How a service is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def set_by_signals(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stopping` meanwhile; only the main thread can listen to them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    both = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, lambda *_: stopping.set()) for s in both}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
