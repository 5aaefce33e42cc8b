"""Which patients train, validate and test. Everything here is by patient, never by image."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from medfl.client.data.cases import Split
from medfl.common.errors import CaseError, DataError
from medfl.common.study import Evaluation

_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


def share(key: str, patient: str) -> float:
    """A patient's place in [0, 1): HMAC-SHA256 of the patient, the same whoever else is there."""
    digest = hmac.digest(key.encode(), patient.encode(), "sha256")
    return int.from_bytes(digest[:8], "big") / 2**64


def split_name(text: str) -> Split:
    """The part that a table's split column names. Raises CaseError("split_unknown")."""
    name = _NAMES.get(text.strip().lower())
    if name is None:
        raise CaseError("split_unknown", f"the split {text!r}")
    return name


def split_cases(
    patients: Sequence[str],
    labels: Sequence[int] | None,
    given: Sequence[Split | None],
    rule: Evaluation,
) -> list[Split]:
    """The part of every case.

    patients: each case's patient, in the order in which the reader lists them. labels: class
    indices for stratified splits, None where cases have no single class. given: the format's own
    parts. With folds, fold `fold` is the test part whatever `split` says.

    Raises:
        DataError: `given` puts a patient on two sides, or names no part.
    """
    if rule.folds is not None:
        return _folded(patients, rule.folds, rule)
    return _RULES[rule.split](patients, labels, given, rule)


def _hashed(
    patients: Sequence[str],
    labels: Sequence[int] | None,
    given: Sequence[Split | None],
    rule: Evaluation,
) -> list[Split]:
    def part(patient: str) -> Split:
        place = share(rule.key, patient)
        if place < rule.test:
            return "test"
        return "validation" if place < rule.test + rule.validation else "train"

    return [part(patient) for patient in patients]


def _folded(patients: Sequence[str], folds: int, rule: Evaluation) -> list[Split]:
    test = {p for p in set(patients) if int(share(rule.key, p) * folds) == rule.fold}
    return _with_validation(patients, test, 1 / folds, rule)


def _with_validation(
    patients: Sequence[str], test: set[str], test_share: float, rule: Evaluation
) -> list[Split]:
    """Cut the validation part from the others by a hash of its own.

    `evaluation.validation` is a share of all patients, hence larger among those that are left.
    """
    bound = rule.validation / (1 - test_share)

    def part(patient: str) -> Split:
        if patient in test:
            return "test"
        return "validation" if share(rule.key, f"validation:{patient}") < bound else "train"

    return [part(patient) for patient in patients]


def _given(
    patients: Sequence[str],
    labels: Sequence[int] | None,
    given: Sequence[Split | None],
    rule: Evaluation,
) -> list[Split]:
    named = [part for part in given if part is not None]
    if len(named) < len(patients):
        raise DataError(
            f'The study takes its parts from the data (split = "given"), but {len(patients)} '
            f"cases name only {len(named)}. Name the table's column as columns.split in site.toml."
        )
    sides: dict[str, set[Split]] = {}
    for patient, part in zip(patients, named, strict=True):
        sides.setdefault(patient, set()).add(part)
    torn = sum(len(parts) > 1 for parts in sides.values())
    if torn:
        raise DataError(
            f"{torn} of {len(sides)} patients are in more than one of train, validation and test. "
            "Results would look better than they are. Give all images of a patient the same part."
        )
    if "validation" in named or rule.validation == 0:
        return named
    test = {p for p, part in zip(patients, named, strict=True) if part == "test"}
    return _with_validation(patients, test, 0.0, rule)


def _shuffled(
    patients: Sequence[str],
    labels: Sequence[int] | None,
    given: Sequence[Split | None],
    rule: Evaluation,
) -> list[Split]:
    """scikit-learn's train_test_split over the patients in order of their first case."""
    from sklearn.model_selection import train_test_split

    order = list(dict.fromkeys(patients))
    if rule.test == 0 or len(order) < 2:
        return _with_validation(patients, set(), 0.0, rule)
    strata = _strata(patients, labels) if rule.stratify and labels is not None else None
    _, test = train_test_split(
        np.arange(len(order)),
        test_size=rule.test,
        shuffle=True,
        random_state=rule.random_state,
        stratify=strata,
    )
    return _with_validation(patients, {order[i] for i in test}, rule.test, rule)


def _strata(patients: Sequence[str], labels: Sequence[int]) -> list[int] | None:
    """Each patient's first label; None where a class has two patients or fewer."""
    first: dict[str, int] = {}
    for patient, label in zip(patients, labels, strict=True):
        first.setdefault(patient, label)
    strata = list(first.values())
    return strata if min(Counter(strata).values()) > 2 else None


_Rule = Callable[
    [Sequence[str], Sequence[int] | None, Sequence[Split | None], Evaluation], list[Split]
]
_RULES: dict[str, _Rule] = {"hash": _hashed, "given": _given, "shuffled": _shuffled}
