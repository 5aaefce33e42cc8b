"""A whole secure sum: what comes out, what is refused, and what the coordinator sees."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats

from medfl.common.errors import FederationError, PolicyRefused, TooFewUpdates
from medfl.common.secure import exchange as said
from medfl.common.secure.collector import Collector
from medfl.common.secure.exchange import Agreement, Exchange, Present, Revealed, Unmask
from medfl.common.secure.member import advertise
from medfl.common.secure.rings import RINGS, Ring, add_stream, signed, to_wire

FULL = Ring(4)
EXCHANGE = Exchange(study="s" * 64, run="main", round=3, attempt=0)
NAMES = tuple(f"h{i}" for i in range(6))  # threshold 5 at two thirds, 4 at a half


def plain_sum(updates, names, ring=FULL):
    return sum(signed(updates[n], ring) for n in names)


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_the_sum_is_that_of_the_plain_integers(table, updates, ring) -> None:
    found = updates(NAMES, ring)
    assert (signed(table(NAMES, ring).play(found), ring) == plain_sum(found, NAMES, ring)).all()


STEPS = ("no_keys", "no_shares", "no_update", "no_unmasking")


@pytest.mark.parametrize("step", STEPS)
def test_sites_may_fall_silent_at_any_step_down_to_the_threshold(table, updates, step) -> None:
    found = updates(NAMES)
    for gone in combinations(NAMES, 2):  # 4 of 6 are left, the threshold at a half
        total = table(NAMES, share=0.5).play(found, **{step: gone})
        left = [n for n in NAMES if n not in gone or step == "no_unmasking"]
        assert (signed(total, FULL) == plain_sum(found, left)).all()


def test_sites_may_fall_silent_at_different_steps(table, updates) -> None:
    found = updates((*NAMES, "h6", "h7"))
    gone = {"no_keys": ["h0"], "no_shares": ["h1"], "no_update": ["h3"], "no_unmasking": ["h5"]}
    total = table(tuple(found), share=0.5).play(found, **gone)  # 4 of 7 unmask
    left = ("h2", "h4", "h5", "h6", "h7")
    assert (signed(total, FULL) == plain_sum(found, left)).all()


@pytest.mark.parametrize("step", STEPS[1:])
def test_one_site_below_the_threshold_ends_the_round(table, updates, step) -> None:
    with pytest.raises(TooFewUpdates, match="needs 4"):
        table(NAMES, share=0.5).play(updates(NAMES), **{step: NAMES[:3]})


def test_the_sum_does_not_depend_on_the_order_of_arrival(table, updates) -> None:
    found = updates(NAMES)
    one = table(NAMES).play(found)
    other = table(NAMES).play(found, order=lambda sites: sorted(sites, reverse=True))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_what_the_coordinator_receives_of_one_update_is_uniform(table, updates, ring) -> None:
    """Each byte of each masked update by chi-square, and the words by Kolmogorov-Smirnov."""
    n = 60_000
    played = table(NAMES, ring)
    found = updates(NAMES, ring, n)
    played.play(found)
    assert len(played.received) == len(NAMES)
    for sent, name in zip(played.received, NAMES, strict=True):
        octets = np.frombuffer(sent, np.uint8).reshape(n, ring.width)
        for place in range(ring.width):
            counts = np.bincount(octets[:, place], minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-7
        weights = 256.0 ** np.arange(ring.width)
        unit = (octets @ weights + 0.5) / 256.0**ring.width
        assert stats.kstest(unit, "uniform").pvalue > 1e-7
        own = signed(found[name], ring).astype(float)
        assert abs(stats.pearsonr(unit, own).statistic) < 5 / np.sqrt(n)


def test_all_but_one_masked_updates_together_are_still_uniform(table, updates) -> None:
    """Whoever adds up five of six has the sixth's streams, and nothing of the updates."""
    played = table(NAMES)
    played.play(updates(NAMES, n=60_000))
    words = [np.frombuffer(sent, "<u4") for sent in played.received]
    partial = sum(words[1:], np.zeros_like(words[0]))
    assert stats.kstest((partial + 0.5) / 2**32, "uniform").pvalue > 1e-7


def test_the_uniformity_test_sees_an_update_without_its_masks(updates) -> None:
    word = updates(["a"], n=60_000)["a"]
    assert stats.kstest((word + 0.5) / 2**32, "uniform").pvalue < 1e-9


# What a site refuses.


