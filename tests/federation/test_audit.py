"""The audit chain: whatever is done to the file afterwards is found, and where."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medfl.common import audit, heads
from medfl.common.audit import START, AuditLog, BadLine, Head, files_of, verify
from medfl.common.errors import StorageError
from medfl.common.signing import new_key, public_of

N = 6


def filled(folder: Path, lines: int = N) -> AuditLog:
    log = AuditLog(folder / "audit.jsonl")
    log.path.unlink(missing_ok=True)
    for i in range(lines):
        log.append("did", {"i": i}, at=1_800_000_000 + i)
    return log


def rewrite(log: AuditLog, lines: list[bytes]) -> None:
    log.path.write_bytes(b"".join(lines))


def with_own_hash(line: bytes, **changed: object) -> bytes:
    """The line as a forger writes it, who knows how hashes are made."""
    plain = json.loads(line) | changed
    plain["hash"] = audit._hash(plain)
    return audit.canonical(plain) + b"\n"


def test_a_line_holds_the_hash_of_the_one_before_it(tmp_path: Path) -> None:
    log = filled(tmp_path, 2)
    first, second = (json.loads(line) for line in log.path.read_bytes().splitlines())
    assert first["before"] == START
    assert second["before"] == first["hash"] == audit._hash(first)
    assert first["at"] == "2027-01-15T08:00:00Z"
    assert log.head() == Head(2, second["hash"])


def test_an_untouched_log_verifies_also_an_empty_one(tmp_path: Path) -> None:
    assert verify(tmp_path / "none") is None
    assert verify(filled(tmp_path).path) is None


@pytest.mark.parametrize("k", range(1, N + 1))
def test_an_edited_line_is_named(tmp_path: Path, k: int) -> None:
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[k - 1] = lines[k - 1].replace(b'"did"', b'"not"')
    rewrite(log, lines)
    bad = verify(log.path)
    assert bad is not None
    assert bad.n == k


def test_the_same_values_written_otherwise_are_an_edit(tmp_path: Path) -> None:
    log = filled(tmp_path)
    whole = log.path.read_bytes()
    for old, new in ((b'{"i":2}', b'{"i": 2}'), (b'{"i":2}', b'{"i":2,"i":2}')):
        log.path.write_bytes(whole.replace(old, new))
        bad = verify(log.path)
        assert bad is not None
        assert bad.n == 3


@pytest.mark.parametrize("k", range(1, N))
def test_an_edited_line_with_a_fresh_hash_is_named_by_the_next(tmp_path: Path, k: int) -> None:
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[k - 1] = with_own_hash(lines[k - 1], what="not")
    rewrite(log, lines)
    bad = verify(log.path)
    assert bad is not None
    assert bad.n == k


@pytest.mark.parametrize("k", range(1, N))
def test_a_removed_line_is_named_by_its_place(tmp_path: Path, k: int) -> None:
    log = filled(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    del lines[k - 1]
    rewrite(log, lines)
    bad = verify(log.path)
    assert bad is not None
    assert bad.n == k


def test_a_cut_tail_and_a_new_last_line_are_found_by_the_other_side(tmp_path: Path) -> None:
    log = filled(tmp_path)
    known = {N: log.head().hash}
    lines = log.path.read_bytes().splitlines(keepends=True)
    rewrite(log, lines[:-2])
    assert verify(log.path) is None
    bad = verify(log.path, known)
    assert bad is not None
    assert bad.n == N - 1
    rewrite(log, [*lines[:-1], with_own_hash(lines[-1], what="not")])
    assert verify(log.path) is None
    bad = verify(log.path, known)
    assert bad is not None
    assert bad.n == N


def test_a_whole_chain_made_anew_is_found_by_the_other_side(tmp_path: Path) -> None:
    log = filled(tmp_path)
    known = {2: Head(2, json.loads(log.path.read_bytes().splitlines()[1])["hash"]).hash}
    log.path.unlink()
    for i in range(N):
        log.append("else", {"i": i})
    bad = verify(log.path, known)
    assert bad is not None
    assert bad.n == 2


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cut=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    put=st.binary(max_size=12),
)
def test_no_edit_of_the_bytes_goes_unseen(tmp_path: Path, cut: tuple[int, int], put: bytes) -> None:
    """Any stretch of bytes replaced by any other: seen, and never named after the damage."""
    log = AuditLog(tmp_path / "audit.jsonl")
    if not log.path.exists() or not (tmp_path / "whole").exists():
        filled(tmp_path)
        (tmp_path / "whole").write_bytes(log.path.read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    start, length = cut[0] % len(whole), cut[1] % 60
    edited = whole[:start] + put + whole[start + length :]
    log.path.write_bytes(edited)
    known = {N: json.loads(whole.splitlines()[-1])["hash"]}
    bad = verify(log.path, known)
    if edited == whole:
        assert bad is None
    else:
        touched = whole[:start].count(b"\n") + 1
        assert bad is not None
        assert bad.n <= touched + 1
        assert bad.n >= touched - 1


def test_an_unfinished_last_line_is_set_aside_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = filled(tmp_path, 3)
    whole = log.path.read_bytes()
    os.truncate(log.path, len(whole) - 10)
    bad = verify(log.path)
    assert bad is not None
    assert "torn" in bad.why
    log.append("next", {})
    assert "unfinished" in caplog.text
    assert [line["what"] for line in log.lines()] == ["did", "did", "recovered", "next"]
    assert verify(log.path) is None
    assert (tmp_path / "audit.jsonl.torn").read_bytes()[:-1] == whole.splitlines()[2][:-9]


def test_nothing_is_added_after_a_damaged_last_line(tmp_path: Path) -> None:
    log = filled(tmp_path, 2)
    log.path.write_bytes(log.path.read_bytes().replace(b'"i":1', b'"i":7'))
    with pytest.raises(StorageError, match="last line is damaged"):
        log.append("next", {})


def _until_full(path: Path, limit: int) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        AuditLog(path).append("did", {"i": 99})
    except StorageError as error:
        os._exit(error.exit_code)
    os._exit(0)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_is_an_error_and_the_log_goes_on_later(tmp_path: Path, room: int) -> None:
    """A limit on the file's size stands for the disk: what fits is written, then an error."""
    log = filled(tmp_path, 2)
    limit = log.path.stat().st_size + room
    writer = get_context("fork").Process(target=_until_full, args=(log.path, limit))
    writer.start()
    writer.join(30)
    assert writer.exitcode == StorageError.exit_code
    log.append("next", {})
    assert verify(log.path) is None
    whats = [line["what"] for line in log.lines()]
    assert whats == ["did", "did", *(["recovered"] if room else []), "next"]


