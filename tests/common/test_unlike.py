"""Hospitals whose numbers are in another unit or all the same are named, and no others."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from medfl.common.statistics import LocalStatistics, Moments, merge
from medfl.common.unlike import unlike, unlike_all

MG_DL = (180.0, 200.0, 213.0, 230.0, 250.0)
MMOL_L = tuple(v / 38.67 for v in MG_DL)
COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")


def hospital(**fields: Sequence[float]) -> LocalStatistics:
    n = len(next(iter(fields.values())))
    return LocalStatistics(n_cases=n, features={name: moments(v) for name, v in fields.items()})


def moments(values: Sequence[float]) -> Moments:
    return Moments(len(values), sum(values), sum(v * v for v in values))


def test_cholesterol_in_another_unit_is_named_on_both_sides() -> None:
    # 214.6 +- 26.9 beside 5.55 +- 0.70: 209 is 300 of the smaller spread.
    parts = {"a": hospital(chol=MG_DL), "b": hospital(chol=MMOL_L)}
    far = "chol: a mean far from the other hospitals'; in the same unit?"
    assert unlike(parts) == {"a": (far,), "b": (far,)}


def test_of_several_hospitals_the_one_in_another_unit_is_named() -> None:
    parts = {name: hospital(chol=MG_DL) for name in "abc"} | {"d": hospital(chol=MMOL_L)}
    assert list(unlike(parts)) == ["d"]
    shared = merge(parts.values())
    # 5.55 is 157 from the mean over all, and its own spread is .7.
    assert unlike_all(parts["d"], shared)
    assert unlike_all(parts["a"], shared) == ()


def test_a_field_of_zeros_is_named() -> None:
    parts = {"a": hospital(chol=MG_DL, age=(40, 50, 60, 70, 80))}
    parts["b"] = hospital(chol=(0.0,) * 5, age=(42, 50, 60, 70, 78))
    assert unlike(parts)["b"] == ("chol: the same value in every case",)
    assert unlike_all(parts["b"], merge(parts.values())) == ("chol: the same value in every case",)


def test_a_field_that_is_the_same_at_every_hospital_is_not_unlike() -> None:
    parts = {name: hospital(dose=(80.0,) * 6) for name in "ab"}
    assert unlike(parts) == {}
    assert unlike_all(parts["a"], merge(parts.values())) == ()


def test_another_spread_is_named_where_the_means_agree() -> None:
    parts = {"a": hospital(x=(-1, 0, 1)), "b": hospital(x=(-30, 0, 30))}
    # Spreads 1 and 30, more than five times each other.
    assert unlike(parts)["b"] == ("x: a spread far from the other hospitals'; in the same unit?",)


def test_images_in_another_scale_are_named() -> None:
    parts = {
        "a": LocalStatistics(5, intensity=(moments((90, 100, 110)),)),
        "b": LocalStatistics(5, intensity=(moments((1090, 1100, 1110)),)),
    }
    assert unlike(parts)["b"][0].startswith("image channel 1: a mean far")


def test_few_or_hidden_values_say_nothing() -> None:
    parts = {"a": hospital(x=(1, 2, 3)), "b": LocalStatistics(9, features={"x": Moments()})}
    assert unlike(parts) == {}
    assert unlike({"a": parts["a"]}) == {}


def test_of_the_four_heart_hospitals_only_the_one_without_cholesterol_is_named(
    public_data: Callable[[str], Path],
) -> None:
    folder, parts = public_data("uci_heart_disease"), {}
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        with (folder / f"processed.{name}.data").open(newline="") as lines:
            rows = [dict(zip(COLUMNS, row, strict=False)) for row in csv.reader(lines)]
        fields = {
            c: [float(r[c]) for r in rows if r[c] not in ("?", "")]
            for c in ("age", "trestbps", "chol", "thalach", "oldpeak")
        }
        parts[name] = LocalStatistics(
            len(rows), features={c: moments(v) for c, v in fields.items()}
        )
    assert unlike(parts) == {"switzerland": ("chol: the same value in every case",)}
