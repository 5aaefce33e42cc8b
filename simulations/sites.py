"""The hospitals of a simulation: found on disk, or made from a public collection."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.cases import Arrays, CaseRef, Cohort, Found, Quarantined
from medfl.client.data.cohort import build_cohort, find_cases
from medfl.client.hospital import Hospital
from medfl.common.errors import ConfigError, DataError
from medfl.common.site import Cache, Policy, SitePrivacy, load_site
from medfl.common.source import DataSource
from medfl.common.study import Study
from medfl.simulations.partition import partition

log = logging.getLogger(__name__)

# What one worker keeps open: some hospitals in any case, and as many more as hold this many cases
# (500 bytes each; pictures stay in the cache's files). More would make memory grow with the sites.
OPEN_HOSPITALS = 8
OPEN_CASES = 20_000
# Each has a file mapped, which counts as an open file; a process may have 1024.
MOST_OPEN = 256


@dataclass(frozen=True)
class SimulatedHospital:
    """One hospital before its data are read. `listed`: its cases of a divided collection."""

    name: str
    source: DataSource
    cache: Cache
    listed: Found | None = None
    policy: Policy = field(default_factory=Policy)
    privacy: SitePrivacy | None = None

    def cohort(self, study: Study) -> Cohort:
        """The checked cases; keys differ between sites even where case ids do not."""
        return build_cohort(
            self.source,
            study,
            cache=self.cache,
            found=self.listed,
            site_key=self.name.encode(),
            durable=False,
            test_only=self.policy.evaluate_only,
        )


@dataclass(frozen=True)
class SimulatedRun:
    """One run of one study: the main one, or a comparison's.

    pooled: all hospitals' cases lie in one place, which is what federation does without.
    """

    name: str
    study: Study
    hospitals: tuple[SimulatedHospital, ...]
    folder: Path
    device: str = "cpu"
    pooled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, in the order of their ids from 1."""
        return ("pooled",) if self.pooled else tuple(h.name for h in self.hospitals)

    def hospital(self, node_id: int) -> Hospital:
        """The hospital behind a node of this run."""
        if self.pooled:
            return Hospital(
                name="pooled",
                study=self.study,
                load_cohort=lambda: pool(list(_usable(self.hospitals, self.study))),
                folder=self.folder / "sites" / "pooled",
                device=self.device,
                simulated=True,
            )
        found = self.hospitals[node_id - 1]
        return Hospital(
            name=found.name,
            study=self.study,
            load_cohort=lambda: found.cohort(self.study),
            folder=self.folder / "sites" / found.name,
            policy=found.policy,
            privacy=found.privacy,
            device=self.device,
            simulated=True,
        )


class OpenHospitals:
    """The hospitals of all runs, each opened when asked for; the least used ones are closed."""

    def __init__(self, runs: Mapping[int, SimulatedRun]) -> None:
        self._runs = runs
        self._open: OrderedDict[tuple[int, int], Hospital] = OrderedDict()

    def find(self, run_id: int, node_id: int) -> Hospital:
        """The hospital behind a node of a run."""
        key = (run_id, node_id)
        if key not in self._open:
            self._open[key] = self._runs[run_id].hospital(node_id)
            self._close_some()
        self._open.move_to_end(key)
        return self._open[key]

    def _close_some(self) -> None:
        cases = sum(_read_cases(hospital) for hospital in self._open.values())
        while len(self._open) > (OPEN_HOSPITALS if cases > OPEN_CASES else MOST_OPEN):
            cases -= _read_cases(self._open.popitem(last=False)[1])


def _read_cases(hospital: Hospital) -> int:
    """Cases of a hospital whose cohort has been read, else 0."""
    cohort: Cohort | None = vars(hospital).get("cohort")
    return 0 if cohort is None else len(cohort.cases)


def _usable(hospitals: Sequence[SimulatedHospital], study: Study) -> Iterator[Cohort]:
    """The cohorts of the hospitals whose data serve the study, as the federation has them."""
    for hospital in hospitals:
        try:
            yield hospital.cohort(study)
        except DataError as error:
            log.warning("site=%s is not pooled: %s", hospital.name, error)


