"""The app bundle that Flower wants for a run. medfl's holds no code: only which study it is about.

Its bytes follow from the study's digest alone, so that a hospital can tell any other bundle by
comparing, without ever opening it.
"""

from __future__ import annotations

import io
import zipfile

_PROJECT = """\
[project]
name = "medfl-study"
version = "1.0.0"
description = "Holds no code. Hospitals run the medfl that they have installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "medfl"

[tool.flwr.app.components]
serverapp = "nothing:here"
clientapp = "nothing:here"

[tool.flwr.app.config]
study = "{digest}"
"""


def study_bundle(digest: str) -> bytes:
    """A zip file of one member, the same bytes wherever it is made."""
    buffer = io.BytesIO()
    member = zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_STORED) as archive:
        archive.writestr(member, _PROJECT.format(digest=digest))
    return buffer.getvalue()
