"""Envelopes as Flower's RecordDict and back: the one place where the two meet.

A group of arrays travels as one safetensors text: among the description where it is small, as an
Array of its own, which Flower cuts into chunks, where it is not. Flower makes a call for each
object, so that a network of 700 layers, sent as such, would cost 1400 calls a round and site.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medfl.common.errors import FederationError
from medfl.common.messages import Envelope
from medfl.common.tensors import Tensors

_ABOUT = "about"
_JSON = "json"
_PACKED = "safetensors"
_SMALL = 1024 * 1024


def to_record(envelope: Envelope) -> RecordDict:
    """As a RecordDict: a ConfigRecord `about`, and an ArrayRecord a large group."""
    about: dict[str, str | bytes] = {_JSON: envelope.about}
    record = RecordDict()
    for group, tensors in envelope.arrays.items():
        # Not ascontiguousarray, which turns a scalar (a batch counter) into an array of one.
        raw = save({name: np.asarray(a, order="C") for name, a in tensors.items()})
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


def _unpacked(raw: object) -> Tensors:
    if not isinstance(raw, bytes):
        raise FederationError("A message holds arrays in a form that medfl does not send.")
    try:
        return dict(load(raw))
    except SafetensorError:
        raise FederationError("A message holds arrays that are damaged; it is refused.") from None
