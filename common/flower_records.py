"""Envelopes as Flower's RecordDict and back: the one place where the two meet.

A group of arrays travels as one safetensors text. Flower sends each Array as objects of its own,
one call each; a network of 700 layers would cost 1400 calls a round and site.
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
_PACKED = "safetensors"


def to_record(envelope: Envelope) -> RecordDict:
    """As a RecordDict: a ConfigRecord `about` and one ArrayRecord a group that is not empty."""
    record = RecordDict({_ABOUT: ConfigRecord({"json": envelope.about})})
    for group, tensors in envelope.arrays.items():
        if tensors:
            record[group] = ArrayRecord({_PACKED: _packed(tensors)})
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of `to_record`. Nothing is unpickled.

    Raises:
        FederationError: the record has no `about`, or another kind of content.
    """
    about = record.config_records.get(_ABOUT)
    if about is None or not isinstance(about.get("json"), str):
        raise FederationError("A message has no description; it is refused.")
    groups = {group: _unpacked(arrays) for group, arrays in record.array_records.items()}
    return Envelope(str(about["json"]), groups)


def _packed(tensors: Tensors) -> Array:
    # Not ascontiguousarray, which turns a scalar (a batch counter) into an array of one.
    raw = save({name: np.asarray(a, order="C") for name, a in tensors.items()})
    return Array("uint8", (len(raw),), _PACKED, raw)


def _unpacked(arrays: ArrayRecord) -> Tensors:
    found = arrays.get(_PACKED)
    if found is None or len(arrays) != 1 or found.stype != _PACKED:
        raise FederationError("A message holds arrays in a form that medfl does not send.")
    try:
        return dict(load(found.data))
    except SafetensorError:
        raise FederationError("A message holds arrays that are damaged; it is refused.") from None
