"""Run a command under what a unit file says of system calls, without systemd as process 1.

    /usr/bin/python3 sandbox.py UNIT COMMAND...       needs Debian's python3-seccomp

Applied: SystemCallFilter=, RestrictAddressFamilies=, MemoryDenyWriteExecute=. What is not in the
list fails with EPERM, as SystemCallErrorNumber= of the units has it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import seccomp  # type: ignore[import-not-found]


def values(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{key}=")]


def calls(name: str) -> set[str]:
    """The system calls of a name: itself, or what systemd has in a group."""
    if not name.startswith("@"):
        return {name}
    told = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    inner = [word for line in told.splitlines()[1:] if (word := line.strip()) and word[0] != "#"]
    return set().union(*(calls(word) for word in inner))


def allowed(unit: str) -> set[str]:
    found = calls("@default")
    for line in values(unit, "SystemCallFilter"):
        these = set().union(*(calls(word) for word in line.lstrip("~").split()))
        found = found - these if line.startswith("~") else found | these
    return found


def confine(unit: str) -> None:
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in sorted(allowed(unit) - {"socket"}):
        try:
            rules.add_rule(seccomp.ALLOW, name)
        except (ValueError, RuntimeError, OSError):
            continue  # of another machine's architecture
    for family in " ".join(values(unit, "RestrictAddressFamilies")).split():
        number = int(getattr(socket, family))
        rules.add_rule(seccomp.ALLOW, "socket", seccomp.Arg(0, seccomp.EQ, number))
    if values(unit, "MemoryDenyWriteExecute") == ["yes"]:
        # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN; since Linux 6.3, and inherited by children.
        ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)
    rules.load()


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execv(sys.argv[2], sys.argv[2:])
