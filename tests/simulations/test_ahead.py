"""Pictures are in the cache before anybody needs them, and what is given up leaves nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.client.data import cohort, store
from medfl.client.data.cases import Found
from medfl.client.data.fingerprints import Fingerprints, save_fingerprints
from medfl.common.study import Study, load_study
from medfl.simulations.ahead import reading_ahead
from medfl.simulations.benchmarks import shares
from medfl.simulations.sites import SimulatedHospital, find_hospitals

Divided = tuple[Study, tuple[SimulatedHospital, ...], Path]


@pytest.fixture
def divided(tmp_path: Path) -> Divided:
    """A study, three hospitals of pictures, and their cache, which is empty."""
    study = shares.write(shares.ImageWork("cnn", 3, rounds=1), shares.made_up(60), tmp_path / "w")
    cache = tmp_path / "cache"
    return study, find_hospitals(study, tmp_path / "w" / "data", cache), cache


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_hospitals_that_were_read_ahead_come_from_the_cache(
    divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, hospitals, cache = divided
    with reading_ahead(hospitals, study):
        wait_for(lambda: len(list(cache.glob("[!.]*/index.json"))) == 3)
    monkeypatch.setattr(store, "build_entry", None)
    assert sum(len(hospital.cohort(study).cases) for hospital in hospitals) == 60


def test_what_was_begun_is_given_up_at_once_and_leaves_nothing(
    divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, hospitals, cache = divided
    prepare = cohort.prepare
    with monkeypatch.context() as slow:
        slow.setattr(cohort, "prepare", lambda *args: (time.sleep(0.5), prepare(*args))[1])
        with reading_ahead(hospitals, study):
            wait_for(lambda: list(cache.glob(".unfinished-*-*")))  # an entry's folder
            started = time.monotonic()
    assert time.monotonic() - started < 5
    assert [f.name for f in cache.iterdir()] == ["fingerprints.json"]
    assert len(hospitals[0].cohort(study).cases) == 20


def test_remembered_hashes_that_were_not_finished_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(source: object, target: object) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "replace", ended)
    with pytest.raises(SystemExit):
        save_fingerprints(tmp_path, Fingerprints({"a": "b"}))
    assert list(tmp_path.iterdir()) == []


def test_errors_are_left_to_whoever_needs_the_hospital(
    divided: Divided, capfd: pytest.CaptureFixture[str]
) -> None:
    study, (first, *others), cache = divided
    with reading_ahead([replace(first, listed=Found((), ())), *others], study):
        wait_for(lambda: len(list(cache.glob("[!.]*/index.json"))) == 2)
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_block_ends_the_reading(
    divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, hospitals, _ = divided
    forked, fork = list[int](), os.fork
    monkeypatch.setattr(os, "fork", lambda: forked.append(fork()) or forked[-1])
    with pytest.raises(KeyError), reading_ahead(hospitals, study):
        raise KeyError
    assert not Path(f"/proc/{forked[0]}").exists()


@pytest.mark.parametrize("cores", [1, 2])
def test_nothing_is_read_ahead_without_pictures_or_a_second_core(
    divided: Divided,
    write_study: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "fork", None)
    study = divided[0] if cores == 1 else load_study(write_study())
    with reading_ahead(divided[1], study):
        pass
