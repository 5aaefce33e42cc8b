"""site.toml: the hospital's own file. Where it and a study disagree, this one wins."""

from __future__ import annotations

from dataclasses import field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medfl.common import config
from medfl.common.errors import PolicyRefused
from medfl.common.source import DataSet, DataSource
from medfl.common.written import Count, Name, NotNegative, Positive, written


@written
class Policy:
    """What this hospital allows, whatever a study asks.

    min_cases: fewer training cases than this, and the site takes no part.
    tasks: kinds of task allowed.
    round_metrics_to: decimals of metrics that leave the hospital.
    require_secure_aggregation: train only in studies whose updates are summed under masks.
    min_sum_sites: under masks, the fewest hospitals (this one counted) whose sum may be seen.
    runs_per_approval: runs of a study that may begin under one approval.
    smallest_count: a number of cases below this does not leave, nor do metrics or sums of so few
        patients, shares of a class that so few have, or words that so few have; the counts of the
        prepare exchange are raised to it. Sums are told again only when so many patients have
        changed. With fewer training patients the site takes no part.
    evaluate_only: this hospital trains no model: all its cases are test cases, and it is asked at
        the end how the model does on them (external validation). min_cases and smallest_count
        then speak of these.
    """

    min_cases: Count = 1
    tasks: tuple[Literal["classification", "segmentation", "risk"], ...] = (
        "classification",
        "segmentation",
        "risk",
    )
    round_metrics_to: Count = 4
    require_secure_aggregation: bool = False
    min_sum_sites: Annotated[int, Field(ge=2)] = 3
    runs_per_approval: Count = 10
    smallest_count: Count = 5
    evaluate_only: bool = False


@written
class Budget:
    """The most privacy loss of a patient that this hospital accepts for everything ever.

    All studies, runs, trials and restarts together, as the hospital's ledger counts them.
    """

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5


@written
class SitePrivacy:
    """The most privacy loss that this hospital accepts for one study, per the study's unit.

    epsilon, delta: differential privacy of the whole study (all rounds). A study that asks for
        none, or for a larger epsilon or delta, is trained under these.
    clip: bound on the L2 norm of one unit's contribution, used where the study states none.
    budget: for all studies together.
    declared_patients, declared_cases: about how many training patients, and images or records,
        this hospital has. They are what others learn instead of the exact numbers, which are as
        private as the rest; cases omitted: as many as patients. Only a simulation counts itself.
    """

    epsilon: Positive
    delta: Positive = 1e-5
    clip: Positive = 1.0
    budget: Budget | None = None
    declared_patients: Count | None = None
    declared_cases: Count | None = None


@written
class Cache:
    """Prepared cases, so that the second epoch reads no DICOM.

    path: folder; it holds derived patient data and belongs on an encrypted disk of the hospital.
    max_gb: older entries are removed to stay below.
    """

    path: Path = Path(".medfl-cache")
    max_gb: NotNegative = 50.0


@written
class Deid:
    """How images are de-identified: PS3.15 Annex E, Basic Profile, with these options.

    retain_longitudinal: "shifted" moves all dates and times of a patient by the same amount, "full"
        leaves them, "none" removes them. retain_device: serial numbers and station names.
    retain_institution: the hospital's name and address. retain_patient_characteristics: age (90 and
        more as 90), sex, size, weight and the like. clean_descriptors: the technical words of
        descriptions. retain_safe_private: private attributes known to hold only a measure.
    key: file of the secret behind the pseudonyms; None: beside the cache, made on first use.
    """

    retain_longitudinal: Literal["shifted", "full", "none"] = "shifted"
    retain_device: bool = False
    retain_institution: bool = False
    retain_patient_characteristics: bool = False
    clean_descriptors: bool = False
    retain_safe_private: bool = False
    key: Path | None = None


@written
class Site:
    """A hospital, as written in site.toml.

    data: its cases. data_sets: several collections by name instead, each with the studies that it
        serves: `[data_sets.chest]`, `[data_sets.heart]`.
    ledger: folder of what was spent of patients' privacy, ever. It must outlive everything else
    here: put it on a disk that is backed up, and never begin it anew.
    """

    name: Name
    data: DataSource | None = None
    data_sets: dict[Name, DataSet] = field(default_factory=dict)
    policy: Policy = Policy()
    privacy: SitePrivacy | None = None
    cache: Cache = Cache()
    ledger: Path = Path("privacy-ledger")
    deid: Deid = Deid()
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def faults(self) -> list[str]:
        """Contradictions between keys, one line each."""
        privacy, faults = self.privacy, []
        if self.data is None and not self.data_sets:
            faults.append("data: is missing; add it")
        if self.data is not None and self.data_sets:
            faults.append(
                "data_sets: stand in place of [data]; write the one table or the others, not both"
            )
        if privacy is None or privacy.declared_patients is None:
            return faults
        if privacy.delta * privacy.declared_patients >= 1:
            faults.append(
                "privacy.delta: must be below 1 / declared_patients; a larger one would allow to "
                "publish one patient's record"
            )
        return faults

    @property
    def source(self) -> DataSource:
        """The one collection of cases; of several, `of_study` says which. Raises PolicyRefused."""
        if self.data is None:
            raise PolicyRefused("site.toml has several data sets, and no study was named.")
        return self.data

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """Every collection of cases."""
        return (self.data,) if self.data is not None else tuple(self.data_sets.values())

    def of_study(self, study: str) -> Site:
        """This hospital as a study of this name meets it: with the one collection that serves it.

        Raises:
            PolicyRefused: no data set names the study, or two do.
        """
        if self.data is not None:
            return self
        fitting = self.serving(study)
        if len(fitting) == 1:
            return replace(self, data=self.data_sets[fitting[0]].source, data_sets={})
        known = ", ".join(self.data_sets)
        if not fitting:
            raise PolicyRefused(
                f"{study}: no data set of site.toml names this study, so this hospital takes no "
                f'part in it. To take part write studies = ["{study}"] in one of [data_sets]: '
                f"{known}."
            )
        raise PolicyRefused(
            f"{study}: the data sets {' and '.join(fitting)} of site.toml both name this study. "
            "Leave it in one of them."
        )

    def serving(self, study: str) -> list[str]:
        """Names of the data sets that name the study."""
        return [
            name
            for name, data in self.data_sets.items()
            if any(fnmatchcase(study, pattern) for pattern in data.studies)
        ]


def load_site(path: Path) -> Site:
    """Read site.toml; relative paths in it start at its folder. Raises ConfigError."""
    site = config.load(path, Site)
    folder = path.resolve().parent
    return replace(
        site,
        data=None if site.data is None else site.data.below(folder),
        data_sets={name: data.below(folder) for name, data in site.data_sets.items()},
        cache=Cache(path=folder / site.cache.path, max_gb=site.cache.max_gb),
        ledger=folder / site.ledger,
        deid=replace(site.deid, key=folder / site.deid.key) if site.deid.key else site.deid,
    )
