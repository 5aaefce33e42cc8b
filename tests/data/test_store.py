"""The cache: one array without copies, nothing half-written, damage noticed and repaired."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medfl.client.data import store
from medfl.client.data.preprocess import Facts, Prepared
from medfl.common.errors import CaseError, StorageError
from medfl.common.site import Cache

FACTS = Facts((2, 2), (), 0.0, 1.0, 2.0)


def prepared(value: float, shape: tuple[int, ...] = (1, 2, 2)) -> Prepared:
    image = np.full(shape, value, dtype=np.float32)
    return Prepared(image, np.full(shape[1:], int(value), dtype=np.uint8), FACTS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(path=tmp_path / "cache")


def test_cases_of_one_shape_are_one_array_on_disk(cache: Cache) -> None:
    outcomes = [prepared(1), CaseError("unreadable", "x"), prepared(2)]
    stored = store.build_entry(cache, "k", outcomes)
    assert isinstance(stored.inputs, np.ndarray)
    assert stored.inputs.shape == (2, 1, 2, 2)
    base: object = stored.inputs
    while not isinstance(base, np.memmap):
        base = base.base  # type: ignore[attr-defined]
    assert stored.inputs[:, 0, 0, 0].tolist() == [1, 2]
    assert [e.reason for e in stored.entries] == ["", "unreadable", ""]
    assert stored.entries[0].facts == FACTS


def test_cases_of_several_shapes_are_views(cache: Cache) -> None:
    stored = store.build_entry(cache, "k", [prepared(1), prepared(2, (1, 3, 5))])
    assert isinstance(stored.inputs, store.Slots)
    assert [stored.inputs[i].shape for i in range(2)] == [(1, 2, 2), (1, 3, 5)]
    assert (stored.inputs[1] == 2).all()
    assert not stored.inputs[1].flags.owndata
    assert stored.masks is not None
    assert stored.masks[1].shape == (3, 5)


@pytest.mark.parametrize("shapes", [[(1, 2, 2)] * 3, [(1, 2, 2), (1, 3, 2), (1, 2, 2)], []])
def test_memory_and_disk_give_the_same(cache: Cache, shapes: list[tuple[int, ...]]) -> None:
    outcomes: list[store.Outcome] = [prepared(i + 1, s) for i, s in enumerate(shapes)]
    outcomes.append(CaseError("unreadable"))
    memory, disk = store.in_memory(outcomes), store.build_entry(cache, "k", outcomes)
    assert memory.entries == disk.entries
    assert len(memory.inputs) == len(disk.inputs) == len(shapes)
    for i in range(len(shapes)):
        assert np.array_equal(memory.inputs[i], disk.inputs[i])


def test_the_same_picture_twice_is_kept_once(cache: Cache) -> None:
    stored = store.build_entry(cache, "k", [prepared(1), prepared(1), prepared(2)])
    assert [e.reason for e in stored.entries] == ["", "duplicate", ""]
    assert len(stored.inputs) == 2


def test_a_missing_entry_is_none(cache: Cache) -> None:
    assert store.read_entry(cache, "nothing") is None


@pytest.mark.parametrize("name", ["inputs.bin", "masks.bin", "index.json"])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_entry_is_noticed_aloud(
    cache: Cache, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    store.build_entry(cache, "k", [prepared(1), prepared(2)])
    path = cache.path / "k" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content[:-2] if how == "cut" else content)
    with caplog.at_level(logging.WARNING):
        assert store.read_entry(cache, "k") is None
    assert "built again" in caplog.text


def test_a_touched_but_sound_entry_is_kept(cache: Cache) -> None:
    store.build_entry(cache, "k", [prepared(1)])
    path = cache.path / "k" / "inputs.bin"
    path.write_bytes(path.read_bytes())
    assert store.read_entry(cache, "k") is not None


@pytest.mark.parametrize("durable", [True, False])
def test_what_did_not_wait_for_the_disk_is_checked_after_the_next_start(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    store.build_entry(cache, "k", [prepared(1)], durable=durable)
    path = cache.path / "k" / "inputs.bin"
    state = path.stat()
    path.write_bytes(bytes(state.st_size))  # what a file is whose blocks never reached the disk
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert store.read_entry(cache, "k") is not None
    monkeypatch.setattr(store, "_boot", lambda: "another start")
    assert (store.read_entry(cache, "k") is None) is not durable


def test_a_sound_entry_that_did_not_wait_is_kept_after_the_next_start(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.build_entry(cache, "k", [prepared(1)], durable=False)
    monkeypatch.setattr(store, "_boot", lambda: "another start")
    assert store.read_entry(cache, "k") is not None


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 kB, which is what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_nothing_half_written(cache: Cache) -> None:
    store.build_entry(cache, "good", [prepared(1)])
    with pytest.raises(StorageError, match="Make room"):
        store.build_entry(cache, "big", [prepared(i, (1, 100, 100)) for i in range(5)])
    assert [p.name for p in cache.path.iterdir()] == ["good"]


def test_a_crash_while_writing_leaves_no_entry_and_is_swept_up(cache: Cache) -> None:
    def breaks() -> Iterator[store.Outcome]:
        yield prepared(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build_entry(cache, "k", breaks())
    assert list(cache.path.iterdir()) == []
    left = cache.path / ".unfinished-999999999-abc"
    left.mkdir()
    os.utime(left, (1e9, 1e9))
    store.build_entry(cache, "k", [prepared(1)])
    assert not left.exists()


def test_a_cache_stays_below_its_size_though_not_every_entry_looks_at_all(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(path=cache.path, max_gb=400e-6)
    looked, look = [], store._remove_oldest
    monkeypatch.setattr(
        store, "_remove_oldest", lambda *args, **named: looked.append(1) or look(*args, **named)
    )
    for i in range(60):
        store.build_entry(cache, f"k{i:02}", [prepared(i % 200, (1, 20, 20))])
        os.utime(cache.path / f"k{i:02}", (1e9 + i, 1e9 + i))
        sizes = [f.stat().st_size for f in cache.path.rglob("*") if f.is_file()]
        assert sum(sizes) < 400e3
    assert len(looked) < 30
    for i in range(60, 300):
        store.build_entry(cache, f"k{i:03}", [prepared(i % 200, (1, 20, 20))])
    left = sorted(p.name for p in cache.path.iterdir())
    assert "k299" in left
    assert "k00" not in left
    assert sum(f.stat().st_size for f in cache.path.rglob("*") if f.is_file()) < 400e3


def test_oldest_entries_go_when_the_cache_is_too_large(cache: Cache) -> None:
    cache = Cache(path=cache.path, max_gb=100e-6)
    for age, key in enumerate(["new", "middle", "old"]):
        store.build_entry(cache, key, [prepared(i, (1, 90, 90)) for i in range(1)])
        os.utime(cache.path / key, (1e9 - age, 1e9 - age))
    store.build_entry(cache, "next", [prepared(7, (1, 90, 90))])
    assert {p.name for p in cache.path.iterdir()} == {"next", "new"}
