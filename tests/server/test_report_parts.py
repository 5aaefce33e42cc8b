"""The report's pure parts: wording of numbers, curves by hand, the SVG's clean-up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medfl.common.metrics import score_classification
from medfl.common.pictures import upright
from medfl.common.study import Task
from medfl.server.report import words
from medfl.server.report.classification import confusion, reliability, roc
from medfl.server.report.plot import inline, svg
from medfl.server.report.segmentation import Example, best_and_worst
from medfl.server.report.write import markdown_text


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (1, "<5"), (4, "<5"), (5, "5"), (1204, "1,204")])
def test_small_counts_are_masked(n: int, text: str) -> None:
    assert words.count(n) == text


def test_a_total_with_a_masked_part_names_only_what_is_visible() -> None:
    assert words.total([10, 20]) == "30"
    assert words.total([10, 3, 20]) == "more than 30"
    assert words.total([3, 2, 0]) == "at most 8"


@pytest.mark.parametrize("spent", [0.001, 1.0, 2.345, 2.3451, 7.999])
def test_a_privacy_loss_is_written_no_smaller_than_it_is(spent: float) -> None:
    assert spent <= float(words.epsilon(spent)) + 1e-8 < spent + 0.011


def test_less_distance_is_a_gain_and_less_dice_is_a_loss() -> None:
    assert words.gained("dice", 0.9, 0.8) == 1
    assert words.gained("hd95_liver", 2.0, 3.0) == 1
    assert words.gained("dice_liver", 0.8001, 0.8004) == 0
    assert words.gained("brier", 0.3, 0.2) == -1
    assert words.gained("dice", None, 0.2) is None


def test_a_count_that_was_not_told_is_a_dash_and_opens_the_total() -> None:
    assert words.count(None) == "–"
    assert words.total([10, None]) == "more than 10"
    assert words.total([None, None]) == "–"


def test_an_axial_slice_has_the_front_on_top_and_the_patients_right_on_the_left() -> None:
    volume_slice = np.zeros((3, 4), dtype=np.uint8)  # RAS: axis 0 leads right, axis 1 to the front
    volume_slice[2, 3] = 1  # far right, far front
    picture = upright(volume_slice, "RAS")
    assert picture.shape == (4, 3)
    assert picture[0, 0] == 1
    assert upright(volume_slice, "LPS")[3, 2] == 1
    assert upright(volume_slice, None) is volume_slice


def test_durations_and_sizes_read_naturally() -> None:
    assert [words.duration(s) for s in (4.21, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 5 min"]
    assert [words.size(n) for n in (999, 1_500, 42_000_000)] == ["999 B", "1.5 kB", "42 MB"]


def test_roc_by_hand_with_a_tie() -> None:
    # Ranked: + (.9), then + and - tied (.6), then - (.1).
    truth = np.array([True, True, False, False])
    x, y = roc(truth, np.array([0.9, 0.6, 0.6, 0.1]))
    assert x.tolist() == [0, 0, 0.5, 1]
    assert y.tolist() == [0, 0.5, 1, 1]


def test_roc_needs_both_outcomes() -> None:
    assert roc(np.ones(3, dtype=bool), np.array([0.1, 0.2, 0.3]))[0].size == 0


def test_reliability_by_hand() -> None:
    hit = np.array([True, False, True, True])
    mean, share, cases = reliability(hit, np.array([0.62, 0.68, 1.0, 0.95]))
    assert mean.tolist() == pytest.approx([0.65, 0.975])
    assert share.tolist() == [0.5, 1.0]
    assert cases.tolist() == [2, 2]


def test_confusion_has_the_truth_in_rows() -> None:
    task = Task(kind="classification", classes=["no", "yes"])
    scores = score_classification(
        list("abc"), list("abc"), np.array([1, 1, 0]), np.array([0.2, 0.8, 0.1])
    )
    assert confusion(task, scores).tolist() == [[1, 0], [1, 1]]


def test_no_case_is_both_good_and_bad_and_hospitals_take_turns() -> None:
    blank = np.zeros((2, 2), dtype=np.uint8)
    cases = [Example(site, blank, blank, blank, s) for site, s in
             [("a", 0.99), ("a", 0.98), ("b", 0.9), ("b", 0.3), ("a", 0.2)]]  # fmt: skip
    best, worst = best_and_worst(cases)
    assert [e.score for e in best] == [0.99, 0.9]
    assert [e.score for e in worst] == [0.2, 0.3]


def test_clean_up_keeps_the_digits_of_texts_and_the_colours_of_shapes() -> None:
    source = (
        '<?xml version="1.0"?>\n<svg viewBox="0 0 1 1"><defs><style>*{}</style></defs>'
        '<g id="axes_1"><path id="m1" d="M 1.2345 2" style="fill: none; stroke: #123456"/>'
        '<use xlink:href="#m1"/><text style="font-family: x; font-size: 9px">0.123</text></g></svg>'
    )
    assert inline(source, "f", 'a "b"') == (
        '<svg class="plot" viewBox="0 0 1 1" role="img" aria-label="a &#34;b&#34;" '
        'stroke-linejoin="round"><defs></defs><g><path id="f-m1" d="M 1.2 2" fill="none" '
        'stroke="#123456"/><use href="#f-m1"/><text font-size="9px">0.123</text></g></svg>'
    )


def test_a_label_is_never_read_as_mathematics() -> None:
    drawing = svg("x", (2, 2), "alt", lambda f: f.add_subplot().set_title(r"$\frac{1}{</text>$"))
    assert r"$\frac{1}{&lt;/text&gt;$" in drawing


def test_markdown_text_stays_on_one_line_and_acts_on_nothing() -> None:
    assert markdown_text("# a\n|b| *c* <d> [e](f)") == (r"\# a \|b\| \*c\* &lt;d&gt; \[e\](f)")


def test_drawing_leaves_the_global_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg("x", (2, 2), "alt", lambda f: None)
    assert dict(matplotlib.rcParams) == before
