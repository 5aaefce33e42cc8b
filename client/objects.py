"""The SuperNode's large objects as files: calls carry tickets between forwarder and runner.

coordinator -> forwarder: onto the shelf, ticket -> SuperNode -> runner: from the shelf; the answer
goes back the same way. The SuperNode decides when an object goes.
"""

from __future__ import annotations

import logging

from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from medfl.common.errors import StorageError
from medfl.common.shelf import LARGE, Shelf, ticket

log = logging.getLogger(__name__)


class ShelfObjectStore(InMemoryObjectStore):
    """Flower's store in memory, where a ticket may stand for a large object."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self._shelf = shelf

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep an announced object, itself or by its ticket.

        Raises:
            ValueError: nothing lies there for the ticket, or the content is not the id's.
            NoObjectInStoreError: not announced.
        """
        if object_content != ticket(object_id):
            super().put(object_id, object_content)
            return
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None:
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            if entry.is_available:
                self._shelf.take_back(object_id)
                return
            if not self._shelf.keep(object_id):
                raise ValueError("nothing lies on the shelf for this ticket")
            entry.content, entry.is_available = object_content, True

    def delete(self, object_id: str) -> None:
        """Drop an object that nothing refers to, and what only it referred to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._shelf.drop(object_id)

    def clear(self) -> None:
        """Drop everything."""
        with self.lock_store:
            super().clear()
            self._shelf.sweep(all_of_it=True)


def shelved(shelf: Shelf, asked: bytes, answer: bytes) -> bytes:
    """The answer to a pull-object call, its large object replaced by a ticket.

    What is not the object that was asked for stays as it is, and the SuperNode refuses it.
    """
    if len(answer) < LARGE:
        return answer
    try:
        object_id = str(PullObjectRequest.FromString(asked).object_id)
        got = PullObjectResponse.FromString(answer)
        shelf.lay(object_id, got.object_content)
    except (DecodeError, ValueError):
        return answer
    except StorageError as error:
        log.warning("%s", error)
        return answer
    got.object_content = ticket(object_id)
    return bytes(got.SerializeToString())


def unshelved(shelf: Shelf, call: bytes) -> bytes:
    """A push-object call with the object in the place of its ticket."""
    if len(call) >= LARGE:
        return call
    try:
        sent = PushObjectRequest.FromString(call)
    except DecodeError:
        return call
    if sent.object_content == ticket(sent.object_id):
        content = shelf.read(sent.object_id)
        if content is not None:
            sent.object_content = content
            return bytes(sent.SerializeToString())
    return call
