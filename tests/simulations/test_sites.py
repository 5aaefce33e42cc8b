"""Hospitals are found where the study or their site.toml says, and opened when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medfl.client.encoding import case_set
from medfl.common.config import parse
from medfl.common.errors import ConfigError, DataError
from medfl.common.source import DataSource
from medfl.common.statistics import Shared
from medfl.common.study import (
    Evaluation,
    ImageInput,
    Partition,
    Quality,
    Simulation,
    Study,
    load_study,
)
from medfl.simulations import sites
from medfl.simulations.sites import (
    OPEN_HOSPITALS,
    OpenHospitals,
    SimulatedHospital,
    SimulatedRun,
    find_hospitals,
    pool,
)

Write = Callable[..., Path]


def test_every_folder_with_a_site_toml_is_a_hospital(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("west", more="[privacy]\nepsilon = 2.0\n[policy]\nmin_cases = 5")
    data = write_hospital("east")
    (data / "notes").mkdir()
    east, west = find_hospitals(load_study(write_study()), data, tmp_path / "cache")
    assert (east.name, west.name) == ("east", "west")
    assert west.privacy is not None
    assert (west.privacy.epsilon, west.policy.min_cases) == (2.0, 5)
    assert east.privacy is None


def test_data_that_are_no_folder_are_an_error(write_study: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        find_hospitals(load_study(write_study()), tmp_path / "absent", tmp_path)


def test_a_folder_without_hospitals_is_an_error(write_study: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"site\.toml"):
        find_hospitals(load_study(write_study()), tmp_path / "empty", tmp_path)


def test_two_hospitals_of_one_name_are_an_error(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    data = write_hospital("a")
    write_hospital("b")
    file = data / "b" / "site.toml"
    file.write_text(file.read_text().replace('"b"', '"a"'))
    with pytest.raises(ConfigError, match=r"two site\.toml have the name a"):
        find_hospitals(load_study(write_study()), data, tmp_path)


def test_a_study_may_name_its_sites_and_their_privacy(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    data = write_hospital("a")
    write_hospital("b")
    more = "".join(
        f'[[simulation.sites]]\nname = "{n}"\n{extra}\n'
        f'[simulation.sites.data]\nformat = "table"\npath = "{n}/table.csv"\n'
        for n, extra in (("b", "privacy_epsilon = 3.0"), ("a", ""))
    )
    a, b = find_hospitals(load_study(write_study(more=more)), data, tmp_path)
    assert (a.name, a.privacy) == ("a", None)
    assert b.privacy is not None
    assert b.privacy.epsilon == 3.0


def test_one_collection_is_divided_and_nobody_shares_a_patient(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    data = write_hospital("all", n=33)
    more = (
        '[simulation.data]\nformat = "table"\npath = "table.csv"\n'
        '[simulation.partition]\nkind = "iid"\nsites = 3\n'
    )
    study = load_study(write_study(more=more))
    sites = find_hospitals(study, data / "all", tmp_path)
    cohorts = [site.cohort(study) for site in sites]
    assert [len(c.cases) for c in cohorts] == [11, 11, 11]
    keys = {case.key for cohort in cohorts for case in cohort.cases}
    assert len(keys) == 33


def twelve_hospitals(write_study: Write, write_hospital: Write, folder: Path) -> SimulatedRun:
    data = write_hospital("h00")
    for i in range(1, 12):
        write_hospital(f"h{i:02d}")
    study = load_study(write_study())
    return SimulatedRun("main", study, find_hospitals(study, data, folder), folder / "out")


def test_the_least_used_hospitals_are_closed_where_they_hold_many_cases(
    write_study: Write, write_hospital: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twelve_hospitals(write_study, write_hospital, tmp_path)
    opened = OpenHospitals({1: run, 2: replace(run, name="other")})
    first = opened.find(1, 1)
    for node in range(2, OPEN_HOSPITALS + 3):
        # One of the drawn values may lie beyond the study's range.
        assert 28 <= len(opened.find(1, node).cohort.cases) <= 30
    assert len(opened._open) == OPEN_HOSPITALS + 2  # few cases: all stay open
    monkeypatch.setattr(sites, "OPEN_CASES", 8 * 30)
    assert opened.find(1, 1) is first  # used again, so now node 2 is the least used
    second, third = opened.find(1, 2), opened.find(1, 3)
    opened.find(1, 11)
    assert opened.find(1, 2) is second
    assert opened.find(1, 3) is third
    assert len(opened._open) <= OPEN_HOSPITALS + 2
    assert (1, 4) not in opened._open
    assert opened.find(2, 1).folder == run.folder / "sites" / "h00"


def test_no_more_hospitals_are_open_than_a_process_may_have_files(
    write_study: Write, write_hospital: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twelve_hospitals(write_study, write_hospital, tmp_path)
    monkeypatch.setattr(sites, "MOST_OPEN", 9)
    opened = OpenHospitals({1: run})
    for node in range(1, 13):
        opened.find(1, node)
    assert [node for _, node in opened._open] == list(range(4, 13))


def test_pooled_records_keep_their_parts(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("a", n=9)
    data = write_hospital("b", n=6)
    study = load_study(write_study())
    cohorts = [h.cohort(study) for h in find_hospitals(study, data, tmp_path)]
    together = pool(cohorts)
    for part in ("train", "test"):
        apart = [case_set(replace_scale(study), Shared(), c, part) for c in cohorts]  # type: ignore[arg-type]
        whole = case_set(replace_scale(study), Shared(), together, part)  # type: ignore[arg-type]
        assert whole.keys == apart[0].keys + apart[1].keys
        assert np.array_equal(whole.inputs, np.concatenate([a.inputs for a in apart]))
        assert np.array_equal(whole.targets, np.concatenate([a.targets for a in apart]))


def replace_scale(study: Study) -> Study:
    assert study.record is not None
    return replace(study, record=replace(study.record, scale="none"))


@pytest.fixture
def volumes(tmp_path: Path) -> Callable[[str, list[int]], SimulatedHospital]:
    """A hospital of NIfTI volumes with masks, of these heights."""

    def make(name: str, heights: list[int]) -> SimulatedHospital:
        folder = tmp_path / name
        folder.mkdir()
        for i, height in enumerate(heights):
            image = np.random.default_rng(len(name) + i).normal(size=(4, 5, height))
            mask = (image > 0.5).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f"case{i}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"case{i}_mask.nii.gz")
        from medfl.common.site import Cache

        return SimulatedHospital(
            name, DataSource(format="nifti", path=folder), Cache(path=tmp_path / "cache")
        )

    return make


def test_pooled_masks_of_several_sizes_stay_as_they_are(
    volumes: Callable[[str, list[int]], SimulatedHospital],
) -> None:
    study = parse(
        {
            "name": "seg",
            "task": {"kind": "segmentation", "classes": ["background", "organ"]},
            "image": {"dimensions": 3, "size": [4, 4, 4], "fit": "keep", "intensity": "none"},
            "model": {"name": "basic_unet"},
            "training": {"local_steps": 1},
            "federation": {"rounds": 1},
            "evaluation": {"test": 0.0, "validation": 0.0},
        },
        Study,
        "study",
    )
    # One size at the first hospital, several at the others.
    sites = [volumes("a", [4, 4]), volumes("b", [5, 6]), volumes("c", [7, 7])]
    cohorts = [site.cohort(study) for site in sites]
    together = pool(cohorts)
    cases = case_set(study, Shared(), together, "train")
    assert [a.shape[-1] for a in cases.inputs] == [
        a.shape[-1] for c in cohorts for a in case_set(study, Shared(), c, "train").inputs
    ]
    pairs = zip(cases.inputs, cases.targets, strict=True)
    assert all(np.array_equal(np.asarray(i)[0] > 0.5, t) for i, t in pairs)


def test_nothing_cannot_be_pooled() -> None:
    with pytest.raises(DataError):
        pool([])


def test_a_hospital_that_cannot_serve_is_left_out_of_the_pool(
    write_study: Write, write_hospital: Write, tmp_path: Path
) -> None:
    write_hospital("bad", text="patient,x,y,label,split\np,1,2,maybe,train\n")
    data = write_hospital("good", n=9)
    study = load_study(write_study())
    run = SimulatedRun(
        "pooled", study, find_hospitals(study, data, tmp_path), tmp_path, pooled=True
    )
    assert run.names == ("pooled",)
    assert len(run.hospital(1).cohort.cases) == 9


def test_a_public_npz_becomes_hospitals_by_label(tmp_path: Path, risk_study: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_{kind}": (
            rng.integers(0, 255, (n, 4, 4), dtype=np.uint8)
            if kind == "images"
            else (np.arange(n) % 2)[:, None]
        )
        for part, n in (("train", 40), ("val", 10), ("test", 10))
        for kind in ("images", "labels")
    }
    np.savez(tmp_path / "tiny.npz", **arrays)
    base = risk_study()
    study = replace(
        base,
        task=replace(base.task, kind="classification", label_map={"0": "no", "1": "yes"}),
        record=None,
        image=ImageInput(dimensions=2, size=[4, 4]),
        evaluation=Evaluation(split="given"),
        quality=Quality(min_cases=1),
        simulation=Simulation(
            data=DataSource(format="medmnist", path=Path("tiny.npz")),
            partition=Partition(kind="label_skew", sites=3, alpha=0.3),
        ),
    )
    sites = find_hospitals(study, tmp_path, tmp_path / "cache")
    cohorts = [site.cohort(study) for site in sites]
    assert sum(len(c.cases) for c in cohorts) == 60
    assert len({case.key for c in cohorts for case in c.cases}) == 60
