"""How one public collection becomes several hospitals. All parts are by patient, all seeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import CaseRef
from medfl.common.errors import ConfigError
from medfl.common.study import Partition

# site name -> case ids
Parts = dict[str, list[str]]


def partition(cases: Sequence[CaseRef], how: Partition) -> Parts:
    """Cases by site; every case in exactly one site, every patient in exactly one site.

    Raises:
        ConfigError: the data lack what the partition goes by.
    """
    if how.kind == "column":
        return _by_column(cases, how)
    patients = sorted({c.patient for c in cases})
    n_sites = how.sites or 1
    if n_sites > len(patients):
        raise ConfigError(
            f"simulation.partition.sites: {n_sites} sites of {len(patients)} patients; "
            f"write at most {len(patients)}"
        )
    site_of = dict(zip(patients, _RULES[how.kind](cases, patients, how), strict=True))
    width = len(str(n_sites))
    parts: Parts = {f"site-{i + 1:0{width}d}": [] for i in range(n_sites)}
    names = list(parts)
    for case in cases:
        parts[names[site_of[case.patient]]].append(case.case_id)
    return {name: ids for name, ids in parts.items() if ids}


def _by_column(cases: Sequence[CaseRef], how: Partition) -> Parts:
    parts: Parts = {}
    home = _home_of(cases, how)
    for case in cases:
        parts.setdefault(home[case.patient], []).append(case.case_id)
    parts = {name: ids for name, ids in parts.items() if len(ids) >= how.drop_below}
    if not parts:
        raise ConfigError(
            f"simulation.partition.drop_below: no site has {how.drop_below} cases; lower it"
        )
    small = [name for name, ids in parts.items() if len(ids) < how.merge_below]
    rest = [case_id for name in sorted(small) for case_id in parts.pop(name)]
    return {**parts, **({"rest": rest} if rest else {})}


def _home_of(cases: Sequence[CaseRef], how: Partition) -> dict[str, str]:
    """Each patient's site: where most of the patient's cases are, the first by name of equals."""
    seen: dict[str, Counter[str]] = {}
    for case in cases:
        value = case.fields.get(how.column or "")
        if value is None:
            raise ConfigError(
                f"simulation.partition.column: the table has no column {how.column!r} "
                f"(it has {', '.join(sorted(case.fields))})"
            )
        seen.setdefault(case.patient, Counter())[_site_name(value)] += 1
    return {patient: min(c, key=lambda site: (-c[site], site)) for patient, c in seen.items()}


def _site_name(value: str) -> str:
    text = "".join(c if c.isalnum() or c in "-_" else "-" for c in value.lower())
    return text.strip("-_") or "unnamed"


def _iid(cases: Sequence[CaseRef], patients: list[str], how: Partition) -> NDArray[np.int64]:
    """Equal random parts: sizes differ by at most one patient."""
    order = np.random.default_rng(how.seed).permutation(len(patients))
    site = np.empty(len(patients), dtype=np.int64)
    site[order] = np.arange(len(patients)) * (how.sites or 1) // len(patients)
    return site


def _label_skew(cases: Sequence[CaseRef], patients: list[str], how: Partition) -> NDArray[np.int64]:
    """For each class, its patients go to the sites in Dirichlet(alpha) shares (Hsu et al. 2019)."""
    label = {c.patient: c.fields.get("label", "") for c in cases}
    return _dirichlet([label[p] for p in patients], how)


def _quantity_skew(
    cases: Sequence[CaseRef], patients: list[str], how: Partition
) -> NDArray[np.int64]:
    """Site sizes in Dirichlet(alpha) shares."""
    return _dirichlet([""] * len(patients), how)


def _dirichlet(group_of: list[str], how: Partition) -> NDArray[np.int64]:
    n_sites = how.sites or 1
    rng = np.random.default_rng(how.seed)
    groups = np.array(group_of)
    site = np.empty(len(groups), dtype=np.int64)
    for group in sorted(set(group_of)):
        members = rng.permutation(np.flatnonzero(groups == group))
        edges = np.cumsum(rng.dirichlet([how.alpha] * n_sites))[:-1] * len(members)
        site[members] = np.searchsorted(edges, np.arange(len(members)), side="right")
    # A site without patients would silently make the federation smaller than the study says.
    for empty in sorted(set(range(n_sites)) - set(site.tolist())):
        largest = np.bincount(site, minlength=n_sites).argmax()
        site[np.flatnonzero(site == largest)[0]] = empty
    return site


def _size(cases: Sequence[CaseRef], patients: list[str], how: Partition) -> NDArray[np.int64]:
    """By image volume in voxels, smallest first, equal counts."""
    voxels = {c.patient: prod(c.size) for c in cases if c.size}
    if missing := len(patients) - len(voxels):
        raise ConfigError(
            f"simulation.partition.kind: {missing} patients have images whose size is not known "
            "before reading them; use another kind"
        )
    order = sorted(range(len(patients)), key=lambda i: (voxels[patients[i]], patients[i]))
    site = np.empty(len(patients), dtype=np.int64)
    site[order] = np.arange(len(patients)) * (how.sites or 1) // len(patients)
    return site


_RULES: dict[str, Callable[[Sequence[CaseRef], list[str], Partition], NDArray[np.int64]]] = {
    "iid": _iid,
    "label_skew": _label_skew,
    "quantity_skew": _quantity_skew,
    "size": _size,
}
