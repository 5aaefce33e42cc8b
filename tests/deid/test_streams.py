"""Comments in compressed pictures are gone, and the pictures are the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit

from medfl.client.deid.streams import clean_fragments
from medfl.common.errors import CaseError

SAID = b"Quillfeather^Ottoline 1923"


def picture() -> Image.Image:
    y, x = np.mgrid[:64, :64]
    return Image.fromarray(((x * 3 + y * 2) % 256).astype(np.uint8))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x013B] = SAID.decode()
    picture().save(buffer, format="JPEG", comment=SAID, exif=exif)
    return buffer.getvalue()


def jpeg2000() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format="JPEG2000", comment=SAID.decode(), no_jp2=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("stream", "syntax"), [(jpeg(), JPEGBaseline8Bit), (jpeg2000(), JPEG2000Lossless)]
)
def test_a_comment_in_a_compressed_picture_does_not_come_out(
    planted: Callable[..., Dataset],
    write: Callable[[Dataset, Path], Path],
    deidentify: Callable[..., Dataset],
    tmp_path: Path,
    stream: bytes,
    syntax: UID,
) -> None:
    assert SAID in stream
    dataset = planted(
        Rows=64, Columns=64, BitsAllocated=8, BitsStored=8, HighBit=7,
        PixelData=encapsulate([stream + b"behind the end " + SAID + b"!"]),
    )  # fmt: skip
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    result = deidentify(write(dataset, tmp_path / "a.dcm"))
    assert SAID not in result.PixelData
    assert b"behind" not in result.PixelData
    decoded = np.asarray(Image.open(io.BytesIO(stream)))
    assert np.array_equal(result.pixel_array, decoded)


def test_several_frames_and_fragments_keep_their_places() -> None:
    one, two = jpeg(), jpeg2000()
    value = encapsulate([one, one, two], fragments_per_frame=3)
    cleaned = clean_fragments(value)
    assert len(cleaned) == len(value)
    assert SAID[:6] in value
    assert SAID[:6] not in cleaned


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Quillfeather",
        encapsulate([jpeg()])[:-40],
        encapsulate([jpeg()]) + b"Quillfeather, behind the fragments",
        encapsulate([b"\xff\xd8 Quillfeather instead of a marker"]),
        b"\xfe\xff\x00\xe0\x08\x00\x00\x00Quillfea" + encapsulate([jpeg()], has_bot=False)[8:],
    ],
)
def test_fragments_that_are_not_what_they_say_are_refused(value: bytes) -> None:
    with pytest.raises(CaseError):
        clean_fragments(value)
