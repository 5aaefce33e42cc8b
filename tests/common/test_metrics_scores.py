from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medfl.common.errors import StorageError
from medfl.common.metrics import (
    Scores,
    concatenate,
    default_metrics,
    intervals,
    load,
    score_classification,
    score_masks,
    summarise,
)
from medfl.common.study import Task

ORGANS = Task(kind="segmentation", classes=["background", "liver", "spleen"])


def mask(*shape: int, **boxes: tuple[slice, ...]) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    for name, box in boxes.items():
        array[box] = ORGANS.classes.index(name)
    return array


def compare(
    target: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...] | None = None
) -> dict[str, float]:
    spacings = None if spacing is None else [spacing]
    scores = score_masks(["k"], ["p"], [target], [prediction], ORGANS.classes, spacings, True)
    return {name: float(column[0]) for name, column in scores.columns.items()}


def test_dice_of_two_boxes_is_twice_the_overlap_over_both() -> None:
    target = mask(12, 12, liver=np.s_[2:6, 2:6])
    prediction = mask(12, 12, liver=np.s_[2:6, 4:10])
    assert compare(target, prediction)["dice/liver"] == pytest.approx(2 * 8 / (16 + 24))


def test_distances_of_a_shifted_line_are_the_shift_in_millimetres() -> None:
    target, prediction = mask(20, 20, liver=np.s_[2:18, 5]), mask(20, 20, liver=np.s_[2:18, 8])
    in_mm = compare(target, prediction, spacing=(1.0, 2.5))
    assert in_mm["hd95/liver"] == in_mm["surface_distance/liver"] == pytest.approx(7.5)
    in_voxels = compare(target, prediction)
    assert in_voxels["hd95/liver"] == in_voxels["surface_distance/liver"] == pytest.approx(3)


def test_distances_of_shifted_boxes_in_three_dimensions_follow_the_spacing() -> None:
    # A plate one voxel thick, two slices of 3 mm away: every surface point is 6 mm off.
    target = mask(16, 16, 8, spleen=np.s_[3:13, 3:13, 2])
    prediction = mask(16, 16, 8, spleen=np.s_[3:13, 3:13, 4])
    told = compare(target, prediction, spacing=(1.0, 1.0, 3.0))
    assert told["hd95/spleen"] == told["surface_distance/spleen"] == pytest.approx(6)
    assert told["dice/spleen"] == 0.0


def test_the_surface_distance_looks_both_ways_and_hd95_forgives_one_stray_voxel() -> None:
    target = mask(120, 40, liver=np.s_[10:110, 5])
    prediction = target.copy()
    prediction[50, 25] = 1
    told = compare(target, prediction)
    assert told["hd95/liver"] == pytest.approx(0)
    assert told["surface_distance/liver"] == pytest.approx(20 / 201)
    turned = compare(prediction, target)
    assert turned["surface_distance/liver"] == pytest.approx(20 / 201)


def test_a_case_whose_truth_lacks_the_class_has_no_dice_and_counts_as_false_positive() -> None:
    liver = mask(8, 8, liver=np.s_[1:4, 1:4])
    both = mask(8, 8, liver=np.s_[1:4, 1:4], spleen=np.s_[5:7, 5:7])
    assert np.isnan(compare(liver, liver)["dice/spleen"])
    assert np.isnan(compare(liver, both)["dice/spleen"])
    assert compare(both, liver)["dice/spleen"] == 0.0
    assert compare(liver, liver)["empty_false_positives/spleen"] == 0.0
    assert compare(liver, both)["empty_false_positives/spleen"] == 1.0
    assert np.isnan(compare(both, liver)["empty_false_positives/spleen"])
    assert np.isnan(compare(liver, both)["hd95/spleen"])
    assert np.isnan(compare(liver, both)["surface_distance/spleen"])


def test_dice_is_the_mean_over_cases_and_then_over_foreground_classes() -> None:
    nan = np.nan
    columns = {"dice/liver": np.array([1.0, 0.5, nan]), "dice/spleen": np.array([nan, nan, 0.25])}
    scores = Scores(("a", "b", "c"), ("p", "q", "r"), columns)
    told = summarise(ORGANS, scores, default_metrics(ORGANS))
    assert told == {
        "dice": (0.75 + 0.25) / 2,
        "hd95": None,
        "surface_distance": None,
        "empty_false_positives": None,
        "dice_liver": 0.75,
        "dice_spleen": 0.25,
    }


