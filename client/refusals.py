"""What this hospital refused, by reason: for the running client's words and for `status`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medfl.client.premises import Home


@dataclass(frozen=True, slots=True)
class Refused:
    """One reason. study: digest. times: so many questions. last: when. kind, round, run: of the
    last of them."""

    study: str
    why: str
    times: int
    last: str
    kind: str
    round: int
    run: str


def by_reason(lines: Iterable[Mapping[str, Any]]) -> list[Refused]:
    """Every reason that stands in the audit log, the latest last."""
    found: dict[tuple[str, str], Refused] = {}
    for line in lines:
        if line["what"] == "refused":
            about = line["about"]
            key = str(about.get("study", "")), str(about.get("why", ""))
            before = found.pop(key, None)
            found[key] = Refused(
                *key,
                times=int(about.get("times", 1)) + (before.times if before else 0),
                last=str(line["at"]),
                kind=str(about.get("kind", "")),
                round=int(about.get("round", 0)),
                run=str(about.get("run", "")),
            )
    return list(found.values())


def lines(refused: list[Refused], names: Mapping[str, str]) -> Iterator[str]:
    """For a person. names: of studies, by digest."""
    if refused:
        yield f"{sum(r.times for r in refused)} questions were refused here:"
    for each in refused:
        yield "  " + _line(each, names)


def _line(each: Refused, names: Mapping[str, str]) -> str:
    study = names.get(each.study, "a study that is not known here")
    return f"{study}, {each.times} times, last {each.last} ({each.kind} of {each.run}): {each.why}"


@dataclass(slots=True)
class News:
    """Refusals since the last look, for the running client to print."""

    home: Home
    _seen: int = -1

    def news(self) -> list[str]:
        """What is new; the first call says nothing of what lies before it."""
        n = self.home.audit.head().n
        if n == self._seen:
            return []
        before, self._seen = self._seen, n
        if before < 0:
            return []
        fresh = by_reason(e for e in self.home.audit.lines() if e["n"] > before)
        names = {p.digest: p.name for p in self.home.published()} if fresh else {}
        return [f"Refused: {_line(each, names)}" for each in fresh]
