"""Whether a hospital is ready: its files, machine, connection, clock and data, green or why not.

What an `Item` says may leave the hospital: no patient, no path, no exact small count. What only
the hospital's own screen may show is in `detail`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.client import consent, machine, reach, witness
from medfl.client.cohort_word import names
from medfl.client.consent import Refusal
from medfl.client.coordinator import Line, connected, skew_warning
from medfl.client.machine import Item, State
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
from medfl.common.site import Site, load_site

if TYPE_CHECKING:
    from medfl.client.data.check import CheckResult

DAY_S = 86400.0
_WARN_DAYS = 14.0


def exit_code(items: list[Item]) -> int:
    """0 where nothing is red, else the code of the first that is."""
    return next((i.code for i in items if i.state == "red"), 0)


def everything(home: Home, site_file: Path, *, n_jobs: int | None = None) -> Iterator[Item]:
    """All that can be checked now, each as it is done; nothing is changed but what is known of
    published studies, and the cache of prepared cases."""
    item, site = _site_file(site_file)
    yield item
    yield from machine.gpu(site)
    yield machine.disk(home, site)
    yield from machine.permissions(home, site)
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
    sets = f" {len(site.data_sets)} data sets ({', '.join(site.data_sets)});"
    role = " only evaluates;" if site.policy.evaluate_only else ""
    said = f"{site.name};{role}{sets if site.data_sets else ''} differential privacy: {own}"
    return Item("site file", "green", said), site


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


def _data(home: Home, site: Site, offered: list[Published], n_jobs: int | None) -> Iterator[Item]:
    """What the data are worth to each study that is offered or approved."""
    from medfl.client.data.check import check_with_cohort

    for published in reversed(offered):
        topic = f"data for {published.name}"
        if site.data_sets and not site.serving(published.name):
            yield Item(topic, "note", "no data set of site.toml names it: no part is taken in it")
            continue
        try:
            study = study_text.opened(home.enrolment().coordinator_key, published)
            result = check_with_cohort(site, study, n_jobs=n_jobs).result
        except MedflError as error:
            yield Item(topic, "red", "the data cannot be read for it",
                       "Read what is said here; site.toml names files and columns.", str(error),
                       error.exit_code)  # fmt: skip
            continue
        if result.faults:
            yield Item(
                topic,
                "red",
                f"{len(result.faults)} reasons why this hospital cannot take part"
                if len(result.faults) > 1
                else "this hospital cannot take part",
                "Read what is said here, or the page: medfl-client check --study "
                f"{published.name} --html data.html",
                "\n".join(
                    [
                        *result.faults,
                        *(f"  {o.cases} × {o.reason}: {o.text}" for o in result.left_out),
                    ]
                ),
                result.exit_code or DataError.exit_code,
            )
        else:
            yield _fitting(home, site, published, result)
    if not offered:
        yield Item(
            "data",
            "note",
            "no study is offered, so there is nothing to check them against",
            "With a study's file: medfl-client check --study study.toml",
        )


def _fitting(home: Home, site: Site, published: Published, result: CheckResult) -> Item:
    """Data that serve; what this hospital has decided about the study, and for which cases."""
    topic = f"data for {published.name}"
    left_out = sum(part.cases for part in result.left_out if part.faulty)
    said = f"they serve; {'some' if left_out else 'no'} faulty cases are left out"
    verdict = consent.verdict(home, published.digest, site)
    decided = consent.allowed(home, published.digest, result.digest, site)
    known = home.decision(published.digest)
    if not isinstance(decided, Refusal):
        return Item(topic, "green", f"{said}; {verdict}")
    others = known is not None and not names(home.signing_key(), known, result.digest)
    if known is not None and known.verdict == "approved" and others:
        return Item(
            topic,
            "warning",
            f"{said}; approved for other cases than there are now",
            f"Look at what has changed, then: medfl-client approve {published.name}",
        )
    if known is not None and known.verdict == "approved":
        todo = f"Read it again, then: medfl-client approve {published.name}"
        return Item(topic, "warning", f"{said}; {verdict}", todo)
    return Item(topic, "green", f"{said}; {verdict}", f"Next: medfl-client show {published.name}")


def _first_line(error: MedflError) -> str:
    return str(error).splitlines()[0]
