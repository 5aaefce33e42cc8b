"""Envelopes as Flower's RecordDict and back: the one place where the two meet."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from medfl.common.errors import FederationError
from medfl.common.messages import Envelope

_ABOUT = "about"


def to_record(envelope: Envelope) -> RecordDict:
    """As a RecordDict: a ConfigRecord `about` and one ArrayRecord a group."""
    record = RecordDict({_ABOUT: ConfigRecord({"json": envelope.about})})
    for group, tensors in envelope.arrays.items():
        record[group] = ArrayRecord({name: Array(array) for name, array in tensors.items()})
    return record


def from_record(record: RecordDict) -> Envelope:
    """Inverse of `to_record`. Arrays are read as .npy without pickle.

    Raises:
        FederationError: the record has no `about`, or another kind of content.
    """
    about = record.config_records.get(_ABOUT)
    if about is None or not isinstance(about.get("json"), str):
        raise FederationError("A message has no description; it is refused.")
    groups = {
        group: {name: array.numpy() for name, array in arrays.items()}
        for group, arrays in record.array_records.items()
    }
    return Envelope(str(about["json"]), groups)
