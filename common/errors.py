"""Every error that medfl raises on purpose, and the exit code of each.

MedflError (1)
├── ConfigError (2)        a file or an argument that a person wrote is wrong
├── DataError (3)          a hospital's data cannot serve the study
│   └── CaseError          one case cannot be used; it is quarantined, never fatal by itself
├── BudgetSpent (4)        the privacy budget does not allow the next step
├── PolicyRefused (5)      the hospital's policy forbids what the study asks
│   ├── NotApproved        no approval of the hospital holds now
│   └── OtherCode          the coordinator sent code with a study
├── FederationError (6)    too few sites answered, or their answers cannot be combined
│   └── TrainerDied        a hospital's training process ended before it answered
│   └── NotFinite          training gave an update with NaN or infinities
│   └── TooFewUpdates      one round has too few for its strategy; the round is void, not the run
│   └── LogRolledBack      an audit log is shorter than it was; a person must say that it may be
├── StorageError (7)       the disk is full or a file of ours is damaged
└── Interrupted (8)        a person stopped the run; what was done is kept

Codes stay below 125, which shells use for themselves. 0 is success; 1 is any other failure.
"""

from __future__ import annotations


class MedflError(Exception):
    """Base of all errors that medfl reports to a person. The text says what, where, what to do."""

    exit_code = 1


class ConfigError(MedflError):
    """Faults in something that a person wrote; `faults` holds one line each."""

    exit_code = 2

    def __init__(self, faults: str | list[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(MedflError):
    """The hospital's data cannot serve the study."""

    exit_code = 3


class CaseError(DataError):
    """One case cannot be used.

    reason: a stable key of the catalogue in `medfl.client.data.reasons`; only this and a count
    may ever leave the hospital. The message itself stays on the hospital's machine.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class BudgetSpent(MedflError):
    """The privacy budget does not allow the next step."""

    exit_code = 4


class PolicyRefused(MedflError):
    """The hospital's policy forbids what the study asks."""

    exit_code = 5


class NotAdmitted(PolicyRefused):
    """An answer that the coordinator's door does not let in. phrase: for reports; text: the log."""

    def __init__(self, phrase: str, text: str) -> None:
        super().__init__(text)
        self.phrase = phrase


class NotApproved(PolicyRefused):
    """The hospital has no approval that holds now, for these cases and under this site.toml."""


class OtherCode(PolicyRefused):
    """The coordinator sent code with a study; a hospital runs installed code only."""


class FederationError(MedflError):
    """Too few sites answered, or their answers cannot be combined."""

    exit_code = 6


class TooFewUpdates(FederationError):
    """One round has fewer updates than its strategy can do with; the round is void."""


class NotFinite(FederationError):
    """Training gave an update that is not finite, where nobody could see that in the sum."""


class LogRolledBack(FederationError):
    """An audit log is shorter, or another, than it was; nothing goes on until a person accepts."""


class TrainerDied(FederationError):
    """A hospital's training process ended before it answered; the next task gets a new one."""


class StorageError(MedflError):
    """The disk is full, or a file that medfl wrote is damaged."""

    exit_code = 7


class Interrupted(MedflError):
    """A person stopped the run; what was done is kept."""

    exit_code = 8
