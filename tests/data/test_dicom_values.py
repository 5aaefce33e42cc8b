"""What stored DICOM values mean: lookup tables, rescale tags, padding, palettes, MONOCHROME1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medfl.client.data.cases import Picture
from medfl.client.data.preprocess import prepare
from medfl.client.readers import READERS
from medfl.common.errors import CaseError
from medfl.common.source import DataSource
from medfl.common.study import ImageInput, Study

Make = Callable[..., Dataset]
Save = Callable[[Dataset, Path], Path]
dicom = READERS["dicom"]


def only(folder: Path, study: Study) -> Picture:
    found = dicom.find(DataSource(format="dicom", path=folder), study)
    assert len(found.cases) == 1, found.quarantined
    return dicom.load(found.cases[0], study)


def modality_lut(entries: list[int], bits: int = 16, first: int = 0) -> Sequence:
    item = Dataset()
    item.add_new(0x00283002, "US", [len(entries), first, bits])
    item.ModalityLUTType = "US"
    item.add_new(0x00283006, "US", entries)
    return Sequence([item])


def row(*values: int, kind: Any = np.uint16) -> Any:
    return np.array([values], dtype=kind)


def test_the_lookup_table_comes_before_the_turning_over(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    # v -> v * v // 4095: stored 0, 2048, 4095 mean 0, 1024, 4095, and turned over 4095, 3071, 0.
    table = modality_lut([v * v // 4095 for v in range(4096)])
    more = {"Modality": "CR", "BitsStored": 12, "HighBit": 11, "ModalityLUTSequence": table}
    ds = dicom_slice(row(0, 2048, 4095), PhotometricInterpretation="MONOCHROME1", **more)
    save(ds, tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0].tolist() == [[4095, 3071, 0]]


@pytest.mark.parametrize("bits", [12, 16, 10])
def test_a_lookup_table_may_say_any_depth(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, bits: int
) -> None:
    table = modality_lut([5, 50, 500], bits, first=100)
    save(
        dicom_slice(row(99, 101, 102, 103), ModalityLUTSequence=table, Modality="CR"),
        tmp_path / "a.dcm",
    )
    # What lies before the first or behind the last entry takes theirs.
    assert only(tmp_path, planes).array[0].tolist() == [[5, 50, 500, 500]]


def test_a_lookup_table_shorter_than_it_says_costs_its_case(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    table = modality_lut([5, 50, 500])
    table[0].LUTDescriptor = [4096, 0, 16]
    save(dicom_slice(row(0, 1), ModalityLUTSequence=table, Modality="CR"), tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="3 of 4096 entries") as error:
        only(tmp_path, planes)
    assert error.value.reason == "dicom_rescale"


@pytest.mark.parametrize(
    ("tags", "seen"),
    [
        ({"RescaleSlope": 2}, [200, 202]),
        ({"RescaleIntercept": -10}, [90, 91]),
        ({"RescaleSlope": None, "RescaleIntercept": None}, [100, 101]),
        ({"RescaleSlope": None, "RescaleIntercept": 7}, [107, 108]),
    ],
)
def test_an_absent_or_empty_rescale_tag_changes_nothing(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study, tags: Any, seen: list[int]
) -> None:
    save(dicom_slice(row(100, 101), **tags), tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0].tolist() == [seen]


def test_a_slope_of_zero_is_named(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(dicom_slice(row(1, 2), RescaleSlope=0, RescaleIntercept=5), tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="slope 0") as error:
        only(tmp_path, planes)
    assert error.value.reason == "dicom_rescale"


def padded(dicom_slice: Make, pixels: Any, value: int, vr: str = "US", **more: Any) -> Dataset:
    ds = dicom_slice(pixels, **more)
    ds.add_new(0x00280120, vr, value)
    return ds


def test_padding_of_a_computed_tomography_is_air(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    ds = padded(dicom_slice, row(63536, 1024, 1064), 63536, RescaleSlope=1, RescaleIntercept=-1024)
    save(ds, tmp_path / "a.dcm")
    picture = only(tmp_path, planes)
    assert picture.array[0].tolist() == [[-1000, 0, 40]]
    assert picture.outside is not None
    assert picture.outside.tolist() == [[True, False, False]]


def test_padding_is_known_in_either_sign(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    # -2000 in pixels without sign is 63536, whichever of the two the tag says.
    ds = padded(dicom_slice, row(-2000, 0, 40, kind=np.int16), 63536, "US")
    save(ds, tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0].tolist() == [[-1000, 0, 40]]


def test_a_range_of_padding_is_background_and_never_the_brightest(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    # 12 bits turned over: 500 and 3500 mean 3595 and 595; 0 to 3 lie outside the collimator.
    more = {"BitsStored": 12, "HighBit": 11, "Modality": "DX", "PixelPaddingRangeLimit": 3}
    more["PhotometricInterpretation"] = "MONOCHROME1"
    save(padded(dicom_slice, row(0, 3, 4, 500, 3500), 0, **more), tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[0].tolist() == [[595, 595, 4091, 3595, 595]]


@pytest.mark.parametrize("intensity", ["percentiles", "zscore", "none"])
@pytest.mark.parametrize("dark_background", [False, True])
def test_padding_changes_no_other_pixel(
    tmp_path: Path,
    dicom_slice: Make,
    save: Save,
    study: Callable[..., Study],
    intensity: str,
    dark_background: bool,
) -> None:
    rule = ImageInput(
        dimensions=2,
        size=[4, 8],
        intensity=intensity,  # type: ignore[arg-type]
        dark_background=dark_background,
    )
    agreed = study(image=rule)
    pixels = 3000 - np.arange(32, dtype=np.uint16).reshape(4, 8) ** 2
    save(dicom_slice(pixels, Modality="MR"), tmp_path / "plain" / "a.dcm")
    plain = prepare(only(tmp_path / "plain", agreed), None, agreed)
    wide = np.full((4, 12), 65000, dtype=np.uint16)
    wide[:, 2:10] = pixels
    save(padded(dicom_slice, wide, 65000, Modality="MR"), tmp_path / "padded" / "a.dcm")
    rule.size[1] = 12
    seen = prepare(only(tmp_path / "padded", agreed), None, agreed)
    np.testing.assert_allclose(seen.image[..., 2:10], plain.image, rtol=1e-6)
    assert (seen.image[..., :2] == seen.image.min()).all()
    assert (seen.facts.low, seen.facts.high) == (plain.facts.low, plain.facts.high)


def test_a_picture_of_padding_alone_is_empty(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    save(padded(dicom_slice, row(7, 7, 7), 7), tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="padding"):
        only(tmp_path, planes)


def test_a_palette_of_16_bits_has_the_scale_of_other_colours(
    tmp_path: Path, dicom_slice: Make, save: Save, planes: Study
) -> None:
    ds = dicom_slice(row(0, 1, kind=np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for name, value in (("Red", 200), ("Green", 40), ("Blue", 60)):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [2, 0, 16])
        table = np.array([value * 257, 257], "<u2").tobytes()
        setattr(ds, f"{name}PaletteColorLookupTableData", table)
    ds.Modality = "OT"
    save(ds, tmp_path / "a.dcm")
    assert only(tmp_path, planes).array[:, 0].T.tolist() == [[200, 40, 60], [1, 1, 1]]
