"""The formats a hospital's cases may come in: one line a format, two functions each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medfl.client.data.cases import CaseRef, Found, Picture
from medfl.client.readers import arrays, dicom, image, nifti, table
from medfl.common.source import DataSource, Format
from medfl.common.study import Study


@dataclass(frozen=True, slots=True)
class Reader:
    """How one format is read.

    find: lists the cases without reading their pictures. load, load_mask: read one case; they
    raise CaseError for what is wrong with that case alone.
    """

    find: Callable[[DataSource, Study], Found]
    load: Callable[[CaseRef, Study], Picture]
    load_mask: Callable[[CaseRef, Study], Picture]


READERS: dict[Format, Reader] = {
    "dicom": Reader(dicom.find, dicom.load, dicom.load_mask),
    "nifti": Reader(nifti.find, nifti.load, nifti.load_mask),
    "image": Reader(image.find, image.load, image.load_mask),
    "decathlon": Reader(nifti.find_decathlon, nifti.load, nifti.load_mask),
    "medmnist": Reader(arrays.find_medmnist, arrays.load_medmnist, arrays.no_mask),
    "hdf5": Reader(arrays.find_hdf5, arrays.load_hdf5, arrays.load_hdf5_mask),
    "table": Reader(table.find, table.no_image, table.no_image),
}
