"""What this hospital agrees to: studies in plain words, its signed word, and the gate it makes.

`allowed` is asked before anything runs for a study, every time; nothing that the coordinator sends
can answer it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from medfl.client.cohort_word import cohort_word, names
from medfl.client.coordinator import Line, skew_warning
from medfl.client.enrolment import pin_sites
from medfl.client.premises import Home
from medfl.client.reading import Reading, site_word
from medfl.common import study_text
from medfl.common.approvals import Decision, signed, why_not
from medfl.common.coordination import AskStudies, Decide, Done, Published, Studies
from medfl.common.denials import Denials
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.kept import save_record
from medfl.common.messages import Instruction
from medfl.common.private_files import private_folder, read_private, write_private
from medfl.common.signing import public_of
from medfl.common.site import Site
from medfl.common.study import Study

DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing may run for a study now."""

    why: str


def allowed(
    home: Home, study_digest: str, cohort_digest: str | None, site: Site | None = None
) -> Decision | Refusal:
    """This site's approval of exactly this study and these cases, or why there is none.

    cohort_digest: of the cases at hand; None before they are loaded, and then it must be asked
        again with it before the first of them is used. site: site.toml as it is now; without it
        nobody may train on the answer.
    """
    try:
        decision = home.decision(study_digest)
        key = home.signing_key()
    except ConfigError as error:
        return Refusal(str(error))
    if decision is not None and cohort_digest is not None and names(key, decision, cohort_digest):
        cohort_digest = decision.cohort
    why = why_not(
        decision,
        public_of(key),
        home.enrolment().site,
        study_digest,
        cohort_digest,
        home.clock(),
    )
    if not why and decision is not None and site is not None:
        try:
            why = _other_file(decision, site_word(key, for_study(home, study_digest, site)))
        except PolicyRefused as error:
            why = str(error)
    return Refusal(why or "the study is not approved here") if why or not decision else decision


def for_study(home: Home, study_digest: str, site: Site) -> Site:
    """site.toml as far as it concerns a study.

    Raises:
        PolicyRefused: it has several data sets, and not one that is for this study; or the study
            was never heard of.
    """
    return site.of_study(by_digest(home, study_digest).name) if site.data_sets else site


def _other_file(decision: Decision, word: str) -> str:
    if decision.site_toml == word:
        return ""
    if not decision.site_toml:
        return "the approval is of an older medfl and names no site.toml; approve again"
    return "site.toml has changed since the approval; look at the study and approve again"


def number(home: Home, study_digest: str) -> str:
    """Which approval of the study this is: its time; "" where there is none."""
    decision = home.decision(study_digest)
    return "" if decision is None else str(decision.at)


def note_refusal(home: Home, denials: Denials, asked: Instruction, why: str) -> None:
    """Write down what was asked and not answered; `medfl-client status` shows it.

    denials: of this process; the same again and again is counted in few lines.

    Raises:
        StorageError: it could not be written down.
    """
    known = any(asked.study_digest == p.digest for p in home.published())
    times = denials.times(asked.study_digest if known else "unknown", asked.kind, why)
    if times:
        home.record(
            "refused",
            study=asked.study_digest[:64],
            run=asked.run[:80],
            kind=asked.kind,
            round=asked.round,
            why=why[:1000],
            times=times,
        )


def note_unlike(home: Home, study_digest: str, fields: Collection[str]) -> None:
    """Keep which fields of this hospital are far from the others', for `medfl-client status`; a
    later run's word replaces it. It lies beside the study's work and leaves with nothing."""
    file = home.folder / "work" / study_digest[:16] / "unlike.json"
    if fields or file.exists():
        private_folder(file.parent)
        write_private(file, json.dumps(list(fields)).encode())


def unlike_others(home: Home, study_digest: str) -> list[str]:
    """What `note_unlike` kept last; nothing where no run has begun."""
    file = home.folder / "work" / study_digest[:16] / "unlike.json"
    return [str(f) for f in json.loads(read_private(file))] if file.exists() else []