def test_a_hospital_with_empty_masks_alone_has_no_dice_and_a_share_of_false_positives() -> None:
    """One false voxel in one of five cases: 1 of 5, and neither Dice 0 nor nothing."""
    empty = [mask(8, 8) for _ in range(5)]
    said = [mask(8, 8) for _ in range(4)] + [mask(8, 8, liver=np.s_[2:3, 2:3])]
    keys = [str(i) for i in range(5)]
    scores = score_masks(keys, keys, empty, said, ORGANS.classes, None, False)
    told = summarise(ORGANS, scores, ["dice", "empty_false_positives_liver", "dice_liver"])
    assert told == {"dice": None, "empty_false_positives_liver": 0.2, "dice_liver": None}


def test_the_dice_interval_resamples_patients() -> None:
    columns = {"dice/liver": np.array([1.0, 1.0, 0.0]), "dice/spleen": np.full(3, np.nan)}
    scores = Scores(("a", "b", "c"), ("p", "p", "q"), columns)
    told = intervals(ORGANS, scores, ["dice", "dice_spleen"], resamples=200, seed=1)
    assert told == {"dice": (0.0, 1.0), "dice_spleen": None}


def test_masks_are_read_one_case_at_a_time() -> None:
    alive: list[int] = []

    def one_by_one(side: int):  # type: ignore[no-untyped-def]
        for case in range(3):
            alive.append(case + 10 * side)
            yield mask(8, 8, liver=np.s_[1:4, 1 : 4 + case])

    scores = score_masks(
        ["a", "b", "c"], ["p"] * 3, one_by_one(0), one_by_one(1), ORGANS.classes, None, False
    )
    assert alive == [0, 10, 1, 11, 2, 12]
    assert [name for name in scores.columns if name.startswith("dice")] == [
        "dice/liver",
        "dice/spleen",
    ]
    assert scores.columns["dice/liver"].tolist() == [1.0, 1.0, 1.0]


def test_fewer_masks_than_cases_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 keys"):
        score_masks(["a", "b"], ["p", "q"], [mask(4, 4)], [mask(4, 4)], ["x", "y"], None, False)


def test_scores_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    columns = {"dice/grey/white matter": np.array([0.25, np.nan]), "target": np.array([1, 0])}
    written = Scores(("k1", "k2"), ("p", "ü"), columns)
    written.save(tmp_path / "scores.npz")
    read = load(tmp_path / "scores.npz")
    assert (read.keys, read.patients, list(read.columns)) == (("k1", "k2"), ("p", "ü"), [*columns])
    for name, column in columns.items():
        np.testing.assert_array_equal(read.columns[name], column)
        assert read.columns[name].dtype == column.dtype


def test_scores_of_no_case_come_back_too(tmp_path: Path) -> None:
    empty = score_classification([], [], np.zeros(0, np.int64), np.zeros((0, 3), np.float32))
    empty.save(tmp_path / "scores.npz")
    read = load(tmp_path / "scores.npz")
    assert len(read) == 0
    assert read.columns["probability"].shape == (0, 3)


def test_a_missing_a_cut_and_a_pickled_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(StorageError, match="no such file"):
        load(path)
    Scores(("k",), ("p",), {"target": np.arange(1)}).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="not a whole file of scores"):
            load(path)
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(path, allow_pickle=True, cases=objects)
    with pytest.raises(StorageError, match="not a whole file of scores"):
        load(path)


def test_parts_join_in_order_and_refuse_other_columns() -> None:
    first = Scores(("a",), ("p",), {"target": np.array([1]), "probability": np.array([[0.5]])})
    second = Scores(("b",), ("q",), {"probability": np.array([[0.7]]), "target": np.array([0])})
    joined = concatenate([first, second])
    assert (joined.keys, joined.patients) == (("a", "b"), ("p", "q"))
    assert joined.columns["target"].tolist() == [1, 0]
    assert joined.columns["probability"].tolist() == [[0.5], [0.7]]
    with pytest.raises(ValueError, match="different columns"):
        concatenate([first, Scores(("c",), ("r",), {"target": np.array([1])})])


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="target"):
        Scores(("a",), ("p",), {"target": np.arange(2)})
