"""medfl-client's commands for taking part in a federation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfl.common import cli
from medfl.common.errors import (
    ConfigError,
    DataError,
    FederationError,
    MedflError,
    PolicyRefused,
    StorageError,
)

if TYPE_CHECKING:
    from medfl.client.premises import Home
    from medfl.client.reading import Reading
    from medfl.common.site import Site
    from medfl.common.study import Study

State = Annotated[
    Path,
    typer.Option("--state", envvar="MEDFL_STATE", help="Folder of keys, approvals and the log."),
]
SiteFile = Annotated[
    Path,
    typer.Option("--site", envvar="MEDFL_SITE", help="The hospital's own file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HOME = Path("~/.medfl")
SITE = Path("site.toml")
DAY_S = 86400.0

audit_app = typer.Typer(no_args_is_help=True, help="The log of what this hospital did.")


def add_federation_commands(app: typer.Typer) -> None:
    """Add the commands of this file, in the order of their use."""
    for command in (enrol, studies, show, approve, withdraw, start, status, log, diagnose):
        app.command()(command)
    app.command("accept-key")(accept_key)
    app.add_typer(audit_app, name="audit")


def enrol(
    address: Annotated[str, typer.Argument(help="host:port of the coordinator.")],
    token: Annotated[
        str, typer.Option(envvar="MEDFL_TOKEN", help="What the coordinator sent.")
    ] = "",
    token_file: Annotated[Path | None, typer.Option(help="A file that holds the token.")] = None,
    state: State = HOME,
    as_json: AsJson = False,
) -> None:
    """Join a federation: make keys here, get a certificate for them, pin the coordinator's.

    The keys never leave this machine. Compare the fingerprint with the coordinator by telephone.

    Example: medfl-client enrol coordinator.example:443 --token medfl1.st-marys.…
    """
    cli.log_to_stderr(False)
    from medfl.client import enrolment
    from medfl.common import invitation

    text = token if token_file is None else _text(token_file)
    if not text:
        raise ConfigError("--token: is missing; ask the coordinator for an invitation")
    home = _home(state)
    made = enrolment.enrol(home, address, invitation.from_text(text))
    fingerprint = enrolment.authority_fingerprint(home)
    plain = {"site": made.site, "federation": made.federation, "fingerprint": fingerprint}
    lines = [
        f"Enrolled as {made.site} in {made.federation}. Keys are in {home.folder}.",
        f"Compare by telephone: {fingerprint}",
        "Next: medfl-client check, where site.toml is written; then medfl-client studies",
    ]
    _show(plain, lines, as_json)


def studies(state: State = HOME, site: SiteFile = SITE, as_json: AsJson = False) -> None:
    """List the studies that the coordinator offers, and where this hospital stands.

    Example: medfl-client studies
    """
    from medfl.client import consent, enrolment

    home = _home(state)
    own = _site(site) if site.exists() else None
    with enrolment.line_to(home) as line:
        found = consent.fetch(home, line)
    plain = [
        {"name": p.name, "digest": p.digest, "verdict": consent.verdict(home, p.digest, own)}
        for p in found
    ]
    lines = [f"{p['name']:20} {p['digest'][:12]}  {p['verdict']}" for p in plain]
    lines.append("Next: medfl-client show NAME")
    none = ["The coordinator has published no study yet. Next: medfl-client studies, another day"]
    _show({"studies": plain}, lines if plain else none, as_json)


def show(
    study: Annotated[str, typer.Argument(help="The study: name, or beginning of its digest.")],
    state: State = HOME,
    site: SiteFile = SITE,
    as_json: AsJson = False,
) -> None:
    """Say in words what a study computes, what leaves, under which privacy, and who asks.

    Example: medfl-client show lung --site site.toml
    """
    from medfl.client import consent, foreseen, words

    home = _home(state)
    published, found = consent.find(home, study)
    own = _site(site) if site.exists() else None
    told = words.describe(
        found, published, home.enrolment(), own, consent.before_it(home, published)
    )
    verdict = consent.verdict(home, found.digest, own)
    told += ["", f"This hospital: {verdict}."]
    refuses = [] if own is None else foreseen.by_site(found, own)
    if refuses:
        told += ["It would refuse every run of this study:", *(f"  {why}" for why in refuses)]
    else:
        told.append(f"Next: medfl-client approve {found.name}")
    plain = {
        "digest": found.digest,
        "verdict": verdict,
        "would_refuse": refuses,
        "words": told,
        "study": json.loads(published.study),
    }
    _show(plain, told, as_json)


def approve(
    study: Annotated[str, typer.Argument(help="The study: name, or beginning of its digest.")],
    state: State = HOME,
    site: SiteFile = SITE,
    days: Annotated[float, typer.Option(help="How long the approval lasts.")] = 90.0,
    among: Annotated[
        list[str] | None,
        typer.Option("--with", help="Under masks, sum with this hospital; all known ones."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the data, then sign this study for exactly these cases, with an end.

    Without it nothing runs here, whatever the coordinator sends.

    Example: medfl-client approve lung --days 30
    """
    cli.log_to_stderr(False)
    from medfl.client import consent, words
    from medfl.client.approved import book_file
    from medfl.client.book import Book

    home, own = _home(state), _site(site)
    published, found = consent.find(home, study)
    if not yes and not sys.stdin.isatty():
        raise ConfigError("There is nobody to ask: read `medfl-client show`, then say --yes")
    reading = _checked(home, own, found)
    consent.summed_with(home, found, among or (), own.policy.min_sum_sites)
    if not yes:
        before = consent.before_it(home, published)
        told = words.describe(found, published, home.enrolment(), own, before)
        typer.echo("\n".join(told), err=as_json)
        typer.echo("", err=as_json)
        what = "evaluation only" if reading.evaluates else f"{reading.cases} training cases"
        question = f"Sign {found.name} for {what} and {days:g} days?"
        typer.confirm(question, abort=True, err=as_json)
    book = Book.at(book_file(home, found.digest), found, own.policy.runs_per_approval)
    anew = book.used_up(consent.number(home, found.digest))
    decision = consent.approve(home, found, reading, days, among or (), anew)
    told, sent = _send(home, decision)
    plain = {
        "study": found.name,
        "digest": found.digest,
        "cohort": decision.cohort,
        "cases": reading.cases,
        "expires": decision.expires,
        "sent": sent,
    }
    lines = [f"{found.name}: {consent.verdict(home, found.digest, own)}.", *told]
    _show(plain, [*lines, "Next: medfl-client start"], as_json)


