"""What is said arrives as it was said, and nothing else is understood."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save as safetensors

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


WHOLE = safetensors({"w": np.zeros(4, dtype=np.float32)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:5],
        b"no arrays at all",
        WHOLE[:-1],
        WHOLE + b"more",
        # A header that promises 64 GiB, in front of sixteen bytes.
        WHOLE.replace(b"[4]", b"[17179869184]").replace(b"[0,16]", b"[0,68719476736]"),
        b"\x80\x04\x95" + b"\x00" * 20,
    ],
    ids=["empty", "cut", "text", "short", "long", "huge", "pickle"],
)
def test_arrays_that_are_no_whole_safetensors_are_refused(data: bytes) -> None:
    about = {"json": pack(SAID).about}
    with pytest.raises(FederationError, match="damaged"):
        from_record(RecordDict({"about": ConfigRecord({**about, "delta": data})}))
    large = ArrayRecord({"safetensors": Array("uint8", (len(data),), "safetensors", data)})
    with pytest.raises(FederationError, match="damaged"):
        from_record(RecordDict({"about": ConfigRecord(about), "delta": large}))


def test_arrays_in_another_form_are_refused() -> None:
    about = ConfigRecord({"json": pack(SAID).about})
    npy = ArrayRecord({"w": Array(np.zeros(4, dtype=np.float32))})
    with pytest.raises(FederationError, match="form that medfl does not send"):
        from_record(RecordDict({"about": about, "delta": npy}))


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
        (torch.OutOfMemoryError("x"), "out of memory"),
        (torch.AcceleratorError("x"), "GPU failed"),
        (KeyError("x"), "unexpected error"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_refusal_says_why_in_words_that_name_nobody(error: Exception, phrase: str) -> None:
    assert refusal("a", error, 2) == Reply(site="a", round=2, refusal=phrase)
    assert "Doe" not in pack(refusal("a", type(error)("Jane Doe"), 2)).about
