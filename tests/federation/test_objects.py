"""Flower's object store with large objects as files: the same answers, no file left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.object_store import NoObjectInStoreError

from medfl.client.objects import ShelfObjectStore, shelved, unshelved
from medfl.common.errors import StorageError
from medfl.common.flower_objects import announced_of, fixed, redeemed
from medfl.common.shelf import Shelf, ticket
from medfl.server.objects import FileObjectStore

# Flower configures alembic in a way that alembic announces to drop.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")


def store(tmp_path: Path) -> FileObjectStore:
    made = FileObjectStore(str(tmp_path / "superlink.db"), tmp_path / "objects")
    made.initialize()
    return made


def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "objects")


def record(fill: int) -> RecordDict:
    raw = bytes([fill]) * 6_000_000 + bytes(1_000_000)
    return RecordDict(
        {
            "about": ConfigRecord({"fill": fill}),
            "weights": ArrayRecord({"x": Array("uint8", (len(raw),), "raw", raw)}),
        }
    )


def test_objects_go_in_and_come_out_and_large_ones_are_files(tmp_path: Path) -> None:
    kept, made = store(tmp_path), record(1)
    objects = get_all_nested_objects(made)
    assert set(kept.preregister(7, get_object_tree(made))) == set(objects)
    chunks = [i for i, o in objects.items() if type(o).__name__ == "ArrayChunk"]
    assert kept.get(chunks[0]) == b""
    assert kept.get("0" * 64) is None
    for object_id, one in objects.items():
        kept.put(object_id, one.deflate())
        kept.put(object_id, one.deflate())
        assert redeemed(shelf(tmp_path), object_id, kept.get(object_id)) == one.deflate()
    assert all(kept.get(chunk) == ticket(chunk) for chunk in chunks)
    assert {f.name for f in (tmp_path / "objects").iterdir()} == set(chunks)
    # Nobody has to send again what is there, also after a restart.
    assert store(tmp_path).preregister(8, get_object_tree(made)) == []
    kept.delete(made.object_id)
    assert len(kept) == 0
    assert list((tmp_path / "objects").iterdir()) == []


def test_what_two_messages_share_stays_until_both_are_gone(tmp_path: Path) -> None:
    kept, one = store(tmp_path), record(1)
    other = RecordDict({"again": one["weights"]})
    for made in (one, other):
        kept.preregister(7, get_object_tree(made))
        for object_id, found in get_all_nested_objects(made).items():
            kept.put(object_id, found.deflate())
    kept.delete(one.object_id)
    chunk = next(i for i, o in get_all_nested_objects(other).items() if "Chunk" in type(o).__name__)
    assert kept.get(chunk)
    kept.delete_objects_in_run(7)
    assert list((tmp_path / "objects").iterdir()) == []


def test_content_that_is_not_the_ids_or_was_not_announced_is_refused(tmp_path: Path) -> None:
    kept, made = store(tmp_path), record(1)
    objects = get_all_nested_objects(made)
    chunk, found = next((i, o) for i, o in objects.items() if "Chunk" in type(o).__name__)
    with pytest.raises(NoObjectInStoreError):
        kept.put(chunk, found.deflate())
    kept.preregister(7, get_object_tree(made))
    with pytest.raises(ValueError, match="not the object's"):
        kept.put(chunk, found.deflate()[:-1] + b"x")
    assert list((tmp_path / "objects").iterdir()) == []
    assert kept.get(chunk) == b""


def test_a_file_that_a_crash_lost_or_left_is_known(tmp_path: Path) -> None:
    kept, made = store(tmp_path), record(1)
    kept.preregister(7, get_object_tree(made))
    objects = get_all_nested_objects(made)
    for object_id, one in objects.items():
        kept.put(object_id, one.deflate())
    chunk = next(i for i, o in objects.items() if "Chunk" in type(o).__name__)
    (tmp_path / "objects" / chunk).unlink()
    assert kept.get(chunk) == b""
    assert kept.preregister(8, get_object_tree(made)) == [chunk]
    kept.put(chunk, objects[chunk].deflate())
    assert kept.get(chunk) == ticket(chunk)
    assert shelf(tmp_path).read(chunk) == objects[chunk].deflate()
    (tmp_path / "objects" / ("f" * 64)).write_bytes(b"left")
    store(tmp_path)
    assert not (tmp_path / "objects" / ("f" * 64)).exists()


def test_a_ticket_is_worth_what_lies_on_the_shelf_and_nothing_else(tmp_path: Path) -> None:
    kept, made = store(tmp_path), record(1)
    objects = get_all_nested_objects(made)
    chunk, other = (i for i, o in objects.items() if type(o).__name__ == "ArrayChunk")
    with pytest.raises(ValueError, match="not the object's"):
        shelf(tmp_path).lay(chunk, objects[other].deflate())
    with pytest.raises(ValueError, match="not the object's"):
        shelf(tmp_path).lay("../" + "0" * 61, b"")
    shelf(tmp_path).lay(chunk, objects[chunk].deflate())
    with pytest.raises(NoObjectInStoreError):
        kept.put(chunk, ticket(chunk))
    assert list((tmp_path / "objects").iterdir()) == []
    kept.preregister(7, get_object_tree(made))
    with pytest.raises(ValueError, match="nothing lies"):
        kept.put(chunk, ticket(chunk))
    with pytest.raises(ValueError, match="content hash"):
        kept.put(chunk, ticket(other))
    assert kept.get(chunk) == b""
    shelf(tmp_path).lay(chunk, objects[chunk].deflate())
    kept.put(chunk, ticket(chunk))
    assert shelf(tmp_path).read(chunk) == objects[chunk].deflate()
    assert [f.stat().st_mode & 0o777 for f in (tmp_path / "objects").iterdir()] == [0o600]


def test_files_and_database_agree_after_a_restart(tmp_path: Path) -> None:
    """Ended between laying and keeping, and with one object kept and one not."""
    kept, made = store(tmp_path), record(1)
    objects = get_all_nested_objects(made)
    first, second = (i for i, o in objects.items() if type(o).__name__ == "ArrayChunk")
    kept.preregister(7, get_object_tree(made))
    for chunk in (first, second):
        shelf(tmp_path).lay(chunk, objects[chunk].deflate())
    kept.put(first, ticket(first))
    again = store(tmp_path)
    assert again.get(first) == ticket(first)
    assert again.get(second) == b""
    assert second in again.preregister(8, get_object_tree(made))
    # What was laid while the SuperLink was away is kept when its ticket is shown again.
    again.put(second, ticket(second))
    assert shelf(tmp_path).read(second) == objects[second].deflate()
    assert {f.name for f in (tmp_path / "objects").iterdir()} == {first, second}


def test_a_supernode_passes_tickets_on_and_its_deletions_empty_the_shelf(tmp_path: Path) -> None:
    lying, made = shelf(tmp_path), record(1)
    kept, objects = ShelfObjectStore(lying), get_all_nested_objects(made)
    chunk = next(i for i, o in objects.items() if type(o).__name__ == "ArrayChunk")
    whole = objects[chunk].deflate()
    asked = PullObjectRequest(object_id=chunk).SerializeToString()

    def given(content: bytes) -> bytes:
        answer = PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )
        return shelved(lying, asked, answer.SerializeToString())

    # What is not the object that was asked for comes as it is, and the store refuses it.
    false = PullObjectResponse.FromString(given(whole[:-1] + b"x")).object_content
    assert false == whole[:-1] + b"x"
    kept.preregister(7, get_object_tree(made))
    with pytest.raises(ValueError, match="does not match"):
        kept.put(chunk, false)
    with pytest.raises(ValueError, match="nothing lies"):
        kept.put(chunk, ticket(chunk))
    got = PullObjectResponse.FromString(given(whole)).object_content
    assert got == ticket(chunk)
    kept.put(chunk, got)
    assert kept.get(chunk) == ticket(chunk)
    call = PushObjectRequest(object_id=chunk, object_content=ticket(chunk), session_id="7")
    sent = PushObjectRequest.FromString(unshelved(lying, call.SerializeToString()))
    assert (sent.object_content, sent.session_id) == (whole, "7")
    kept.delete(made.object_id)
    assert list((tmp_path / "objects").iterdir()) == []


def test_a_chunk_that_is_hashed_where_it_lies_has_flowers_id(tmp_path: Path) -> None:
    made = record(3)
    flowers = get_object_tree(made)
    assert get_object_tree(fixed(record(3))) == flowers
    about = Metadata(7, "", 1, 2, "", "", 0.0, 60.0, "query.prepare")
    announced = announced_of(Message(content=fixed(record(3)), metadata=about))  # type: ignore[call-overload]
    pushed: dict[str, bytes] = {}
    announced.push(set(announced.objects), pushed.__setitem__, shelf(tmp_path))
    for object_id, found in get_all_nested_objects(made).items():
        if type(found).__name__ == "ArrayChunk":
            laid = shelf(tmp_path).laid(object_id)
            assert laid is not None
            assert laid.read_bytes() == found.deflate()
            assert pushed[object_id] == ticket(object_id)


def test_a_disk_that_is_almost_full_is_not_filled(tmp_path: Path) -> None:
    """The object then goes its usual way, through the SuperNode's memory."""
    full = Shelf(tmp_path / "objects", leave=2**62)
    content = b"ArrayChunk  300000\x00" + bytes(300_000)
    object_id = get_object_id(content)
    with pytest.raises(StorageError, match="almost full"):
        full.lay(object_id, content)
    asked = PullObjectRequest(object_id=object_id).SerializeToString()
    answer = PullObjectResponse(object_found=True, object_content=content).SerializeToString()
    assert shelved(full, asked, answer) == answer
    about = Metadata(7, "", 1, 2, "", "", 0.0, 60.0, "query.prepare")
    announced = announced_of(Message(content=fixed(record(3)), metadata=about))  # type: ignore[call-overload]
    pushed: dict[str, bytes] = {}
    announced.push(set(announced.objects), pushed.__setitem__, full)
    assert all(get_object_id(content) == object_id for object_id, content in pushed.items())
    assert list((tmp_path / "objects").iterdir()) == []
