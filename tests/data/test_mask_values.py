"""What a mask stores becomes the study's classes: maps before thresholds, colours as colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medfl.client.data.cases import Picture
from medfl.client.data.mask_values import class_mask, classes_of
from medfl.client.readers.image import read_mask
from medfl.common.errors import CaseError
from medfl.common.study import Study, Task

Studies = Callable[..., Study]


def task(study: Studies, *classes: str, **label_map: str) -> Task:
    return study("segmentation", classes or ("background", "vessel"), label_map or None).task


def png(path: Path, values: Any, palette: list[int] | None = None) -> Path:
    picture = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette is not None:
        picture = Image.frombytes("P", picture.size, picture.tobytes())
        picture.putpalette(palette)
    picture.save(path)
    return path


def test_the_map_comes_before_any_threshold(tmp_path: Path, study: Studies) -> None:
    path = png(tmp_path / "m.png", [[0, 128, 255]])
    mapped = task(study, **{"0": "background", "128": "background", "255": "vessel"})
    assert read_mask(path, mapped).array.tolist() == [[0, 0, 1]]
    inverted = task(study, **{"0": "vessel", "255": "background"})
    assert read_mask(png(tmp_path / "i.png", [[0, 255]]), inverted).array.tolist() == [[1, 0]]


def test_the_map_is_applied_once(tmp_path: Path, study: Studies) -> None:
    # The hospital's 1 is the study's 2 and the reverse; twice would be no exchange at all.
    mapped = task(study, "background", "liver", "tumour", **{"1": "tumour", "2": "liver"})
    picture = read_mask(png(tmp_path / "m.png", [[0, 1, 2]]), mapped)
    assert class_mask(picture, mapped).tolist() == [[0, 2, 1]]
    assert class_mask(Picture(np.array([[0, 1, 2]])), mapped).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize(
    ("values", "named"), [([[0, 128, 255]], "128, 255"), ([[0, 1, 255]], "255"), ([[0, -1]], "-1")]
)
def test_greys_between_black_and_white_are_named_and_not_guessed(
    study: Studies, values: Any, named: str
) -> None:
    with pytest.raises(CaseError, match=named):
        classes_of(np.array(values), task(study), objects=True)


def test_a_value_beside_the_map_is_left_out(tmp_path: Path, study: Studies) -> None:
    path = png(tmp_path / "m.png", [[0, 128, 255]])
    with pytest.raises(CaseError, match="the value 128"):
        read_mask(path, task(study, **{"0": "background", "255": "vessel"}))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_black_and_white_are_background_and_foreground(study: Studies, white: int) -> None:
    assert classes_of(np.array([[0, white]]), task(study)).tolist() == [[0, 1]]


def test_what_rounding_left_of_a_whole_number_is_that_number(study: Studies) -> None:
    values = np.array([0, 0.99999, 1.0000001], dtype=np.float32)
    assert classes_of(values, task(study)).tolist() == [0, 1, 1]
    with pytest.raises(CaseError, match=r"the values 0\.37, 0\.9882"):
        classes_of(np.array([0, 0.37, 0.9882]), task(study))


def test_single_objects_are_foreground_but_traces_of_compression_are_not(
    tmp_path: Path, study: Studies
) -> None:
    path = png(tmp_path / "m.png", [[0, 1, 2, 3]])
    assert read_mask(path, task(study)).array.tolist() == [[0, 1, 1, 1]]
    values = np.zeros((16, 16), np.uint8)
    values[3:12, 4:9] = 255
    Image.fromarray(values).save(tmp_path / "m.jpg", quality=60)
    with pytest.raises(CaseError, match="mask_values"):
        read_mask(tmp_path / "m.jpg", task(study))


def test_a_grey_palette_is_what_a_viewer_shows(tmp_path: Path, study: Studies) -> None:
    # White is the first colour and black the second, as programs write that save bytes.
    path = png(tmp_path / "m.png", [[1, 0, 1]], [255, 255, 255, 0, 0, 0])
    assert read_mask(path, task(study)).array.tolist() == [[0, 1, 0]]
    three = task(study, "background", "liver", "tumour")
    path = png(tmp_path / "n.png", [[0, 1, 2]], [2, 2, 2, 0, 0, 0, 1, 1, 1])
    assert read_mask(path, three).array.tolist() == [[2, 0, 1]]


def test_colours_count_as_colours_whatever_their_number(tmp_path: Path, study: Studies) -> None:
    red_first = png(tmp_path / "m.png", [[1, 0]], [255, 0, 0, 0, 0, 0])
    assert read_mask(red_first, task(study)).array.tolist() == [[0, 1]]
    three = ("background", "liver", "tumour")
    path = png(tmp_path / "n.png", [[0, 1, 2]], [0, 255, 0, 255, 0, 0, 0, 0, 0])
    mapped = task(
        study, *three, **{"#000000": "background", "#FF0000": "liver", "0, 255, 0": "tumour"}
    )
    assert read_mask(path, mapped).array.tolist() == [[2, 1, 0]]
    with pytest.raises(CaseError, match=r"#000000, #00ff00, #ff0000"):
        read_mask(path, task(study, *three))
    # Black first is the usual order of classes, and the numbers count.
    path = png(tmp_path / "o.png", [[0, 1, 2]], [0, 0, 0, 255, 0, 0, 0, 255, 0])
    assert read_mask(path, task(study, *three)).array.tolist() == [[0, 1, 2]]


def test_a_colour_picture_may_be_a_mask(tmp_path: Path, study: Studies) -> None:
    colours = np.zeros((1, 3, 3), np.uint8)
    colours[0, 1] = (255, 0, 0)
    assert read_mask(png(tmp_path / "m.png", colours), task(study)).array.tolist() == [[0, 1, 0]]
    colours[0, 2] = (0, 255, 0)
    with pytest.raises(CaseError, match="#00ff00"):
        read_mask(png(tmp_path / "n.png", colours), task(study))


def test_a_gif_is_a_mask(tmp_path: Path, study: Studies) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "m.gif")
    assert read_mask(tmp_path / "m.gif", task(study)).array.tolist() == [[0, 1]]
