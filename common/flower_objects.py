"""Flower's objects on their way: announced, pushed and fetched one at a time, large ones by ticket.

A message is a tree of objects, each named by its SHA-256; an array's bytes are cut into chunks.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from medfl.common import resting
from medfl.common.errors import FederationError, StorageError
from medfl.common.flower_records import fill
from medfl.common.shelf import LARGE, Shelf, sha256, ticket

log = logging.getLogger(__name__)

# Calls for objects at a time: one travels while another is worked on.
_AT_ONCE = 2


class Chunk(ArrayChunk):
    """A chunk that never changes: its id is worked out once, and nothing is copied for it."""

    is_dirty = False

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        self.head = f"{ArrayChunk.__qualname__}  {len(data)}".encode() + HEAD_BODY_DIVIDER
        vars(self)["_object_id"] = sha256(self.head, data)


# Flower writes the class's name into the object.
Chunk.__qualname__ = ArrayChunk.__qualname__


def fixed(record: RecordDict) -> RecordDict:
    """The same record, whose arrays' chunks are hashed now and never again."""
    for arrays in record.array_records.values():
        for array in arrays.values():
            whole, step = memoryview(array.data), FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
            chunks = [Chunk(whole[i : i + step]) for i in range(0, len(whole), step)]
            vars(array)["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
    return record


@dataclass(frozen=True, slots=True)
class Announced:
    """A message as it is announced, and the objects that it is made of."""

    request: PushAppMessagesRequest
    objects: Mapping[str, InflatableObject]

    def push(
        self, wanted: Collection[str], push: Callable[[str, bytes], None], shelf: Shelf | None
    ) -> None:
        """Push those of the objects that are wanted; few of them are in memory at a time.

        What the shelf does not take goes whole.
        """

        def one(object_id: str) -> None:
            found = self.objects[object_id]
            if shelf is not None and isinstance(found, Chunk) and len(found.data) >= LARGE:
                try:
                    shelf.lay_own(object_id, found.head, found.data)
                    push(object_id, ticket(object_id))
                    return
                except StorageError as error:
                    log.warning("%s", error)
            push(object_id, found.deflate())

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, [i for i in self.objects if i in wanted]))


def announced_of(message: Message) -> Announced:
    """What is said of a message before its objects follow."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects, tree = get_all_nested_objects(message), get_object_tree(message)
    bare = message_to_proto(remove_content_from_message(message))
    request = PushAppMessagesRequest(messages_list=[bare], message_object_trees=[tree])
    return Announced(request, objects)


def redeemed(shelf: Shelf | None, object_id: str, content: bytes) -> bytes:
    """The object itself, where `content` is its ticket.

    Raises:
        ObjectUnavailableError: it does not lie there; whoever gave the ticket is to be asked again.
    """
    if shelf is None or content != ticket(object_id):
        return content
    whole = shelf.read(object_id)
    if whole is None:
        raise ObjectUnavailableError(object_id)
    return whole


class Malformed(FederationError):
    """A reply that is no message of a size that was asked for."""


def arrived(
    tree: ObjectTree, fetch: Callable[[str], bytes], max_bytes: int, *, rests: bool = False
) -> Message:
    """The message whose objects `fetch` gives, each large array put together as its chunks come.

    rests: large arrays take no memory until they are looked at (`medfl.common.resting`).

    Raises:
        StorageError: the disk has no room for an array that rests.
        Malformed: they make no message, or one of more than `max_bytes`: an array may name one
            chunk any number of times, so that little that was sent becomes much in memory.
    """
    announced = {node.object_id for node in iterate_object_tree(tree)}
    small: dict[str, bytes] = {}
    arrays: dict[str, InflatableObject] = {}
    buffers: dict[bytes, memoryview] = {}
    left, used = [tree.object_id], 0
    try:
        while left:
            object_id = left.pop()
            if object_id in small or object_id in arrays:
                continue
            if object_id not in announced:
                raise Malformed("An answer names an object that was not announced.")
            content = fetch(object_id)
            kind, children, _ = get_object_head_values_from_object_content(content)
            if kind == Array.__qualname__:
                whole, form = _whole(content, children, fetch, max_bytes - used, rests)
                buffers[key := object_id.encode()] = whole
                arrays[object_id] = Array("uint8", (len(whole),), form, key)
                used += len(whole)
            else:
                small[object_id] = content
                left += children
                used += len(content)
            if used > max_bytes:
                raise Malformed("An answer is larger than an update can be.")
        message = inflate_object_from_contents(tree.object_id, small, objects=arrays)
        if isinstance(message, Message) and message.has_content():
            fill(message.content, buffers)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        raise Malformed("An answer is not made of the objects that it names.") from None
    if not isinstance(message, Message):
        raise Malformed("An answer is not a message.")
    return message


def _whole(
    content: bytes, children: list[str], fetch: Callable[[str], bytes], room: int, rests: bool
) -> tuple[memoryview, str]:
    """An array's bytes, each chunk copied to its place as it comes, and how to read them.

    Raises:
        ValueError, LookupError, TypeError: it is none. Malformed: larger than `room`.
    """
    about = json.loads(get_object_body(content, Array))
    (size,) = about["shape"]
    if about["dtype"] != "uint8" or type(size) is not int or not 0 <= size:
        raise ValueError("no array of bytes")
    if size > room:
        raise Malformed("An answer would take more memory than an update can.")
    order = [children[i] for i in about["arraychunk_ids"]]
    made = resting.zeros({"": (size,)}, np.uint8)[""] if rests else np.empty(size, np.uint8)
    buffer, at = made.data, 0
    for chunk in _ahead(order, fetch):
        body = memoryview(chunk)[chunk.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
        if get_object_type_from_object_content(chunk) != ArrayChunk.__qualname__:
            raise ValueError("no chunk")
        if not 0 < len(body) <= size - at:
            raise ValueError("chunks of another size")
        buffer[at : at + len(body)] = body
        resting.let_go(made, at, at + len(body))
        at += len(body)
    if at != size:
        raise ValueError("chunks of another size")
    return buffer, str(about["stype"])


def _ahead(order: list[str], fetch: Callable[[str], bytes]) -> Iterator[bytes]:
    """Objects in order; the next ones are on their way while one is being used."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        coming: deque[Future[bytes]] = deque()
        for object_id in order:
            coming.append(pool.submit(fetch, object_id))
            if len(coming) > _AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
