"""What is said arrives as it was said, and nothing else is understood."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from medfl.common.errors import (
    CaseError,
    ConfigError,
    DataError,
    FederationError,
    PolicyRefused,
    StorageError,
)
from medfl.common.flower_records import from_record, to_record
from medfl.common.messages import (
    Envelope,
    Instruction,
    Reply,
    pack,
    refusal,
    unpack_instruction,
    unpack_reply,
)

WEIGHTS = {"w": np.array([[1.5, -2.0]], dtype=np.float32), "seen": np.array(7)}
ASKED = Instruction(
    kind="round",
    study_digest="ab",
    run="main",
    round=3,
    best_round=2,
    seed=5,
    shared={"means": {"age": 54.5}},
    parts=("validation",),
    weights=WEIGHTS,
    control={"w": np.zeros((1, 2), dtype=np.float32)},
)
SAID = Reply(
    site="a",
    round=3,
    n_cases=4,
    loss=0.25,
    epsilon=0.5,
    metrics={"validation": {"auroc": None, "accuracy": 0.5}},
    counts={"train": 4},
    left_out={"duplicate": 1},
    delta={"w": np.ones((1, 2), dtype=np.float32)},
)


def same(left: Any, right: Any) -> bool:
    """Equal in every field; arrays bit by bit and of one type."""
    for name in type(left).__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if name in ("weights", "delta", "control"):
            if a.keys() != b.keys():
                return False
            if any(a[n].dtype != b[n].dtype or not np.array_equal(a[n], b[n]) for n in a):
                return False
        elif a != b:
            return False
    return True


def test_an_instruction_arrives_as_it_was_sent() -> None:
    assert same(unpack_instruction(pack(ASKED)), ASKED)


def test_a_reply_arrives_as_it_was_sent() -> None:
    assert same(unpack_reply(pack(SAID)), SAID)


def test_both_survive_flowers_records() -> None:
    assert same(unpack_instruction(from_record(to_record(pack(ASKED)))), ASKED)
    assert same(unpack_reply(from_record(to_record(pack(SAID)))), SAID)


def test_a_scalar_buffer_stays_a_scalar() -> None:
    assert from_record(to_record(pack(ASKED))).arrays["weights"]["seen"].shape == ()


@pytest.mark.parametrize(
    "about",
    [
        "",
        "nonsense",
        "[]",
        "null",
        '{"site": "a"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_reply_is_refused(about: str) -> None:
    with pytest.raises(FederationError, match="fields of a reply"):
        unpack_reply(Envelope(about))


def changed(**fields: Any) -> Envelope:
    plain = json.loads(pack(SAID).about) | fields
    return Envelope(json.dumps(plain), {"delta": {}, "control": {}})


@pytest.mark.parametrize(
    "fields",
    [
        {"extra": 1},
        {"n_cases": "many"},
        {"n_cases": 1.5},
        {"loss": float("nan")},
        {"epsilon": float("inf")},
        {"metrics": {"validation": {"auroc": float("nan")}}},
        {"metrics": {"secret": {"auroc": 0.5}}},
        {"statistics": {"features": {"age": {"n": float("nan")}}}},
        {"left_out": {"duplicate": "Jane Doe"}},
        {"site": None},
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FederationError):
        unpack_reply(changed(**fields))


def test_a_number_too_large_to_be_finite_is_refused() -> None:
    about = pack(SAID).about.replace('"loss": 0.25', '"loss": 1e999')
    with pytest.raises(FederationError):
        unpack_reply(Envelope(about, {"delta": {}, "control": {}}))


def test_an_unknown_group_of_arrays_is_refused() -> None:
    envelope = pack(SAID)
    with pytest.raises(FederationError):
        unpack_reply(replace(envelope, arrays={**envelope.arrays, "images": {}}))


def test_a_reply_is_no_instruction() -> None:
    with pytest.raises(FederationError, match="instruction"):
        unpack_instruction(pack(SAID))


def test_a_number_that_is_none_is_not_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack(replace(SAID, loss=float("nan")))


def test_what_was_in_a_refused_message_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FederationError) as caught:
        unpack_reply(Envelope('{"patient": "Jane Doe"}'))
    assert "Jane" not in str(caught.value) + caplog.text


def record_with(data: bytes) -> RecordDict:
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
    about = ConfigRecord({"json": pack(SAID).about})
    return RecordDict({"about": about, "delta": ArrayRecord({"w": array})})


def npy(array: np.ndarray[Any, Any], **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(1))
    return buffer.getvalue()


# A header that promises 64 GiB, in front of eight bytes.
HUGE = npy(np.zeros(1)).replace(b"(1,), }" + b" " * 9, b"(8589934592,), }")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"no array",
        npy(np.zeros(4))[:-1],
        npy(np.zeros(4)) + b"more",
        npy(np.array([{}], dtype=object), allow_pickle=True),
        zipped(),
        HUGE,
    ],
    ids=["empty", "cut", "text", "short", "long", "pickle", "zip", "huge"],
)
def test_an_array_that_is_no_plain_npy_is_refused(data: bytes) -> None:
    with pytest.raises(FederationError, match="cannot be read"):
        from_record(record_with(data))


def test_a_record_without_description_is_refused() -> None:
    with pytest.raises(FederationError, match="no description"):
        from_record(RecordDict({"about": ConfigRecord({"json": 5})}))
    with pytest.raises(FederationError, match="no description"):
        from_record(RecordDict())


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (PolicyRefused("x"), "not allowed by the hospital's policy"),
        (DataError("x"), "data cannot serve the study"),
        (CaseError("unreadable", "x"), "data cannot serve the study"),
        (StorageError("x"), "disk full or damaged file"),
        (ConfigError("x"), "study cannot be run there"),
        (KeyError("x"), "unexpected error"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_refusal_says_why_in_words_that_name_nobody(error: Exception, phrase: str) -> None:
    assert refusal("a", error, 2) == Reply(site="a", round=2, refusal=phrase)
    assert "Doe" not in pack(refusal("a", type(error)("Jane Doe"), 2)).about
