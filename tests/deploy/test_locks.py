"""The lock files name every file that may be installed; the list of parts and the check of known
advisories follow from them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock", "deploy/requirements-lint.lock")
PIN = re.compile(r"^([a-z0-9._-]+)==([^\s\\]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", re.M)


def pins(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each pin."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = PIN.findall(text)
    lines = [x for x in text.splitlines() if not x.startswith(("#", "    --hash="))]
    assert len(found) == len(lines), "a line that is no pin"
    return {n: (version, hashes.count("--hash")) for n, version, hashes in found}


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_the_hashes_of_its_files(name: str) -> None:
    assert [n for n, (_, hashes) in pins(name).items() if not hashes] == []


def test_torch_alone_is_pinned_by_its_version() -> None:
    assert set(pins("requirements-torch.lock")) == {"torch"}
    assert not any("torch" in pins(name) for name in LOCKS)


def test_the_list_of_parts_is_that_of_the_locks() -> None:
    """CycloneDX 1.6, by the names of its JSON schema."""
    plain: dict[str, Any] = json.loads((ROOT / "sbom.cdx.json").read_text(encoding="utf-8"))
    assert (plain["bomFormat"], plain["specVersion"], plain["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", plain["serialNumber"])
    parts = {c["name"]: c for c in plain["components"]}
    locked = pins("requirements.lock") | pins("requirements-torch.lock")
    assert {n: c["version"] for n, c in parts.items()} == {n: v for n, (v, _) in locked.items()}
    assert all(c["purl"] == f"pkg:pypi/{n}@{c['version']}" for n, c in parts.items())
    refs = {c["bom-ref"] for c in (*parts.values(), plain["metadata"]["component"])}
    assert len(refs) == len(parts) + 1
    needs = {d["ref"]: set(d["dependsOn"]) for d in plain["dependencies"]}
    assert set(needs) == refs
    assert parts["torch"]["bom-ref"] in needs[parts["opacus"]["bom-ref"]]
    assert parts["flwr"]["bom-ref"] in needs[plain["metadata"]["component"]["bom-ref"]]
    assert set().union(*needs.values()) <= refs


# --- known advisories ----------------------------------------------------------------------------


def advisory(number: int, package: str, **affected: Any) -> dict[str, Any]:
    """In the OSV schema."""
    about = {"package": {"ecosystem": "PyPI", "name": package}, **affected}
    return {"id": f"PYSEC-{number}", "summary": "something bad", "affected": [about]}


def events(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"type": "ECOSYSTEM", "events": [{what: version} for what, version in pairs]}]


def checked(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "deploy" / "advisories.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_pin_with_a_known_advisory_is_named(tmp_path: Path) -> None:
    numpy = pins("requirements.lock")["numpy"][0]
    made = [
        advisory(1, "NumPy", versions=[numpy]),
        advisory(2, "grpcio", ranges=events(("introduced", "0"))),
        advisory(
            3, "Typing_Extensions", ranges=events(("introduced", "0"), ("last_affected", "99"))
        ),
        # What does not fit: fixed before, not there yet, withdrawn, another ecosystem or package.
        advisory(4, "numpy", ranges=events(("introduced", "0"), ("fixed", "1.0"))),
        advisory(5, "numpy", ranges=events(("introduced", "99"))),
        advisory(6, "numpy", versions=[numpy]) | {"withdrawn": "2026-01-01T00:00:00Z"},
        advisory(7, "numpy", versions=["0.0.1"], ranges=[{"type": "GIT", "events": []}]),
        advisory(8, "no-package-of-ours", ranges=events(("introduced", "0"))),
        advisory(9, "scipy", ranges=events(("introduced", "0"), ("last_affected", "0.1"))),
    ]
    made.append({"id": "GO-1", "affected": [{"package": {"ecosystem": "Go", "name": "numpy"}}]})
    for plain in made:
        (tmp_path / f"{plain['id']}.json").write_text(json.dumps(plain))
    code, said = checked(str(tmp_path))
    assert code == 1, said
    assert sorted(re.findall(r"PYSEC-\d+", said)) == ["PYSEC-1", "PYSEC-2", "PYSEC-3"]
    assert f"numpy=={numpy}: PYSEC-1 something bad" in said


def test_without_a_database_nothing_is_checked_and_that_is_said(tmp_path: Path) -> None:
    assert checked() == (0, "advisories: not checked, there is no database at MEDFL_OSV\n")
    assert "not checked" in checked(str(tmp_path / "away"))[1]
    code, said = checked(str(tmp_path))
    assert code == 0
    assert said.startswith("advisories: 0 for ")
