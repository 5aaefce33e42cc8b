"""One DICOM file with what its header says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl.client.readers.dicom_geometry import Place, along_normal


@dataclass(frozen=True, slots=True)
class Item:
    """One DICOM file with what its header says (see `dicom_pixels.image_header`)."""

    path: Path
    header: dict[str, Any]

    @property
    def height(self) -> float:
        """Position along the slices' normal in mm; 0 where the file does not say."""
        position, orientation = self.header["position"], self.header["orientation"]
        if len(position) != 3 or len(orientation) != 6:
            return 0.0
        return along_normal(Place(tuple(position), tuple(orientation), (1.0, 1.0)))
