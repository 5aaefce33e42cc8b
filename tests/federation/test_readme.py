"""README's blocks run as they are written, from nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from medfl.client import foreseen
from medfl.common.site import load_site
from medfl.common.study import load_study

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_S = 840


def blocks(title: str) -> list[str]:
    """The fenced blocks of one section."""
    section = re.split(rf"(?m)^#+ {re.escape(title)}$", README)[1]
    section = re.split(r"(?m)^#{2,3} ", section)[0]
    return re.findall(r"(?ms)^```[a-z]*\n(.*?)^```$", section)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(script: str, folder: Path, log: Path) -> int:
    """Run it as somebody would type it; what it leaves running is ended afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return shell.wait(timeout=MOST_S)
        finally:
            _end(shell.pid)


def _end(group: int) -> None:
    """End what the shell has left in the background, at last by force."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, how)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                os.killpg(group, 0)
                time.sleep(0.2)
        except ProcessLookupError:
            return


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout that has nothing but what git and `make` put there."""
    for name in (".venv", "simulations"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_readmes_hospital_can_serve_the_study_that_it_is_shown_with(tmp_path: Path) -> None:
    """It had [privacy], and its study `scale = "federated"`: every run was refused."""
    (tmp_path / "site.toml").write_text(blocks("Use it")[0], encoding="utf-8")
    site = load_site(tmp_path / "site.toml")
    assert site.privacy is not None
    study = load_study(ROOT / "simulations" / "studies" / "demo_federation.toml")
    assert foreseen.without_data(study, site.policy, site.privacy) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_blocks_run_as_they_are_written(folder: Path) -> None:
    site, use = blocks("Use it")
    (between,) = blocks("Between hospitals")
    place = "my-hospitals/segmentation/st-marien/site.toml"
    writes = f"cp site.toml {place}\n"
    (folder / "site.toml").write_text(site, encoding="utf-8")
    lines = use.splitlines(keepends=True)
    made = next(i for i, line in enumerate(lines) if "medfl-simulate hospitals" in line)
    lines.insert(made + 1, writes)
    script = "".join(lines) + between.replace("8443", str(free_port()))
    log = folder / "said.txt"
    assert run(script, folder, log) == 0, log.read_text()
    said = log.read_text()
    assert "done after 8 rounds" in said
    assert "round 8/8: 3 sites" in said
    assert (folder / "report.html").is_file()
    assert (folder / "runs" / "first" / "report.html").is_file()
