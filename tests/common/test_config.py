"""Files that people write: every fault at once, each with the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medfl.common import config
from medfl.common.errors import ConfigError
from medfl.common.site import Site
from medfl.common.study import Study


def plain_study() -> dict[str, Any]:
    return {
        "name": "hearts",
        "task": {"kind": "classification", "classes": ["well", "ill"]},
        "model": {"name": "logistic"},
        "training": {"local_steps": 1},
        "federation": {"rounds": 2},
        "record": {"features": [{"name": "age"}]},
    }


def faults_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, Study, "study.toml")
    return caught.value.faults


def fault_at(key: str, value: object) -> str:
    raw = plain_study()
    *tables, last = key.split(".")
    place = raw
    for table in tables:
        place = place.setdefault(table, {})
    place[last] = value
    (fault,) = faults_of(raw)
    return fault


def test_a_whole_study_has_no_faults() -> None:
    assert config.parse(plain_study(), Study, "study.toml").federation.rounds == 2


def test_all_faults_are_told_at_once_each_with_its_file_and_key() -> None:
    raw = plain_study()
    raw["federation"]["rounds"] = "many"
    raw["training"]["learning_rate"] = -1.0
    raw["training"]["optimizer"] = "sgd"
    del raw["model"]
    faults = faults_of(raw)
    assert sorted(fault.split(": ")[1] for fault in faults) == [
        "federation.rounds",
        "model",
        "training.learning_rate",
        "training.optimizer",
    ]
    assert all(fault.startswith("study.toml: ") for fault in faults)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("federation.rounds", 2.5, "must be a whole number (it is 2.5)"),
        ("federation.rounds", True, "must be a whole number (it is True)"),
        ("federation.rounds", "5", "must be a whole number (it is '5')"),
        ("federation.rounds", 0, "must be greater than or equal to 1 (it is 0)"),
        ("training.learning_rate", "0.1", "must be a number (it is '0.1')"),
        ("training.learning_rate", float("nan"), "must be a finite number (it is nan)"),
        ("training.learning_rate", 0, "must be greater than 0 (it is 0)"),
        ("evaluation.stratify", "yes", "must be true or false (it is 'yes')"),
        ("evaluation.metrics", "auroc", "must be a list, like [1, 2] (it is 'auroc')"),
        ("title", 7, 'must be text in quotes, like "this" (it is 7)'),
        ("task", "classification", "must be a table of key = value lines"),
        ("model.options", 3, "must be a table of key = value lines"),
        ("model.start_weights", 3, 'must be text in quotes, like "this" (it is 3)'),
        ("training.optimiser", "sdg", "must be one of 'sgd', 'adam' or 'adamw' (it is 'sdg')"),
        ("name", "St Mary", "lower-case letters, digits, - and _ (it is 'St Mary')"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_plain_words(
    key: str, value: object, said: str
) -> None:
    fault = fault_at(key, value)
    assert fault.startswith(f"study.toml: {key}: ")
    assert said in fault


@pytest.mark.parametrize("value", [{"deep": 1}, [1, "two"], [[1], [2]]])
def test_an_option_of_no_allowed_kind_is_one_fault(value: object) -> None:
    fault = fault_at("model.options", {"width": value})
    assert fault == (
        "study.toml: model.options.width: must be text, true or false, a number, or a list of "
        "numbers or of texts"
    )


@pytest.mark.parametrize("value", ["a", True, 3, 0.5, [1, 2], [0.5, 1], ["a", "b"]])
def test_an_option_keeps_its_value_and_kind(value: object) -> None:
    raw = plain_study()
    raw["model"]["options"] = {"width": value}
    options = config.parse(raw, Study, "study.toml").model.options
    assert options == {"width": value}
    assert options is not None
    assert type(options["width"]) is type(value)


def test_a_list_of_the_wrong_length_says_how_many() -> None:
    raw = plain_study()
    raw["record"]["features"][0]["range"] = [1, 2, 3]
    assert faults_of(raw) == ["study.toml: record.features.0.range: must have at most 2 entries"]
    raw["record"]["features"][0]["range"] = [1]
    (fault,) = faults_of(raw)
    assert fault == "study.toml: record.features.0.range.1: is missing; add it"


def test_an_unknown_key_gets_the_nearest_known_one() -> None:
    assert fault_at("federation.min_site", 2) == (
        "study.toml: federation.min_site: is not a known key; did you mean min_sites?"
    )


def test_an_unknown_key_without_a_near_one_gets_the_list() -> None:
    assert fault_at("quality.zzz", 2) == (
        "study.toml: quality.zzz: is not a known key; known keys here: max_quarantined, min_cases"
    )


def test_hints_reach_into_lists_and_optional_tables() -> None:
    source = {"format": "dicom", "path": "x", "colums": {}}
    fault = fault_at("simulation", {"sites": [{"name": "a", "data": source}]})
    assert fault == (
        "study.toml: simulation.sites.0.data.colums: is not a known key; did you mean columns?"
    )


def test_contradictions_between_keys_are_all_told_too() -> None:
    raw = plain_study()
    raw["training"]["local_epochs"] = 1
    raw["evaluation"] = {"validation": 0.5, "test": 0.5}
    faults = faults_of(raw)
    assert len(faults) == 2
    assert all(fault.startswith("study.toml: ") for fault in faults)


def test_broken_toml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('name = "a"\n[data\n')
    with pytest.raises(ConfigError, match=r"site\.toml: is not valid TOML: .*line 2"):
        config.load(path, Site)


def test_a_missing_file_a_folder_and_foreign_bytes_are_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: there is no such file; check the path"):
        config.load(tmp_path / "nothing.toml", Site)
    with pytest.raises(ConfigError, match=r"is a folder; name the \.toml file in it"):
        config.load(tmp_path, Site)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('name = "Zürich"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text; save it as UTF-8"):
        config.load(latin, Site)


def test_a_file_saved_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "a"\n[data]\nformat = "dicom"\npath = "."\n')
    assert config.load(path, Site).name == "a"


def test_a_fault_in_a_file_has_exit_code_2() -> None:
    assert ConfigError("x").exit_code == 2
