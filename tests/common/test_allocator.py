"""Large blocks go back to the system as soon as they are free."""

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
bytearray(20_000_000)  # lets glibc raise its limit
large, pins = [], []
for _ in range(40):
    large.append(b"x" * 5_000_000)
    pins.append(b"y" * 100_000)
large.clear()
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_of_objects_do_not_stay_after_they_are_freed() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", FREED, word], capture_output=True, text=True, check=True
        )
        for word in ("no", "yes")
    ]
    kept, given_back = (int(done.stdout) for done in told)
    assert given_back < 60_000_000
    assert kept > 150_000_000  # else there is nothing to mend, and this module can go
