"""Large blocks go back to the system as soon as they are free; objects are not many at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import sys
from pathlib import Path
from medfl.common.allocator import give_back

if sys.argv[1] == "yes":
    give_back()
size, live, times = map(int, sys.argv[2:])
bytearray(30_000_000)  # lets glibc raise its limit
pins = []
for _ in range(times):
    large = []
    for _ in range(live):
        large.append(b"x" * size)
        pins.append(b"y" * 10_000)
    large.clear()
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096)
"""


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def resident(word: str, size: int, live: int, times: int) -> int:
    """Bytes of a process after so many blocks at once, so many times, are free again."""
    numbers = [str(n) for n in (size, live, times)]
    command = [sys.executable, "-c", FREED, word, *numbers]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_models_arrays_do_not_stay_after_they_are_freed() -> None:
    kept, given_back = (resident(word, 20_000_000, 10, 1) for word in ("no", "yes"))
    assert given_back < 60_000_000
    assert kept > 150_000_000  # else there is nothing to mend, and this module can go


def test_objects_that_come_and_go_take_the_memory_of_those_that_are_there_at_once() -> None:
    assert resident("yes", 5_000_000, 8, 50) < 8 * 5_000_000 + 40_000_000
