"""The demonstration, on fewer cases: what `make demo` promises is there at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medfl.simulations.demo import run_demo


@pytest.mark.slow
def test_the_demonstration_leaves_reports_models_and_check_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = run_demo(tmp_path / "runs", small=True)
    assert [f.name for f in folders] == [
        "demo-segmentation",
        "demo-classification",
        "demo-risk",
    ]
    for folder in folders:
        for file in ("report.html", "model_card.md", "model.safetensors", "rounds.jsonl"):
            assert (folder / file).stat().st_size > 0, file
        result = json.loads((folder / "result.json").read_text())
        assert len(result["sites"]) == 3
        assert {"local", "pooled"} <= set(result["baselines"])
    assert "no_privacy" in result["baselines"]
    assert "The same training without privacy reached" in (folders[2] / "report.html").read_text()
    sites = json.loads((folders[2] / "result.json").read_text())["sites"]
    private = {site["name"]: site["epsilon"] for site in sites}
    assert private.pop("riverside") == pytest.approx(8, rel=0.02)
    assert set(private.values()) == {None}
    assert len(list((tmp_path / "runs" / "demo-hospitals").glob("*/*/check.html"))) == 9
