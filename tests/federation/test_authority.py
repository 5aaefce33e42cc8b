"""Who belongs: tokens, certificates and revocation, on the state folder and an injected clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from medfl.common import certificates, invitation
from medfl.common.audit import verify
from medfl.common.certificates import TlsKey, Wanted
from medfl.common.coordination import Enrol, Enrolled
from medfl.common.errors import ConfigError, PolicyRefused, StorageError
from medfl.common.invitation import Token
from medfl.common.signing import new_key, public_of, sign
from medfl.server import authority
from medfl.server.authority import DAY_S, PROOF, Guest
from medfl.server.federation import Federation, SiteRecord
from medfl.server.settings import ServerSettings, load_settings, open_federation, settings_text

START = 1_800_000_000.0


@dataclass
class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def federation(tmp_path: Path, clock: Clock) -> Federation:
    authority.init(tmp_path / "fed", ServerSettings(name="Lung study group"), clock.now)
    return open_federation(tmp_path / "fed", clock)


def request_of(folder: Path, token: Token, site: str | None = None) -> tuple[TlsKey, Enrol]:
    """What medfl-client sends, with keys kept in `folder`."""
    name = site or token.site
    folder.mkdir(exist_ok=True)
    signing = new_key(folder / f"{name}-{len(list(folder.iterdir()))}.key")
    key = certificates.new_tls_key()
    pem = certificates.request(name, key)
    proof = sign(signing, PROOF, {"request": pem, "site": name})
    return key, Enrol(name, pem, public_of(signing), proof)


def knock(federation: Federation, token: Token) -> Guest:
    """The holder of a token at the door."""
    _, shown = invitation.guest_certificate(token, federation.clock())
    guest = authority.identify(federation, certificates.pem_of(shown).encode())
    assert isinstance(guest, Guest)
    return guest


def join(federation: Federation, folder: Path, site: str, days: float = 90) -> Enrolled:
    token = authority.invite(federation, site, 24)
    _, asked = request_of(folder, token)
    return authority.enrol(federation, knock(federation, token), asked, days)


def who(federation: Federation, certificate: str) -> SiteRecord:
    found = authority.identify(federation, certificate.encode())
    assert isinstance(found, SiteRecord)
    return found


def test_init_makes_private_keys_and_a_second_time_changes_nothing(
    federation: Federation,
) -> None:
    files = {p: p.read_bytes() for p in sorted(federation.folder.rglob("*")) if p.is_file()}
    assert all(p.stat().st_mode & 0o077 == 0 for p in federation.folder.rglob("*"))
    authority.init(federation.folder, ServerSettings(name="other"), START)
    assert files == {p: p.read_bytes() for p in files}
    assert federation.name == "Lung study group"


def test_init_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    folder, settings = tmp_path / "fed", ServerSettings(name="x")
    first = authority.init(folder, settings, START)
    fingerprint = authority.authority_fingerprint(first)
    (folder / "server.toml").unlink()
    (first.keys / "gateway.pem").unlink()
    again = authority.init(folder, settings, START)
    assert authority.authority_fingerprint(again) == fingerprint
    assert load_settings(folder).name == "x"
    again.gateway()


def test_init_does_not_fill_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        authority.init(tmp_path, ServerSettings(name="x"), START)


def test_a_site_joins_with_a_token_and_is_known_by_its_certificate(
    federation: Federation, tmp_path: Path
) -> None:
    answer = join(federation, tmp_path / "site", "st-marys")
    record = who(federation, answer.certificate)
    assert (record.name, record.status) == ("st-marys", "active")
    shown = certificates.load_certificate(answer.certificate.encode(), "test")
    assert certificates.ends_at(shown) == START + 90 * DAY_S
    assert certificates.was_issued_by(shown, federation.authority()[1])
    whats = [line["what"] for line in federation.audit.lines()]
    assert whats == ["initialised", "invited", "enrolled"]
    assert verify(federation.audit.path) is None


def test_no_secret_of_a_token_is_kept(federation: Federation, tmp_path: Path) -> None:
    token = authority.invite(federation, "a", 24)
    key = certificates.key_pem(invitation.key_of(token))
    for file in federation.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert token.secret not in content
            assert token.secret.hex().encode() not in content
            assert key not in content
    assert "secret" not in repr(token)


def test_a_token_survives_a_mail_program_and_no_other_change(federation: Federation) -> None:
    text = invitation.to_text(authority.invite(federation, "st-marys", 24))
    assert len(text) < 600
    wrapped = "\n".join(text[i : i + 70] for i in range(0, len(text), 70)) + "\n"
    assert invitation.to_text(invitation.from_text(wrapped)) == text
    changed = text.replace("st-marys", "charite")
    flipped = text[:100] + ("A" if text[100] != "A" else "B") + text[101:]
    for wrong in (changed, flipped, text[:-1], text[:200], "", "medfl1.a.", "x" + text):
        with pytest.raises(ConfigError, match="not a whole token"):
            invitation.from_text(wrong)


def test_a_token_serves_once(federation: Federation, tmp_path: Path) -> None:
    token = authority.invite(federation, "a", 24)
    _, asked = request_of(tmp_path / "a", token)
    first = authority.enrol(federation, knock(federation, token), asked, 90)
    _, thief = request_of(tmp_path / "thief", token)
    with pytest.raises(PolicyRefused, match="has been used"):
        authority.enrol(federation, knock(federation, token), thief, 90)
    assert [line["what"] for line in federation.audit.lines()][-1] == "token replayed"
    # The answer got lost: the same request again is the same enrolment.
    again = authority.enrol(federation, knock(federation, token), asked, 90)
    assert again.certificate == first.certificate
    assert who(federation, first.certificate).signing_key == asked.signing_key


def test_a_token_lasts_24_hours(federation: Federation, tmp_path: Path, clock: Clock) -> None:
    token = authority.invite(federation, "a", 24)
    _, asked = request_of(tmp_path / "a", token)
    clock.now = START + 24 * 3600
    with pytest.raises(PolicyRefused, match="has expired"):
        authority.enrol(federation, knock(federation, token), asked, 90)
    clock.now -= 1
    authority.enrol(federation, knock(federation, token), asked, 90)
    clock.now = START + 9 * DAY_S
    with pytest.raises(PolicyRefused, match="has expired"):
        knock(federation, token)


def test_a_token_of_another_site_is_refused(federation: Federation, tmp_path: Path) -> None:
    token = authority.invite(federation, "a", 24)
    _, asked = request_of(tmp_path / "b", token, site="b")
    with pytest.raises(PolicyRefused, match="another site"):
        authority.enrol(federation, knock(federation, token), asked, 90)
    _, mixed = request_of(tmp_path / "b", token, site="b")
    with pytest.raises(PolicyRefused, match="another site"):
        authority.enrol(federation, knock(federation, token), replace(mixed, site="a"), 90)
    key = new_key(tmp_path / "other.key")
    pem = certificates.request("a", certificates.new_tls_key())
    said = Enrol("b", pem, public_of(key), sign(key, PROOF, {"request": pem, "site": "b"}))
    with pytest.raises(PolicyRefused, match="another site"):
        authority.enrol(federation, knock(federation, token), said, 90)
    assert federation.sites() == []


def test_a_newer_token_cancels_the_older(federation: Federation, tmp_path: Path) -> None:
    old = authority.invite(federation, "a", 24)
    new = authority.invite(federation, "a", 24)
    _, asked = request_of(tmp_path / "a", old)
    with pytest.raises(PolicyRefused, match="cancelled"):
        authority.enrol(federation, knock(federation, old), asked, 90)
    authority.enrol(federation, knock(federation, new), asked, 90)


def test_the_signing_key_must_be_the_sites_own(federation: Federation, tmp_path: Path) -> None:
    token = authority.invite(federation, "a", 24)
    _, asked = request_of(tmp_path / "a", token)
    _, other = request_of(tmp_path / "b", token)
    stolen = replace(asked, signing_key=other.signing_key)
    swapped = replace(asked, request=other.request)
    for mixed in (stolen, swapped):
        with pytest.raises(PolicyRefused, match="not signed by the signing key"):
            authority.enrol(federation, knock(federation, token), mixed, 90)


def test_a_token_holder_cannot_make_itself_a_site(federation: Federation, tmp_path: Path) -> None:
    """The token's key may sign certificates of any name; none of them is a site's."""
    join(federation, tmp_path / "a", "a")
    token = authority.invite(federation, "b", 24)
    key = invitation.key_of(token)
    issuer = invitation.anchor_name(invitation.identity_of(token))
    for claimed in (issuer, certificates.common_name(federation.authority()[1].subject)):
        made = certificates.issue(
            Wanted("a", START, DAY_S, use="client"), key.public_key(), claimed, key
        )
        pem = certificates.pem_of(made).encode()
        try:
            assert isinstance(authority.identify(federation, pem), Guest)
        except PolicyRefused:
            pass


def test_a_guest_must_hold_the_token_and_not_only_know_of_it(federation: Federation) -> None:
    token = authority.invite(federation, "a", 24)
    issuer = invitation.anchor_name(invitation.identity_of(token))
    other = certificates.new_tls_key()
    wanted = Wanted("guest", START, DAY_S, use="client")
    made = certificates.issue(wanted, other.public_key(), issuer, other)
    with pytest.raises(PolicyRefused, match="not known here"):
        authority.identify(federation, certificates.pem_of(made).encode())


def test_a_certificate_of_the_same_authority_alone_says_nothing(
    federation: Federation, tmp_path: Path
) -> None:
    join(federation, tmp_path / "a", "a")
    key, own = federation.authority()
    issuer = certificates.common_name(own.subject)
    for name in ("a", "nobody", "../../keys/authority", ""):
        wanted = Wanted(name or "x", START, DAY_S, use="client")
        made = certificates.issue(wanted, certificates.new_tls_key().public_key(), issuer, key)
        with pytest.raises(PolicyRefused):
            authority.identify(federation, certificates.pem_of(made).encode())


def test_a_revoked_site_is_refused_at_once_and_may_be_invited_again(
    federation: Federation, tmp_path: Path
) -> None:
    answer = join(federation, tmp_path / "a", "a")
    who(federation, answer.certificate)
    assert authority.revoke(federation, "a", "stolen laptop") is True
    assert authority.revoke(federation, "a", "again") is False
    with pytest.raises(PolicyRefused, match="was revoked"):
        who(federation, answer.certificate)
    newer = join(federation, tmp_path / "a", "a")
    assert who(federation, newer.certificate).status == "active"
    with pytest.raises(PolicyRefused, match="replaced by a newer one"):
        who(federation, answer.certificate)
    with pytest.raises(ConfigError, match="not enrolled"):
        authority.revoke(federation, "b", "")


def test_an_enrolled_site_is_invited_again_only_on_purpose(
    federation: Federation, tmp_path: Path
) -> None:
    join(federation, tmp_path / "a", "a")
    with pytest.raises(ConfigError, match="--again"):
        authority.invite(federation, "a", 24)
    authority.invite(federation, "a", 24, again=True)


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "-a", "a" * 64, "a/b", "ä"])
def test_a_name_that_could_be_a_path_is_refused(federation: Federation, name: str) -> None:
    with pytest.raises(ConfigError, match="no site name"):
        authority.invite(federation, name, 24)


def test_a_certificate_serves_90_days_and_is_renewed_over_itself(
    federation: Federation, tmp_path: Path, clock: Clock
) -> None:
    first = join(federation, tmp_path / "a", "a").certificate
    clock.now = START + 60 * DAY_S
    key = certificates.new_tls_key()
    request = certificates.request("a", key)
    second = authority.renew(federation, who(federation, first), request, 90).certificate
    # The answer got lost: the old one still serves to ask again, and again.
    third = authority.renew(federation, who(federation, first), request, 90).certificate
    fourth = authority.renew(federation, who(federation, first), request, 90).certificate
    assert who(federation, fourth).ends == START + 150 * DAY_S
    for stale in (second, third):
        with pytest.raises(PolicyRefused, match="replaced by a newer"):
            who(federation, stale)
    clock.now += DAY_S
    with pytest.raises(PolicyRefused, match="replaced by a newer"):
        who(federation, first)
    clock.now = START + 150 * DAY_S
    with pytest.raises(PolicyRefused, match="has expired"):
        who(federation, fourth)


def test_a_site_renews_only_itself(federation: Federation, tmp_path: Path) -> None:
    first = who(federation, join(federation, tmp_path / "a", "a").certificate)
    other = certificates.request("b", certificates.new_tls_key())
    with pytest.raises(PolicyRefused, match="another site"):
        authority.renew(federation, first, other, 90)
    for nonsense in ("", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA", "x" * 1000):
        with pytest.raises(PolicyRefused, match="not a sound"):
            authority.renew(federation, first, nonsense, 90)


def test_a_request_must_be_signed_by_the_key_that_it_names() -> None:
    """Or somebody could get a certificate for a key that is not his."""
    pem = certificates.request("a", certificates.new_tls_key())
    assert certificates.requested(pem)[0] == "a"
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    with pytest.raises(PolicyRefused, match="not a sound"):
        certificates.requested(forged)


def test_a_damaged_record_stops_rather_than_admits(federation: Federation, tmp_path: Path) -> None:
    answer = join(federation, tmp_path / "a", "a")
    file = federation.state / "sites" / "a.json"
    whole = file.read_bytes()
    for damage in (b"", whole[:-5], whole.replace(b"active", b"wished"), b"[]"):
        file.write_bytes(damage)
        with pytest.raises(StorageError):
            authority.identify(federation, answer.certificate.encode())
    file.write_bytes(whole)
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        authority.identify(federation, answer.certificate.encode())


def test_settings_are_read_from_file_then_environment_then_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(name='A "quoted" näme', listen="127.0.0.1:1")
    (tmp_path / "server.toml").write_text(settings_text(settings))
    assert load_settings(tmp_path) == settings
    monkeypatch.setenv("MEDFL_SERVER_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("MEDFL_SERVER_CERTIFICATE_DAYS", "7")
    assert load_settings(tmp_path).listen == "127.0.0.1:2"
    assert load_settings(tmp_path).certificate_days == 7
    assert load_settings(tmp_path, {"listen": "127.0.0.1:3"}).listen == "127.0.0.1:3"
    assert load_settings(tmp_path, {"listen": None}).listen == "127.0.0.1:2"
    monkeypatch.setenv("MEDFL_SERVER_LISTNE", "x")
    with pytest.raises(ConfigError, match="MEDFL_SERVER_LISTNE"):
        load_settings(tmp_path)
