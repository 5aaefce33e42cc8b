"""deploy/install-torch.sh takes the build that fits the machine, and asks no more than it must."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "deploy" / "install-torch.sh"
LOCKED = "2.13.0"

# Stands in for the environment's python: says which torch it has, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$*" in
*'-c '*) cat "$HAS" ;;
*) echo "$*" >> "$ASKED"
   case "$*" in *"$REFUSES"*) exit 1 ;; esac
   echo 2.13.0 > "$HAS" ;;
esac
"""


def asked(
    tmp_path: Path,
    *,
    has: str = "",
    refuses: str = "nothing",
    driver: bool = False,
    torch: str = "",
) -> tuple[int, list[str]]:
    """Exit status of the script, and the arguments of each call of pip."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {"python": PYTHON, "nvidia-smi": f"#!/bin/sh\nexit {0 if driver else 9}\n"}
    for name, text in {**commands, "uname": "#!/bin/sh\necho Linux\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls, installed = tmp_path / "calls", tmp_path / "has"
    installed.write_text(has)
    calls.touch()
    done = subprocess.run(
        [str(SCRIPT), str(folder / "python")],
        env={
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "HAS": str(installed),
            "ASKED": str(calls),
            "REFUSES": refuses,
            "MEDFL_TORCH": torch,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines()


def test_the_locked_version_is_left_alone(tmp_path: Path) -> None:
    assert asked(tmp_path, has=LOCKED, driver=True) == (0, [])


def test_a_cpu_machine_takes_the_cpu_build_from_where_pip_looks(tmp_path: Path) -> None:
    status, (call,) = asked(tmp_path)
    assert status == 0
    assert call.endswith(f"torch=={LOCKED}+cpu")
    assert "index" not in call


def test_without_one_there_it_goes_to_the_index_of_cpu_builds(tmp_path: Path) -> None:
    status, calls = asked(tmp_path, refuses="+cpu")
    assert status == 0
    assert len(calls) == 2
    assert "--index-url https://download.pytorch.org/whl/cpu" in calls[1]


def test_a_machine_with_a_driver_takes_the_ordinary_build(tmp_path: Path) -> None:
    status, (call,) = asked(tmp_path, driver=True)
    assert status == 0
    assert call.endswith(f" torch=={LOCKED}")


@pytest.mark.parametrize(("torch", "build"), [("cpu", "+cpu"), ("gpu", "")])
def test_a_person_may_decide(tmp_path: Path, torch: str, build: str) -> None:
    _, (call,) = asked(tmp_path, torch=torch, driver=torch == "cpu")
    assert call.endswith(f"torch=={LOCKED}{build}")


def test_another_version_is_replaced(tmp_path: Path) -> None:
    _, calls = asked(tmp_path, has="2.12.0")
    assert len(calls) == 1


def test_a_failure_ends_with_a_status(tmp_path: Path) -> None:
    status, calls = asked(tmp_path, refuses="torch")
    assert status != 0
    assert len(calls) == 2


def test_a_misspelt_choice_installs_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, torch="cuda") == (2, [])
