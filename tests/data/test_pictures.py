"""Pictures as their files say they are to be seen: TIFF tags, palettes, transparency, GIF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from medfl.client.data.cases import CaseRef
from medfl.client.readers import image
from medfl.common.errors import CaseError
from medfl.common.study import ImageInput, Study

# A dark left half, a bright right half, a white dot in the upper left.
SEEN = np.array([[255, 40, 200, 200], [40, 40, 200, 200], [40, 40, 200, 90]], dtype=np.uint8)


def seen(path: Path) -> Any:
    return image.read(path)


def tiff(path: Path, array: Any, **more: Any) -> Path:
    tifffile.imwrite(path, np.ascontiguousarray(array), **more)
    return path


@pytest.mark.parametrize("depth", [1, 257])
def test_a_tiff_whose_zero_is_white_is_turned_over(tmp_path: Path, depth: int) -> None:
    wide = SEEN.astype(np.uint8 if depth == 1 else np.uint16) * depth
    top = int(np.iinfo(wide.dtype).max)
    path = tiff(tmp_path / "a.tif", top - wide, photometric="miniswhite")
    assert (seen(path) == wide).all()


def test_a_tiff_of_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", SEEN > 100, photometric="miniswhite")
    assert seen(path).tolist() == np.where(SEEN > 100, 0, 255).tolist()


def test_a_tiff_palette_is_looked_up(tmp_path: Path) -> None:
    values = np.unique(SEEN)[::-1]
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(values)] = values.astype(int) * 257
    index = (len(values) - 1 - np.searchsorted(np.unique(SEEN), SEEN)).astype(np.uint8)
    path = tiff(tmp_path / "a.tif", index, photometric="palette", colormap=table)
    assert (seen(path) == SEEN[..., np.newaxis]).all()


def test_cmyk_keeps_its_black(tmp_path: Path) -> None:
    # 200 = 255 - 55 as colour alone; with K = 51 a fifth of the light is gone: 160.
    inks = np.zeros((2, 2, 4), np.uint8)
    inks[...] = (55, 0, 255, 51)
    path = tiff(tmp_path / "a.tif", inks, photometric="separated")
    assert seen(path)[0, 0].tolist() == [160, 204, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_upright_as_the_same_jpeg_or_png_is(tmp_path: Path, orientation: int) -> None:
    tag = [(274, 3, 1, orientation, True)]
    path = tiff(tmp_path / "a.tif", SEEN, photometric="minisblack", extratags=tag)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(SEEN).save(tmp_path / "a.png", exif=exif)
    assert (seen(path) == seen(tmp_path / "a.png")).all()
    turned = {1: SEEN, 3: SEEN[::-1, ::-1], 6: np.rot90(SEEN, -1), 8: np.rot90(SEEN)}
    if orientation in turned:
        assert (seen(path) == turned[orientation]).all()


def test_planes_of_colour_are_not_taken_for_rows(tmp_path: Path) -> None:
    planes = np.stack([SEEN, SEEN // 2, SEEN // 4])
    path = tiff(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    assert (seen(path) == np.moveaxis(planes, 0, -1)).all()


def test_a_stack_in_one_page_is_no_picture(tmp_path: Path) -> None:
    stack = np.stack([SEEN] * 5)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(CaseError, match="5 pictures") as error:
        seen(tmp_path / "a.tif")
    assert error.value.reason == "dimensions"


def test_lab_colours_are_refused_and_not_shown_as_red_and_green(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", np.stack([SEEN] * 3, -1), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(8)
    with pytest.raises(CaseError, match="CIELAB"):
        seen(path)


def rgba(alpha: Any) -> Any:
    return np.dstack([SEEN, SEEN, SEEN, np.broadcast_to(np.uint8(alpha), SEEN.shape)])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_hidden_pixels_leave_the_picture_out_and_an_even_alpha_does_not(
    tmp_path: Path, suffix: str
) -> None:
    def written(alpha: Any) -> Path:
        path = tmp_path / f"a.{suffix}"
        if suffix == "tif":
            return tiff(path, rgba(alpha), photometric="rgb", extrasamples=["unassalpha"])
        Image.fromarray(rgba(alpha)).save(path)
        return path

    assert (seen(written(128)) == SEEN[..., np.newaxis]).all()
    with pytest.raises(CaseError, match="from 0 to 255") as error:
        seen(written(np.where(SEEN > 100, 255, 0)))
    assert error.value.reason == "transparency"


def test_a_transparent_colour_hides_only_where_it_is_used(tmp_path: Path) -> None:
    Image.fromarray(SEEN).save(tmp_path / "a.png", transparency=41)
    assert (seen(tmp_path / "a.png") == SEEN).all()
    Image.fromarray(SEEN).save(tmp_path / "b.png", transparency=40)
    with pytest.raises(CaseError, match="transparency"):
        seen(tmp_path / "b.png")


def test_a_gif_is_read_whatever_its_name_says(tmp_path: Path) -> None:
    Image.fromarray(SEEN).save(tmp_path / "a.gif")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.gif").read_bytes())
    for name in ("a.gif", "b.png"):
        grey = seen(tmp_path / name)
        assert (np.atleast_3d(grey) == SEEN[..., np.newaxis]).all()
    frames = [Image.fromarray(SEEN), Image.fromarray(255 - SEEN)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(CaseError, match="2 pictures"):
        seen(tmp_path / "c.gif")


def test_two_samples_are_two_channels_where_the_study_has_two(
    tmp_path: Path, study: Callable[..., Study]
) -> None:
    pair = np.stack([SEEN, 255 - SEEN], -1)
    path = tiff(tmp_path / "a.tif", pair, photometric="minisblack", planarconfig="contig")
    ref = CaseRef("a", "a", (path,))
    for channels in (1, 2):
        rule = ImageInput(dimensions=2, size=[3, 4], channels=channels)
        array = image.load(ref, study(image=rule)).array
        assert (array == np.moveaxis(pair, -1, 0)[:channels]).all()
