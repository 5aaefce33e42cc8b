"""Which objects a hospital may fetch and is to send, and the large ones' way past the SuperLink.

The SuperLink's own answers say it: the trees of messages that it gave to this hospital, and what
it lacks of an answer that this hospital announced. Flower alone lets whoever knows an id have it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from medfl.common.errors import StorageError
from medfl.common.shelf import LARGE, Shelf, ticket
from medfl.common.tunnel import Answer
from medfl.server import nodes

log = logging.getLogger(__name__)

# A message whose objects are never confirmed is forgotten after so many others.
_KEPT_MESSAGES = 16
# Answers that a SuperNode would give up at too early are repeated: for s, every s.
_COMING_S, _COMING_NAP_S = 2.0, 0.02
_BUSY_S, _BUSY_NAP_S = 30.0, 0.5
# For so long after the SuperLink let a node fetch, it is not asked about each object again.
_ALIVE_S = 1.0
_PROTOBUF = {"content-type": "application/x-protobuf"}

# One call to the SuperLink, with this body.
Ask = Callable[[bytes], Answer]


class Parcels:
    """What one hospital's node may fetch and is to send; a restart, which ends runs, forgets it."""

    def __init__(self) -> None:
        self._given: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._wanted: dict[str, Answer | None] = {}
        self._lock = threading.Lock()
        # When the SuperLink last let this node fetch: it does so while the run goes on.
        self._alive = -_ALIVE_S

    def arrived(self) -> None:
        """A new SuperNode: it has no message."""
        with self._lock:
            self._alive = -_ALIVE_S
            self._given.clear()
            self._wanted.clear()

    def give(self, trees: Mapping[str, frozenset[str]]) -> None:
        """Messages were handed over, by id, with the ids of their objects."""
        with self._lock:
            self._alive = -_ALIVE_S  # they may be of another run
            self._given.update(trees)
            while len(self._given) > _KEPT_MESSAGES:
                self._given.popitem(last=False)

    def received(self, message_id: str) -> None:
        """A message is there with all its objects."""
        with self._lock:
            self._given.pop(message_id, None)

    def want(self, object_ids: Iterable[str]) -> None:
        """An answer was announced; these are to follow. A SuperNode sends one after another."""
        with self._lock:
            self._wanted = dict.fromkeys(object_ids)

    def fetch(
        self,
        request: Any,
        body: bytes,
        ask: Ask,
        shelf: Shelf | None,
        room: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The answer to a pull-object call; 403, as where the run is over, if it is not theirs.

        room: waits until there is room for an object in memory.
        """
        object_id = str(request.object_id)
        with self._lock:
            if not any(object_id in ids for ids in self._given.values()):
                return Answer(403)
            lately = time.monotonic() - self._alive < _ALIVE_S
        if lately and shelf is not None and shelf.has(object_id):
            room()
            content = shelf.read(object_id)
            if content is not None:
                return Answer(200, _PROTOBUF, nodes.available(len(content)), content)
        until = time.monotonic() + _COMING_S
        while True:
            answer = ask(body)
            if answer.status != 200:
                return answer
            with self._lock:
                self._alive = time.monotonic()
            if shelf is not None and nodes.is_ticket(answer.body, object_id):
                room()
                content = shelf.read(object_id)
                if content is not None:
                    return Answer(200, answer.headers, nodes.available(len(content)), content)
            elif not nodes.on_its_way(answer.body):
                return answer
            if time.monotonic() > until:
                return Answer(200, answer.headers, nodes.COMING)
            time.sleep(_COMING_NAP_S)

    def store(self, request: Any, body: bytes, ask: Ask, shelf: Shelf | None) -> Answer:
        """The answer to a push-object call; a repeated one takes effect once."""
        object_id, content = str(request.object_id), bytes(request.object_content)
        with self._lock:
            if object_id not in self._wanted:
                return Answer(403)
            done = self._wanted[object_id]
        if done is not None:
            return done
        if content == ticket(object_id):
            return Answer(200, _PROTOBUF, nodes.NOT_STORED)
        large = shelf is not None and len(content) >= LARGE
        if large:
            body = nodes.with_ticket(request)
        until = time.monotonic() + _BUSY_S
        while True:
            try:
                if shelf is not None and large:
                    shelf.lay(object_id, content)
                answer = ask(body)
            except ValueError:
                return Answer(200, _PROTOBUF, nodes.NOT_STORED)
            except StorageError as error:
                log.error("%s", error)
                answer = Answer(200, _PROTOBUF, nodes.NOT_STORED)
            if answer.status != 200 or not nodes.not_stored(answer.body):
                break
            if time.monotonic() > until:
                break
            time.sleep(_BUSY_NAP_S)
        if answer.status == 200 and not nodes.not_stored(answer.body):
            with self._lock:
                if object_id in self._wanted:
                    self._wanted[object_id] = answer
        elif shelf is not None:
            shelf.take_back(object_id)
        return answer