def find_hospitals(study: Study, data: Path, cache: Path) -> tuple[SimulatedHospital, ...]:
    """The hospitals that the study's [simulation] makes of `data`, or the folders with a site.toml.

    Raises:
        ConfigError: `data` holds no hospital, or not what the study's [simulation] speaks of.
    """
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder; name the folder that holds the data")
    simulation = study.simulation
    if simulation is None:
        return _from_site_files(data, study)
    own = Cache(path=cache)
    if simulation.sites is not None:
        return tuple(
            SimulatedHospital(
                name=s.name,
                source=s.data.below(data),
                cache=own,
                privacy=None
                if s.privacy_epsilon is None
                else SitePrivacy(epsilon=s.privacy_epsilon),
            )
            for s in sorted(simulation.sites, key=lambda s: s.name)
        )
    if simulation.data is None or simulation.partition is None:
        raise ConfigError("simulation: write `sites`, or `data` with `partition`")
    source = simulation.data.below(data)
    found = find_cases(source, study)
    parts = partition(found.cases, simulation.partition)
    return tuple(
        SimulatedHospital(name=name, source=source, cache=own, listed=listed)
        for name, listed in sorted(_shares(found, parts).items())
    )


def _shares(found: Found, parts: Mapping[str, Sequence[str]]) -> dict[str, Found]:
    """Each site's cases, and the faulty ones of a site's cases, in the reader's order."""
    home = {case_id: name for name, ids in parts.items() for case_id in ids}
    cases: dict[str, list[CaseRef]] = {name: [] for name in parts}
    faulty: dict[str, list[Quarantined]] = {name: [] for name in parts}
    for ref in found.cases:
        if ref.case_id in home:
            cases[home[ref.case_id]].append(ref)
    for case in found.quarantined:
        if case.case_id in home:
            faulty[home[case.case_id]].append(case)
    return {name: Found(tuple(cases[name]), tuple(faulty[name])) for name in parts}


def _from_site_files(data: Path, study: Study) -> tuple[SimulatedHospital, ...]:
    files = sorted(data.glob("*/site.toml"))
    if not files:
        raise ConfigError(
            f"--data {data}: no folder in it holds a site.toml, and the study has no [simulation] "
            "table that says how to make hospitals of it. Add one of the two"
        )
    sites = [load_site(file) for file in files]
    names = [s.name for s in sites]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"--data {data}: two site.toml have the name {', '.join(sorted(twice))}")
    return tuple(
        SimulatedHospital(
            name=s.name,
            source=s.of_study(study.name).source,
            cache=s.cache,
            policy=s.policy,
            privacy=s.privacy,
        )
        for s in sorted(sites, key=lambda s: s.name)
    )


class _Chain(Sequence[NDArray[Any]]):
    """Several cohorts' arrays one after another, read when asked for."""

    def __init__(self, parts: Sequence[Arrays | Sequence[NDArray[Any]]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> NDArray[Any]:  # type: ignore[override]
        part = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return np.asarray(self._parts[part][index - before])


def pool(cohorts: Sequence[Cohort]) -> Cohort:
    """All cohorts as if they lay in one hospital; each case keeps its part. Raises DataError."""
    if not cohorts:
        raise DataError("No hospital's data can serve the study.")
    first = cohorts[0]
    # Labels are copied; masks, with a case's every voxel, stay where they are.
    in_one_array = isinstance(first.targets, np.ndarray) and first.targets.ndim <= 2
    return replace(
        first,
        cases=tuple(c for cohort in cohorts for c in cohort.cases),
        inputs=_Chain([c.inputs for c in cohorts]),
        targets=np.concatenate([np.asarray(c.targets) for c in cohorts])
        if in_one_array
        else _Chain([c.targets for c in cohorts]),
        records=tuple(r for cohort in cohorts for r in cohort.records),
        quarantined=tuple(q for cohort in cohorts for q in cohort.quarantined),
        digest="",
    )
