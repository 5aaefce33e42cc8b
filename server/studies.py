"""Published studies, and what each site has decided about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medfl.common import study_text
from medfl.common.approvals import Decision, is_by, why_not
from medfl.common.coordination import Published
from medfl.common.errors import ConfigError, PolicyRefused
from medfl.common.kept import load_record, load_records, save_record
from medfl.common.study import Study
from medfl.server.federation import Federation, SiteRecord

# An approval for longer than this is more likely a slip than a wish.
MAX_APPROVAL_S = 3 * 366 * 86400


def publish(federation: Federation, study: Study, *, replace: bool = False) -> Published:
    """Sign a study and offer it to the sites; the same study again is the same publication.

    replace: another study of this name is withdrawn.

    Raises:
        ConfigError: the study cannot be published: it names what no catalogue has, its network
            cannot be built or combined as it says, a text has a control character, or another
            study has its name.
    """
    # Their models take their time to import.
    from medfl.strategies.catalogue import study_faults
    from medfl.strategies.rehearsal import misfits

    if faults := study_faults(study) or misfits(study):
        raise ConfigError(faults)
    study_text.refuse_control(study)
    same_name = [p for p in published(federation) if p.name == study.name]
    others = [p for p in same_name if p.digest != study.digest]
    if others and not replace:
        raise ConfigError(_name_is_taken(others[0], study))
    for other in others:
        withdraw(federation, other)
    with federation.change():
        file = federation.state / "studies" / f"{study.digest}.json"
        known = load_record(file, Published)
        if known is not None:
            return known
        _withdrawn_file(federation, study.digest).unlink(missing_ok=True)
        made = study_text.publish(federation.signing_key(), study, federation.clock())
        federation.record("published", study=study.name, digest=study.digest)
        save_record(file, made)
        return made


def _name_is_taken(other: Published, study: Study) -> list[str]:
    changed = study_text.changes(study_text.from_text(other.study), study)
    return [
        f"name: {study.name} is published already, with the digest {other.digest[:12]}. Give this "
        "study another name, or withdraw the other one with --replace. This one differs in:",
        *(f"  {line}" for line in changed),
    ]


def withdraw(federation: Federation, made: Published) -> None:
    """Offer a study no longer. What it has trained stays, and so do hospitals' decisions.

    Raises:
        ConfigError: a run of it is not over.
    """
    from medfl.server import runs

    for run in runs.everything(federation):
        if run.digest == made.digest and run.state in ("waiting", "running"):
            raise ConfigError(
                f"{made.name}: {run.id} is {run.state}. End it first: medfl-server stop {run.id}"
            )
    with federation.change():
        federation.record("publication withdrawn", study=made.name, digest=made.digest)
        save_record(_withdrawn_file(federation, made.digest), made)
        (federation.state / "studies" / f"{made.digest}.json").unlink(missing_ok=True)


def _withdrawn_file(federation: Federation, digest: str) -> Path:
    return federation.state / "studies" / "withdrawn" / f"{known_digest(digest)}.json"


def published(federation: Federation) -> list[Published]:
    """All publications, newest first."""
    found = load_records(federation.state / "studies", Published)
    return sorted(found, key=lambda p: (-p.at, p.digest))


def ever_published(federation: Federation) -> list[Published]:
    """Those that are offered, then those that were withdrawn."""
    return [
        *published(federation),
        *load_records(federation.state / "studies" / "withdrawn", Published),
    ]


def find(federation: Federation, name: str) -> Published:
    """The newest publication of this name, or the one whose digest begins so.

    Raises:
        ConfigError: there is none, or the beginning fits several.
    """
    everything = published(federation)
    named = [p for p in everything if p.name == name]
    if named:
        return named[0]
    by_digest = [p for p in everything if len(name) >= 6 and p.digest.startswith(name)]
    if len(by_digest) == 1:
        return by_digest[0]
    raise ConfigError(
        f"{name}: no such study is published. Published: "
        f"{', '.join(p.name for p in everything) or 'none'}; publish one with: medfl-server study "
        "publish STUDY.toml"
    )


def decide(federation: Federation, site: SiteRecord, decision: Decision) -> None:
    """Keep a site's decision.

    Raises:
        PolicyRefused: it is another site's, not signed by the pinned key, older than the one that
            is kept, expired, or about an unknown study.
    """
    if decision.site != site.name or not is_by(site.signing_key, decision):
        raise PolicyRefused("The decision is not signed by the key that was pinned for this site.")
    offered = federation.state / "studies" / f"{known_digest(decision.study)}.json"
    if not offered.exists() and not _withdrawn_file(federation, decision.study).exists():
        raise PolicyRefused("The decision is about a study that is not published here.")
    if decision.verdict == "approved":
        known_digest(decision.cohort)
        now = federation.clock()
        # No case: the hospital only evaluates, and may claim no weight.
        if not now < decision.expires <= now + MAX_APPROVAL_S or decision.cases < 0:
            raise PolicyRefused(
                "The approval has expired, has no end, or states no number of cases."
            )
    with federation.change():
        kept = decision_of(federation, decision.study, site.name)
        if kept == decision:
            return
        if kept is not None and decision.at <= kept.at:
            raise PolicyRefused("The decision is older than the one that is kept: a replay.")
        federation.record(
            decision.verdict,
            site=site.name,
            study=decision.study,
            cohort=decision.cohort,
            signature=decision.signature,
        )
        save_record(_file(federation, decision.study, site.name), decision)


def decision_of(federation: Federation, study: str, site: str) -> Decision | None:
    """The last decision of a site on a study (digest)."""
    return load_record(_file(federation, study, site), Decision)


def approvals(federation: Federation, study: str) -> dict[str, Decision]:
    """Sites that may be asked now, with the approval that says so; signatures are checked again.

    study: digest. A revoked site has no approval that counts, and in a secure sum only those take
    part whose keys all the others have approved.
    """
    found = _all_approvals(federation, study)
    left_out = unsummed(federation, study)
    return {site: decision for site, decision in found.items() if site not in left_out}


def unsummed(federation: Federation, study: str) -> dict[str, str]:
    """Sites with an approval that cannot be in one secure sum with the others, and why.

    Whoever lacks most others is left out first, and of two the one that approved later: usually a
    hospital that enrolled after the others had approved.
    """
    keys = {r.name: r.signing_key for r in federation.sites()}
    found = _all_approvals(federation, study)
    if not any(decision.sites for decision in found.values()):
        return {}
    strangers = {
        a: {b for b in found if b != a and not _know_each_other(found, keys, a, b)} for a in found
    }
    left_out = {}
    while any(strangers.values()):
        worst = max(strangers, key=lambda site: (len(strangers[site]), found[site].at, site))
        names = ", ".join(sorted(strangers.pop(worst)))
        left_out[worst] = f"not in one sum with {names}: one of them has not approved the other"
        for others in strangers.values():
            others.discard(worst)
    return left_out


def _know_each_other(
    found: Mapping[str, Decision], keys: Mapping[str, str], a: str, b: str
) -> bool:
    return found[a].sites.get(b) == keys[b] and found[b].sites.get(a) == keys[a]


def _all_approvals(federation: Federation, study: str) -> dict[str, Decision]:
    found = {}
    for record in federation.sites():
        decision = decision_of(federation, study, record.name)
        if decision is not None and not refusal(federation, record, decision, study):
            found[record.name] = decision
    return found


def refusal(
    federation: Federation, record: SiteRecord, decision: Decision | None, study: str
) -> str:
    """Why this site may not be asked now, "" where it may."""
    if record.status != "active":
        return "the site was revoked"
    now = federation.clock()
    if now >= record.ends:
        return "the site's certificate has expired"
    return why_not(decision, record.signing_key, record.name, study, None, now)


def known_digest(text: str) -> str:
    """A SHA-256 in hex; anything else could name another file. Raises PolicyRefused."""
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise PolicyRefused("A digest is not 64 hexadecimal digits.")
    return text


def _file(federation: Federation, study: str, site: str) -> Path:
    return federation.state / "decisions" / known_digest(study) / f"{site}.json"
