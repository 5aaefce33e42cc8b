"""The warning of writing in a picture: how often it comes, and how often for nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread
from pydicom.data import get_testdata_file

from medfl.client.deid.burned_in import text_in_picture
from medfl.client.readers.dicom_pixels import frames

Picture = NDArray[np.float32]
LINES = ("DOE^JOHN", "Mueller, Anna *12.03.1951", "ID 778812 F 67Y", "0004711", "R. Smith 14:22")


def body(seed: int, size: int = 256) -> Picture:
    """An ellipse of smooth tissue with round things in it, on black, with noise."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    picture = gaussian_filter(rng.normal(size=(size, size)), 6) * 300
    picture[(x / 0.8) ** 2 + (y / 0.9) ** 2 > 1] = -800
    for _ in range(12):
        cx, cy, r = [*rng.uniform(-0.6, 0.6, 2).tolist(), rng.uniform(0.02, 0.15)]
        picture[(x - cx) ** 2 + (y - cy) ** 2 < r**2] += rng.uniform(-300, 600)
    return np.asarray(picture + rng.normal(0, 15, picture.shape), dtype=np.float32)


def written(picture: Picture, line: str, size: int, corner: str) -> Picture | None:
    """The picture with a line in a corner; None where it has no room or would not be seen."""
    font = ImageFont.load_default(size)
    mask = Image.new("L", picture.shape[::-1], 0)
    left, top, right, bottom = font.getbbox(line)
    width, height = int(right - left), int(bottom - top)
    if width > picture.shape[1] - 6:
        return None
    x = 3 if corner[1] == "l" else picture.shape[1] - width - 3
    y = 3 if corner[0] == "t" else picture.shape[0] - height - 4
    low, high = np.percentile(picture, (0.5, 99.9))
    if abs(high - np.median(picture[y : y + height, x : x + width])) < 0.5 * (high - low):
        return None
    ImageDraw.Draw(mask).text((x - left, y - top), line, font=font, fill=255)
    share = np.asarray(mask, np.float32) / 255
    return picture * (1 - share) + np.float32(high) * share


def labelled(pictures: list[Picture], count: int, seed: int) -> Iterator[Picture]:
    rng = random.Random(seed)
    made = 0
    while made < count:
        size, corner = rng.choice((10, 12, 16, 20, 28)), rng.choice(("tl", "tr", "bl", "br"))
        picture = written(rng.choice(pictures), rng.choice(LINES), size, corner)
        if picture is not None:
            made += 1
            yield picture


def test_most_lines_in_a_corner_are_noticed_and_no_clean_picture_is() -> None:
    clean = [body(seed) for seed in range(40)]
    assert sum(text_in_picture(p[None]) for p in clean) == 0
    hits = [text_in_picture(p[None]) for p in labelled(clean, 60, seed=3)]
    assert sum(hits) >= 0.9 * len(hits)


def test_dark_writing_on_a_bright_ground_is_noticed() -> None:
    picture = written(body(1), "ID 778812 F 67Y", 16, "tl")
    assert picture is not None
    assert text_in_picture(-picture[None])


def test_a_label_that_stays_over_the_frames_is_noticed_and_noise_is_not() -> None:
    moving = np.stack([np.roll(body(5), shift, axis=1) for shift in range(0, 60, 10)])
    assert not text_in_picture(moving)
    same = [written(frame, "DOE^JOHN", 16, "tl") for frame in moving]
    assert text_in_picture(np.stack([s for s in same if s is not None]))
    assert not text_in_picture(np.random.default_rng(1).normal(size=(3, 128, 128)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 64, 64), (2, 64, 64, 3)])
def test_an_empty_or_tiny_picture_says_nothing(shape: tuple[int, ...]) -> None:
    assert not text_in_picture(np.zeros(shape, np.float32))


def test_a_real_ultrasound_with_the_hospitals_name_is_noticed() -> None:
    path = get_testdata_file("examples_rgb_color.dcm", download=False)
    if path is None:
        pytest.skip("this pydicom carries no such file")
    assert text_in_picture(frames(dcmread(str(path))))


@pytest.mark.slow
def test_real_series_are_noticed_with_a_line_and_not_without(
    public_data: Callable[[str], Path],
) -> None:
    files = sorted(public_data("dicom_mr_two_vendors").rglob("*.dcm"))
    pictures = [frames(dcmread(path)) for path in files]
    assert sum(text_in_picture(p) for p in pictures) <= 0.01 * len(pictures)
    large = [p[0] for p in pictures if min(p[0].shape) >= 200]
    hits = [text_in_picture(p[None]) for p in labelled(large, 40, seed=9)]
    assert sum(hits) >= 0.85 * len(hits)
