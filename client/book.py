"""The book of questions: a hospital answers what a run of the study can need, and no more.

    work/<study>/book.jsonl   one line a question, on the disk before anything is computed for it

Each kind and round is asked once; the same question may come again, because its answer was lost or
its coordinator died, and gets the same answer. So a coordinator cannot ask what it likes of weights
that it chose, which after enough questions tells it every label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from medfl.client.journal import Journal
from medfl.common import tensors
from medfl.common.errors import PolicyRefused
from medfl.common.messages import Instruction, pack
from medfl.common.study import Study

# Questions of a run that may differ from what was asked before: a coordinator that lost its last
# checkpoint trains a round again, perhaps from a sum over others.
CHANGES = 3
# What is evaluated at the end: the last model, for the choice of the best; then the kept one.
_FINISHES = (("validation",), ("validation", "test"))
_PARTS = {"round": ((), ("validation",)), "finish": _FINISHES}
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Line:
    """One question. approval: what it was asked under. slot: of which a run has one each.

    asked: digest of everything in it but `attempt` and the step of a secure sum.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    run: str
    approval: str
    slot: str
    attempt: int
    asked: str


@dataclass(frozen=True, slots=True)
class Book:
    """The questions of one study. runs: how many may begin under one approval."""

    study: Study
    runs: int
    journal: Journal[Line]

    @classmethod
    def at(cls, file: Path, study: Study, runs: int) -> Book:
        """The book in this file."""
        return cls(study, runs, Journal(file, Line))

    def admit(self, asked: Instruction, approval: str) -> None:
        """Note the question, which is on the disk when this returns.

        Raises:
            PolicyRefused: no run of this study can need it, or it was asked otherwise before.
            StorageError: the book is damaged, or cannot be written.
        """
        refuse_misfit(self.study, asked)
        lines = self.journal.lines()
        mine = [line for line in lines if line.run == asked.run]
        if not mine:
            self._refuse_run(lines, asked, approval)
        new = Line(asked.run, approval, _slot(asked), asked.attempt, _digest(asked))
        same_slot = [line for line in mine if line.slot == new.slot]
        if any(line.asked == new.asked for line in same_slot):
            return
        if same_slot:
            _refuse_other(mine, same_slot, asked)
        self.journal.append(new)

    def used_up(self, approval: str) -> bool:
        """Whether no further run may begin under this approval."""
        return len(_begun(self.journal.lines(), approval)) >= self.runs

    def _refuse_run(self, lines: Iterable[Line], asked: Instruction, approval: str) -> None:
        if asked.kind != "prepare":
            raise PolicyRefused("A run begins with `prepare`, and this one did not begin here.")
        if len(_begun(lines, approval)) >= self.runs:
            raise PolicyRefused(
                f"{self.runs} runs were begun under this approval, which is all that "
                "policy.runs_per_approval allows. To allow more, approve the study again."
            )


def refuse_misfit(study: Study, asked: Instruction) -> None:
    """Raises PolicyRefused for a question that no run of the study has."""
    rounds = study.federation.rounds
    first, last = {"prepare": (0, 0), "finish": (0, rounds)}.get(asked.kind, (1, rounds))
    if not first <= asked.round <= last or not 0 <= asked.best_round <= rounds:
        raise PolicyRefused(f"The study has {rounds} rounds, and {asked.round} is not one of them.")
    if asked.parts not in _PARTS.get(asked.kind, ((),)):
        raise PolicyRefused(f"Metrics of {', '.join(asked.parts)} are nothing that a run needs.")
    if asked.kind in _PARTS:
        if asked.model != tensors.digest(asked.weights):
            raise PolicyRefused("The weights are not those of the digest that came with them.")
    elif asked.model or asked.weights or asked.control:
        raise PolicyRefused(f"Weights came with {asked.kind}, which needs none.")
    if not asked.run.isprintable() or not 0 < len(asked.run) <= _LONGEST_NAME or asked.attempt < 0:
        raise PolicyRefused("The run has a name or an attempt that is none.")


def _refuse_other(mine: list[Line], same_slot: list[Line], asked: Instruction) -> None:
    again = asked.attempt > max(line.attempt for line in same_slot)
    changes = len(mine) - len({line.slot for line in mine})
    if not again or changes >= CHANGES:
        raise PolicyRefused(
            f"{_slot(asked).capitalize()} of this run was asked before with other weights or "
            "words; it is answered once."
        )


def _begun(lines: Iterable[Line], approval: str) -> set[str]:
    """Runs that began under an approval, whatever came of them."""
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(line.run, line.approval)
    return {run for run, under in first.items() if under == approval}


def _slot(asked: Instruction) -> str:
    what = "+".join(asked.parts) if asked.kind == "finish" else str(asked.round)
    return f"{asked.kind} {what}"


def _digest(asked: Instruction) -> str:
    about = pack(replace(asked, attempt=0, secure={})).about
    return hashlib.sha256(f"{about}\n{tensors.digest(asked.control)}".encode()).hexdigest()