def _many(path: Path) -> None:
    for i in range(20):
        AuditLog(path).append("did", {"i": i})


def test_processes_that_write_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = get_context("fork")
    writers = [context.Process(target=_many, args=(path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert verify(path) is None
    assert AuditLog(path).head().n == 60


def test_only_heads_signed_by_the_pinned_key_are_believed(tmp_path: Path) -> None:
    key, other = new_key(tmp_path / "k"), new_key(tmp_path / "o")
    file = tmp_path / "witnesses.jsonl"
    right = heads.witness(key, "a", "them", Head(3, "aa"), 1.0)
    forged = heads.witness(other, "a", "them", Head(9, "bb"), 1.0)
    of_another = heads.witness(key, "b", "them", Head(8, "cc"), 1.0)
    for seen in (right, forged, of_another):
        heads.keep(file, seen)
    with file.open("a") as out:
        out.write("not json\n")
    assert heads.kept(file, "a", {"them": public_of(key)}.get) == ({3: "aa"}, 3)


def test_a_log_that_has_grown_is_put_aside_and_its_chain_goes_on(tmp_path: Path) -> None:
    """Files of at most 600 bytes and one line more; the chain is one from line 1 to line 20."""
    log = AuditLog(tmp_path / "audit.jsonl", max_file=600)
    heads = {log.append("event", {"number": k}).n: log.head().hash for k in range(1, 21)}
    assert sorted(heads) == list(range(1, 21))
    aside = files_of(log.path)
    assert len(aside) > 3
    assert all(f.stat().st_size < 1000 for f in aside)
    assert [e["about"]["number"] for e in log.lines()] == list(range(1, 21))
    assert (log.head(), log.hash_at(3)) == (Head(20, heads[20]), heads[3])
    assert verify(log.path, heads) is None
    # The end may be empty (a crash after the renaming): the next line still follows the last.
    log.path.rename(tmp_path / "kept")
    (tmp_path / "kept").unlink()
    assert verify(log.path) is None
    n = log.head().n
    assert (log.append("event", {"number": 0}).n, verify(log.path)) == (n + 1, None)
    # A file that is taken out, or changed, is noticed.
    text = aside[1].read_bytes()
    aside[1].write_bytes(text.replace(b"event", b"evenT", 1))
    assert "was changed" in (verify(log.path) or BadLine(0, "")).why
    aside[1].unlink()
    assert "lines were removed" in (verify(log.path) or BadLine(0, "")).why
