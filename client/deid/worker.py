"""The limited child's answer to "deidentify"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from medfl.client.deid.burned_in import text_in_picture
from medfl.client.deid.instance import as_file, deidentified
from medfl.client.deid.keys import Pseudonyms, withdrawn_hash
from medfl.client.readers import dicom_values
from medfl.common.errors import CaseError
from medfl.common.site import Deid


def deidentify_file(
    path: Path, kind: str, request: dict[str, Any]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """({"patient", "study", "series", "instance", "withdrawn", "text"}, bytes). Raises CaseError.

    text: True where something like writing is in the picture, None where nobody looked.
    """
    options, secret = Deid(**request["options"]), bytes.fromhex(request["secret"])
    patient, result = deidentified(path, kind, options, Pseudonyms(secret))
    plain = {
        "patient": str(result.get("PatientID", "")),
        "study": str(result.get("StudyInstanceUID", "")),
        "series": str(result.get("SeriesInstanceUID", "")),
        "instance": str(result.SOPInstanceUID),
        "withdrawn": withdrawn_hash(secret, patient),
        "text": _looked(path) if request["look"] else None,
    }
    return plain, np.frombuffer(as_file(result), dtype=np.uint8)


def _looked(path: Path) -> bool | None:
    """None where the picture cannot be decoded: nobody has seen it."""
    try:
        values, _ = dicom_values.filled(dicom_values.frames(dcmread(path)), None)
    except (CaseError, *_UNDECODABLE):
        return None
    return text_in_picture(values)


_UNDECODABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError)
