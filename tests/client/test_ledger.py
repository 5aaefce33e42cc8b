"""The ledger: durable before the data are touched, and honest about having been changed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medfl.client.composition import Charge, spent
from medfl.client.ledger import Head, Ledger
from medfl.common import accounting
from medfl.common.errors import BudgetSpent, StorageError

SIX = ["a", "b", "c", "d", "e", "f"]


def charge(round_: int = 1, study: str = "s1", steps: int = 5, sigma: float = 4.0) -> Charge:
    return Charge(study, f"study-{study}", "main", "training", round_, sigma, 0.5, steps)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def file_of(ledger: Ledger) -> Path:
    return ledger.folder / "ledger.jsonl"


def test_a_new_ledger_has_spent_nothing_and_needs_no_file(ledger: Ledger) -> None:
    assert ledger.entries() == ()
    assert ledger.heaviest() == [[]]
    assert ledger.head() == Head(0, "")
    assert not ledger.folder.exists()


def test_reserved_counts_as_spent_and_settling_gives_nothing_back(ledger: Ledger) -> None:
    entry = ledger.reserve(charge(), SIX)
    assert [e.settled for e in ledger.entries()] == [False]
    before = ledger.heaviest()
    assert before == [[(4.0, 0.5, 5)]]
    ledger.settle(entry)
    ledger.settle(entry)
    assert [e.settled for e in ledger.entries()] == [True]
    assert ledger.heaviest() == before


def test_what_is_read_again_is_what_was_written(ledger: Ledger) -> None:
    entry = ledger.reserve(charge(), ["a", "a", "b"])
    (again,) = Ledger(ledger.folder).entries()
    assert again == entry
    assert again.most_records == 2


def test_rounds_studies_and_runs_of_one_cohort_add_up(ledger: Ledger) -> None:
    for round_ in (1, 2, 3):
        ledger.reserve(charge(round_), SIX)
    ledger.reserve(charge(1, study="s2", steps=7), SIX)
    assert spent(ledger.heaviest(), 1e-3) == accounting.epsilon([(4.0, 0.5, 22)], 1e-3)


def test_cohorts_compose_on_their_overlap_alone(ledger: Ledger) -> None:
    ledger.reserve(charge(steps=5), ["a", "b", "c"])
    ledger.reserve(charge(steps=7), ["c", "d"])
    ledger.reserve(charge(steps=11), ["e"])
    total = {p: sum(n for _, _, n in ledger.heaviest([p])[0]) for p in "abcdez"}
    assert total == {"a": 5, "b": 5, "c": 12, "d": 7, "e": 11, "z": 0}
    assert sorted(sum(n for _, _, n in h) for h in ledger.heaviest()) == [11, 12]
    assert [sum(n for _, _, n in h) for h in ledger.heaviest(["a", "d"])] in ([7, 5], [5, 7])


def test_an_objection_comes_before_anything_is_written(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    head = ledger.head()

    def objects(histories, step, entries) -> None:
        assert (histories, step) == ([[(4.0, 0.5, 5)]], (4.0, 0.5, 7))
        raise BudgetSpent("no")

    with pytest.raises(BudgetSpent):
        ledger.reserve(charge(steps=7), SIX, objects)
    assert ledger.head() == head


def test_no_name_of_a_patient_is_in_the_files(ledger: Ledger) -> None:
    ledger.reserve(charge(), ["patient-4711", "patient-4712"])
    for file in ledger.folder.iterdir():
        assert b"patient-47" not in file.read_bytes()
        assert file.name == "lock" or file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("line", [1, 2, 3])
def test_an_edited_line_is_noticed_and_named(ledger: Ledger, line: int) -> None:
    ledger.settle(ledger.reserve(charge(), SIX))
    lines = file_of(ledger).read_text().splitlines()
    plain = json.loads(lines[line - 1])
    plain["when"] = "2001-01-01T00:00:00+00:00"
    lines[line - 1] = json.dumps(plain, sort_keys=True)
    file_of(ledger).write_text("\n".join(lines) + "\n")
    with pytest.raises(StorageError, match=f"line {line} was changed"):
        ledger.reserve(charge(2), SIX)


def test_an_edited_line_with_a_new_hash_of_its_own_breaks_the_next(ledger: Ledger) -> None:
    for round_ in (1, 2):
        ledger.reserve(charge(round_), SIX)
    lines = file_of(ledger).read_text().splitlines()
    plain = json.loads(lines[1])
    plain["charge"]["noise_multiplier"] = 4000.0
    del plain["hash"]
    plain["hash"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    lines[1] = json.dumps(plain, sort_keys=True)
    file_of(ledger).write_text("\n".join(lines) + "\n")
    with pytest.raises(StorageError, match="line 3 was changed"):
        ledger.heaviest()


def test_a_removed_a_swapped_and_a_doubled_line_are_noticed(ledger: Ledger) -> None:
    for round_ in (1, 2, 3):
        ledger.reserve(charge(round_), SIX)
    lines = file_of(ledger).read_text().splitlines(keepends=True)
    for wrong in (
        lines[:1] + lines[2:],
        [lines[0], lines[2], lines[1], lines[3]],
        [*lines, lines[3]],
    ):
        file_of(ledger).write_text("".join(wrong))
        with pytest.raises(StorageError, match="was changed, removed or put in"):
            ledger.entries()


def test_a_ledger_put_back_or_begun_anew_is_noticed_by_its_head(ledger: Ledger) -> None:
    ledger.reserve(charge(1), SIX)
    backup = file_of(ledger).read_bytes()
    early = ledger.head()
    ledger.reserve(charge(2), SIX)
    late = ledger.head()
    assert ledger.noticed(early) is None
    assert ledger.noticed(late) is None
    file_of(ledger).write_bytes(backup)
    assert ledger.entries()  # Alone it looks whole ...
    assert "cut short" in (ledger.noticed(late) or "")  # ... and somebody else knows better.
    ledger.reserve(charge(2, sigma=400.0), SIX)
    assert "rewritten" in (ledger.noticed(late) or "")
    assert "cut short" in (Ledger(ledger.folder / "new").noticed(late) or "")


def test_a_ledger_that_is_gone_is_not_taken_for_a_new_one(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    file_of(ledger).unlink()
    with pytest.raises(StorageError, match="is gone"):
        ledger.reserve(charge(), SIX)
    file_of(ledger).write_bytes(b"")
    with pytest.raises(StorageError):
        ledger.reserve(charge(), SIX)


def test_a_lost_key_and_a_lost_list_of_patients_stop_everything(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    (listed,) = ledger.folder.glob("patients-*")
    content = listed.read_bytes()
    listed.write_bytes(content[8:])
    with pytest.raises(StorageError, match="whose privacy"):
        ledger.reserve(charge(), SIX, lambda *_: None)
    listed.write_bytes(content)
    (ledger.folder / "key").write_bytes(bytes(32))
    with pytest.raises(StorageError, match="does not belong"):
        ledger.reserve(charge(), SIX)


def test_half_a_line_of_a_killed_process_is_dropped(ledger: Ledger) -> None:
    ledger.reserve(charge(1), SIX)
    with file_of(ledger).open("a") as file:
        file.write('{"number": 2, "kind": "res')
    assert len(ledger.entries()) == 1
    ledger.reserve(charge(2), SIX)
    assert [e.charge.round for e in ledger.entries()] == [1, 2]


def test_a_process_killed_while_it_made_the_ledger_leaves_it_usable(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    first = file_of(ledger).read_bytes().splitlines(keepends=True)[0]
    (ledger.folder / "key").unlink()
    file_of(ledger).write_bytes(first)
    ledger.reserve(charge(), SIX)
    assert len(ledger.entries()) == 1


def test_a_full_disk_stops_before_the_data(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from medfl.client.ledger import Ledger; from medfl.client.composition import Charge\n"
        "from medfl.common.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    Ledger(Path(sys.argv[1])).reserve(\n"
        "        Charge('s', 'n', 'main', 'training', 1, 4.0, .5, 1), ['a', 'b'])\n"
        "except StorageError:\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, ledger.folder], timeout=60).returncode == 7
    assert len(ledger.entries()) == 1


def test_two_processes_take_turns(ledger: Ledger) -> None:
    ledger.reserve(charge(), SIX)
    code = (
        "import sys; from pathlib import Path\n"
        "from medfl.client.ledger import Ledger; from medfl.client.composition import Charge\n"
        "for r in range(15):\n"
        "    e = Ledger(Path(sys.argv[1])).reserve(\n"
        "        Charge('s', 'n', 'main', 'training', r, 4.0, .5, 1), ['a', 'b'])\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, ledger.folder]) for _ in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert len(ledger.entries()) == 31


# A hospital's process: reserve, release (another file), settle, without end.
WORK = """
import os, sys
from pathlib import Path
from medfl.client.ledger import Ledger
from medfl.client.composition import Charge
folder, order = Path(sys.argv[1]), sys.argv[2]
ledger = Ledger(folder / "ledger")
released = os.open(folder / "released", os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
for r in range(10_000):
    steps = 1 + r % 3
    charge = Charge("s", "n", "main", "training", r, 4.0, 0.5, steps)
    if order == "released first":
        os.write(released, b"%d\\n" % steps)
    entry = ledger.reserve(charge, ["a", "b", "c"])
    if order != "released first":
        os.write(released, b"%d\\n" % steps)
    ledger.settle(entry)
"""


def spent_and_released(folder: Path, order: str, seed: int) -> Iterator[tuple[float, float]]:
    """(epsilon by the ledger, epsilon of what was released) after each kill of the process."""
    rng = random.Random(seed)
    (folder / "released").touch()
    for attempt in range(80):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK, folder, order], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        # Longer from time to time: a busy machine writes little in a few milliseconds.
        time.sleep(rng.uniform(0.0, 0.02 * (1 + attempt)))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        steps = sum(map(int, (folder / "released").read_text().split()))
        by_ledger = Ledger(folder / "ledger").heaviest()
        yield spent(by_ledger, 1e-3), accounting.epsilon([(4.0, 0.5, steps)], 1e-3)


def test_killed_at_any_moment_the_ledger_never_says_too_little(tmp_path: Path) -> None:
    worked = 0
    for by_ledger, real in spent_and_released(tmp_path, "reserved first", seed=0):
        assert by_ledger >= real
        worked += real > 0
        if worked == 8:
            return
    pytest.fail("the process never came to release anything")


@pytest.mark.slow
def test_a_ledger_written_afterwards_would_be_caught(tmp_path: Path) -> None:
    found = spent_and_released(tmp_path, "released first", seed=0)
    assert any(by_ledger < real for by_ledger, real in found)


def test_a_reservation_is_on_the_disk_before_the_data_are_touched(
    ledger: Ledger, monkeypatch
) -> None:
    # What a file holds when it is flushed outlasts a power cut; what is written later may not. So
    # each file's content at its last flush is kept, and what was reserved must be in it.
    flushed: dict[str, bytes] = {}
    real = os.fsync

    def watched(handle: int) -> None:
        real(handle)
        file = Path(f"/proc/self/fd/{handle}").readlink()
        flushed[file.name] = file.read_bytes() if file.is_file() else b""

    monkeypatch.setattr(os, "fsync", watched)
    for round_ in (1, 2):
        entry = ledger.reserve(charge(round_), SIX)
        assert flushed["ledger.jsonl"] == file_of(ledger).read_bytes()
        assert json.loads(flushed["ledger.jsonl"].splitlines()[-1])["number"] == entry.number
    # The patients whom it speaks of, the key of their hashes, and the folder that names the files.
    assert any(entry.cohort in name and len(held) == 8 * 6 for name, held in flushed.items())
    assert any("key" in name and len(held) == 32 for name, held in flushed.items())
    assert ledger.folder.name in flushed
    ledger.settle(entry)
    assert json.loads(flushed["ledger.jsonl"].splitlines()[-1])["kind"] == "settle"
