"""RESULTS.md: what each case did, what was seen, and how it ended, from one run's own reports."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness.cases import CASES, EXISTING


@dataclass
class Told:
    """What one test reported over its phases."""

    node: str
    outcome: str = "begun"
    seconds: float = 0.0
    did: dict[int, str] = field(default_factory=dict)
    short: str = ""
    seen: list[str] = field(default_factory=list)


def note(told: list[Told], report: pytest.TestReport) -> None:
    """Add one phase of one test."""
    found = next((t for t in told if t.node == report.nodeid), None)
    if found is None:
        found = Told(report.nodeid)
        told.append(found)
    found.seconds += report.duration
    if report.outcome != "passed" or (report.when == "call" and found.outcome == "begun"):
        found.outcome = "failed" if found.outcome == "failed" else report.outcome
    seen = [str(value) for name, value in report.user_properties if name == "seen"]
    found.seen = seen or found.seen
    for name, value in report.user_properties:
        if name.startswith("case "):
            found.did[int(name.removeprefix("case "))] = str(value)
        elif name == "short" and value:
            found.short = str(value)


def write(told: Sequence[Told], path: Path, *, whole: bool = True) -> bool:
    """The table; False where a case was not run at all. whole: the campaign has come to its end."""
    lines = [
        "# The fault campaign: what was done, what was seen",
        "",
        "Written by `make faults` from the tests that it ran; nothing here was written by hand. "
        "Every case with its own test also asserts that nothing outlives its deadline, no process "
        "is left over, both audit chains verify, ledgers only grow, and exit codes are those of "
        "`common/errors.py`. *In part*: the test passes, and what it does not reach is said.",
        "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, Linux {platform.machine()}, Python "
        f"{platform.python_version()}. {_sum(told)}",
        *([] if whole else ["", "**Broken off**: a case may lack some of its tests."]),
        "",
        "| case | written as | done | seen | verdict |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(number, told) for number in CASES]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return not any("**not run**" in line for line in lines)


def _row(number: int, told: Sequence[Told]) -> str:
    own = [t for t in told if number in t.did]
    others = [t for t in told for prefix in EXISTING.get(number, ()) if t.node.startswith(prefix)]
    did = [t.did[number] for t in own]
    seen = [text for t in own for text in t.seen]
    for prefix in EXISTING.get(number, ()):
        mine = [t for t in others if t.node.startswith(prefix)]
        did.append(f"also `{prefix}`")
        seen.append(f"{sum(t.outcome == 'passed' for t in mine)} of {len(mine)} passed")
    short = [t.short for t in own if t.short]
    cells = [_cell(dict.fromkeys(did)), _cell(dict.fromkeys([*seen, *short]))]
    return f"| {number} | {CASES[number]} | {cells[0]} | {cells[1]} | {verdict(own, others)} |"


def verdict(own: Sequence[Told], others: Sequence[Told]) -> str:
    """From the outcomes alone."""
    outcomes = [t.outcome for t in (*own, *others) if t.outcome != "begun"]
    if not outcomes:
        return "**not run**"
    if "failed" in outcomes:
        return "**fails**"
    if "skipped" in outcomes:
        return "not run here" if "passed" not in outcomes else "in part"
    if not own:
        return "holds (no process of its own)"
    return "in part" if any(t.short for t in own) else "holds"


def _cell(texts: object) -> str:
    return "; ".join(texts).replace("|", "\\|").replace("\n", " ")  # type: ignore[call-overload]


def _sum(told: Sequence[Told]) -> str:
    ended = [
        verdict(
            [t for t in told if n in t.did],
            [t for t in told for p in EXISTING.get(n, ()) if t.node.startswith(p)],
        )
        for n in CASES
    ]
    counts = {v: ended.count(v) for v in dict.fromkeys(ended)}
    minutes = sum(t.seconds for t in told) / 60
    return (
        ", ".join(f"{n} {v.strip('*')}" for v, n in counts.items())
        + f"; {len(told)} tests, {minutes:.0f} minutes of test time."
    )
