"""Patients are divided stably, never torn, and as published protocols did."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from typing import Any

import pytest

from medfl.client.data.cases import Split
from medfl.client.data.splits import share, split_cases
from medfl.common.errors import DataError
from medfl.common.study import Evaluation

PATIENTS = [f"patient {i}" for i in range(2000)]


def split(patients: list[str], given: list[Split | None] | None = None, **rule: Any) -> list[Split]:
    return split_cases(patients, None, given or [None] * len(patients), Evaluation(**rule))


def test_a_patients_place_is_the_hmac_of_the_name() -> None:
    digest = hmac.new(b"medfl", b"patient 7", hashlib.sha256).hexdigest()
    assert share("medfl", "patient 7") == int(digest[:16], 16) / 2**64


def test_added_patients_and_another_order_move_nobody() -> None:
    before = dict(zip(PATIENTS[:500], split(PATIENTS[:500]), strict=True))
    after = dict(zip(PATIENTS[::-1], split(PATIENTS[::-1]), strict=True))
    assert all(after[p] == part for p, part in before.items())


def test_shares_are_as_asked_and_another_key_divides_otherwise() -> None:
    counts = Counter(split(PATIENTS, validation=0.15, test=0.2))
    # Three standard deviations of a binomial with n = 2000.
    assert abs(counts["test"] - 400) < 54
    assert abs(counts["validation"] - 300) < 48
    assert split(PATIENTS, key="a") != split(PATIENTS, key="b")


def test_all_images_of_a_patient_stay_together() -> None:
    parts = split(["p", "q"] * 50)
    assert len(set(parts[::2])) == len(set(parts[1::2])) == 1


def test_every_patient_is_tested_in_exactly_one_fold() -> None:
    tested: Counter[str] = Counter()
    for fold in range(5):
        parts = split(PATIENTS, folds=5, fold=fold, validation=0.16)
        tested.update(p for p, part in zip(PATIENTS, parts, strict=True) if part == "test")
        # 16 % of all patients, cut from the four fifths that are left.
        assert abs(Counter(parts)["validation"] - 320) < 60
    assert set(tested.values()) == {1}
    assert len(tested) == len(PATIENTS)


def test_given_parts_are_kept_and_a_torn_patient_is_refused_by_number_not_name() -> None:
    given: list[Split | None] = ["train", "validation", "test"]
    assert split(["a", "b", "c"], given, split="given") == given
    with pytest.raises(DataError, match=r"^1 of 2 patients") as caught:
        split(["secret", "b", "secret"], given, split="given")
    assert "secret" not in str(caught.value)


def test_given_parts_without_validation_get_one_from_training_only() -> None:
    given: list[Split | None] = ["train" if i % 4 else "test" for i in range(2000)]
    parts = split(PATIENTS, given, split="given", validation=0.2)
    assert [i for i, part in enumerate(parts) if part == "test"] == list(range(0, 2000, 4))
    assert abs(Counter(parts)["validation"] - 300) < 48
    assert split(PATIENTS, given, split="given", validation=0) == given


def test_given_parts_must_be_there() -> None:
    with pytest.raises(DataError, match=r"columns\.split"):
        split(["a", "b"], ["train", None], split="given")


def test_shuffled_is_scikit_learns_own_division() -> None:
    from sklearn.model_selection import train_test_split

    labels = [i % 3 == 0 for i in range(100)]
    _, expected = train_test_split(
        list(range(100)),
        train_size=0.66,
        test_size=0.34,
        shuffle=True,
        random_state=43,
        stratify=labels,
    )
    rule = Evaluation(split="shuffled", test=0.34, validation=0, random_state=43, stratify=True)
    parts = split_cases(PATIENTS[:100], [int(x) for x in labels], [None] * 100, rule)
    assert {i for i, part in enumerate(parts) if part == "test"} == set(expected)