def withdraw(
    study: Annotated[str, typer.Argument(help="The study: name, or beginning of its digest.")],
    state: State = HOME,
    as_json: AsJson = False,
) -> None:
    """Take an approval back: here at once, and at the coordinator as soon as it hears of it.

    What earlier rounds have learned stays in the model.

    Example: medfl-client withdraw lung
    """
    from medfl.client import consent

    home = _home(state)
    lines, plain = [], {}
    for found in consent.approved_as(home, study):
        told, sent = _send(home, consent.withdraw(home, found.digest))
        name = f"{found.name} ({found.digest[:12]})"
        lines += [f"{name}: withdrawn. Nothing runs for it here.", *told]
        plain = {"study": found.name, "digest": found.digest, "sent": sent}
    _show(plain, lines, as_json)


def start(
    state: State = HOME,
    site: SiteFile = SITE,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Take part in the approved studies, in the foreground, until SIGTERM or Ctrl-C.

    Example: medfl-client start --site site.toml
    """
    cli.log_to_stderr(verbose)
    from medfl.client import service

    home, own = _home(state), _site(site)
    if own.name != home.enrolment().site:
        typer.echo(
            f"{site} says {own.name}, and the federation knows this hospital as "
            f"{home.enrolment().site}.",
            err=True,
        )
    service.serve(home, site.resolve(), typer.echo)
    typer.echo("Stopped; approvals and the log are kept.")


def status(
    state: State = HOME,
    site: Annotated[
        Path | None,
        typer.Option("--site", envvar="MEDFL_SITE", help="Else the client's own, or site.toml."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say who this hospital is, whether it is connected, and what it has approved.

    Example: medfl-client status --json
    """
    from dataclasses import asdict

    from medfl.client import consent, hatch, refusals
    from medfl.client.enrolment import ending
    from medfl.client.service import Status
    from medfl.common import certificates
    from medfl.common.kept import load_record
    from medfl.common.signing import key_fingerprint, public_of

    home = _home(state)
    enrolment = home.enrolment()
    days, holds = None, "The certificate is the network side's (medfl-client line)."
    if not hatch.is_hatch(enrolment.address):
        days = round((certificates.ends_at(home.identity()[1]) - home.clock()) / DAY_S, 1)
        holds = f"The certificate lasts {days:.0f} days; it renews itself while the client runs."
    said = load_record(home.folder / "status.json", Status)
    running = _running(home)
    now = said.state if said is not None and running else "not running"
    own, unread = _site_of(site or Path(said.site_file if said and said.site_file else SITE))
    names = {p.digest: p.name for p in home.published()}
    unlike = {digest: consent.unlike_others(home, digest) for digest in names}
    # Oldest first: of two studies with one name, the name stands for the newest.
    standing = [(p, consent.verdict(home, p.digest, own)) for p in reversed(home.published())]
    told = refusals.by_reason(home.audit.lines())
    key = key_fingerprint(public_of(home.signing_key()))
    plain = {
        "site": enrolment.site,
        "federation": enrolment.federation,
        "address": enrolment.address,
        "signing_key": key,
        "client": now,
        "certificate_days": days,
        "studies": {p.name: verdict for p, verdict in standing},
        "digests": {p.digest: verdict for p, verdict in standing},
        "refused": [asdict(each) for each in told],
        "unlike": {name: unlike[digest] for digest, name in names.items() if unlike[digest]},
    }
    lines = [
        f"{enrolment.site} in {enrolment.federation} ({enrolment.address}): {now}.",
        f"Fingerprint of this hospital's key, for others who ask by telephone: {key}",
        holds,
        *([] if days is None else ending(home)),
        *unread,
        *(f"{p.name} ({p.digest[:12]}): {verdict}" for p, verdict in standing),
        *(
            f"{names[digest]}: here is {field}"
            for digest, fields in unlike.items()
            for field in fields
        ),
        *refusals.lines(told, names),
        "Next: medfl-client studies" if running else "Next: medfl-client start",
    ]
    _show(plain, lines, as_json)


def log(
    state: State = HOME,
    last: Annotated[int, typer.Option(min=1, help="So many lines.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the last lines of what this hospital did.

    Example: medfl-client log --last 50
    """
    home = _home(state)
    home.enrolment()
    found = list(home.audit.lines())[-last:]
    told = [
        f"{e['n']:5} {e['at']} {e['what']} "
        + " ".join(f"{key}={str(value)[:40]}" for key, value in e["about"].items())
        for e in found
    ]
    _show({"lines": found}, [*told, "Next: medfl-client audit verify"], as_json)


@audit_app.command()
def verify(state: State = HOME, as_json: AsJson = False) -> None:
    """Check the log against itself and the coordinator's signatures; 7 where a line is bad.

    Example: medfl-client audit verify
    """
    from medfl.client import witness

    checked = witness.check(_home(state))
    if checked.bad is not None:
        raise StorageError(f"audit.jsonl: line {checked.bad.n} {checked.bad.why}")
    lines = [
        f"Whole: {checked.lines} lines, {checked.heads} heads countersigned by the coordinator."
    ]
    if checked.doubtful:
        lines.append(f"{checked.doubtful} countersignatures could not be checked.")
    plain = {"lines": checked.lines, "heads": checked.heads, "doubtful": checked.doubtful}
    _show(plain, lines, as_json)


def diagnose(
    state: State = HOME,
    site: SiteFile = SITE,
    out: Annotated[Path | None, typer.Option(help="Write the bundle here.")] = None,
) -> None:
    """Collect what helps to find a fault, as JSON without patients' data, names or paths.

    Example: medfl-client diagnose --out diagnose.json
    """
    from medfl.client.diagnose import bundle

    text = json.dumps(bundle(_home(state), site), indent=2)
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None
    typer.echo(f"Wrote {out}. Read it before you send it.")


def accept_key(
    site: Annotated[str, typer.Argument(help="Another hospital that has enrolled again.")],
    state: State = HOME,
) -> None:
    """Forget another hospital's pinned key, so that its new one is pinned at the next start.

    Example: medfl-client accept-key charite
    """
    from medfl.client import enrolment

    enrolment.forget_site(_home(state), site)
    typer.echo(f"The next key of {site} will be pinned. Next: medfl-client start")


def _home(state: Path) -> Home:
    from medfl.client.premises import Home

    return Home(state.expanduser())


def _site_of(path: Path) -> tuple[Site | None, list[str]]:
    """site.toml as it is now, and what to say where it cannot be read; both empty without one."""
    if not path.exists():
        return None, []
    try:
        return _site(path), []
    except MedflError as error:
        return None, [f"Nothing runs until {path} can be read: {error}"]


def _site(path: Path) -> Site:
    from medfl.common.private_files import refuse_writable
    from medfl.common.site import load_site

    # It is the hospital's policy: who can write it decides what leaves.
    if path.exists():
        refuse_writable(path)
    return load_site(path)


def _checked(home: Home, site: Site, study: Study) -> Reading:
    """What would be signed for: the cohort and this site.toml, as they are read now.

    Under privacy the cases are the declared ones, and nobody learns the digest.

    Raises:
        DataError: the data cannot serve the study. PolicyRefused: site.toml forbids it.
    """
    from medfl.client import budget
    from medfl.client.data.check import check_with_cohort, describe
    from medfl.client.reading import Reading, site_word

    site = site.of_study(study.name)
    result = check_with_cohort(site, study).result
    if result.exit_code != 0:
        typer.echo("\n".join(describe(result)), err=True)
        if result.exit_code == DataError.exit_code:
            raise DataError("The data cannot serve the study; nothing was signed.")
        raise PolicyRefused("site.toml forbids what the study asks; nothing was signed.")
    terms = budget.terms_of(study, site.privacy)
    word = site_word(home.signing_key(), site)
    evaluates = site.policy.evaluate_only
    if terms is None:
        return Reading(result.digest, result.cases["train"], word, evaluates=evaluates)
    budget.refuse_undeclared(terms)
    cases = 0 if evaluates else terms.n_cases or 1
    return Reading(result.digest, cases, word, blind=True, evaluates=evaluates)


def _send(home: Home, decision: Any) -> tuple[list[str], bool]:
    """Tell the coordinator; what to say to the person of that or of the clocks, and whether it is
    told."""
    from medfl.client import consent, enrolment

    try:
        with enrolment.line_to(home) as line:
            warning = consent.send(home, line, decision)
    except FederationError as error:
        return [f"It holds here. The coordinator hears of it at the next start: {error}"], False
    return [warning] if warning else [], True


def _running(home: Home) -> bool:
    from medfl.common.private_files import only_one

    try:
        with only_one(home.folder / "client.lock", "medfl-client"):
            return False
    except MedflError:
        return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"{path}: cannot be read ({why})") from None


def _show(plain: Any, lines: list[str], as_json: bool) -> None:
    typer.echo(json.dumps(plain) if as_json else "\n".join(lines))