def fetch(home: Home, line: Line) -> list[Published]:
    """The published studies, each checked against the coordinator's pinned key and kept.

    The keys of sites that are new here are pinned, so that an approval can name them.

    Raises:
        PolicyRefused: one is not signed by that key, or is not what its digest says; or the key of
            a site has changed.
    """
    coordinator = home.enrolment().coordinator_key
    answer = line.call("Studies", AskStudies(), Studies)
    pin_sites(home, answer.sites)
    for shown in answer.published:
        study_text.opened(coordinator, shown)
    _note_offered(home, [shown.digest for shown in answer.published])
    for shown in answer.published:
        place = home.folder / "studies" / f"{shown.digest}.json"
        if not place.exists():
            save_record(place, shown)
            home.record("study heard of", study=shown.name, digest=shown.digest)
    return list(answer.published)


def _note_offered(home: Home, digests: Collection[str]) -> None:
    text = json.dumps(sorted(digests)).encode()
    file = home.folder / "offered.json"
    if not file.exists() or read_private(file) != text:
        write_private(file, text)


def is_offered(home: Home, digest: str) -> bool:
    """Whether the coordinator offered the study when it was last asked."""
    file = home.folder / "offered.json"
    return not file.exists() or digest in json.loads(read_private(file))


def before_it(home: Home, published: Published) -> Study | None:
    """The last other study of the same name that was heard of before this one."""
    older = (p for p in home.published() if p.name == published.name and p.at <= published.at)
    other = next((p for p in older if p.digest != published.digest), None)
    return None if other is None else by_digest(home, other.digest)


def approved_as(home: Home, name: str) -> list[Published]:
    """Studies of this name, or with a digest that begins so, with an approval not yet taken back;
    where there is none, the one that `find` finds.

    Raises:
        ConfigError: no such study is known here.
    """
    first, _ = find(home, name)
    fits = [p for p in home.published() if p.name == name] or [first]
    decided = [(p, home.decision(p.digest)) for p in fits]
    return [p for p, word in decided if word is not None and word.verdict == "approved"] or [first]


def find(home: Home, name: str) -> tuple[Published, Study]:
    """A kept study by its name (the newest) or the beginning of its digest, checked again.

    Raises:
        ConfigError: there is none. PolicyRefused: it was changed since it was kept.
    """
    kept = home.published()
    fits = [p for p in kept if p.name == name]
    if not fits and len(name) >= 6:
        fits = [p for p in kept if p.digest.startswith(name)]
    if not fits:
        raise ConfigError(
            f"{name}: no such study is known here. Known: "
            f"{', '.join(sorted({p.name for p in kept})) or 'none'}; ask for new ones with: "
            "medfl-client studies"
        )
    return fits[0], study_text.opened(home.enrolment().coordinator_key, fits[0])


def by_digest(home: Home, digest: str) -> Study:
    """The study of this digest. Raises PolicyRefused where it was never heard of here."""
    for kept in home.published():
        if kept.digest == digest:
            return study_text.opened(home.enrolment().coordinator_key, kept)
    raise PolicyRefused("This hospital has never heard of the study that it was asked for.")


def approve(
    home: Home,
    study: Study,
    reading: Reading,
    days: float,
    among: Collection[str] = (),
    anew: bool = False,
) -> Decision:
    """Sign and keep an approval for these cases under this site.toml; `send` tells the coordinator.

    An approval that says the same and lasts as long is kept as it is, but `anew`: its runs are used
    up, and a new one allows as many again.
    among: the hospitals that an update may be summed with under masks; () = all that are known.

    Raises:
        ConfigError: no cases, a time that is none, or too few hospitals for a secure sum.
    """
    if (reading.cases < 1 and not reading.evaluates) or not reading.cohort:
        raise ConfigError("There are no training cases to approve; run: medfl-client check")
    if not 0 < days <= 1000:
        raise ConfigError("--days: must be above 0 and at most 1000")
    now = int(home.clock())
    expires = now + int(days * DAY_S)
    sites = summed_with(home, study, among)
    known = allowed(home, study.digest, reading.cohort)
    if isinstance(known, Decision) and not anew and _says_the_same(known, reading, sites):
        if abs(known.expires - expires) < DAY_S // 2:
            return known
    at = _after_the_last(home, study.digest, now)
    key, cohort = home.signing_key(), reading.cohort
    decision = Decision(
        verdict="approved",
        site=home.enrolment().site,
        study=study.digest,
        cohort=cohort_word(key, study.digest, at, cohort) if reading.blind else cohort,
        cases=reading.cases,
        at=at,
        expires=expires,
        sites=sites,
        site_toml=reading.site_toml,
    )
    return _keep(home, decision)