def agreed(table, share: float = 2 / 3, fewest: int = 2):
    """A table whose sites have shared; the agreement, and the coordinator's collector."""
    played = table(NAMES, share=share, fewest=fewest)
    agreement = played.advertise()
    collector = Collector(agreement, FULL, 8)
    for site in NAMES:
        collector.post(site, played.agree(site, agreement))
    return played, agreement, collector


def masked(table, updates, dead=(), share: float = 2 / 3):
    """The same after the masked updates of all but `dead`."""
    played, agreement, collector = agreed(table, share)
    found = updates(NAMES, n=8)
    for site in NAMES:
        if site not in dead:
            sent = played.mask(site, collector.present(), found[site])
            assert collector.add(site, to_wire(sent, FULL))
    return played, agreement, collector


def test_a_site_called_alive_and_dead_is_not_unmasked(table, updates) -> None:
    played, _, collector = masked(table, updates)
    asked = replace(collector.ask("h0"), dead=("h3",))
    with pytest.raises(PolicyRefused, match="h3 is called alive and dead"):
        played.unmask("h0", asked)


def test_a_site_is_not_unmasked_as_alive_once_and_as_dead_another_time(table, updates) -> None:
    played, _, collector = masked(table, updates)
    first = collector.ask("h0")
    answered = played.unmask("h0", first)
    assert played.unmask("h0", first) == answered  # the same question has the same answer
    alive = tuple(n for n in NAMES if n != "h3")
    with pytest.raises(PolicyRefused, match="for another sum"):
        played.unmask("h0", replace(first, alive=alive, dead=("h3",)))


def test_a_living_site_does_not_believe_that_it_is_dead(table, updates) -> None:
    played, _, collector = masked(table, updates)
    asked = collector.ask("h0")
    alive = tuple(n for n in NAMES if n != "h0")
    with pytest.raises(PolicyRefused, match="called dead"):
        played.unmask("h0", replace(asked, alive=alive, dead=("h0",)))


@pytest.mark.parametrize("alive", [NAMES[:5], (*NAMES, "h9"), (*NAMES, "h1")])
def test_masks_come_off_for_those_sites_that_they_were_made_for(table, updates, alive) -> None:
    played, _, collector = masked(table, updates)
    with pytest.raises(PolicyRefused, match="other sites"):
        played.unmask("h0", replace(collector.ask("h0"), alive=alive))


def test_fewer_living_sites_than_the_threshold_are_not_unmasked(table, updates) -> None:
    played, _, collector = masked(table, updates)
    asked = replace(collector.ask("h0"), alive=NAMES[:4], dead=NAMES[4:])
    with pytest.raises(PolicyRefused, match="over 4 sites"):
        played.unmask("h0", asked)


def test_a_sites_own_minimum_counts_beside_the_threshold(table, updates) -> None:
    played, _, collector = masked(table, updates, dead=["h5"], share=0.5)
    played.fewest = 6
    with pytest.raises(PolicyRefused, match="over 5 sites hides too little: at least 6"):
        played.unmask("h0", collector.ask("h0"))


def test_a_site_masks_nothing_among_fewer_than_its_own_minimum(table, updates) -> None:
    played, _, _ = agreed(table)
    present = Present(NAMES[:5])
    played.fewest = 6
    with pytest.raises(PolicyRefused, match="over 5 sites"):
        played.mask("h0", present, updates(NAMES, n=8)["h0"])
    strict = table(NAMES, fewest=7)
    with pytest.raises(PolicyRefused, match="over 6 sites"):
        strict.agree("h0", strict.advertise())


@pytest.mark.parametrize("threshold", [1, 2, 3, 7])
def test_a_threshold_at_or_below_half_is_refused(table, threshold) -> None:
    played = table(NAMES)
    agreement = replace(played.advertise(), threshold=threshold)
    with pytest.raises(PolicyRefused, match="not above half"):
        played.agree("h0", agreement)


def test_another_threshold_than_the_studys_is_refused(table) -> None:
    played = table(NAMES)
    with pytest.raises(PolicyRefused, match="not the study's"):
        played.agree("h0", replace(played.advertise(), threshold=4))


def with_advert(agreement: Agreement, new) -> Agreement:
    adverts = tuple(new if a.site == new.site else a for a in agreement.adverts)
    return replace(agreement, adverts=adverts)


