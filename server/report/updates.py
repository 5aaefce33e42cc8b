"""How long each hospital's updates were and whither they led: for people, and as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from medfl.server.records import RoundRecord
from medfl.server.report import words
from medfl.server.report.run import Run
from medfl.server.report.tables import Table
from medfl.strategies.catalogue import ROBUST

# A median cosine below this is a direction of its own: the sketch errs by .02, and the noise of
# private updates is without direction.
AGAINST = -0.1
# So many times the others' median length, and the hospital moves the model more than they do.
LONG = 3.0
# One round's, each with name, length and cosine.
Updates = Iterable[Mapping[str, Any]]
# A median over fewer rounds, or of fewer hospitals, says nothing of whose fault it is.
_ROUNDS, _HOSPITALS = 3, 3


def updates_table(run: Run) -> Table | None:
    """Median length and cosine of each hospital's updates over the rounds; None where unseen."""
    found = _medians(_of_run(run))
    if not found:
        return None
    rows = [
        [(site, ""), (f"{n}", ""), (f"{length:.3g}", ""), (_cosine(cosine), "")]
        for site, (n, length, cosine) in found.items()
    ]
    text = (
        "Medians over the rounds. Cosine: 1 where a hospital's update led as the others' did, 0 "
        "where it had nothing to do with them, −1 where it led the opposite way."
    )
    return Table(text, ["Hospital", "Rounds", "Length of the update", "Cosine to the others"], rows)


def against_the_rest(run: Run) -> Iterable[str]:
    """One sentence for each hospital that pulls against the others, or far more than they do."""
    return _against(_of_run(run), run.study.federation.strategy)


def against_so_far(rounds: Iterable[RoundRecord], strategy: str) -> list[str]:
    """The same of a run that goes on."""
    return list(_against(((s for s in r.sites if "length" in s) for r in rounds), strategy))


def _of_run(run: Run) -> Iterable[Updates]:
    for line in run.rounds:
        if line.run == "main":
            yield [
                {"name": n, "length": x, "cosine": line.site_cosine.get(n)}
                for n, x in line.site_length.items()
            ]


def _against(rounds: Iterable[Updates], strategy: str) -> Iterable[str]:
    found = {site: own for site, own in _medians(rounds).items() if own[0] >= _ROUNDS}
    if len(found) < _HOSPITALS:
        return
    for site, (n, length, cosine) in found.items():
        others = median(own[1] for name, own in found.items() if name != site)
        if cosine is not None and cosine < AGAINST:
            yield (
                f"{site} pulls against the others: over {n} rounds the median cosine of its update "
                f"to theirs is {_cosine(cosine)}. {_remedy(strategy)}"
            )
        elif others > 0 and length > LONG * others:
            yield (
                f"{site} moves the model more than the others: over {n} rounds its updates are "
                f"{length / others:.1f} times as long as theirs in the median. {_remedy(strategy)}"
            )


def _remedy(strategy: str) -> str:
    look = "Look at its labels, its units and its data before the model is used"
    if strategy in ROBUST:
        return look
    return f"{look}; a robust strategy ({', '.join(ROBUST[:3])}) bounds what one hospital can do"


def _medians(rounds: Iterable[Updates]) -> dict[str, tuple[int, float, float | None]]:
    """By hospital: rounds, median length, median cosine."""
    lengths: dict[str, list[float]] = {}
    cosines: dict[str, list[float]] = {}
    for updates in rounds:
        for own in updates:
            site, length, cosine = str(own["name"]), own["length"], own["cosine"]
            if length is not None:
                lengths.setdefault(site, []).append(length)
            if cosine is not None:
                cosines.setdefault(site, []).append(cosine)
    return {
        site: (len(own), median(own), median(cosines[site]) if site in cosines else None)
        for site, own in sorted(lengths.items())
    }


def _cosine(number: float | None) -> str:
    return words.NONE if number is None else f"{number:.2f}".replace("-", "−")
