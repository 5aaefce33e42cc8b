"""Sealed messages: one exchange, one sender, one content, once, also after a restart."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from medfl.common.errors import PolicyRefused, StorageError
from medfl.common.messages import Envelope
from medfl.common.receipts import (
    Seal,
    Seen,
    attach,
    check,
    content_of,
    detach,
    from_text,
    seal,
    to_text,
)
from medfl.common.signing import new_key, public_of

BARE = Seal(
    study="s" * 64,
    run="main",
    kind="round",
    asked="a" * 64,
    round=3,
    attempt=0,
    site="a",
    content="c" * 64,
)


def test_a_seal_holds_for_its_own_exchange_and_no_other(tmp_path: Path) -> None:
    key = new_key(tmp_path / "k")
    sealed = from_text(to_text(seal(key, BARE)))
    check(sealed, BARE, public_of(key))
    for other in (
        {"study": "t" * 64},
        {"run": "again"},
        {"kind": "finish"},
        {"asked": "b" * 64},
        {"round": 4},
        {"attempt": 1},
        {"site": "b"},
        {"content": "d" * 64},
    ):
        with pytest.raises(PolicyRefused, match=f"another {next(iter(other))}"):
            check(sealed, replace(BARE, **other), public_of(key))  # type: ignore[arg-type]
        moved = replace(sealed, **other)  # type: ignore[arg-type]
        with pytest.raises(PolicyRefused, match="not signed"):
            check(moved, replace(BARE, **other), public_of(key))  # type: ignore[arg-type]


def test_one_site_cannot_seal_in_anothers_name(tmp_path: Path) -> None:
    a, b = new_key(tmp_path / "a"), new_key(tmp_path / "b")
    sealed = seal(a, replace(BARE, site="b"))
    with pytest.raises(PolicyRefused, match="not signed by its pinned key"):
        check(sealed, replace(BARE, site="b"), public_of(b))
    with pytest.raises(PolicyRefused, match="not signed by its pinned key"):
        check(sealed, replace(BARE, site="b"), None)


def test_a_message_counts_once_also_after_a_restart(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.jsonl")
    seen.admit(BARE)
    for again in (seen, Seen(tmp_path / "seen.jsonl")):
        with pytest.raises(PolicyRefused, match="was sent before"):
            again.admit(BARE)
        with pytest.raises(PolicyRefused, match="second content"):
            again.admit(replace(BARE, content="d" * 64))
    Seen(tmp_path / "seen.jsonl").admit(replace(BARE, attempt=1))


def test_a_line_that_a_crash_left_unfinished_did_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "seen.jsonl"
    Seen(file).admit(BARE)
    whole = file.read_bytes()
    Seen(file).admit(replace(BARE, round=4))
    file.write_bytes(file.read_bytes()[:-5])
    Seen(file).admit(replace(BARE, round=4))
    assert "unfinished" in caplog.text
    assert file.read_bytes().startswith(whole)
    with pytest.raises(PolicyRefused):
        Seen(file).admit(replace(BARE, round=4))


def test_a_damaged_list_counts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "seen.jsonl"
    Seen(file).admit(BARE)
    file.write_bytes(b"x" + file.read_bytes())
    with pytest.raises(StorageError, match="is damaged"):
        Seen(file).admit(replace(BARE, round=4))


def _until_full(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        Seen(path).admit(replace(BARE, round=4))
    except StorageError as error:
        os._exit(error.exit_code)
    os._exit(0)


@pytest.mark.parametrize("room", [0, 20])
def test_what_the_disk_does_not_take_does_not_count(tmp_path: Path, room: int) -> None:
    file = tmp_path / "seen.jsonl"
    Seen(file).admit(BARE)
    whole = file.read_bytes()
    writer = get_context("fork").Process(target=_until_full, args=(file, len(whole) + room))
    writer.start()
    writer.join(30)
    assert writer.exitcode == StorageError.exit_code
    assert file.read_bytes() == whole
    Seen(file).admit(replace(BARE, round=4))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"study":1}', "[" * 5000])
def test_nonsense_is_no_seal(text: str) -> None:
    with pytest.raises(PolicyRefused, match="no seal"):
        from_text(text)


def test_the_content_is_everything_in_the_message() -> None:
    weights = {"w": np.arange(4, dtype=np.float32), "b": np.zeros(1, np.float32)}
    base = Envelope('{"a":1}', {"delta": weights})
    same = Envelope('{"a":1}', {"delta": dict(reversed(weights.items()))})
    assert content_of(base) == content_of(same)
    others = [
        Envelope('{"a":2}', {"delta": weights}),
        Envelope('{"a":1}', {"control": weights}),
        Envelope('{"a":1}', {"delta": weights, "control": {}}),
        Envelope('{"a":1}', {"delta": weights | {"b": np.zeros((1, 1), np.float32)}}),
        Envelope('{"a":1}', {"delta": weights | {"b": np.zeros(1, np.int32)}}),
        Envelope('{"a":1}', {"delta": weights | {"w": np.arange(4, dtype=np.float32) * -1}}),
    ]
    assert len({content_of(e) for e in [base, *others]}) == 1 + len(others)


def test_a_seal_travels_with_its_message_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    message = Envelope('{"a":1}', {"delta": {"w": np.ones(2, np.float32)}})
    sealed = seal(new_key(tmp_path / "k"), replace(BARE, content=content_of(message)))
    opened, found = detach(attach(message, sealed))
    assert found == sealed
    assert content_of(opened) == content_of(message)
    assert detach(message) == (message, None)
    for wrong in (np.zeros(3, np.float32), np.zeros(5000, np.uint8), np.full(9, 255, np.uint8)):
        with pytest.raises(PolicyRefused):
            detach(replace(message, arrays={"seal": {"seal": wrong}}))
