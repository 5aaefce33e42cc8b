"""How many large objects the gateway holds at once, however many hospitals send and fetch them."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import grpc

# A fast line moves an object in this time. A slower one is no longer counted, and who waits for
# room waits no longer: a hospital far away must not keep the others waiting.
_FAST_S = 5.0


class Room:
    """Room for as many objects as the machine can move at once, each for as long as its call lasts.

    So the gateway's memory does not grow with the number of hospitals whose lines are fast.
    """

    def __init__(self, places: int | None = None) -> None:
        self._places = places or max(2, len(os.sched_getaffinity(0)))
        self._taken: dict[object, float] = {}
        self._changed = threading.Condition()

    def take(self, context: grpc.ServicerContext) -> None:
        """Wait for a place, which is free again once the call is over."""
        mine, end = object(), time.monotonic() + _FAST_S
        with self._changed:
            while (left := end - time.monotonic()) > 0 and self._counted() >= self._places:
                self._changed.wait(left)
            self._taken[mine] = time.monotonic()
        if not context.add_callback(partial(self._free, mine)):
            self._free(mine)

    def _counted(self) -> int:
        late = time.monotonic() - _FAST_S
        return sum(since > late for since in self._taken.values())

    def _free(self, place: object) -> None:
        with self._changed:
            self._taken.pop(place, None)
            self._changed.notify()
