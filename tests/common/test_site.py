"""site.toml: paths start at the file, and the defaults are the cautious ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from medfl.common.errors import ConfigError
from medfl.common.site import Site, load_site

TEXT = """
name = "st-marys"
[data]
format = "dicom"
path = "images"
table = "lists/cases.csv"
masks = "masks"
[cache]
path = "prepared"
max_gb = 3
"""


def written_site(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "hospital"
    folder.mkdir()
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_site(tmp_path, TEXT)
    monkeypatch.chdir(tmp_path)
    site = load_site(Path("hospital/site.toml"))
    folder = path.parent
    assert site.data.path == folder / "images"
    assert site.data.table == folder / "lists" / "cases.csv"
    assert site.data.masks == folder / "masks"
    assert site.cache.path == folder / "prepared"
    assert site.cache.max_gb == 3.0


def test_absolute_paths_stay(tmp_path: Path) -> None:
    text = TEXT.replace('"images"', f'"{tmp_path / "elsewhere"}"')
    assert load_site(written_site(tmp_path, text)).data.path == tmp_path / "elsewhere"


def test_every_key_that_the_file_gives_survives_the_placing_of_paths(tmp_path: Path) -> None:
    extra = """
device = "cpu"
[data]
format = "table"
path = "a.csv"
columns = { age = "AGE_YEARS" }
header = ["AGE_YEARS", "y"]
delimiter = ";"
missing = ["-9"]
[policy]
min_cases = 30
tasks = ["risk"]
round_metrics_to = 2
[privacy]
epsilon = 3
delta = 1e-6
clip = 0.5
"""
    site = load_site(written_site(tmp_path, 'name = "a"\n' + extra))
    assert site.data.columns == {"age": "AGE_YEARS"}
    assert site.data.header == ["AGE_YEARS", "y"]
    assert site.data.delimiter == ";"
    assert site.data.missing == ("-9",)
    assert (site.policy.min_cases, site.policy.tasks) == (30, ("risk",))
    assert site.policy.round_metrics_to == 2
    assert site.privacy is not None
    assert (site.privacy.epsilon, site.privacy.delta, site.privacy.clip) == (3.0, 1e-6, 0.5)
    assert site.device == "cpu"


def test_a_column_is_the_hospitals_own_name_or_the_studys(tmp_path: Path) -> None:
    site = load_site(
        written_site(tmp_path, 'name = "a"\n[data]\nformat="table"\npath="."\ncolumns={age="AGE"}')
    )
    assert site.data.column("age") == "AGE"
    assert site.data.column("label") == "label"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[privacy]\nepsilon = 0", "privacy.epsilon: must be greater than 0"),
        ("[privacy]\nepsilon = inf", "privacy.epsilon: must be a finite number"),
        ("[privacy]\ndelta = 1e-5", "privacy.epsilon: is missing; add it"),
        ("[policy]\nmin_cases = 0", "policy.min_cases: must be greater than or equal to 1"),
        ("[policy]\ntasks = ['anything']", "policy.tasks.0: must be one of"),
        ("[cache]\nmax_gb = -1", "cache.max_gb: must be greater than or equal to 0"),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    start = 'name = "a"\n[data]\nformat = "dicom"\npath = "."\n'
    with pytest.raises(ConfigError) as caught:
        load_site(written_site(tmp_path, start + text))
    assert said in str(caught.value)


def test_a_site_is_a_frozen_value(tmp_path: Path) -> None:
    path = written_site(tmp_path, TEXT)
    site = load_site(path)
    assert isinstance(site, Site)
    assert site == load_site(path)
    with pytest.raises(AttributeError):
        site.name = "other"  # type: ignore[misc]


PRIVATE = """
[privacy]
epsilon = 2.0
delta = 1e-4
declared_patients = 400
[privacy.budget]
epsilon = 6.0
"""


def test_a_budget_for_everything_and_a_ledger_beside_the_file(tmp_path: Path) -> None:
    path = written_site(tmp_path, TEXT + PRIVATE)
    site = load_site(path)
    assert site.ledger == path.parent / "privacy-ledger"
    assert site.privacy is not None
    assert site.privacy.budget is not None
    assert (site.privacy.budget.epsilon, site.privacy.budget.delta) == (6.0, 1e-5)
    assert load_site(path).privacy == site.privacy


def test_a_delta_that_allows_to_publish_a_patient_is_refused(tmp_path: Path) -> None:
    text = TEXT + PRIVATE.replace("400", "10000")
    with pytest.raises(ConfigError, match="below 1 / declared_patients"):
        load_site(written_site(tmp_path, text))


def test_a_sum_over_two_hospitals_is_the_least_that_a_policy_can_allow(tmp_path: Path) -> None:
    site = load_site(written_site(tmp_path, TEXT + "\n[policy]\nmin_sum_sites = 2\n"))
    assert site.policy.min_sum_sites == 2
    assert Site(name="a", data=site.data).policy.min_sum_sites == 3
    path = tmp_path / "hospital" / "site.toml"
    path.write_text(TEXT + "\n[policy]\nmin_sum_sites = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"policy\.min_sum_sites"):
        load_site(path)
