"""medfl-simulate as people use it: its errors, its output, Ctrl-C and a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.common.errors import ConfigError
from medfl.simulations.cli import main, make_room

Write = Callable[..., Path]


@pytest.fixture
def data(write_hospital: Write) -> Path:
    write_hospital("a", n=21)
    return write_hospital("b", n=15)


def test_a_run_prints_a_table_and_leaves_its_files(
    write_study: Write, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["run", str(write_study()), "--data", str(data), "--out", str(out), "--compare", "local"]
    assert main([*args, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "2 sites, 3 rounds of fedavg, 1 workers on cpu" in shown.err
    assert "main: round 3/3" in shown.err
    assert "fedavg" in shown.out
    assert "local" in shown.out
    assert f"Open {out / 'report.html'}" in shown.out
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "study.toml",
        "rounds.jsonl",
        "result.json",
        "model.safetensors",
        "model_last.safetensors",
        "report.html",
        "model_card.md",
        "tensorboard",
        "baselines",
        "sites",
    }
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
    # The report alone, again, from the files.
    report = (out / "report.html").read_bytes()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == report


def test_json_goes_to_stdout_alone(
    write_study: Write, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", str(write_study()), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*args, "--json", "--seed", "7"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seed"] == 7
    assert [s["name"] for s in result["sites"]] == ["a", "b"]


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make_room(out) is None
    for n in (1, 2):
        (out / "rounds.jsonl").write_text(f"run {n}")
        assert make_room(out) == tmp_path / f"out.previous-{n}"
        assert list(out.iterdir()) == []
    assert (tmp_path / "out.previous-1" / "rounds.jsonl").read_text() == "run 1"


def test_a_folder_of_other_files_is_never_moved(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="other files"):
        make_room(home)
    assert (home / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="is a file"):
        make_room(home / "thesis.txt")


def test_a_run_that_ended_early_makes_room(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.toml").write_text("")
    assert make_room(tmp_path / "out") is not None


def test_the_data_must_be_named(write_study: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_study())]) == 2
    assert "--data" in capsys.readouterr().err


def test_all_faults_of_a_study_are_said_at_once(
    write_study: Write, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(scale="federal", strategy="fedavg", federation='keeep = "best"')
    assert main(["run", str(study), "--data", str(data)]) == 2
    shown = capsys.readouterr()
    assert "record.scale" in shown.err
    assert "did you mean keep?" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--compare", "fedfoo"], "--compare fedfoo: is not known; use pooled, no_privacy or one"),
        (["--device", "tpu"], "--device tpu: must be one of auto, cpu, cuda"),
        (["--data", "absent"], "--data absent: is not a folder"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    write_study: Write,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    args = ["run", str(write_study()), "--data", str(data), "--out", str(out), *extra]
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_strategy_that_the_training_cannot_serve_is_an_error_before_the_run(
    write_study: Write, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study()
    path.write_text(path.read_text().replace("[training]", '[training]\noptimiser = "adam"'))
    out = tmp_path / "out"
    args = ["run", str(path), "--data", str(data), "--out", str(out), "--compare", "scaffold"]
    assert main(args) == 2
    assert "scaffold corrects plain SGD" in capsys.readouterr().err
    assert not out.exists()


def test_too_few_sites_end_with_six_and_their_reasons(
    write_study: Write, write_hospital: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hospital("good")
    data = write_hospital("bad", text="patient,x,y,label,split\np,1,2,maybe,train\n")
    args = ["run", str(write_study(min_sites=2)), "--data", str(data)]
    assert main([*args, "--out", str(tmp_path / "out")]) == 6
    assert "Left out: bad (data cannot serve the study)" in capsys.readouterr().err


def test_a_folder_without_a_run_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 7
    assert "result.json" in capsys.readouterr().err


# --- stopped by a person, and by the disk ------------------------------------------------------


def session(leader: int) -> set[int]:
    """Living processes of a session."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.add(int(name))
    return found


