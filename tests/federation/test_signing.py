"""Keys and signatures: who may read a key, and what a signature covers."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.common.errors import ConfigError, StorageError
from medfl.common.private_files import only_one, read_private, write_private
from medfl.common.signing import (
    canonical,
    fingerprint,
    is_signed,
    load_key,
    new_key,
    public_of,
    sign,
)

PLAIN = st.dictionaries(
    st.text(max_size=8), st.one_of(st.text(max_size=20), st.integers(), st.booleans()), max_size=5
)


def test_a_new_key_is_readable_by_its_owner_alone_and_is_the_same_when_read(tmp_path: Path) -> None:
    key = new_key(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert public_of(load_key(tmp_path / "k")) == public_of(key)


def test_a_key_is_never_replaced_by_a_new_one(tmp_path: Path) -> None:
    before = public_of(new_key(tmp_path / "k"))
    with pytest.raises(StorageError, match="is not replaced"):
        new_key(tmp_path / "k")
    assert public_of(load_key(tmp_path / "k")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_key_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    new_key(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(tmp_path / "k")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA", b"\0" * 100])
def test_an_empty_or_damaged_key_is_refused(tmp_path: Path, content: bytes) -> None:
    write_private(tmp_path / "k", content)
    with pytest.raises(StorageError, match="restore it from the backup"):
        load_key(tmp_path / "k")


def test_a_missing_key_is_a_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_key(tmp_path / "k")


def test_a_signature_holds_for_its_purpose_value_and_key_only(tmp_path: Path) -> None:
    key, other = new_key(tmp_path / "a"), new_key(tmp_path / "b")
    signature = sign(key, "approval", {"study": "x", "n": 1})
    mine = public_of(key)
    assert is_signed(mine, "approval", {"n": 1, "study": "x"}, signature)
    assert not is_signed(mine, "withdrawal", {"study": "x", "n": 1}, signature)
    assert not is_signed(mine, "approval", {"study": "x", "n": 2}, signature)
    assert not is_signed(public_of(other), "approval", {"study": "x", "n": 1}, signature)


@pytest.mark.parametrize("public", ["", "zz", "00" * 31, "00" * 32])
@pytest.mark.parametrize("signature", ["", "not base64!", "AAAA", "A" * 88])
def test_nonsense_is_no_signature_and_no_error(public: str, signature: str) -> None:
    assert not is_signed(public, "p", {}, signature)


def test_a_purpose_cannot_be_stretched_into_the_value(tmp_path: Path) -> None:
    """Purpose and value are kept apart by a line break, which no purpose has."""
    key = new_key(tmp_path / "k")
    assert not is_signed(public_of(key), "a b", {}, sign(key, "a", {"b": 1}))


def test_canonical_json_is_the_shortest_sorted_form() -> None:
    assert canonical({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"x": float("nan")})


@given(PLAIN, PLAIN)
def test_two_values_have_one_form_only_if_they_are_equal(left: dict, right: dict) -> None:
    same = {k: (type(v), v) for k, v in left.items()} == {k: (type(v), v) for k, v in right.items()}
    assert (canonical(left) == canonical(right)) == same


def test_a_fingerprint_is_sha256_in_groups_of_four() -> None:
    # SHA-256 of "abc" (FIPS 180-4, example B.1).
    assert fingerprint(b"abc").startswith("ba78 16bf 8f01 cfea 4141 40de")
    assert len(fingerprint(b"abc").split()) == 16


def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_private(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="could not be written"):
        write_private(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert read_private(tmp_path / "f") == b"old"


def test_threads_that_write_one_file_at_once_leave_one_whole_content(tmp_path: Path) -> None:
    contents = [bytes([65 + i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            list(pool.map(lambda content: write_private(tmp_path / "f", content), contents))
            assert read_private(tmp_path / "f") in contents
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "lock", "medfl-server"):
        with pytest.raises(StorageError, match="another medfl-server runs"):
            with only_one(tmp_path / "lock", "medfl-server"):
                pass
    with only_one(tmp_path / "lock", "medfl-server"):
        pass
