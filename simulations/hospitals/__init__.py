"""Three made-up hospitals as files: DICOM, NIfTI, tables and site.toml, with real faults.

No hospital's data can be published, and public data sets are already tidy. These folders have what
tidy data hide: slices out of order, other orientations, MONOCHROME1, broken files, doubles.
"""

from __future__ import annotations

from pathlib import Path

# About how many patients the hospital under privacy trains on, as it tells everybody.
_DECLARED = {"segmentation": 20, "classification": 30, "risk": 250}


def make_hospitals(
    folder: Path, *, seed: int = 0, small: bool = False, private: str = "risk"
) -> list[Path]:
    """Write segmentation/, classification/ and risk/<hospital>/ below `folder`.

    private: the study's folder in which one hospital asks for differential privacy. With records it
        has patients enough for it; a few dozen scans or X-rays learn little under its noise.

    The same seed writes the same bytes. small: a few cases each, for tests. Files that are already
    there are overwritten, but never removed: give a new or an empty folder. Returns the nine paths
    of site.toml, segmentation first and risk last.
    """
    from medfl.simulations.hospitals import ct, records, tables, xray
    from medfl.simulations.hospitals.profiles import HOSPITALS

    sites = []
    for kind, files in (("segmentation", ct), ("classification", xray), ("risk", records)):
        for hospital in HOSPITALS:
            place = folder / kind / hospital.name
            table = files.write(hospital, place, seed=seed, small=small)
            declared = _DECLARED[kind] if kind == private else None
            sites.append(tables.write_site(hospital, table, place, declared))
    return sites