def started(study: Path, data: Path, out: Path, wrapper: str = "") -> subprocess.Popen[str]:
    code = f"{wrapper}\nimport sys; from medfl.simulations.cli import main; sys.exit(main())"
    args = ["run", str(study), "--data", str(data), "--out", str(out), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *args, "--cache", str(out.parent / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MEDFL_TEST": "1"},
    )


def wait_for_rounds(process: subprocess.Popen[str], out: Path, n: int = 3) -> None:
    end = time.monotonic() + 60
    log = out / "rounds.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= n):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the command alone", "the whole terminal"])
def test_ctrl_c_ends_soon_and_keeps_what_was_done(
    write_study: Write, data: Path, tmp_path: Path, whom: str
) -> None:
    from medfl.common import tensors

    out = tmp_path / "out"
    process = started(write_study(rounds=100_000), data, out)
    wait_for_rounds(process, out)
    before = time.monotonic()
    if whom == "the command alone":
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - before < 20  # about 1 s where nothing else runs
    assert process.returncode == 8, err
    assert "Stopped. The rounds that were finished are in" in err
    assert "Traceback" not in err
    lines = [json.loads(t) for t in (out / "rounds.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == list(range(1, len(lines) + 1))
    assert tensors.load(out / "model_last.safetensors").keys() == {"1.weight", "1.bias"}
    assert session(process.pid) == set()


@pytest.mark.slow
def test_workers_end_when_the_command_is_killed(
    write_study: Write, data: Path, tmp_path: Path
) -> None:
    process = started(write_study(rounds=100_000), data, tmp_path / "out")
    wait_for_rounds(process, tmp_path / "out")
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 10
    while session(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert session(process.pid) == set()


LIMIT = """
import resource, sys
import medfl.simulations.cli
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "culprit"), [(600, "rounds.jsonl"), (2200, "result.json")])
def test_a_full_disk_ends_with_seven_and_leaves_nothing_half_written(
    write_study: Write, data: Path, tmp_path: Path, size: int, culprit: str
) -> None:
    study = write_study(rounds=2, bootstrap=0, evaluation='metrics = ["auroc"]')
    if culprit == "result.json":
        # Else it would be no larger than the hospitals' scores, which come before it.
        study.write_text(f'purpose = "{"long " * 200}"\n{study.read_text()}')
    out = tmp_path / "out"
    process = started(study, data, out, LIMIT.format(size=size))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert culprit in err
    assert "could not be written (File too large)" in err
    assert "Traceback" not in err
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
    for line in (out / "rounds.jsonl").read_text().splitlines():
        json.loads(line)
    if culprit == "result.json":
        assert not (out / "result.json").exists()
    assert session(process.pid) == set()


@pytest.mark.slow
def test_a_full_cache_is_named_as_the_reason(tmp_path: Path) -> None:
    import numpy as np

    arrays = {}
    for part, n in (("train", 20), ("test", 10)):
        rng = np.random.default_rng(n)
        arrays[f"{part}_images"] = rng.integers(0, 255, (n, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 2)[:, None]
    (tmp_path / "data").mkdir()
    np.savez_compressed(tmp_path / "data" / "tiny.npz", **arrays)
    (tmp_path / "study.toml").write_text(
        """
name = "tiny"
task = { kind = "classification", classes = ["0", "1"] }
image = { dimensions = 2, size = [8, 8] }
model = { name = "logistic" }
training = { local_steps = 1 }
federation = { rounds = 1 }
evaluation = { split = "given" }
[simulation]
partition = { kind = "iid", sites = 2 }
[simulation.data]
format = "medmnist"
path = "tiny.npz"
"""
    )
    process = started(
        tmp_path / "study.toml", tmp_path / "data", tmp_path / "out", LIMIT.format(size=3000)
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert "site-1 (disk full or damaged file)" in err
    assert "The cache in" in err
    assert "Traceback" not in err
    left = {p.name for p in (tmp_path / "cache").iterdir()}
    assert left <= {"fingerprints.json"}


def test_names_that_no_catalogue_has_are_all_told_at_once(
    write_study: Write, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(strategy="fedavgg", federation='best_metric = "dise"')
    study.write_text(study.read_text().replace('"logistic"', '"logistik"'))
    assert main(["run", str(study), "--data", str(data), "--out", str(tmp_path / "o")]) == 2
    told = capsys.readouterr().err
    for key in ("model.name", "federation.strategy", "federation.best_metric"):
        assert f"{study}: {key}: " in told
