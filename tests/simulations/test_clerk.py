"""The clerk's report is the report, and errors are told where the command runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.common.errors import StorageError
from medfl.common.study import load_study
from medfl.server.report import write_report
from medfl.simulations import clerk
from medfl.simulations.cli import simulate


def test_the_clerks_report_is_the_report_to_the_byte(
    write_study: Callable[..., Path], write_hospital: Callable[..., Path], tmp_path: Path
) -> None:
    write_hospital("a")
    data, study, out = write_hospital("b"), write_study(), tmp_path / "out é"
    simulate(
        load_study(study),
        study,
        data=data,
        out=out,
        seed=1,
        workers=1,
        compare=[],
        device="cpu",
        cache=tmp_path / "cache",
    )
    names = ("report.html", "model_card.md")
    first = [(out / name).read_bytes() for name in names]
    assert first[0].count(b"<svg") >= 4
    for name in names:
        (out / name).unlink()
    write_report(out)
    assert [(out / name).read_bytes() for name in names] == first


def test_an_error_of_the_clerk_is_told(tmp_path: Path) -> None:
    with clerk.Clerk() as writer, pytest.raises(StorageError, match="folder of a finished run"):
        writer.report(tmp_path)


def test_a_report_is_written_also_where_the_clerk_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(task: bytes) -> bytes:
        raise SystemExit(1)

    monkeypatch.setattr(clerk, "_work", die)
    with clerk.Clerk() as writer, pytest.raises(StorageError):
        writer.report(tmp_path)
