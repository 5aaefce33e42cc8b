"""Arrays at rest hold what was written and take memory only while somebody looks at them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medfl.common import resting, tensors


@pytest.fixture(autouse=True)
def _everything_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 8)


def resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_arrays_begin_as_zeros_and_keep_what_was_written() -> None:
    made = resting.zeros({"w": (3, 5), "scalar": (), "empty": (0, 2)}, np.float32)
    assert {n: a.shape for n, a in made.items()} == {"w": (3, 5), "scalar": (), "empty": (0, 2)}
    assert not made["w"].any()
    made["w"][1] = [1.0, -2.0, 3.0, 0.0, 5.0]
    made["scalar"][...] = -7.0
    for array in made.values():
        resting.let_go(array)
    assert made["w"].tolist() == [[0.0] * 5, [1.0, -2.0, 3.0, 0.0, 5.0], [0.0] * 5]
    assert made["scalar"] == -7.0


def test_what_is_let_go_takes_no_memory() -> None:
    (array,) = resting.zeros({"w": (8 * 2**20,)}, np.float64).values()
    before = resident_bytes()
    array += 1.5
    assert resident_bytes() - before > 60e6
    resting.let_go(array, 2**20)
    assert resident_bytes() - before < 20e6
    resting.let_go(array)
    assert resident_bytes() - before < 10e6
    assert array.sum() == 1.5 * 8 * 2**20


def test_what_is_brought_is_in_memory_before_anybody_writes() -> None:
    (array,) = resting.zeros({"w": (8 * 2**20,)}, np.float64).values()
    array[:] = 1.5
    resting.let_go(array)
    before = resident_bytes()
    resting.bring(array, 2**20, 5 * 2**20)
    assert 30e6 < resident_bytes() - before < 40e6
    resting.bring(array, 8 * 2**20 - 1, 8 * 2**20)
    assert array.sum() == 1.5 * 8 * 2**20
    resting.bring(np.zeros(4), 0, 4)  # one that does not rest stays as it is


UNPACKING = """
import numpy as np
from pathlib import Path
from medfl.common import resting
from medfl.common.packing import pack, unpack

def resident_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))

resting.IN_MEMORY_BYTES = 8
sent = {"w": np.random.default_rng(0).normal(size=(4, 2**20)).astype(np.float32)}
packed = resting.rested(pack(sent, "float32"))
before = resident_bytes()
for array in packed.values():
    array.sum()
print(resident_bytes() - before)
unpacked = unpack(packed, {"w": (4, 2**20)})
print(resident_bytes() - before)
assert np.array_equal(unpacked["w"], sent["w"])
"""


def test_a_packed_update_at_rest_is_let_go_as_it_is_unpacked() -> None:
    """In a process of its own: in this one others' tests have left the allocator as it is."""
    said = subprocess.run(
        [sys.executable, "-c", UNPACKING], capture_output=True, text=True, check=True
    )
    read, after = map(int, said.stdout.split())
    assert read > 10e6
    # What was unpacked takes 16.8 MB; the packed form has given as much back.
    assert after < 22e6


def test_a_copy_at_rest_has_all_types_and_the_same_digest() -> None:
    rng = np.random.default_rng(0)
    found = {
        "w": rng.normal(size=(700, 30)).astype(np.float32),
        "count": np.array(7),
        "bias": rng.normal(size=13).astype(np.float32),
    }
    at_rest = resting.rested(found)
    assert tensors.digest(at_rest) == tensors.digest(found)
    assert list(at_rest) == list(found)
    assert resting.rested(at_rest) is at_rest


def test_small_groups_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "IN_MEMORY_BYTES", 2**20)
    (array,) = resting.zeros({"w": (1000,)}, np.float32).values()
    assert array.base is None