def test_keys_signed_by_another_identity_are_refused(table) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    forged = advertise(played.exchange, "h3", Ed25519PrivateKey.generate()).advert
    with pytest.raises(PolicyRefused, match="h3 are not signed"):
        played.agree("h0", with_advert(agreement, forged))
    # Signed by an enrolled site, and still not by the one that it names.
    stolen = advertise(played.exchange, "h3", played.identities["h2"]).advert
    with pytest.raises(PolicyRefused, match="h3 are not signed"):
        played.agree("h0", with_advert(agreement, stolen))


def test_keys_changed_after_they_were_signed_are_refused(table) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    other = agreement.by_site["h2"]
    for field in ("sharing", "masking", "own"):
        swapped = replace(agreement.by_site["h3"], **{field: getattr(other, field)})
        with pytest.raises(PolicyRefused, match="h3 are not signed"):
            played.agree("h0", with_advert(agreement, swapped))


@pytest.mark.parametrize("earlier", [{"round": 2}, {"run": "first"}, {"attempt": 1}])
def test_keys_of_another_round_run_or_attempt_are_refused(table, earlier) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    old = advertise(replace(played.exchange, **earlier), "h3", played.identities["h3"]).advert
    with pytest.raises(PolicyRefused, match="h3 are not signed by it for this round"):
        played.agree("h0", with_advert(agreement, old))
    with pytest.raises(FederationError, match="another run, round or attempt"):
        played.agree("h0", replace(agreement, exchange=replace(played.exchange, **earlier)))


def test_a_site_whose_key_is_not_pinned_is_refused(table) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    del played.identities["h4"]
    with pytest.raises(PolicyRefused, match="h4 is not among the hospitals"):
        played.agree("h0", agreement)


def test_a_site_wants_its_own_keys_in_the_roster(table) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    again = advertise(played.exchange, "h0", played.identities["h0"]).advert
    with pytest.raises(PolicyRefused, match="in this site's name"):
        played.agree("h0", with_advert(agreement, again))


def test_secrets_are_shared_once_and_an_update_is_masked_once(table, updates) -> None:
    played, agreement, collector = masked(table, updates)
    with pytest.raises(PolicyRefused, match="shared already"):
        played.agree("h0", agreement)
    with pytest.raises(PolicyRefused, match="masked already"):
        played.mask("h0", collector.present(), updates(NAMES, n=8)["h0"])


def test_nothing_is_masked_before_anything_was_agreed(table, updates) -> None:
    played = table(NAMES)
    played.advertise()
    with pytest.raises(FederationError, match="Nothing was agreed"):
        played.mask("h0", Present(NAMES), updates(NAMES, n=8)["h0"])
    with pytest.raises(FederationError, match="no mask is taken off"):
        played.unmask("h0", Unmask(NAMES, (), {}))


def test_sites_that_were_told_two_rosters_add_up_to_noise(table, updates) -> None:
    """The coordinator tells three sites that h5 did not share, and three that it did."""
    played, _, collector = agreed(table, share=0.5)
    zeros = np.zeros(20_000, "<u4")
    some, all_of_them = Present(NAMES[:5]), Present(NAMES)
    views = {n: some if n < "h3" else all_of_them for n in NAMES[:5]}
    sent = {n: played.mask(n, views[n], zeros) for n in NAMES[:5]}
    total = sum(sent.values(), zeros)
    for site in NAMES[:5]:
        agreement = played.members[site].agreement
        own = said.integer(played.members[site].own)
        add_stream(total, said.own_stream(agreement, site, own), -1)
    assert stats.kstest((total + 0.5) / 2**32, "uniform").pvalue > 1e-7
    assert collector.present() == all_of_them


@pytest.mark.parametrize(
    "other",
    [
        {"threshold": 6},
        {"weight_cap": 1},
        {"exchange": replace(EXCHANGE, round=4)},
        {"exchange": replace(EXCHANGE, attempt=1)},
        {"exchange": replace(EXCHANGE, run="another")},
        {"exchange": replace(EXCHANGE, study="t" * 64)},
    ],
)
def test_whoever_was_told_something_else_has_another_stream(table, other) -> None:
    played = table(NAMES)
    agreement = played.advertise()
    secret = {n: said.integer(played.members[n].masking) for n in NAMES}
    here = said.pair_stream(agreement, NAMES, secret["h1"], "h1", "h2")
    assert here == said.pair_stream(agreement, NAMES, secret["h2"], "h2", "h1")
    told = replace(agreement, **other)
    assert here != said.pair_stream(told, NAMES, secret["h2"], "h2", "h1")
    assert here != said.pair_stream(agreement, NAMES[:5], secret["h2"], "h2", "h1")
    assert here != said.pair_stream(agreement, NAMES, secret["h3"], "h3", "h2")


