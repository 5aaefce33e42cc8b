"""Three made-up hospitals as files: DICOM, NIfTI, tables and site.toml, with real faults.

No hospital's data can be published, and public data sets are already tidy. These folders have what
tidy data hide: slices out of order, other orientations, MONOCHROME1, broken files, doubles.
"""

from __future__ import annotations

from pathlib import Path


def make_hospitals(folder: Path, *, seed: int = 0, small: bool = False) -> list[Path]:
    """Write segmentation/<hospital>/ and classification/<hospital>/ below `folder`.

    The same seed writes the same bytes. small: a few cases each, for tests. Files that are already
    there are overwritten, but never removed: give a new or an empty folder. Returns the six paths
    of site.toml, segmentation first.
    """
    from medfl.simulations.hospitals import ct, tables, xray
    from medfl.simulations.hospitals.profiles import HOSPITALS

    sites = []
    for hospital in HOSPITALS:
        place = folder / "segmentation" / hospital.name
        ct.write(hospital, place, seed=seed, small=small)
        sites.append(tables.write_site(hospital, hospital.ct.table, place, hospital.ct_privacy))
    for hospital in HOSPITALS:
        place = folder / "classification" / hospital.name
        xray.write(hospital, place, seed=seed, small=small)
        sites.append(tables.write_site(hospital, hospital.xray.table, place))
    return sites
