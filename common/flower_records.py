"""Envelopes as Flower's RecordDict and back: the one place where the two meet.

A group of arrays travels as one safetensors text: among the description where it is small, as an
Array of its own, which Flower cuts into chunks, where it is not. Flower makes a call for each
object, so that a network of 700 layers, sent as such, would cost 1400 calls a round and site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from medfl.common.errors import FederationError
from medfl.common.messages import Envelope
from medfl.common.tensors import Tensors, file_order, header, raw_bytes, views

_ABOUT = "about"
_JSON = "json"
_PACKED = "safetensors"
_SMALL = 1024 * 1024


def to_record(envelope: Envelope) -> RecordDict:
    """As a RecordDict: a ConfigRecord `about`, and an ArrayRecord a large group."""
    about: dict[str, str | bytes] = {_JSON: envelope.about}
    record = RecordDict()
    for group, tensors in envelope.arrays.items():
        raw = b"".join([header(tensors), *(raw_bytes(tensors[n]) for n in file_order(tensors))])
        if len(raw) <= _SMALL:
            about[group] = raw
        else:
            record[group] = ArrayRecord({_PACKED: Array("uint8", (len(raw),), _PACKED, raw)})
    record[_ABOUT] = ConfigRecord(dict(about))
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of `to_record`. Nothing is unpickled.

    Raises:
        FederationError: the record has no `about`, or another kind of content.
    """
    about = record.config_records.get(_ABOUT)
    text = None if about is None else about.get(_JSON)
    if about is None or not isinstance(text, str):
        raise FederationError("A message has no description; it is refused.")
    packed = {group: raw for group, raw in about.items() if group != _JSON}
    for group, arrays in record.array_records.items():
        found = arrays.get(_PACKED)
        if group in packed or found is None or len(arrays) != 1 or found.stype != _PACKED:
            raise FederationError("A message holds arrays in a form that medfl does not send.")
        packed[group] = found.data
    return Envelope(text, {group: _unpacked(raw) for group, raw in packed.items()})


def as_text(message: Message) -> list[bytes | memoryview]:
    """A message for another process of this machine, in pieces that are to be joined."""
    bare = message_to_proto(remove_content_from_message(message))
    return joined(bytes(bare.SerializeToString()), message.content)


def from_text(text: memoryview) -> Message:
    """Inverse of `as_text`; the arrays are views of it."""
    bare, record = parted(text)
    metadata = message_from_proto(ProtoMessage.FromString(bare)).metadata
    return Message(content=record, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def joined(parts: bytes, record: RecordDict) -> list[bytes | memoryview]:
    """`parts` and a record of `to_record` as pieces of a text for another process of this machine.

    Flower's own form copies the arrays five times on the way; whoever sends this copies them once.
    """
    about = record.config_records[_ABOUT]
    small = {name: value for name, value in about.items() if isinstance(value, bytes)}
    large = {name: arrays[_PACKED].data for name, arrays in record.array_records.items()}
    pieces = [parts, *small.values(), *large.values()]
    told = {
        "json": about[_JSON],
        "small": [(name, len(raw)) for name, raw in small.items()],
        "large": [(name, len(raw)) for name, raw in large.items()],
        "parts": len(parts),
    }
    head = json.dumps(told).encode()
    return [len(head).to_bytes(8, "big"), head, *pieces]


def parted(text: memoryview) -> tuple[bytes, RecordDict]:
    """Inverse of `joined`; large groups are views of `text`."""
    start = 8 + int.from_bytes(text[:8], "big")
    told = json.loads(bytes(text[8:start]))

    def taken(size: int) -> memoryview:
        nonlocal start
        start += size
        return text[start - size : start]

    parts, record = bytes(taken(told["parts"])), RecordDict()
    about = {_JSON: told["json"], **{n: bytes(taken(size)) for n, size in told["small"]}}
    large = {}
    for name, size in told["large"]:
        large[name.encode()] = taken(size)
        record[name] = ArrayRecord({_PACKED: Array("uint8", (size,), _PACKED, name.encode())})
    record[_ABOUT] = ConfigRecord(about)
    fill(record, large)
    return parts, record


def fill(record: RecordDict, buffers: Mapping[bytes, bytearray | memoryview]) -> None:
    """Put bytes, which are not copied, in the place of the keys that arrays hold so far.

    Flower's Array takes no other bytes than `bytes`, and an ArrayRecord copies its Arrays.
    """
    for arrays in record.array_records.values():
        for array in arrays.values():
            vars(array)["data"] = buffers[array.data]


def _unpacked(raw: object) -> Tensors:
    if not isinstance(raw, bytes | bytearray | memoryview):
        raise FederationError("A message holds arrays in a form that medfl does not send.")
    try:
        return views(raw)
    except ValueError:
        raise FederationError("A message holds arrays that are damaged; it is refused.") from None
