"""One physical space: masks and channels by their affines, tilt, units and unknown orientation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medfl.client.data.cases import CaseRef, Picture
from medfl.client.data.cohort import examine
from medfl.client.data.preprocess import Prepared, prepare
from medfl.client.readers import READERS, nifti
from medfl.common.config import load
from medfl.common.errors import CaseError, ConfigError
from medfl.common.source import DataSource
from medfl.common.study import ImageInput, Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
Studies = Callable[..., Study]


def volume(array: Any, affine: Any, path: Path, unit: str = "mm") -> Path:
    image = nibabel.Nifti1Image(np.asarray(array, dtype=np.float32), np.asarray(affine, float))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def nameless(path: Path, shape: tuple[int, ...] = (4, 3, 2)) -> Path:
    """A volume whose header does not say where it lies; the voxel stored first is the brightest."""
    array = np.zeros(shape, dtype=np.float32)
    array[0, 0, 0] = 9
    image = nibabel.Nifti1Image(array, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.header.set_zooms((1.0, 2.0, 3.0))
    nibabel.save(image, path)
    return path


def brightest(array: NDArray[np.generic]) -> list[int]:
    return [int(i) for i in np.unravel_index(int(array.argmax()), array.shape)]


def both(image: Picture, mask: Picture, study: Study) -> tuple[list[int], list[int]]:
    ready: Prepared = prepare(image, mask, study)
    assert ready.mask is not None
    return brightest(ready.image[0]), brightest(ready.mask)


def test_a_nifti_mask_meets_its_dicom_slice_where_both_say_the_same_place(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    pixels = np.zeros((8, 8), dtype=np.int16)
    pixels[1, 2] = 900
    ds = dicom_slice(pixels, position=(0.0, 0.0, 5.0), PixelSpacing=[1.0, 1.0])
    file = save(ds, tmp_path / "a.dcm")
    # LPS x = column, y = row; the NIfTI of it has y upwards: voxel (2, 7 - 1).
    drawn = np.zeros((8, 8, 1))
    drawn[2, 6, 0] = 1
    affine = [[-1, 0, 0, 0], [0, 1, 0, -7], [0, 0, 1, 5], [0, 0, 0, 1]]
    mask = volume(drawn, affine, tmp_path / "m.nii.gz")
    ref = CaseRef("a", "a", (file,), (mask,), fields={"mosaic": ""})
    reader = READERS["dicom"]
    found = both(reader.load(ref, planes), reader.load_mask(ref, planes), planes)
    assert found == ([1, 2], [1, 2])

    affine[2][3] = 10  # another slice
    volume(drawn, affine, mask)
    with pytest.raises(CaseError, match=r"mask_geometry.*5\.0 mm apart"):
        both(reader.load(ref, planes), reader.load_mask(ref, planes), planes)


def test_slices_of_two_directions_meet_in_two_dimensions(tmp_path: Path, planes: Study) -> None:
    image, drawn = np.zeros((8, 6, 1)), np.zeros((6, 8, 1))
    image[2, 1] = 9
    # The image counts to the left and back from the origin: its voxel lies at (-2, -1) mm. The
    # mask's first axis runs to the front from -5 mm, its second to the right from -7 mm.
    drawn[4, 5] = 1
    ref = CaseRef(
        "a",
        "a",
        (volume(image, np.diag([-1.0, -1, 1, 1]), tmp_path / "a.nii"),),
        (
            volume(
                drawn,
                [[0, 1, 0, -7], [1, 0, 0, -5], [0, 0, 1, 0], [0, 0, 0, 1]],
                tmp_path / "m.nii",
            ),
        ),
    )
    keep = replace(
        planes, image=ImageInput(dimensions=2, size=[6, 8], fit="keep", intensity="none")
    )
    found = both(nifti.load(ref, keep), nifti.load_mask(ref, keep), keep)
    assert found == ([1, 2], [1, 2])


def test_a_mask_that_alone_says_where_it_lies_is_not_used(planes: Study) -> None:
    image = Picture(np.eye(8, dtype=np.float32)[np.newaxis])
    with pytest.raises(CaseError, match="mask_geometry"):
        prepare(image, Picture(np.eye(8, dtype=np.uint8), np.eye(4)), planes)


def test_channels_are_brought_onto_one_grid_or_refused(tmp_path: Path, volumes: Study) -> None:
    first, second = np.zeros((4, 3, 2)), np.zeros((4, 3, 2))
    first[1, 0, 1] = second[2, 0, 1] = 9
    # x runs to the right from 0 in the first, to the left from 3 in the second: the same point.
    left = [[-1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    one = volume(first, np.eye(4), tmp_path / "c_0000.nii")
    other = volume(second, left, tmp_path / "c_0001.nii")
    picture = nifti.load(CaseRef("c", "c", (one, other)), volumes)
    assert [brightest(channel) for channel in picture.array] == [[1, 0, 1], [1, 0, 1]]

    left[2][3] = 4  # four millimetres higher
    volume(second, left, other)
    with pytest.raises(CaseError, match=r"mixed_geometry.*4\.0 mm apart"):
        nifti.load(CaseRef("c", "c", (one, other)), volumes)


@pytest.mark.parametrize(("degrees", "usable"), [(0.0, True), (20.0, False), (0.2, True)])
def test_a_tilted_stack_is_never_used_as_if_it_were_upright(
    study: Studies, degrees: float, usable: bool
) -> None:
    tilt = np.radians(degrees)
    # Sixteen slices, 5 mm apart along the body, whose planes are tilted about the x axis. Their
    # rows drift by 5 sin(20°) = 1.7 mm a slice; by 0.26 mm over the whole stack at 0.2°.
    affine = np.eye(4)
    affine[:3, 1] = 0, np.cos(tilt), np.sin(tilt)
    affine[:3, 2] = 0, 0, 5
    array = np.arange(8 * 8 * 16, dtype=np.float32).reshape(1, 8, 8, 16)
    rule = study(image=ImageInput(dimensions=3, size=[8, 8, 16], intensity="none"))
    if usable:
        prepare(Picture(array, affine, (1.0, 1.0, 5.0)), None, rule)
        return
    with pytest.raises(CaseError, match=r"sheared.*tilt or shear of 20\.0"):
        prepare(Picture(array, affine, (1.0, 1.0, 5.0)), None, rule)


def test_a_tilted_dicom_series_is_left_out(
    tmp_path: Path, dicom_slice: Make, save: Save, study: Studies
) -> None:
    tilt = np.radians(20)
    for k in range(16):
        ds = dicom_slice(
            np.arange(64, dtype=np.int16).reshape(8, 8) + k,
            position=(0.0, 0.0, 5.0 * k),
            PixelSpacing=[1.0, 1.0],
            ImageOrientationPatient=[1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))],
        )
        save(ds, tmp_path / f"{k}.dcm")
    (tmp_path / "t.csv").write_text("patient,label\np1,yes\n")
    rule = study(image=ImageInput(dimensions=3, size=[8, 8, 16], intensity="none"))
    source = DataSource(format="dicom", path=tmp_path, table=tmp_path / "t.csv")
    examined = examine(source, rule, cache=None)
    assert [q.reason for q in examined.cohort.quarantined] == ["sheared"]


def test_a_nifti_that_says_two_places_is_used_by_its_sform_and_told(
    tmp_path: Path, study: Studies
) -> None:
    """The qform of `b` has left and right turned; that of `c` is half a voxel away."""
    array = np.zeros((4, 4, 4), dtype=np.float32)
    array[3, 0, 0] = 9
    for name, qform in (
        ("a", np.eye(4)),
        ("b", np.diag([-1.0, 1, 1, 1])),
        ("c", np.eye(4) + 0.5 * np.eye(4, k=3)),
    ):
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.set_sform(np.eye(4), 2)
        image.set_qform(qform, 1)
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        array = array + 1  # another picture
    (tmp_path / "t.csv").write_text("image,label\na.nii.gz,yes\nb.nii.gz,no\nc.nii.gz,no\n")
    rule = study(image=ImageInput(dimensions=3, size=[4, 4, 4], intensity="none"))
    source = DataSource(format="nifti", path=tmp_path, table=tmp_path / "t.csv")
    examined = examine(source, rule, cache=None)
    assert len(examined.cohort.cases) == 3
    for volume_ in examined.cohort.inputs:
        assert np.unravel_index(int(np.argmax(volume_[0])), (4, 4, 4)) == (3, 0, 0)
    (note,) = [n for n in examined.notes if "qform" in n]
    assert note.startswith("1 NIfTI files say two places")


def test_a_nifti_without_place_is_used_only_as_the_site_declares(
    tmp_path: Path, study: Studies
) -> None:
    nameless(tmp_path / "a.nii.gz")
    with pytest.raises(CaseError, match="no_affine"):
        nifti.read(tmp_path / "a.nii.gz")
    # LPS: the first voxel is the rightmost, frontmost, lowest one; zooms stay with their axes.
    declared = nifti.read(tmp_path / "a.nii.gz", "LPS")
    assert declared.spacing_mm == (1.0, 2.0, 3.0)
    assert declared.affine is not None
    assert declared.affine.tolist() == np.diag([-1.0, -2, 3, 1]).tolist()

    (tmp_path / "t.csv").write_text("image,label\na.nii.gz,yes\n")
    rule = study(image=ImageInput(dimensions=3, size=[4, 3, 2], intensity="none"))
    source = DataSource(format="nifti", path=tmp_path, table=tmp_path / "t.csv")
    silent = examine(source, rule, cache=None).cohort
    assert [q.reason for q in silent.quarantined] == ["no_affine"]
    places, digests = [], set()
    for letters in ("RAS", "LPS"):
        cohort = examine(replace(source, orientation=letters), rule, cache=None).cohort
        places.append(brightest(np.asarray(cohort.inputs[0])[0]))
        digests.add(cohort.digest)
    assert places == [[0, 0, 0], [3, 2, 0]]
    assert len(digests) == 2  # what is declared is part of what the hospital approves


def test_a_declared_orientation_has_one_letter_of_each_pair(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text('format = "nifti"\npath = "."\norientation = "RAL"\n')
    with pytest.raises(ConfigError, match="one of each pair R/L, A/P, S/I"):
        load(tmp_path / "data.toml", DataSource)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("micron", 1e-3), ("meter", 1e3)])
def test_the_headers_unit_of_length_is_honoured(tmp_path: Path, unit: str, factor: float) -> None:
    steps = np.diag([2 / factor, 3 / factor, 4 / factor, 1])
    steps[:3, 3] = 10 / factor
    picture = nifti.read(volume(np.arange(24).reshape(4, 3, 2), steps, tmp_path / "a.nii", unit))
    assert picture.spacing_mm == pytest.approx((2.0, 3.0, 4.0))
    assert picture.affine is not None
    assert picture.affine[:3, 3] == pytest.approx([10.0, 10.0, 10.0])


def test_an_uncompressed_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    plain = volume(np.arange(24).reshape(4, 3, 2), np.eye(4), tmp_path / "a.nii")
    plain.rename(tmp_path / "c.nii.gz")
    assert nifti.read(tmp_path / "c.nii.gz").array.ravel().tolist() == list(range(24))
