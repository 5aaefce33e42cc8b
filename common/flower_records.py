"""Envelopes as Flower's RecordDict and back: the one place where the two meet."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

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
        FederationError: the record has no `about`, or an array that is not a plain .npy.
    """
    about = record.config_records.get(_ABOUT)
    if about is None or not isinstance(about.get("json"), str):
        raise FederationError("A message has no description; it is refused.")
    groups = {
        group: {name: _array(array) for name, array in arrays.items()}
        for group, arrays in record.array_records.items()
    }
    return Envelope(str(about["json"]), groups)


def _array(array: Array) -> NDArray[Any]:
    """The array, if its header declares exactly as much as is there.

    A header alone could make the reader set aside any amount of memory.
    """
    try:
        header = io.BytesIO(array.data)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(header)]
        shape, _, dtype = read(header)
        if math.prod(shape) * dtype.itemsize == len(array.data) - header.tell():
            return array.numpy()
    except (ValueError, KeyError, TypeError, EOFError, OverflowError):
        pass
    raise FederationError("A message holds an array that cannot be read; it is refused.")
