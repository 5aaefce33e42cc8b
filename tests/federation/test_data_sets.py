"""A hospital with a table study and an image study: each has its own data and its own approval."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medfl.client import approved, consent
from medfl.client.approved import Approved
from medfl.client.cli import app
from medfl.client.data.check import check
from medfl.client.data.own import own_cohort
from medfl.client.hospital import answer
from medfl.client.premises import Enrolment, Home
from medfl.client.reading import Reading, site_word
from medfl.common import config, study_text
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.kept import save_record
from medfl.common.messages import Instruction
from medfl.common.private_files import private_folder
from medfl.common.signing import new_key, public_of
from medfl.common.site import Site, load_site
from medfl.common.study import Study
from medfl.simulations.sites import find_hospitals

FEDERATION = {"rounds": 1}
HEART: dict[str, Any] = {
    "name": "heart-2026",
    "task": {"kind": "risk", "classes": ["no", "yes"]},
    "record": {"features": [{"name": "a"}]},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": FEDERATION,
}
CHEST: dict[str, Any] = {
    "name": "chest",
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "image": {"dimensions": 2, "size": [8, 8], "intensity": "zscore"},
    "model": {"name": "logistic"},
    "training": {"local_steps": 1},
    "federation": FEDERATION,
}
SITE = """
name = "north"
[data_sets.records]
studies = ["heart-*"]
format = "table"
path = "heart.csv"
[data_sets.xrays]
studies = ["chest"]
format = "image"
path = "pictures"
table = "chest.csv"
"""


@dataclass
class Context:
    run_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    finder: Approved
    heart: Study
    chest: Study

    @property
    def file(self) -> Path:
        return self.finder.site_file

    def approve(self, study: Study) -> None:
        site = load_site(self.file).of_study(study.name)
        cohort = own_cohort(site, study)
        word = site_word(self.finder.home.signing_key(), site)
        reading = Reading(cohort.digest, len(cohort.positions("train")), word)
        consent.approve(self.finder.home, study, reading, 30)

    def find(self, study: Study) -> Any:
        return self.finder(Context({"study": study.digest}))

    def said(self, *argv: str) -> Any:
        there = ["--site", str(self.file), "--state", str(self.finder.home.folder)]
        return CliRunner().invoke(app, [*argv, *there])


@pytest.fixture
def world(tmp_path: Path) -> World:
    home = Home(private_folder(tmp_path / "state"))
    coordinator = new_key(tmp_path / "coordinator.key")
    new_key(home.signing_file)
    save_record(home.enrolment_file, Enrolment("north", "h:1", "T", public_of(coordinator), 0))
    heart, chest = (config.parse(plain, Study, "test") for plain in (HEART, CHEST))
    for study in (heart, chest):
        made = study_text.publish(coordinator, study, 0)
        save_record(home.folder / "studies" / f"{study.digest}.json", made)
    records = [f"p{i},{i / 10},{'yes' if i % 3 else 'no'}" for i in range(30)]
    (tmp_path / "heart.csv").write_text("\n".join(["patient,a,label", *records]))
    (tmp_path / "pictures").mkdir()
    rows, draw = ["image,patient,label"], np.random.default_rng(1)
    for i in range(24):
        pixels = draw.integers(0, 255, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
        rows.append(f"{i}.png,x{i},{'yes' if i % 2 else 'no'}")
    (tmp_path / "chest.csv").write_text("\n".join(rows))
    (tmp_path / "site.toml").write_text(SITE)
    argument = json.dumps({"state": str(home.folder), "site": str(tmp_path / "site.toml")})
    return World(approved.hospitals(argument), heart, chest)


def prepare(study: Study) -> Instruction:
    return Instruction(kind="prepare", study_digest=study.digest, run="r", seed=1)


def test_one_client_serves_both_studies_each_from_its_own_data(world: World) -> None:
    world.approve(world.heart)
    world.approve(world.chest)
    for study, cases in ((world.heart, 30), (world.chest, 24), (world.heart, 30)):
        hospital = world.find(study)
        assert len(hospital.cohort.cases) == cases
        assert answer(hospital, prepare(study)).refusal == ""


def test_a_change_of_one_data_set_leaves_the_other_approval_in_force(world: World) -> None:
    world.approve(world.heart)
    world.approve(world.chest)
    before = world.file.read_text()
    world.file.write_text(before.replace('table = "chest.csv"', 'table = "other.csv"'))
    assert len(world.find(world.heart).cohort.cases) == 30
    with pytest.raises(PolicyRefused, match=r"site\.toml has changed since the approval"):
        world.find(world.chest)
    world.file.write_text(before + '[policy]\ntasks = ["risk"]\n')  # is of both
    for study in (world.heart, world.chest):
        with pytest.raises(PolicyRefused, match=r"site\.toml has changed since the approval"):
            world.find(study)


def test_data_that_change_stop_the_study_that_they_are_for(world: World) -> None:
    world.approve(world.heart)
    world.approve(world.chest)
    table = world.file.with_name("heart.csv")
    table.write_text(table.read_text().replace("p1,0.1", "p1,9.9"))
    assert len(world.find(world.chest).cohort.cases) == 24
    with pytest.raises(PolicyRefused, match="the data have changed since the approval"):
        world.find(world.heart)


def test_a_study_that_no_data_set_names_is_refused_everywhere_with_the_remedy(
    world: World,
) -> None:
    world.approve(world.chest)
    world.file.write_text(SITE.replace('studies = ["chest"]', 'studies = ["skin"]'))
    remedy = 'write studies = ["chest"] in one of [data_sets]: records, xrays'
    with pytest.raises(PolicyRefused) as refused:
        world.find(world.chest)
    assert remedy in str(refused.value)
    assert remedy in world.said("show", "chest").output
    signed = world.said("approve", "chest", "--yes")
    assert isinstance(signed.exception, PolicyRefused)
    assert remedy in str(signed.exception)
    with pytest.raises(PolicyRefused, match=r"no data set of site\.toml names this study"):
        check(load_site(world.file), world.chest)


def test_a_study_that_two_data_sets_name_is_refused(world: World) -> None:
    world.file.write_text(SITE.replace('studies = ["chest"]', 'studies = ["chest", "heart*"]'))
    with pytest.raises(PolicyRefused, match=r"data sets records and xrays of site\.toml both"):
        check(load_site(world.file), world.heart)
    assert check(load_site(world.file), world.chest).usable == 24


def test_what_is_shown_names_the_data_set(world: World) -> None:
    shown = world.said("show", "chest").output
    assert "From the data set xrays of site.toml (image, " in shown
    assert "pictures" in shown


def test_the_whole_check_looks_at_each_study_with_its_own_data(world: World) -> None:
    """And a study that the hospital has no data for is no fault of its file."""
    argv = ["check", str(world.file), "--state", str(world.finder.home.folder)]
    said = CliRunner().invoke(app, argv).output
    assert "2 data sets (records, xrays)" in said
    assert said.count("they serve; no faulty cases are left out") == 2
    world.file.write_text(SITE.replace('studies = ["chest"]', 'studies = ["skin"]'))
    said = CliRunner().invoke(app, argv).output
    assert "no data set of site.toml names it: no part is taken in it" in said


def test_a_simulation_takes_the_data_set_that_names_its_study(world: World) -> None:
    folder = world.file.parent / "sites" / "north"
    folder.mkdir(parents=True)
    for name in ("site.toml", "heart.csv"):
        (folder / name).write_bytes(world.file.with_name(name).read_bytes())
    (made,) = find_hospitals(world.heart, folder.parent, folder / "cache")
    assert made.source.path.name == "heart.csv"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "north"\n', "data: is missing; add it"),
        (
            SITE + '[data]\nformat = "table"\npath = "a.csv"\n',
            "data_sets: stand in place of .data.; write the one table or the others",
        ),
        (SITE.replace('studies = ["chest"]\n', ""), "data_sets.xrays.studies: is missing"),
        (SITE.replace('["chest"]', "[]"), "data_sets.xrays.studies: must have at least 1"),
        (SITE.replace("table =", "tabel ="), "data_sets.xrays.tabel: .* did you mean table"),
    ],
)
def test_faults_of_data_sets_are_named_by_their_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_site(tmp_path / "site.toml")


def test_a_site_with_one_collection_keeps_the_word_that_its_approvals_name(
    tmp_path: Path,
) -> None:
    """What an approval of before named: the word is over the same keys."""
    key = new_key(tmp_path / "key")
    (tmp_path / "site.toml").write_text('name = "n"\n[data]\nformat = "table"\npath = "a.csv"\n')
    one = load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text(
        'name = "n"\n[data_sets.x]\nstudies = ["s"]\nformat = "table"\npath = "a.csv"\n'
    )
    several = load_site(tmp_path / "site.toml")
    assert isinstance(one, Site)
    assert site_word(key, one) == site_word(key, several.of_study("s"))
    with pytest.raises(PolicyRefused):
        site_word(key, several)
