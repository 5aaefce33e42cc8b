"""The gateway over real TLS on loopback: who gets in, who does not, and when that changes."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from medfl import __version__
from medfl.client import coordinator, enrolment, service, witness
from medfl.client.coordinator import Line, connected
from medfl.client.ledger import Ledger
from medfl.client.premises import Home
from medfl.common import certificates, coordination, invitation
from medfl.common import heads as heads_of
from medfl.common.audit import Head
from medfl.common.certificates import TlsKey, Wanted
from medfl.common.coordination import (
    AskStudies,
    Bye,
    Done,
    Enrol,
    Enrolled,
    HeadSeen,
    Heard,
    Report,
    ShowHead,
    Studies,
    Welcome,
)
from medfl.common.errors import (
    ConfigError,
    FederationError,
    LogRolledBack,
    PolicyRefused,
    StorageError,
)
from medfl.common.heads import Witness
from medfl.common.invitation import Token
from medfl.common.signing import public_of
from medfl.server import authority, heads
from medfl.server.authority import DAY_S
from medfl.server.federation import Federation
from medfl.server.gateway import Gateway, Peers, Sessions
from medfl.server.settings import ServerSettings, open_federation


@dataclass
class Clock:
    """TLS looks at the real clock, so this one starts there."""

    offset: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@dataclass
class World:
    """One coordinator that listens, with a clock that can be moved and a folder for sites."""

    federation: Federation
    settings: ServerSettings
    gateway: Gateway
    clock: Clock
    folder: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    def invited(self, site: str, hours: float = 24) -> Token:
        return authority.invite(self.federation, site, hours)

    def joined(self, site: str) -> Home:
        home = Home(self.folder / site, self.clock)
        enrolment.enrol(home, self.address, self.invited(site))
        return home


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    clock = Clock()
    settings = ServerSettings(name="Test", listen="127.0.0.1:0", workers=8)
    authority.init(tmp_path / "fed", settings, clock())
    federation = open_federation(tmp_path / "fed", clock)
    gateway = Gateway(federation, settings)
    gateway.start()
    yield World(federation, settings, gateway, clock, tmp_path)
    gateway.stop(0)


def no_ledger(home: Home) -> Ledger:
    return Ledger(home.folder / "ledger")


def studies(line: Line) -> Studies:
    return line.call("Studies", AskStudies(), Studies)


def test_a_site_enrols_and_speaks_under_its_own_name(world: World) -> None:
    home = world.joined("st-marys")
    assert home.folder.stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o077 == 0 for p in home.folder.rglob("*"))
    assert home.enrolment().coordinator_key == public_of(world.federation.signing_key())
    assert enrolment.authority_fingerprint(home) == authority.authority_fingerprint(
        world.federation
    )
    with enrolment.line_to(home) as line:
        assert studies(line).published == ()
    key = certificates.key_pem(home.identity()[0])
    assert not [
        p for p in world.federation.folder.rglob("*") if p.is_file() and key in p.read_bytes()
    ]


def test_enrolling_twice_changes_nothing_and_another_site_needs_another_folder(
    world: World,
) -> None:
    token = world.invited("a")
    home = Home(world.folder / "a", world.clock)
    first = enrolment.enrol(home, world.address, token)
    files = {p: p.read_bytes() for p in home.folder.iterdir()}
    assert enrolment.enrol(home, world.address, token) == first
    assert {p: p.read_bytes() for p in home.folder.iterdir()} == files
    with pytest.raises(ConfigError, match="enrolled already, as a"):
        enrolment.enrol(home, world.address, world.invited("b"))


def test_an_enrolment_whose_answer_was_lost_goes_on_with_the_same_keys(world: World) -> None:
    token = world.invited("a")
    home = Home(world.folder / "a", world.clock)
    enrolment.enrol(home, world.address, token)
    identity = home.identity_file.read_bytes()
    pending = home.folder / "identity.new"
    pending.write_bytes(certificates.key_pem(home.identity()[0]))
    pending.chmod(0o600)
    for lost in (home.enrolment_file, home.identity_file, home.authority_file):
        lost.unlink()
    enrolment.enrol(home, world.address, token)
    assert home.identity_file.read_bytes() == identity


def test_an_answer_that_is_not_what_was_asked_for_is_not_kept(world: World) -> None:
    key, authority_key = certificates.new_tls_key(), world.federation.authority()[0]
    own = world.federation.authority()[1]
    issuer = certificates.common_name(own.subject)

    def answered(name: str, of: TlsKey, by: TlsKey) -> Enrolled:
        wanted = Wanted(name, world.clock(), DAY_S, use="client")
        made = certificates.issue(wanted, of.public_key(), issuer, by)
        return Enrolled(certificates.pem_of(made), "0" * 64, "Test", world.clock())

    other = certificates.new_tls_key()
    enrolment._sound(answered("a", key, authority_key), "a", own, key)
    for wrong in (
        answered("b", key, authority_key),
        answered("a", other, authority_key),
        answered("a", key, other),
    ):
        with pytest.raises(FederationError, match="not a certificate for this site's key"):
            enrolment._sound(wrong, "a", own, key)


def test_a_replayed_token_is_refused_over_the_wire(world: World) -> None:
    token = world.invited("a")
    enrolment.enrol(Home(world.folder / "a", world.clock), world.address, token)
    with pytest.raises(PolicyRefused, match="has been used"):
        enrolment.enrol(Home(world.folder / "thief", world.clock), world.address, token)


def test_a_token_older_than_24_hours_is_refused_over_the_wire(world: World) -> None:
    token = world.invited("a")
    world.clock.offset = 24 * 3600 + 1
    site = Home(world.folder / "a")
    with pytest.raises(PolicyRefused, match="has expired"):
        enrolment.enrol(site, world.address, token)
    world.clock.offset = 0
    enrolment.enrol(site, world.address, token)


def test_without_a_certificate_there_is_not_even_a_handshake(world: World) -> None:
    roots = certificates.pem_of(world.federation.authority()[1]).encode()
    name = certificates.server_name(world.federation.authority()[1])
    options = [("grpc.ssl_target_name_override", name)]
    credentials = grpc.ssl_channel_credentials(roots)
    with grpc.secure_channel(world.address, credentials, options) as channel:
        for method in ("Enrol", "Studies", "Hello"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/medfl.Coordinator/{method}")(b"{}", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(world.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/medfl.Coordinator/Studies")(b"{}", timeout=5)


@pytest.mark.parametrize("method", [m for m in coordination.METHODS if m != "Enrol"])
def test_with_a_token_only_enrolment_answers(world: World, method: str) -> None:
    token = world.invited("a")
    key, guest = invitation.guest_certificate(token, world.clock())
    with connected(world.address, invitation.authority_of(token), key, guest) as line:
        call = line.channel.unary_unary(f"/medfl.Coordinator/{method}")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"{}", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_site_cannot_enrol_and_unknown_calls_do_not_answer(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        with pytest.raises(PolicyRefused, match="needs a token"):
            line.call("Enrol", Enrol("b", "", "", ""), Enrolled)
        for path in ("/medfl.Coordinator/Init", "/v1/control/list-runs", "/docs"):
            with pytest.raises(grpc.RpcError) as refused:
                line.channel.unary_unary(path)(b"{}", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_certificate_of_another_authority_is_refused_by_both_sides(
    world: World, tmp_path: Path
) -> None:
    home = world.joined("a")
    authority.init(tmp_path / "evil", ServerSettings(name="Evil"), world.clock())
    evil = open_federation(tmp_path / "evil", world.clock)
    key, own = evil.authority()
    mine = certificates.new_tls_key()
    wanted = Wanted("a", world.clock(), DAY_S, use="client")
    made = certificates.issue(wanted, mine.public_key(), certificates.common_name(own.subject), key)
    with connected(world.address, home.authority(), mine, made) as line:
        with pytest.raises(FederationError, match="cannot be reached"):
            studies(line)
    # The same name on a server of another authority: the site sends nothing.
    gateway = Gateway(evil, replace(world.settings, listen="127.0.0.1:0"))
    gateway.start()
    try:
        with enrolment.line_to(home, f"127.0.0.1:{gateway.port}") as line:
            with pytest.raises(FederationError, match="is not the coordinator"):
                studies(line)
    finally:
        gateway.stop(0)


def test_a_site_cannot_pose_as_the_gateway(world: World) -> None:
    """Its certificate is of the right authority, but for a client and without the name."""
    home, other = world.joined("a"), world.joined("b")
    key, shown = other.identity()
    server = grpc.server(ThreadPoolExecutor(1))
    pair = (certificates.key_pem(key), certificates.pem_of(shown).encode())
    roots = certificates.pem_of(home.authority()).encode()
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
    )
    server.start()
    try:
        with enrolment.line_to(home, f"127.0.0.1:{port}") as line:
            with pytest.raises(FederationError, match="is not the coordinator"):
                studies(line)
    finally:
        server.stop(0)


def test_only_tls_1_3_is_spoken(world: World) -> None:
    home = world.joined("a")

    def handshake(version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        # In TLS 1.2 a handshake without a certificate fails for that reason already.
        context.load_cert_chain(home.identity_file)
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", world.gateway.port)) as plain:
            with context.wrap_socket(plain) as secured:
                return secured.version()

    assert handshake(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(ssl.TLSVersion.TLSv1_2)


def test_a_call_over_an_older_tls_is_refused_even_where_the_handshake_was_not(
    world: World,
) -> None:
    class Context:
        """What grpcio says of a connection."""

        def auth_context(self) -> dict[str, list[bytes]]:
            return {"ssl_tls_version": [b"TLSv1.2"], "x509_pem_cert": [b"whatever"]}

        def abort(self, code: grpc.StatusCode, text: str) -> None:
            raise PolicyRefused(f"{code}: {text}")

    with pytest.raises(PolicyRefused, match=r"UNAUTHENTICATED: Only TLS 1\.3"):
        world.gateway.peers.who(Context())


def test_a_revocation_holds_at_the_next_call_of_an_open_connection(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        studies(line)
        authority.revoke(world.federation, "a", "stolen laptop")
        with pytest.raises(PolicyRefused, match="was revoked"):
            studies(line)


def test_an_expired_certificate_is_refused_in_mid_session(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        studies(line)
        world.clock.offset = 91 * DAY_S
        with pytest.raises(PolicyRefused, match="has expired"):
            studies(line)
    with pytest.raises(PolicyRefused, match="certificate has expired"):
        with enrolment.line_to(home):
            pass


def test_a_certificate_expired_by_the_real_clock_gets_no_handshake(world: World) -> None:
    home = world.joined("a")
    key, own = world.federation.authority()
    mine, issuer = home.identity()[0], certificates.common_name(own.subject)
    wanted = Wanted("a", world.clock() - 7200, 3600, use="client")
    old = certificates.issue(wanted, mine.public_key(), issuer, key)
    with connected(world.address, own, mine, old) as line:
        with pytest.raises(FederationError, match="cannot be reached"):
            studies(line)


def aged(world: World, home: Home, days: float) -> None:
    """Give the site a certificate that was made `days` ago, by the real clock too."""
    record = world.federation.site(home.enrolment().site)
    assert record is not None
    key = certificates.new_tls_key()
    world.clock.offset = -days * DAY_S
    request = certificates.request(record.name, key)
    pem = authority.renew(world.federation, record, request, 90).certificate
    world.clock.offset = 0
    shown = certificates.load_certificate(pem.encode(), "test")
    certificates.save_pair(home.identity_file, key, shown)


def test_a_certificate_renews_itself_when_a_third_of_its_life_is_left(world: World) -> None:
    home = world.joined("a")
    aged(world, home, 59)
    before = home.identity_file.read_bytes()
    with enrolment.line_to(home) as line:
        studies(line)
    assert home.identity_file.read_bytes() == before
    aged(world, home, 61)
    old_key = certificates.key_pem(home.identity()[0])
    with enrolment.line_to(home) as line:
        studies(line)
    key, shown = home.identity()
    assert certificates.key_pem(key) != old_key
    assert certificates.ends_at(shown) - world.clock() == pytest.approx(90 * DAY_S, abs=60)
    record = world.federation.site("a")
    assert record is not None
    assert record.certificate == certificates.digest_of(shown)


def test_a_coordinator_that_is_away_does_not_stop_a_certificate_that_holds(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    home = world.joined("a")
    world.clock.offset = 80 * DAY_S
    assert not enrolment.renew_if_due(home, "127.0.0.1:1")
    assert "ends in 10 days" in caplog.text


def test_the_gateway_refuses_to_start_with_an_expired_certificate(world: World) -> None:
    world.clock.offset = 91 * DAY_S
    with pytest.raises(ConfigError, match="medfl-server renew"):
        Gateway(world.federation, world.settings)
    authority.renew_gateway(world.federation, world.settings)
    Gateway(world.federation, world.settings).stop(0)
    world.clock.offset = 3651 * DAY_S
    with pytest.raises(ConfigError, match="authority has expired"):
        Gateway(world.federation, world.settings)


def test_certificates_in_their_last_two_weeks_are_named_on_both_sides(world: World) -> None:
    home = world.joined("a")
    assert enrolment.ending(home) == authority.ending(world.federation) == []
    world.clock.offset = 80 * DAY_S
    assert [text[:41] for text in enrolment.ending(home)] == [
        "This site's certificate ends in 10 days. "
    ]
    assert [text[:43] for text in authority.ending(world.federation)] == [
        "The gateway's certificate ends in 10 days. "
    ]
    world.clock.offset = (authority.AUTHORITY_DAYS - 3) * DAY_S
    assert any("authority ends in 3 days" in text for text in enrolment.ending(home))
    assert any("authority ends in 3 days" in text for text in authority.ending(world.federation))


def test_the_gateway_refuses_to_start_with_a_damaged_signing_key(world: World) -> None:
    (world.federation.keys / "coordinator.key").write_bytes(b"")
    with pytest.raises(StorageError, match=r"coordinator\.key: is empty"):
        Gateway(world.federation, world.settings)


def test_a_gateway_whose_certificate_has_expired_is_refused_with_the_reason(world: World) -> None:
    home = world.joined("a")
    world.clock.offset = -91 * DAY_S
    authority.renew_gateway(world.federation, world.settings)
    # By the clock of that time, which the server goes by, the certificate is fresh.
    shut = Gateway(world.federation, replace(world.settings, listen="127.0.0.1:0"))
    shut.start()
    key, shown = home.identity()
    try:
        with connected(f"127.0.0.1:{shut.port}", home.authority(), key, shown) as line:
            with pytest.raises(FederationError, match="expired or is not yet valid"):
                studies(line)
    finally:
        shut.stop(0)


def test_a_port_in_use_is_said_plainly(world: World) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        Gateway(world.federation, replace(world.settings, listen=world.address))


def test_one_session_a_site(world: World) -> None:
    home, other = world.joined("a"), world.joined("b")
    now = [0.0]
    world.gateway.peers.sessions.clock = lambda: now[0]
    with enrolment.line_to(home) as line, enrolment.line_to(other) as second:
        enrolment.greet(home, line, "first", __version__)
        enrolment.greet(other, second, "first", __version__)
        with pytest.raises(PolicyRefused, match="try again in 20 s"):
            enrolment.greet(home, line, "second", __version__)
        enrolment.greet(home, line, "first", __version__)
        now[0] = 15
        line.call("Report", Report("first", "waiting"), Heard)
        with pytest.raises(PolicyRefused, match="is not live"):
            line.call("Report", Report("second", "waiting"), Heard)
        now[0] = 30
        with pytest.raises(PolicyRefused, match="try again in 5 s"):
            enrolment.greet(home, line, "second", __version__)
        now[0] = 36
        enrolment.greet(home, line, "second", __version__)
        line.call("Bye", Bye("first"), Done)
        with pytest.raises(PolicyRefused):
            enrolment.greet(home, line, "third", __version__)
        line.call("Bye", Bye("second"), Done)
        enrolment.greet(home, line, "third", __version__)
    whats = [line["what"] for line in world.federation.audit.lines()]
    assert whats.count("second session refused") == 3


def test_a_client_with_a_skewed_clock_is_told_so_and_the_next_start_is_not_taken_for_a_second(
    world: World, tmp_path: Path
) -> None:
    """Ten minutes ahead: the next start read that another client was running with the same keys."""
    home, said, stopping = world.joined("a"), list[str](), threading.Event()

    def hear(text: str) -> None:
        said.append(text)
        stopping.set()

    ahead = replace(home, clock=lambda: world.clock() + 600)
    service.serve(ahead, tmp_path / "site.toml", hear, stopping)
    assert "this machine's clock is 10 minutes ahead of the coordinator's" in said[-1]
    with enrolment.line_to(home) as line:
        enrolment.greet(home, line, "next", __version__)


def test_a_second_client_that_knocks_all_night_fills_a_few_lines(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        enrolment.greet(home, line, "first", __version__)
        for _ in range(25):
            with pytest.raises(PolicyRefused, match="Another medfl-client"):
                enrolment.greet(home, line, "second", __version__)
    lines = [e for e in world.federation.audit.lines() if e["what"] == "second session refused"]
    assert [e["about"]["times"] for e in lines] == [1] * 10


def test_other_sites_keys_are_pinned_and_a_changed_one_is_refused(world: World) -> None:
    home, other = world.joined("a"), world.joined("b")
    with enrolment.line_to(home) as line:
        enrolment.greet(home, line, "s", __version__)
    pinned = home.enrolment().sites
    record = world.federation.site("b")
    assert record is not None
    assert pinned == {"b": record.signing_key}
    token = authority.invite(world.federation, "b", 24, again=True)
    enrolment.enrol(Home(world.folder / "b2", world.clock), world.address, token)
    with enrolment.line_to(home) as line:
        with pytest.raises(PolicyRefused, match="not the one that was pinned"):
            enrolment.greet(home, line, "s", __version__)
        enrolment.forget_site(home, "b")
        enrolment.greet(home, line, "s", __version__)
    assert home.enrolment().sites != pinned
    # The old folder of b is shut out by the new enrolment.
    with enrolment.line_to(other) as line, pytest.raises(PolicyRefused, match="replaced"):
        studies(line)


def test_clocks_that_differ_are_named(world: World) -> None:
    home = world.joined("a")
    slow = Home(home.folder, lambda: world.clock() - 600)
    with enrolment.line_to(slow) as line:
        with pytest.raises(FederationError, match=r"clock skew.*10 minutes behind"):
            enrolment.greet(slow, line, "s", __version__)


def test_heads_are_exchanged_and_each_side_can_show_what_was_cut(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        for _ in range(3):
            witness.exchange(home, line, no_ledger(home))
    mine, theirs = witness.check(home), heads.check(world.federation)
    assert (mine.bad, mine.heads, mine.doubtful) == (None, 3, 0)
    assert (theirs.bad, theirs.heads, theirs.doubtful) == (None, 2, 0)
    for path, check in (
        (home.audit.path, lambda: witness.check(home).bad),
        (world.federation.audit.path, lambda: heads.check(world.federation).bad),
    ):
        whole = path.read_bytes()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-4]))
        bad = check()
        assert bad is not None
        assert "countersigned" in bad.why
        path.write_bytes(whole)
        assert check() is None


def test_a_log_that_was_rolled_back_is_refused_by_the_other_side(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        witness.exchange(home, line, no_ledger(home))
        witness.exchange(home, line, no_ledger(home))
        whole = home.audit.path.read_bytes()
        home.audit.path.write_bytes(whole.splitlines(keepends=True)[0])
        with pytest.raises(PolicyRefused, match="audit log of a had"):
            witness.exchange(home, line, no_ledger(home))
        # Put right again, it is still refused until somebody at the coordinator says so.
        home.audit.path.write_bytes(whole)
        with pytest.raises(PolicyRefused, match="accept-log a"):
            witness.exchange(home, line, no_ledger(home))
        assert heads.accept(world.federation, "a") > 1
        witness.exchange(home, line, no_ledger(home))
        # And the coordinator's: as if it were restored from an old backup.
        theirs = world.federation.audit.path
        theirs.write_bytes(b"".join(theirs.read_bytes().splitlines(keepends=True)[:3]))
        (world.federation.state / "heads" / "a.json").unlink()
        with pytest.raises(LogRolledBack, match="log of the coordinator had"):
            witness.exchange(home, line, no_ledger(home))
        # It grows with every call, and stays refused until somebody here says otherwise.
        for _ in range(10):
            world.federation.record("grows")
        with pytest.raises(LogRolledBack, match="accept-log"):
            witness.exchange(home, line, no_ledger(home))
        assert witness.accept(home).whose == "the coordinator"
        witness.exchange(home, line, no_ledger(home))
        with pytest.raises(ConfigError, match="nothing to do"):
            witness.accept(home)


def test_a_coordinator_that_was_put_back_and_has_grown_past_the_hospitals_line_is_noticed(
    world: World,
) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        witness.exchange(home, line, no_ledger(home))
        theirs = world.federation.audit.path
        early = theirs.read_bytes()
        world.federation.record("a round")
        witness.exchange(home, line, no_ledger(home))
        theirs.write_bytes(early)
        (world.federation.state / "heads" / "a.json").unlink()
        for _ in range(9):
            world.federation.record("grows")
        with pytest.raises(LogRolledBack, match="or another line there"):
            witness.exchange(home, line, no_ledger(home))


def test_a_hospital_that_was_put_back_and_has_grown_since_notices_by_itself(world: World) -> None:
    """As after a snapshot of a virtual machine: longer than the coordinator knows, and another."""
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        witness.exchange(home, line, no_ledger(home))
        before = {f: f.read_bytes() for f in home.folder.iterdir() if f.is_file()}
        home.record("answered", round=1)
        witness.exchange(home, line, no_ledger(home))
        for file, content in before.items():
            file.write_bytes(content)
        for _ in range(9):
            home.record("client started")
        with pytest.raises(LogRolledBack, match="log of this hospital had"):
            witness.exchange(home, line, no_ledger(home))


def test_a_site_that_enrols_again_begins_a_log_of_its_own(world: World) -> None:
    home = world.joined("a")
    for _ in range(5):
        home.record("something")
    with enrolment.line_to(home) as line:
        witness.exchange(home, line, no_ledger(home))
    again = Home(home.folder.parent / "again", world.clock)
    enrolment.enrol(again, world.address, authority.invite(world.federation, "a", 1, again=True))
    with enrolment.line_to(again) as line:
        witness.exchange(again, line, no_ledger(again))
    assert witness.check(again).bad is None


@dataclass
class Forging:
    """A line that changes what the coordinator says of heads."""

    line: Line
    change: Callable[[HeadSeen], HeadSeen]

    def call(self, method: str, message: object, answer: type) -> object:
        return self.change(self.line.call(method, message, answer))


def test_a_head_that_is_not_signed_by_the_pinned_key_is_not_kept(world: World) -> None:
    home, other = world.joined("a"), world.joined("b")
    mine = other.signing_key()

    def resigned(seen: Witness) -> Witness:
        return heads_of.witness(mine, seen.of, seen.by, Head(seen.n, seen.hash), seen.at)

    with enrolment.line_to(home) as line:
        for change in (
            lambda answer: replace(answer, own=resigned(answer.own)),
            lambda answer: replace(answer, seen=resigned(answer.seen)),
            lambda answer: replace(answer, seen=replace(answer.seen, n=answer.seen.n + 1)),
            lambda answer: replace(answer, own=answer.seen),
        ):
            with pytest.raises(FederationError, match="is not right"):
                witness.exchange(home, Forging(line, change), no_ledger(home))  # type: ignore[arg-type]
    assert not home.witnesses.exists()
    # And the other way: a site that countersigns with another key, or for another's log.
    record = world.federation.site("a")
    assert record is not None
    key, title = home.signing_key(), world.federation.title
    head, now = home.audit.head(), world.clock()
    own = heads_of.witness(key, "a", "a", head, now)
    for seen in (
        heads_of.witness(mine, title, "a", Head(1, "0" * 64), now),
        heads_of.witness(key, "b", "a", Head(1, "0" * 64), now),
        heads_of.witness(mine, title, "b", Head(1, "0" * 64), now),
    ):
        with pytest.raises(PolicyRefused, match="not this site's"):
            heads.exchange(world.federation, record, ShowHead(own=own, seen=seen))
    with pytest.raises(PolicyRefused, match="not signed by the key pinned"):
        heads.exchange(world.federation, record, ShowHead(own=resigned(own)))
    assert not world.federation.witnesses.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"session":1,"version":"x"}',
        b'{"session":"s","version":"x","more":1}',
        b"[" * 100_000,
        b'{"session":"' + b"x" * coordination.MAX_BODY + b'","version":"x"}',
    ],
)
def test_nonsense_is_refused_and_not_repeated(
    world: World, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    home = world.joined("a")
    caplog.set_level(logging.DEBUG)
    with enrolment.line_to(home) as line:
        with pytest.raises(grpc.RpcError) as refused:
            line.channel.unary_unary("/medfl.Coordinator/Hello")(body, timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "same version" in str(refused.value.details())
        assert len(caplog.text) < 5000
        assert isinstance(enrolment.greet(home, line, "s", __version__), Welcome)


def test_a_body_above_the_cap_is_not_read(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home) as line:
        options = [("grpc.max_send_message_length", -1)]
        key, shown = home.identity()
        credentials = grpc.ssl_channel_credentials(
            certificates.pem_of(home.authority()).encode(),
            certificates.key_pem(key),
            certificates.pem_of(shown).encode(),
        )
        name = certificates.server_name(home.authority())
        options += [("grpc.ssl_target_name_override", name)]
        with grpc.secure_channel(world.address, credentials, options) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/medfl.Coordinator/Hello")(bytes(9 * 2**20), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        studies(line)


def test_another_service_of_the_port_learns_the_caller_from_the_certificate(
    tmp_path: Path,
) -> None:
    clock = Clock()
    settings = ServerSettings(name="Test", listen="127.0.0.1:0", workers=4)
    authority.init(tmp_path / "fed", settings, clock())
    federation = open_federation(tmp_path / "fed", clock)
    peers = Peers(federation, Sessions())

    def say(body: bytes, context: grpc.ServicerContext) -> bytes:
        return peers.site_of(context).encode()

    echo = grpc.method_handlers_generic_handler(
        "other.Service", {"Who": grpc.unary_unary_rpc_method_handler(say)}
    )
    gateway = Gateway(federation, settings, peers, [echo])
    gateway.start()
    world = World(federation, settings, gateway, clock, tmp_path)
    try:
        home, token = world.joined("a"), world.invited("b")
        with enrolment.line_to(home) as line:
            who = line.channel.unary_unary("/other.Service/Who")
            assert who(b"b", timeout=5) == b"a"
            authority.revoke(federation, "a", "gone")
            with pytest.raises(grpc.RpcError, match="revoked"):
                who(b"", timeout=5)
        key, guest = invitation.guest_certificate(token, clock())
        with connected(world.address, invitation.authority_of(token), key, guest) as line:
            with pytest.raises(grpc.RpcError, match="only serves to enrol"):
                line.channel.unary_unary("/other.Service/Who")(b"", timeout=5)
    finally:
        gateway.stop(0)


def test_an_address_that_nobody_answers_at_is_said_plainly(world: World) -> None:
    home = world.joined("a")
    with enrolment.line_to(home, "127.0.0.1:1") as line:
        with pytest.raises(FederationError, match="cannot be reached"):
            studies(line)
    assert coordinator.MAX_SKEW_S == 300


@pytest.mark.parametrize("address", ["host", "host:", "host:x", ":443", "https://host:443", "h:0"])
def test_an_address_has_host_and_port(world: World, address: str) -> None:
    with pytest.raises(ConfigError, match="host and port"):
        enrolment.enrol(Home(world.folder / "a"), address, world.invited("a"))


def test_a_hospital_behind_an_http_proxy_reaches_the_coordinator(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = world.joined("a")
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=proxy, args=(listener, asked), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with enrolment.line_to(home) as line:
            assert studies(line).published == ()
    assert asked[0].startswith(f"CONNECT {world.address}".encode())


def proxy(listener: socket.socket, asked: list[bytes]) -> None:
    """One CONNECT, then bytes both ways until either side ends."""
    try:
        near, _ = listener.accept()
    except OSError:
        return
    asked.append(near.recv(4096))
    host, _, port = asked[0].split()[1].decode().partition(":")
    with near, socket.create_connection((host, int(port))) as far:
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=pump, args=(far, near), daemon=True)
        back.start()
        pump(near, far)
        back.join(5)


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_a_handshake_replaces_nothing_that_is_as_before(world: World) -> None:
    """gRPC dies now and then where it replaces certificates while others connect."""
    fetched = world.gateway._changed
    assert fetched() is None
    world.invited("north")
    assert fetched() is not None
    assert fetched() is None
    authority.renew_gateway(world.federation, world.settings)
    assert fetched() is not None
    assert fetched() is None
