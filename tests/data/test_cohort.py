"""From every format to a checked cohort: labels, splits, quarantine, digest and cache."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfl.client.data import own, store
from medfl.client.data.cases import CaseRef, Cohort, Found
from medfl.client.data.cohort import _outcomes, build_cohort, find_cases
from medfl.client.data.reasons import KEPT, REASONS
from medfl.client.readers import READERS
from medfl.client.readers.rows import closed_folder
from medfl.common.errors import DataError
from medfl.common.site import Cache, Site
from medfl.common.source import DataSource
from medfl.common.study import Evaluation, Feature, ImageInput, Quality, RecordInput, Study

Studies = Callable[..., Study]
LENIENT = Quality(max_quarantined=0.9, min_cases=1)
HEART = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num".split()


def grey(seed: int, size: tuple[int, int] = (6, 5)) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def reasons(cohort: Cohort) -> Counter[str]:
    return Counter(q.reason for q in cohort.quarantined)


@pytest.fixture
def images(tmp_path: Path) -> DataSource:
    """Six grey PNGs of three patients with a table."""
    rows = ["file,who,finding"]
    for i in range(6):
        Image.fromarray(grey(i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,p{i // 2},{'yes' if i % 2 else '0.0'}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    columns = {"image": "file", "patient": "who", "label": "finding"}
    return DataSource(format="image", path=tmp_path, table=tmp_path / "t.csv", columns=columns)


@pytest.fixture
def grey_study(study: Studies) -> Study:
    return study(
        label_map={"0": "no"},
        image=ImageInput(dimensions=2, size=[6, 5], intensity="none"),
        quality=LENIENT,
    )


def test_images_with_a_table(images: DataSource, grey_study: Study) -> None:
    cohort = build_cohort(images, grey_study, cache=None)
    assert len(cohort.cases) == 6
    assert sorted(np.asarray(cohort.targets)) == [0, 0, 0, 1, 1, 1]
    assert len({c.patient for c in cohort.cases}) == 3
    assert [c.key for c in cohort.cases] == sorted(c.key for c in cohort.cases)
    for index, case in enumerate(cohort.cases):
        assert case.split in ("train", "validation", "test")
        pictures = [grey(i) for i in range(6) if i % 2 == np.asarray(cohort.targets)[index]]
        assert any(np.array_equal(cohort.inputs[index][0], p) for p in pictures)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("p7"), "reading_failed"),
        (MemoryError(), "memory"),
        (PermissionError(13, "Permission denied", "p7.png"), "unreadable"),
    ],
)
def test_what_a_reader_did_not_foresee_costs_the_case_and_not_the_hospital(
    images: DataSource,
    grey_study: Study,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    load = READERS["image"].load

    def fails(ref: CaseRef, study: Study) -> Any:
        if ref.case_id == "3.png":
            raise error
        return load(ref, study)

    monkeypatch.setitem(READERS, "image", replace(READERS["image"], load=fails))
    cohort = build_cohort(images, grey_study, cache=None)
    assert (len(cohort.cases), reasons(cohort)) == (5, Counter({reason: 1}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_of_somebody_else_is_one_line(images: DataSource, grey_study: Study) -> None:
    closed = images.path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed cannot be opened \(Permission denied\)"):
        build_cohort(images, grey_study, cache=None)


def test_a_folder_that_cannot_be_listed_is_not_passed_over() -> None:
    with pytest.raises(DataError, match=r"/data/x cannot be opened \(Permission denied\)"):
        closed_folder(PermissionError(13, "Permission denied", "/data/x"))


def test_bad_cases_are_left_out_for_their_own_reason(images: DataSource, grey_study: Study) -> None:
    folder = images.path
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    Image.fromarray(np.zeros((6, 5), dtype=np.uint8)).save(folder / "black.png")
    shutil.copy(folder / "1.png", folder / "copy.png")
    Image.open(folder / "2.png").save(folder / "repacked.png", compress_level=0)
    Image.fromarray(grey(9)).save(folder / "nolabel.png")
    Image.fromarray(grey(8)).save(folder / "odd.png")
    with (folder / "t.csv").open("a") as table:
        table.write("\nbroken.png,b,yes\nblack.png,c,yes\ncopy.png,d,yes\nrepacked.png,e,yes")
        table.write("\nnolabel.png,f,\nodd.png,g,perhaps\nabsent.png,h,yes\n0.png,i,yes")
    cohort = build_cohort(images, grey_study, cache=None)
    assert len(cohort.cases) == 5
    assert reasons(cohort) == {
        "unreadable": 1,
        "empty_image": 1,
        "duplicate": 2,
        "label_missing": 1,
        "label_unknown": 1,
        "file_missing": 1,
        "ambiguous_line": 2,
    }
    assert "copy.png" in {q.case_id for q in cohort.quarantined if q.reason == "duplicate"}


def test_of_copies_the_one_that_is_listed_first_is_kept(
    images: DataSource, grey_study: Study
) -> None:
    for i in range(6):
        shutil.copy(images.path / f"{i}.png", images.path / f"copy{i}.png")
        with (images.path / "t.csv").open("a") as table:
            table.write(f"\ncopy{i}.png,p{i // 2},yes")
    cohort = build_cohort(images, grey_study, cache=None)
    assert {q.case_id for q in cohort.quarantined} == {f"copy{i}.png" for i in range(6)}


def test_too_many_bad_cases_stop_the_study_with_counts_and_no_names(
    images: DataSource, grey_study: Study, study: Studies
) -> None:
    (images.path / "secret.png").write_bytes(b"x")
    with (images.path / "t.csv").open("a") as table:
        table.write("\nsecret.png,secret,yes")
    strict = study(label_map={"0": "no"}, image=grey_study.image)
    with pytest.raises(DataError, match="1 of 7 cases") as caught:
        build_cohort(images, strict, cache=None)
    assert "unreadable" in str(caught.value)
    assert KEPT in str(caught.value)
    assert "secret" not in str(caught.value)


def test_too_few_cases_stop_the_study(images: DataSource, grey_study: Study) -> None:
    with pytest.raises(DataError, match="0 usable cases"):
        build_cohort(images, grey_study, cache=None, found=Found(()))


def test_a_share_of_the_cases_keeps_their_keys(images: DataSource, grey_study: Study) -> None:
    listed = find_cases(images, grey_study).cases
    share = Found(tuple(c for c in listed if c.case_id in ("1.png", "4.png")))
    some = build_cohort(images, grey_study, cache=None, found=share)
    every = build_cohort(images, grey_study, cache=None)
    assert len(some.cases) == 2
    assert set(some.cases) <= set(every.cases)


def test_the_digest_knows_every_pixel_and_label_but_no_file_name(
    images: DataSource, grey_study: Study
) -> None:
    first = build_cohort(images, grey_study, cache=None)
    assert build_cohort(images, grey_study, cache=None).digest == first.digest
    table = images.path / "t.csv"
    text = table.read_text()
    table.write_text(text.replace("0.png,p0,0.0", "0.png,p0,yes"))
    assert build_cohort(images, grey_study, cache=None).digest != first.digest
    table.write_text(text)
    Image.fromarray(grey(77)).save(images.path / "0.png")
    assert build_cohort(images, grey_study, cache=None).digest != first.digest


def test_another_site_key_hides_the_same_patients_otherwise(
    images: DataSource, grey_study: Study
) -> None:
    one = build_cohort(images, grey_study, cache=None, site_key=b"one")
    two = build_cohort(images, grey_study, cache=None, site_key=b"two")
    assert not {c.patient for c in one.cases} & {c.patient for c in two.cases}
    assert not {c.key for c in one.cases} & {c.key for c in two.cases}


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_cache_gives_the_same_and_reads_no_picture_again(
    images: DataSource,
    grey_study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jobs: int,
) -> None:
    cache = Cache(path=tmp_path / "cache")
    first = build_cohort(images, grey_study, cache=cache, n_jobs=jobs)
    plain = build_cohort(images, grey_study, cache=None)
    assert np.array_equal(np.asarray(first.inputs), np.asarray(plain.inputs))
    assert first.digest == plain.digest

    def refuse(*args: object) -> None:
        raise AssertionError("a picture was read again")

    monkeypatch.setattr("medfl.client.readers.image.read", refuse)
    monkeypatch.setattr("hashlib.file_digest", refuse)
    again = build_cohort(images, grey_study, cache=cache, n_jobs=jobs)
    assert np.array_equal(np.asarray(first.inputs), np.asarray(again.inputs))
    assert again.cases == first.cases


def test_the_cached_arrays_outlive_their_sources(
    images: DataSource, grey_study: Study, tmp_path: Path
) -> None:
    cache = Cache(path=tmp_path / "cache")
    first = build_cohort(images, grey_study, cache=cache)
    for file in images.path.glob("*.png"):
        file.unlink()
    (key,) = [p.parent.name for p in cache.path.glob("*/index.json")]
    stored = store.read_entry(cache, key)
    assert stored is not None
    assert np.array_equal(np.asarray(stored.inputs), np.asarray(first.inputs))


def test_a_changed_preprocessing_is_another_entry(
    images: DataSource, grey_study: Study, study: Studies, tmp_path: Path
) -> None:
    cache = Cache(path=tmp_path / "cache")
    build_cohort(images, grey_study, cache=cache)
    other = study(
        label_map={"0": "no"}, image=ImageInput(dimensions=2, size=[4, 4]), quality=LENIENT
    )
    assert np.asarray(build_cohort(images, other, cache=cache).inputs).shape == (6, 1, 4, 4)
    assert len(list(cache.path.glob("*/index.json"))) == 2


def test_the_cache_names_no_patient_and_no_file(
    images: DataSource, grey_study: Study, tmp_path: Path
) -> None:
    cache = Cache(path=tmp_path / "cache")
    build_cohort(images, grey_study, cache=cache)
    for file in cache.path.rglob("*.json"):
        assert "png" not in file.read_text()


def test_instance_maps_count_as_foreground(tmp_path: Path, study: Studies) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(2):
        Image.fromarray(grey(i)).save(tmp_path / "images" / f"{i}.png")
        instances = np.zeros((6, 5), dtype=np.uint16)
        instances[0, 0], instances[1, 1] = 1, 300
        Image.fromarray(instances).save(tmp_path / "masks" / f"{i}.png")
    source = DataSource(format="image", path=tmp_path / "images", masks=tmp_path / "masks")
    rule = study("segmentation", image=ImageInput(dimensions=2, size=[6, 5]), quality=LENIENT)
    cohort = build_cohort(source, rule, cache=None)
    assert np.argwhere(np.asarray(cohort.targets[0])).tolist() == [[0, 0], [1, 1]]


def test_a_folder_of_volumes_with_masks_beside_them(tmp_path: Path, study: Studies) -> None:
    for i in range(3):
        volume = np.random.default_rng(i).normal(size=(4, 5, 6)).astype(np.float32)
        folder = tmp_path / f"patient{i // 2}"
        folder.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"{i}.nii.gz")
        mask = (volume > 0).astype(np.uint8)
        if i < 2:
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"{i}_mask.nii.gz")
    image = ImageInput(dimensions=3, size=[4, 5, 6], intensity="none")
    rule = study("segmentation", image=image, quality=LENIENT)
    cohort = build_cohort(DataSource(format="nifti", path=tmp_path), rule, cache=None)
    assert len(cohort.cases) == 2
    assert len({c.patient for c in cohort.cases}) == 1
    assert reasons(cohort) == {"mask_missing": 1}
    assert np.array_equal(np.asarray(cohort.targets[0]), np.asarray(cohort.inputs[0])[0] > 0)


def test_decathlon_with_damaged_and_mismatched_files(tmp_path: Path, study: Studies) -> None:
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).mkdir()
    for i in range(4):
        volume = np.random.default_rng(i).normal(size=(4, 4, 4)).astype(np.float32)
        size = (4, 4, 5) if i == 1 else (4, 4, 4)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"imagesTr/{i}.nii.gz")
        mask = np.full(size, 7 if i == 2 else 1, dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"labelsTr/{i}.nii.gz")
    (tmp_path / "imagesTr/9.nii.gz").write_bytes(b"no")
    rule = study("segmentation", image=ImageInput(dimensions=3, size=[4, 4, 4]), quality=LENIENT)
    cohort = build_cohort(DataSource(format="decathlon", path=tmp_path), rule, cache=None)
    assert len(cohort.cases) == 2
    assert reasons(cohort) == {"mask_geometry": 1, "mask_values": 1, "unreadable": 1}


def test_nnunet_channels_become_one_case(tmp_path: Path, study: Studies) -> None:
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).mkdir()
    for channel in range(2):
        volume = np.full((3, 3, 3), channel, dtype=np.float32)
        volume[0, 0, 0] = 9
        path = tmp_path / f"imagesTr/a_000{channel}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    mask = nibabel.Nifti1Image(np.ones((3, 3, 3), dtype=np.uint8), np.eye(4))
    nibabel.save(mask, tmp_path / "labelsTr/a.nii.gz")
    image = ImageInput(dimensions=3, size=[3, 3, 3], channels=2, intensity="none")
    rule = study("segmentation", image=image, quality=LENIENT)
    cohort = build_cohort(DataSource(format="decathlon", path=tmp_path), rule, cache=None)
    assert np.asarray(cohort.inputs[0])[:, 1, 1, 1].tolist() == [0, 1]


def medmnist(path: Path, parts: dict[str, int], labels: int = 1) -> None:
    arrays = {}
    for number, (part, count) in enumerate(parts.items()):
        rng = np.random.default_rng(number)
        arrays[f"{part}_images"] = rng.integers(0, 255, (count, 4, 4), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (count, labels), dtype=np.uint8)
    np.savez(path, **arrays)


def test_medmnist_keeps_its_parts_and_numbers_are_classes(tmp_path: Path, study: Studies) -> None:
    medmnist(tmp_path / "a.npz", {"train": 10, "val": 4, "test": 6})
    given = Evaluation(split="given")
    rule = study(image=ImageInput(dimensions=2, size=[4, 4]), evaluation=given)
    cohort = build_cohort(DataSource(format="medmnist", path=tmp_path / "a.npz"), rule, cache=None)
    assert [len(cohort.positions(p)) for p in ("train", "validation", "test")] == [10, 4, 6]
    assert set(np.asarray(cohort.targets)) == {0, 1}


def test_medmnist_without_a_test_part_tests_on_val(tmp_path: Path, study: Studies) -> None:
    medmnist(tmp_path / "a.npz", {"train": 40, "val": 5})
    given = Evaluation(split="given", validation=0.3)
    rule = study(image=ImageInput(dimensions=2, size=[4, 4]), evaluation=given)
    cohort = build_cohort(DataSource(format="medmnist", path=tmp_path), rule, cache=None)
    assert len(cohort.positions("test")) == 5
    assert len(cohort.positions("validation")) > 3


@pytest.mark.parametrize("bad", ["cut", "labels"])
def test_one_bad_file_of_several_costs_itself(tmp_path: Path, study: Studies, bad: str) -> None:
    """As it was: the whole folder."""
    medmnist(tmp_path / "a.npz", {"train": 30})
    medmnist(tmp_path / "b.npz", {"train": 30}, labels=3 if bad == "labels" else 1)
    if bad == "cut":
        (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:300])
    rule = study(image=ImageInput(dimensions=2, size=[4, 4]), quality=LENIENT)
    source = DataSource(format="medmnist", path=tmp_path)
    cohort = build_cohort(source, rule, cache=None)
    assert len(cohort.cases) == 30
    (left_out,) = cohort.quarantined
    assert (left_out.case_id, left_out.reason) == ("b.npz", "unreadable")
    assert ("3 labels" if bad == "labels" else "cannot be read as .npz") in left_out.detail
    with pytest.raises(DataError):
        build_cohort(replace(source, path=tmp_path / "b.npz"), rule, cache=None)


def test_several_findings_at_once(tmp_path: Path, study: Studies) -> None:
    medmnist(tmp_path / "a.npz", {"train": 30}, labels=3)
    image = ImageInput(dimensions=2, size=[4, 4])
    rule = study(classes=["a", "b", "c"], multi_label=True, image=image)
    cohort = build_cohort(DataSource(format="medmnist", path=tmp_path), rule, cache=None)
    targets = np.asarray(cohort.targets)
    assert targets.shape == (30, 3)
    assert targets.dtype == np.float32
    expected = np.random.default_rng(0)
    expected.integers(0, 255, (30, 4, 4), dtype=np.uint8)
    assert targets.sum() == expected.integers(0, 2, (30, 3), dtype=np.uint8).sum()


def test_hdf5_with_patients_and_masks(tmp_path: Path, study: Studies) -> None:
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.random.default_rng(0).normal(size=(6, 4, 5))
        file["masks"] = np.stack([np.full((4, 5), i % 2, dtype=np.uint8) for i in range(6)])
        file["patients"] = [b"x", b"x", b"y", b"y", b"z", b"z"]
        file["link"] = h5py.ExternalLink("other.h5", "/images")
    rule = study("segmentation", image=ImageInput(dimensions=2, size=[4, 5]))
    source = DataSource(format="hdf5", path=tmp_path / "a.h5")
    cohort = build_cohort(source, rule, cache=None)
    assert len({c.patient for c in cohort.cases}) == 3
    assert sum(int(np.asarray(cohort.targets[i]).max()) for i in range(6)) == 3
    linked = DataSource(format="hdf5", path=tmp_path / "a.h5", columns={"images": "link"})
    with pytest.raises(DataError, match="points out of the file"):
        find_cases(linked, rule)


@pytest.mark.parametrize(
    ("site", "counts"),
    [
        ("cleveland", (199, 104)),
        ("hungarian", (172, 89)),
        ("switzerland", (30, 16)),
        ("va", (85, 45)),
    ],
)
def test_the_published_heart_protocol(
    public_data: Callable[[str], Path], study: Studies, site: str, counts: tuple[int, int]
) -> None:
    folder = public_data("uci_heart_disease")
    source = DataSource(
        format="table",
        path=folder / f"processed.{site}.data",
        header=HEART,
        columns={"label": "num"},
    )
    features = [
        Feature(name=n, kind="category" if n in ("cp", "restecg") else "number") for n in HEART[:10]
    ]
    rule = study(
        "risk",
        label_map={"0": "no"} | {str(i): "yes" for i in range(1, 5)},
        record=RecordInput(features=features),
        evaluation=Evaluation(
            split="shuffled", test=0.34, validation=0.1, random_state=43, stratify=True
        ),
    )
    cohort = build_cohort(source, rule, cache=None)
    train = len(cohort.positions("train")) + len(cohort.positions("validation"))
    assert (train, len(cohort.positions("test"))) == counts
    assert set(reasons(cohort)) <= {"incomplete_record"}
    assert {r["cp"] for r in cohort.records} <= {"1", "2", "3", "4"}


def test_shuffled_goes_by_the_tables_order(tmp_path: Path, study: Studies) -> None:
    from sklearn.model_selection import train_test_split

    rows = [f"{i},{i},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["case,a,label", *rows]))
    rule = study(
        "risk",
        record=RecordInput(features=[Feature(name="a")]),
        evaluation=Evaluation(split="shuffled", test=0.25, validation=0, random_state=1),
    )
    source = DataSource(format="table", path=tmp_path / "t.csv")
    cohort = build_cohort(source, rule, cache=None)
    _, expected = train_test_split(list(range(40)), test_size=0.25, random_state=1)
    tested = {int(str(cohort.records[i]["a"])) for i in cohort.positions("test")}
    assert tested == set(expected)


def test_incomplete_records_are_no_fault_and_may_be_kept(tmp_path: Path, study: Studies) -> None:
    (tmp_path / "t.csv").write_text("id,a,y\n1,?,0\n2,5,1\n3,6,0\n4,x,1\n5,NaN,1\n")
    columns = {"case": "id", "label": "y"}
    source = DataSource(format="table", path=tmp_path / "t.csv", columns=columns)
    names = {"0": "no", "1": "yes"}
    dropped = study(
        "risk",
        label_map=names,
        record=RecordInput(features=[Feature(name="a")]),
        quality=Quality(max_quarantined=0.4),
    )
    cohort = build_cohort(source, dropped, cache=None)
    assert len(cohort.cases) == 2
    assert reasons(cohort) == {"incomplete_record": 2, "feature_not_a_number": 1}
    record = RecordInput(features=[Feature(name="a")], missing="mean")
    kept = build_cohort(
        source, study("risk", label_map=names, record=record, quality=LENIENT), cache=None
    )
    assert [r["a"] for r in kept.records].count(None) == 2


def test_a_table_without_a_named_column_says_which(tmp_path: Path, study: Studies) -> None:
    (tmp_path / "t.csv").write_text("id,a\n1,2\n")
    source = DataSource(format="table", path=tmp_path / "t.csv", columns={"label": "outcome"})
    with pytest.raises(DataError, match="no column outcome"):
        find_cases(source, study("risk"))


def test_a_patient_on_both_sides_blocks(images: DataSource, study: Studies) -> None:
    text = (images.path / "t.csv").read_text().splitlines()
    parts = ["split", "train", "test", "train", "train", "test", "test"]
    (images.path / "t.csv").write_text(
        "\n".join(f"{line},{part}" for line, part in zip(text, parts, strict=True))
    )
    rule = study(
        label_map={"0": "no"},
        image=ImageInput(dimensions=2, size=[6, 5]),
        evaluation=Evaluation(split="given"),
        quality=LENIENT,
    )
    with pytest.raises(DataError, match="1 of 3 patients"):
        build_cohort(images, rule, cache=None)


def test_absent_data_say_where_to_look(tmp_path: Path, study: Studies) -> None:
    for source in ("image", "medmnist", "hdf5", "table", "dicom", "nifti", "decathlon"):
        with pytest.raises(DataError, match=r"site\.toml"):
            find_cases(DataSource(format=source, path=tmp_path / "no"), study())  # type: ignore[arg-type]


def test_every_reason_in_the_code_is_explained(root: Path) -> None:
    import re

    found: set[str] = set()
    for folder in ("client/data", "client/readers"):
        for file in (root / folder).glob("*.py"):
            found |= set(re.findall(r'CaseError\(\s*"(\w+)"', file.read_text()))
            found |= set(re.findall(r'Quarantined\([^"\n]*, "(\w+)"', file.read_text()))
    assert len(found) > 25
    assert found <= set(REASONS)
    assert all("delete" not in text.lower() for text in REASONS.values())


def test_cases_prepared_together_keep_their_order_and_are_few(
    study: Studies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time: three more may wait at most while the first is not taken."""
    begun: list[int] = []

    def load(ref: int, reader: object, study: Study) -> int:
        begun.append(ref)
        return ref

    monkeypatch.setattr("medfl.client.data.cohort._load", load)
    candidates = [SimpleNamespace(ref=i) for i in range(20)]
    outcomes = _outcomes(candidates, None, study(), 2)  # type: ignore[arg-type]
    taken = [next(outcomes)]
    assert len(begun) <= 4
    assert [*taken, *outcomes] == list(range(20))


def test_a_hospital_reads_with_all_cores(
    images: DataSource, grey_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(own, "cores", lambda: 5)
    monkeypatch.setattr(own, "build_cohort", lambda *a, n_jobs, **k: asked.append(n_jobs))
    monkeypatch.setattr(own, "examine", lambda *a, n_jobs, **k: asked.append(n_jobs))
    site = Site(name="north", data=images, cache=Cache(path=tmp_path / "cache"))
    own.own_cohort(site, grey_study)
    own.examined(site, grey_study)
    own.examined(site, grey_study, 2)
    assert asked == [5, 5, 2]
