"""Whether a hospital is ready: its files, machine, connection, clock and data, green or why not.

What an `Item` says may leave the hospital: no patient, no path, no exact small count. What only
the hospital's own screen may show is in `detail`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medfl.client import consent, reach, witness
from medfl.client.consent import Refusal
from medfl.client.coordinator import Line, connected, skew_warning
from medfl.client.premises import Home
from medfl.common import certificates, study_text
from medfl.common.coordination import AskStudies, Published, Studies
from medfl.common.errors import (
    ConfigError,
    DataError,
    FederationError,
    MedflError,
    PolicyRefused,
    StorageError,
)
from medfl.common.private_files import private_folder, read_private
from medfl.common.site import Site, load_site

if TYPE_CHECKING:
    from medfl.client.data.check import CheckResult

DAY_S = 86400.0
_WARN_DAYS = 14.0
_LOW_BYTES, _WARN_BYTES, _WARN_CACHE_BYTES = 100e6, 1e9, 5e9
State = Literal["green", "warning", "red", "note"]


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the page. todo: the remedy. detail: for the hospital's own screen only.

    code: exit code of what is red. study: of a data check: its name.
    """

    topic: str
    state: State
    said: str
    todo: str = ""
    detail: str = ""
    code: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Without what must not leave."""
        return {"topic": self.topic, "state": self.state, "said": self.said, "todo": self.todo}


def exit_code(items: list[Item]) -> int:
    """0 where nothing is red, else the code of the first that is."""
    return next((i.code for i in items if i.state == "red"), 0)


def everything(home: Home, site_file: Path, *, n_jobs: int = 1) -> Iterator[Item]:
    """All that can be checked now, each as it is done; nothing is changed but what is known of
    published studies, and the cache of prepared cases."""
    item, site = _site_file(site_file)
    yield item
    yield from _machine(site)
    yield _disk(home, site)
    yield from _permissions(home, site)
    offered: list[Published] = []
    if home.enrolment_file.exists():
        yield from _enrolled(home, site)
        yield from _coordinator(home)
        yield _records(home, site)
        offered = home.published()
    else:
        yield Item(
            "federation",
            "red",
            "this hospital is not enrolled here",
            "Ask the coordinator for an invitation: medfl-client enrol HOST:PORT --token ...",
            f"Looked in {home.folder}; --state or MEDFL_STATE names another folder.",
            ConfigError.exit_code,
        )
    if site is not None:
        yield from _data(home, site, offered, n_jobs)


def _site_file(path: Path) -> tuple[Item, Site | None]:
    try:
        site = load_site(path)
    except ConfigError as error:
        fault = f"{len(error.faults)} fault{'s' if len(error.faults) > 1 else ''}"
        todo = "Correct the file; `medfl-client check FILE` or --site names another."
        said = f"site.toml has {fault}" if path.exists() else "site.toml is not there"
        return Item("site file", "red", said, todo, str(error), error.exit_code), None
    own = "none" if site.privacy is None else f"epsilon at most {site.privacy.epsilon:g} a study"
    return Item("site file", "green", f"{site.name}; differential privacy: {own}"), site


def _machine(site: Site | None) -> Iterator[Item]:
    wanted = "auto" if site is None else site.device
    if wanted == "cpu":
        yield Item("gpu", "green", "site.toml says cpu: training needs no GPU")
        return
    import torch

    if not torch.cuda.is_available():
        built = "is built for the CPU only" if torch.version.cuda is None else "sees no GPU"
        if wanted == "auto":
            yield Item("gpu", "green", f"none (torch {built}): training runs on the CPU")
        else:
            yield Item(
                "gpu",
                "red",
                f"site.toml asks for a GPU and torch {built}",
                "Look at nvidia-smi and the driver; deploy/install-torch.sh installs the build of "
                'torch that fits. Or write device = "auto" in site.toml.',
                code=PolicyRefused.exit_code,
            )
        return
    try:
        torch.ones(8, device="cuda").sum().item()
        free, whole = (n / 1e9 for n in torch.cuda.mem_get_info())
    except RuntimeError as error:  # CUDA's errors; they name no file of the hospital
        yield Item(
            "gpu", "red", "the GPU does not compute", "Look at nvidia-smi; restart the machine.",
            str(error).splitlines()[0], 1,
        )  # fmt: skip
        return
    said = f"{torch.cuda.get_device_name()}, {free:.1f} of {whole:.1f} GB free"
    yield Item("gpu", "green" if free > 0.2 * whole else "warning", said)


def _disk(home: Home, site: Site | None) -> Item:
    places = {"state": (home.folder, _WARN_BYTES)}
    if site is not None:
        places["cache"] = (site.cache.path, _WARN_CACHE_BYTES)
        places["privacy ledger"] = (site.ledger, _WARN_BYTES)
    state: State = "green"
    told, low = [], []
    for name, (place, enough) in places.items():
        free = shutil.disk_usage(existing(place)).free
        told.append(f"{name} {free / 1e9:.1f} GB free")
        if free < enough:
            low.append(name)
            state = "red" if free < _LOW_BYTES or state == "red" else "warning"
    todo = f"Free some space for: {', '.join(low)}." if low else ""
    return Item("disk", state, ", ".join(told), todo, code=StorageError.exit_code)


def _permissions(home: Home, site: Site | None) -> Iterator[Item]:
    import os

    faults = list(_open_to_others(home))
    places = {"state": home.folder}
    if site is not None:
        places |= {"cache": site.cache.path, "privacy ledger": site.ledger}
    faults += [
        (f"the folder of the {name} cannot be written", str(place))
        for name, place in places.items()
        if not os.access(existing(place), os.W_OK | os.X_OK)
    ]
    if site is not None and not os.access(site.data.path, os.R_OK):
        there = "cannot be read" if site.data.path.exists() else "are not there"
        faults.append((f"the data {there}", str(site.data.path)))
    if not faults:
        yield Item("permissions", "green", "keys are this user's alone; folders can be used")
    for said, detail in faults:
        todo = "Give the user that runs medfl-client the right, or name another place in site.toml."
        yield Item("permissions", "red", said, todo, detail, ConfigError.exit_code)


def _open_to_others(home: Home) -> Iterator[tuple[str, str]]:
    if not home.enrolment_file.exists():
        return
    try:
        private_folder(home.folder)
        for file in (home.identity_file, home.signing_file, home.authority_file):
            read_private(file)
    except MedflError as error:
        yield "a key or its folder is missing, damaged or open to other users", str(error)


def _enrolled(home: Home, site: Site | None) -> Iterator[Item]:
    try:
        known, shown = home.enrolment(), home.identity()[1]
    except MedflError as error:
        yield Item("federation", "red", "the enrolment cannot be read", "Restore the backup.",
                   str(error), error.exit_code)  # fmt: skip
        return
    yield Item("federation", "green", f"{known.site} in {known.federation} ({known.address})")
    if site is not None and site.name != known.site:
        yield Item(
            "federation",
            "warning",
            f"site.toml calls this hospital {site.name}, the federation {known.site}",
            f'Write name = "{known.site}" in site.toml, or name the right file.',
        )
    days = (certificates.ends_at(shown) - home.clock()) / DAY_S
    if days <= 0:
        yield Item(
            "certificate",
            "red",
            "it has expired",
            "Ask for a new invitation (medfl-server invite NAME --again) and enrol in a new "
            "folder.",
            code=PolicyRefused.exit_code,
        )
    else:
        short = days < _WARN_DAYS
        todo = "It renews itself while the client runs: medfl-client start" if short else ""
        yield Item("certificate", "warning" if short else "green", f"{days:.0f} days left", todo)


def _coordinator(home: Home) -> Iterator[Item]:
    """The way there step by step, then who we are to it, its clock, and what it offers."""
    try:
        for step in reach.steps(home):
            state: State = "red" if step.todo else "green"
            code = FederationError.exit_code
            yield Item(f"connection: {step.name}", state, step.said, step.todo, code=code)
            if step.todo:
                return
        known, (key, certificate) = home.enrolment(), home.identity()
        with connected(known.address, home.authority(), key, certificate) as line:
            yield from _admitted(home, line)
    except MedflError as error:
        todo = "" if isinstance(error, FederationError) else "Speak to the coordinator."
        yield Item("connection: identity", "red", _first_line(error), todo, code=error.exit_code)


def _admitted(home: Home, line: Line) -> Iterator[Item]:
    answer = line.call("Studies", AskStudies(), Studies)
    yield Item("connection: identity", "green", "the coordinator knows this hospital")
    skew = abs(home.clock() - answer.now)
    if warning := skew_warning(home.clock(), answer.now):
        todo = "Set the clock (NTP) before anything else."
        yield Item("clock", "red", warning.removesuffix(f" {todo}"), todo,
                   code=FederationError.exit_code)  # fmt: skip
    else:
        yield Item("clock", "green", f"{skew:.0f} s from the coordinator's")
    found = consent.fetch(home, line)
    names = ", ".join(p.name for p in found) or "none yet"
    yield Item("studies", "green" if found else "note", f"offered: {names}")


def _records(home: Home, site: Site | None) -> Item:
    """The log and the ledger are whole."""
    from medfl.client.ledger import Ledger

    try:
        checked = witness.check(home)
        uses = 0 if site is None else len(Ledger(site.ledger).entries())
    except MedflError as error:
        return Item("records", "red", "the audit log or the privacy ledger is damaged",
                    "Stop, and find out who changed it; restore the backup.", str(error),
                    error.exit_code)  # fmt: skip
    if checked.bad is not None:
        return Item("records", "red", f"line {checked.bad.n} of the audit log {checked.bad.why}",
                    "Find out who changed it; restore the backup.",
                    code=StorageError.exit_code)  # fmt: skip
    return Item("records", "green", f"audit log whole, {checked.lines} lines; ledger {uses} uses")


def _data(home: Home, site: Site, offered: list[Published], n_jobs: int) -> Iterator[Item]:
    """What the data are worth to each study that is offered or approved."""
    from medfl.client.data.check import check_with_cohort, describe

    for published in reversed(offered):
        topic = f"data for {published.name}"
        try:
            study = study_text.opened(home.enrolment().coordinator_key, published)
            result = check_with_cohort(site, study, n_jobs=n_jobs).result
        except MedflError as error:
            yield Item(topic, "red", "the data cannot be read for it",
                       "Read what is said here; site.toml names files and columns.", str(error),
                       error.exit_code)  # fmt: skip
            continue
        detail = "\n".join(describe(result)) if result.faults else ""
        if result.faults:
            yield Item(
                topic,
                "red",
                f"{len(result.faults)} reasons why this hospital cannot take part"
                if len(result.faults) > 1
                else "this hospital cannot take part",
                "Read what is said here, or the page: medfl-client check --study "
                f"{published.name} --html data.html",
                detail,
                result.exit_code or DataError.exit_code,
            )
        else:
            yield _fitting(home, topic, published, result)
    if not offered:
        yield Item(
            "data",
            "note",
            "no study is offered, so there is nothing to check them against",
            "With a study's file: medfl-client check --study study.toml",
        )


def _fitting(home: Home, topic: str, published: Published, result: CheckResult) -> Item:
    """Data that serve; what this hospital has decided about the study, and for which cases."""
    left_out = sum(part.cases for part in result.left_out if part.faulty)
    said = f"they serve; {'some' if left_out else 'no'} faulty cases are left out"
    verdict = consent.verdict(home, published.digest)
    decided = consent.allowed(home, published.digest, result.digest)
    known = home.decision(published.digest)
    if not isinstance(decided, Refusal):
        return Item(topic, "green", f"{said}; {verdict}")
    if known is not None and known.verdict == "approved" and known.cohort != result.digest:
        return Item(
            topic,
            "warning",
            f"{said}; approved for other cases than there are now",
            f"Look at what has changed, then: medfl-client approve {published.name}",
        )
    return Item(topic, "green", f"{said}; {verdict}", f"Next: medfl-client show {published.name}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _first_line(error: MedflError) -> str:
    return str(error).splitlines()[0]
