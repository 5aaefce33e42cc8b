"""From a picture to the network's input: place, scale and values, the same for image and mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medfl.client.data import resample
from medfl.client.data.cases import Picture
from medfl.client.data.preprocess import MOST_NUMBERS, centred, prepare
from medfl.common.errors import CaseError
from medfl.common.study import ImageInput, Study

Studies = Callable[..., Study]


def rules(study: Studies, **image: Any) -> Study:
    base: dict[str, Any] = {"dimensions": 2, "size": [4, 4], "intensity": "none"}
    return study("segmentation", image=ImageInput(**base | image))


def flat(*rows: list[float]) -> Picture:
    return Picture(np.array([rows], dtype=np.float32))


def test_a_volume_is_turned_to_the_studys_axes_and_its_mask_with_it(study: Studies) -> None:
    rule = rules(study, dimensions=3, size=[2, 3, 4], orientation="RAS")
    array = np.arange(24, dtype=np.float32).reshape(1, 4, 3, 2)
    # Stored axes run down, to the back and to the left: S-, A-, R-.
    affine = np.array([[0, 0, -1, 5], [0, -1, 0, 6], [-1, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    picture = Picture(array, affine, (1.0, 1.0, 1.0))
    mask = Picture((array[0] == 23).astype(np.uint8), affine, (1.0, 1.0, 1.0))
    done = prepare(picture, mask, rule)
    assert done.image.shape == (1, 2, 3, 4)
    assert done.mask is not None
    # The last stored voxel lies lowest, rearmost and leftmost: index 0 0 0 in RAS.
    assert done.image[0, 0, 0, 0] == 23
    assert np.argwhere(done.mask).tolist() == [[0, 0, 0]]


def test_a_mask_in_another_orientation_of_the_same_grid_fits(study: Studies) -> None:
    rule = rules(study, dimensions=3, size=[3, 3, 3])
    array = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    mask = np.zeros((3, 3, 3), dtype=np.uint8)
    mask[0, 1, 2] = 1
    turned = np.diag([-1.0, 1, 1, 1])
    turned[0, 3] = 2
    done = prepare(Picture(array, np.eye(4), (1, 1, 1)), Picture(mask, turned, (1, 1, 1)), rule)
    assert done.mask is not None
    assert np.argwhere(done.mask).tolist() == [[2, 1, 2]]


@pytest.mark.parametrize("shift", [(0.5, 0, 0), (0, 0, 9)])
def test_a_mask_beside_its_image_is_refused(study: Studies, shift: tuple[float, ...]) -> None:
    rule = rules(study, dimensions=3, size=[3, 3, 3])
    array = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    moved = np.eye(4)
    moved[:3, 3] = shift
    mask = Picture(np.ones((3, 3, 3), dtype=np.uint8), moved, (1, 1, 1))
    with pytest.raises(CaseError, match="mask_geometry"):
        prepare(Picture(array, np.eye(4), (1, 1, 1)), mask, rule)
    with pytest.raises(CaseError, match="mask_geometry"):
        prepare(Picture(array, np.eye(4)), Picture(np.ones((3, 3, 4), dtype=np.uint8)), rule)


def test_resampling_halves_the_voxels_and_keeps_a_ramp_a_ramp() -> None:
    ramp = np.arange(8, dtype=np.float32)[np.newaxis]
    # Centres of pairs are 0.5, 2.5, ...; the triangle is symmetric, so the inner ones are exact.
    assert resample.linear(ramp, [4])[0, 1:3].tolist() == [2.5, 4.5]
    # Twice as many: quarters between the centres.
    assert resample.linear(ramp, [16])[0, :5].tolist() == [0, 0.25, 0.75, 1.25, 1.75]
    assert resample.nearest(np.array([1, 2, 3, 4], dtype=np.uint8), [2]).tolist() == [2, 4]


def test_shrinking_averages_what_it_cannot_show() -> None:
    stripes = np.tile([0, 1], 32).astype(np.float32)[np.newaxis]
    # Five samples a step would show stripes that are not there; the mean is a half everywhere.
    assert np.abs(resample.linear(stripes, [13])[0, 1:-1] - 0.5).max() < 0.06


@pytest.mark.parametrize("length", [1, 3, 7, 8, 20])
def test_resampling_never_leaves_the_range_of_values(length: int) -> None:
    image = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
    scaled = resample.linear(image, [length, length])
    assert scaled.shape == (1, length, length)
    assert image.min() - 1e-6 <= scaled.min() <= scaled.max() <= image.max() + 1e-6
    constant = resample.linear(np.ones((1, 8, 8), dtype=np.float32), [length, length])
    assert np.allclose(constant, 1)


def test_spacing_decides_the_size(study: Studies) -> None:
    rule = rules(study, spacing_mm=[1.0, 2.0], fit="keep")
    image = Picture(np.arange(32.0).reshape(1, 4, 8), None, (2.0, 1.0))
    assert prepare(image, None, rule).image.shape == (1, 8, 4)
    with pytest.raises(CaseError, match="no_spacing"):
        prepare(Picture(image.array), None, rule)


def test_a_spacing_that_would_fill_the_memory_is_refused_before_any_is_taken(
    study: Studies,
) -> None:
    """32 voxels of 500 mm would be 16,000 a side at 1 mm: 4.1e12 numbers, 15 TiB."""
    rule = rules(study, dimensions=3, spacing_mm=[1.0, 1.0, 1.0], size=[8, 8, 8])
    image = Picture(np.arange(32.0**3).reshape(1, 32, 32, 32), None, (500.0, 500.0, 500.0))
    with pytest.raises(CaseError, match="implausible_spacing: 16000 × 16000 × 16000"):
        prepare(image, None, rule)
    # 512 slices of a whole body: 360 x 360 x 1000 at 1 mm are many, and plausible.
    assert 512 * 512 * 1000 < MOST_NUMBERS


def test_padding_is_as_dark_as_the_image_and_cropping_keeps_the_middle(study: Studies) -> None:
    done = prepare(flat([-3, 5], [6, 7]), None, rules(study))
    assert done.image[0].tolist() == [[-3] * 4, [-3, -3, 5, -3], [-3, 6, 7, -3], [-3] * 4]
    assert centred(np.arange(6), [4], 0).tolist() == [1, 2, 3, 4]
    assert centred(np.arange(5), [2], 0).tolist() == [1, 2]
    assert centred(np.arange(3), [6], 9).tolist() == [9, 0, 1, 2, 9, 9]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"intensity": "none"}, [-2, 0, 2, 4]),
        ({"intensity": "federated"}, [-2, 0, 2, 4]),
        ({"intensity": "range", "window": (0.0, 4.0)}, [0, 0, 0.5, 1]),
        ({"intensity": "zscore"}, [-3 / 5**0.5, -1 / 5**0.5, 1 / 5**0.5, 3 / 5**0.5]),
    ],
)
def test_intensities_follow_the_studys_rule(
    study: Studies, rule: dict[str, Any], expected: list[float]
) -> None:
    done = prepare(flat([-2, 0], [2, 4]), None, rules(study, size=[2, 2], **rule))
    assert done.image.ravel() == pytest.approx(expected, abs=1e-5)


def test_percentiles_ignore_a_few_extreme_pixels(study: Studies) -> None:
    values = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
    values[0, 0, 0] = 1e6
    done = prepare(Picture(values), None, rules(study, size=[100, 100], intensity="percentiles"))
    assert done.image[0, 50, 0] == pytest.approx(0.5, abs=0.01)


def test_bright_backgrounds_are_turned_over_and_dark_ones_are_not(study: Studies) -> None:
    rule = rules(study, size=[2, 2], dark_background=True)
    assert prepare(flat([9, 9], [9, 1]), None, rule).image.ravel().tolist() == [1, 1, 1, 9]
    assert prepare(flat([1, 1], [1, 9]), None, rule).image.ravel().tolist() == [1, 1, 1, 9]


def test_colours_and_grey_meet_the_studys_channels(study: Studies) -> None:
    colours = Picture(np.array([[[100.0, 0]], [[0.0, 100]], [[0.0, 0]]]))
    grey = prepare(colours, None, rules(study, size=[1, 2])).image
    assert grey.ravel() == pytest.approx([29.9, 58.7])
    three = prepare(flat([1, 2]), None, rules(study, size=[1, 2], channels=3)).image
    assert three.tolist() == [[[1, 2]]] * 3
    with pytest.raises(CaseError, match="channels"):
        prepare(Picture(np.arange(8.0).reshape(2, 2, 2)), None, rules(study))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[[1.0, np.nan]]]), "nan_values"),
        (np.array([[[1.0, np.inf]]]), "nan_values"),
        (np.ones((1, 4, 4)), "empty_image"),
        (np.zeros((1, 0, 4)), "empty_image"),
        (np.arange(8.0).reshape(1, 2, 2, 2), "dimensions"),
    ],
)
def test_unusable_pictures_say_why(study: Studies, array: Any, reason: str) -> None:
    with pytest.raises(CaseError, match=reason):
        prepare(Picture(array), None, rules(study))


def test_mask_values_go_through_the_label_map(study: Studies) -> None:
    image = flat([1, 2], [3, 4])
    mask = Picture(np.array([[0, 255], [0, 255]], dtype=np.uint8))
    mapped = study(
        "segmentation",
        label_map={"255": "yes", "0": "no"},
        image=ImageInput(dimensions=2, size=[2, 2]),
    )
    done = prepare(image, mask, mapped)
    assert done.mask is not None
    assert done.mask.tolist() == [[0, 1], [0, 1]]
    with pytest.raises(CaseError, match="the value 128"):
        prepare(image, Picture(np.where(mask.array > 0, 128, 0)), mapped)