def _says_the_same(known: Decision, reading: Reading, sites: Mapping[str, str]) -> bool:
    if reading.blind and known.cohort == reading.cohort:
        return False
    said = (known.cases, known.sites, known.site_toml)
    return said == (reading.cases, sites, reading.site_toml)


def summed_with(
    home: Home, study: Study, among: Collection[str] = (), fewest: int = 2
) -> dict[str, str]:
    """Keys of the hospitals that this one's update may be summed with; none without masks.

    fewest: hospitals that this one's policy asks for in a sum, itself counted.

    Raises:
        ConfigError: one of `among` is not known here, or they are too few for the study.
    """
    if study.secure_aggregation is None:
        return {}
    pinned = home.enrolment().sites
    if unknown := sorted(set(among) - set(pinned)):
        raise ConfigError(f"--with: no key of {', '.join(unknown)} is known here")
    chosen = {site: key for site, key in pinned.items() if not among or site in among}
    fewest = max(fewest, study.federation.min_sites)
    if len(chosen) + 1 < fewest:
        raise ConfigError(
            f"A sum needs {fewest} hospitals here; the approval would name {len(chosen)} beside "
            "this one. Approve when the others have enrolled; `medfl-client studies` asks for "
            "their keys."
        )
    return chosen


def withdraw(home: Home, study_digest: str) -> Decision:
    """Take an approval back, here and at once; `send` tells the coordinator.

    Raises:
        ConfigError: nothing was ever approved.
    """
    known = home.decision(study_digest)
    if known is None:
        raise ConfigError("This study was never approved here; nothing is to be taken back.")
    if known.verdict == "withdrawn":
        return known
    now = _after_the_last(home, study_digest, int(home.clock()))
    decision = Decision(
        verdict="withdrawn",
        site=home.enrolment().site,
        study=study_digest,
        cohort="",
        cases=0,
        at=now,
        expires=now,
    )
    return _keep(home, decision)


def send(home: Home, line: Line, decision: Decision) -> str:
    """Tell the coordinator; saying it again does no harm. What is to be said of the clocks, if any.

    Raises:
        PolicyRefused: the coordinator does not take it.
    """
    return skew_warning(home.clock(), line.call("Decide", Decide(decision), Done).now)


def send_all(home: Home, line: Line) -> int:
    """Tell the coordinator everything that still holds; how many decisions that were."""
    sent = 0
    for kept in home.published():
        decision = home.decision(kept.digest)
        if decision is not None and (
            decision.verdict == "withdrawn" or decision.expires > home.clock()
        ):
            send(home, line, decision)
            sent += 1
    return sent


def verdict(home: Home, digest: str, site: Site | None = None) -> str:
    """One phrase on where this site stands: not decided, approved until ..., withdrawn, ...

    site: site.toml as it is now; None where it is not at hand.
    """
    gone = "" if is_offered(home, digest) else "; the coordinator offers it no longer"
    if home.decision(digest) is None:
        return f"not decided{gone}"
    known = allowed(home, digest, None, site)
    if isinstance(known, Refusal):
        return f"{known.why}{gone}"
    what = "" if known.cases else " for evaluation only"
    until = time.strftime("%Y-%m-%d", time.gmtime(known.expires))
    return f"approved{what} until {until}{gone}"


def _keep(home: Home, decision: Decision) -> Decision:
    made = signed(home.signing_key(), decision)
    home.record(
        made.verdict, study=made.study, cohort=made.cohort, expires=made.expires, at=made.at
    )
    save_record(home.decision_file(made.study), made)
    return made


def _after_the_last(home: Home, study: str, now: int) -> int:
    """A time after the last decision's: two within a second must still have an order."""
    known = home.decision(study)
    return now if known is None else max(now, known.at + 1)