# Shares on their way.


def test_shares_can_be_opened_by_their_receiver_only(table) -> None:
    played, agreement, collector = agreed(table)
    sealed = collector._outboxes["h1"].shares["h2"]
    secret = {n: said.integer(played.members[n].sharing) for n in NAMES}
    said.open_shares(agreement, secret["h2"], "h2", "h1", sealed)
    with pytest.raises(FederationError, match="cannot be opened"):
        said.open_shares(agreement, secret["h3"], "h3", "h1", sealed)
    with pytest.raises(FederationError, match="cannot be opened"):
        said.open_shares(agreement, secret["h2"], "h2", "h3", sealed)
    turned = ("1" if sealed[-1] == "0" else "0").join([sealed[:-1], ""])
    for broken in (turned, sealed[:-2], "", "no hex"):
        with pytest.raises(FederationError, match="cannot be opened"):
            said.open_shares(agreement, secret["h2"], "h2", "h1", broken)


def test_a_public_key_that_gives_no_secret_is_refused(table) -> None:
    """All-zero: every private key has the same shared secret with it (RFC 7748, section 6.1)."""
    played = table(NAMES)
    agreement = played.advertise()
    bare = replace(agreement.by_site["h3"], sharing="00" * 32)
    weak = said.signed_advert(played.exchange, bare, played.identities["h3"])
    with pytest.raises(FederationError, match="is no key"):
        played.agree("h0", with_advert(agreement, weak))


def test_one_site_that_gives_false_shares_is_outrun(table, updates) -> None:
    played, _, collector = masked(table, updates, dead=["h5"], share=0.5)
    found = updates(NAMES, n=8)
    revealed = {n: played.unmask(n, collector.ask(n)) for n in NAMES[:5]}
    wrong = {s: said.as_hex(said.integer(v) ^ 1) for s, v in revealed["h2"].own.items()}
    liar = Revealed(wrong, {s: "11" * 32 for s in revealed["h2"].masking})
    total = collector.total({**revealed, "h2": liar})
    assert (signed(total, FULL) == plain_sum(found, NAMES[:5])).all()
    # With none to spare the round is void, and no sum that is wrong comes out.
    del revealed["h4"]
    with pytest.raises(TooFewUpdates, match="do not fit"):
        collector.total({**revealed, "h2": liar})


def test_shares_about_other_sites_are_left_out(table, updates) -> None:
    played, _, collector = masked(table, updates, share=0.5)
    revealed = {n: played.unmask(n, collector.ask(n)) for n in NAMES[:4]}
    none = {**revealed, "h3": Revealed({}, {})}
    with pytest.raises(TooFewUpdates, match="3 sites gave their shares"):
        collector.total(none)


def test_an_update_of_another_form_is_not_added(table, updates) -> None:
    _, _, collector = agreed(table)
    for wrong in (np.zeros(7, "<u4"), np.zeros(8, "<f4"), np.zeros((8, 1), "<u4")):
        assert not collector.add("h0", wrong)
    assert collector.add("h0", np.zeros(8, "<u4"))
    assert not collector.add("h0", np.zeros(8, "<u4"))
    assert not collector.add("somebody", np.zeros(8, "<u4"))


def test_a_member_shows_no_secret_when_it_is_printed(table) -> None:
    played, _, _ = agreed(table)
    member = played.members["h0"]
    assert not any(s in repr(member) for s in (member.sharing, member.masking, member.own))


def test_messages_come_back_as_they_were_and_others_are_refused(table, updates) -> None:
    played, agreement, collector = masked(table, updates)
    for message in (agreement, collector.ask("h1"), played.unmask("h1", collector.ask("h1"))):
        assert said.from_plain(said.as_plain(message), type(message)) == message
    for broken in ({}, {"sites": [1]}, {"sites": ["a"], "more": 1}):
        with pytest.raises(FederationError, match="fields of Present"):
            said.from_plain(broken, Present)


@pytest.mark.parametrize(
    ("share", "sites", "needed"), [(0.5, 6, 4), (0.5, 5, 3), (2 / 3, 3, 3), (2 / 3, 10, 7)]
)
def test_the_threshold_is_more_than_its_share(share, sites, needed) -> None:
    assert said.threshold_of(share, sites) == needed
