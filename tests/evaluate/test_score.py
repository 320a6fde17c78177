"""Scores: worked out by hand, and compared with counted pixels."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lfm2vl_edge import DataError
from lfm2vl_edge.config import FRACTION_BOXES, BoxFormat
from lfm2vl_edge.evaluate import iou, mean_iou, normalised, score
from lfm2vl_edge.evaluate.score import found_boxes, true_boxes
from lfm2vl_edge.models.box_formats import LAYOUT_BOXES, PIXEL_BOXES, THOUSAND_BOXES
from lfm2vl_edge.structured.boxes import Region

GRID = 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"),
        ("  A red\n\tcar. ", "red car"),
        ('"The" cat!', 'the" cat'),
        ("The “cat”", "cat"),
        ("(an apple)", "apple"),
        ("the", "the"),
        ("A.", "a"),
        ("anchor", "anchor"),
        ("\uff32\uff25\uff24\uff01", "red"),  # full-width letters
        ("ﬁsh", "fish"),
        ("-5", "-5"),
        ("“-5.”", "-5"),
        (".5", ".5"),
        ("- red", "red"),
        ("5%", "5%"),
        ("C#.", "c#"),
        ("3.5 m", "3.5 m"),
        ("...", "..."),
        ("", ""),
        ("the a the", "the"),
        ("über", "über"),
    ],
)
def test_normalised_by_hand(text: str, expected: str) -> None:
    assert normalised(text) == expected


@given(st.text(alphabet=st.sampled_from("aAnthe \t.,!?\"'-5%“”İß"), max_size=12) | st.text(max_size=12))
def test_normalising_twice_changes_nothing_and_blanks_and_case_never_matter(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert normalised(f"  {text}\n") == once


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "normal"),
    [
        ("red", ["red"], True, True),
        ("Red.", ["red"], False, True),
        ("red", ["Red", "crimson"], False, True),
        ("Crimson", ["Red", "crimson"], False, True),
        ("blue", ["red"], False, False),
        ("", ["red"], False, False),
        ("", [""], True, True),
        ("?", ["!"], False, False),
        ("[1, 2]", ["[1, 2]"], True, True),
        ("1, 2", ["[1, 2]"], False, False),  # JSON is compared as it is
        ('{"A": 1}', ['{"a": 1}'], False, False),
        ("Three.", ["3", "three"], False, True),
        (None, [""], False, False),
    ],
)
def test_exact_and_normalised_by_hand(answer: str | None, accepted: list[str], exact: bool, normal: bool) -> None:
    found = score(answer, accepted)
    assert (found.exact, found.normalised, found.iou) == (exact, normal, None)


def area_of_pixels(one: Any, other: Any) -> float:
    """The naive version: count the squares of a grid."""
    inside = [
        [x1 <= x < x2 and y1 <= y < y2 for x in range(GRID) for y in range(GRID)] for x1, y1, x2, y2 in (one, other)
    ]
    common = sum(a and b for a, b in zip(*inside, strict=True))
    union = sum(a or b for a, b in zip(*inside, strict=True))
    return common / union if common else 0.0


span = st.tuples(st.integers(0, GRID), st.integers(0, GRID)).map(sorted)
corners = st.tuples(span, span).map(lambda two: (two[0][0], two[1][0], two[0][1], two[1][1]))


@given(corners, corners)
def test_iou_counts_pixels_in_any_order_and_scale(one: Any, other: Any) -> None:
    found = iou(one, other)
    assert found == pytest.approx(area_of_pixels(one, other))
    assert found == iou(other, one)
    scaled = [tuple(value / GRID for value in box) for box in (one, other)]
    assert iou(scaled[0], scaled[1]) == pytest.approx(found)


unit = st.floats(0, 1, allow_subnormal=False)


@example((0, 0, 1e-200, 1e-200), (0, 0, 1e-200, 1e-200))
@given(*[st.tuples(unit, unit, unit, unit)] * 2)
def test_iou_is_between_0_and_1(one: Any, other: Any) -> None:
    one, other = ((min(x, u), min(y, v), max(x, u), max(y, v)) for x, y, u, v in (one, other))
    assert 0 <= iou(one, other) <= 1
    assert iou(one, other) == iou(other, one)
    area = (one[2] - one[0]) * (one[3] - one[1])
    assert iou(one, one) == (1 if area > 0 else 0)


def box(label: str, x1: float, x2: float) -> Region:
    """Return a box as high as the image, so that areas are lengths."""
    return Region(label=label, corners=(x1, 0, x2, 1))


def test_boxes_are_matched_by_label_and_the_best_overlap_first() -> None:
    truth = [box("cat", 0.0, 0.4), box("cat", 0.5, 0.9)]
    assert mean_iou(truth, truth) == 1
    assert mean_iou(truth[::-1], truth) == 1
    assert mean_iou(truth[:1], truth) == 0.5  # the other one has no match and counts 0
    assert mean_iou([box("dog", 0.0, 0.4), truth[1]], truth) == 0.5
    assert mean_iou([*truth, box("cat", 0, 1), box("dog", 0, 1)], truth) == 1  # unmatched in the answer: no cost
    assert mean_iou([truth[0], truth[0]], truth) == 0.5  # one box of the answer matches one true box
    assert mean_iou([], truth) == 0
    assert mean_iou([], []) == 1
    assert mean_iou(truth, []) == 0
    # Greedy: the best pair, 0.9, is matched first, though 0.6 and 2/3 would be more in total than 0.9 and 0.2.
    truth, found = [box("cat", 0, 1), box("cat", 0.4, 1)], [box("cat", 0.1, 1), box("cat", 0, 0.6)]
    assert mean_iou(found, truth) == pytest.approx((0.9 + 0.2) / 2)
    assert mean_iou(found[::-1], truth[::-1]) == pytest.approx((0.9 + 0.2) / 2)


def boxes_text(*boxes: tuple[str, list[Any]]) -> str:
    return json.dumps([{"label": label, "bbox": bbox} for label, bbox in boxes])


TRUTH = boxes_text(("cat", [0, 0, 0.5, 1]))


@pytest.mark.parametrize(
    ("answer", "accepted", "valid", "empty", "expected"),
    [
        (TRUTH, [TRUTH], True, False, 1.0),
        (boxes_text(("cat", [0, 0, 0.25, 1])), [TRUTH], True, False, 0.5),
        (boxes_text(("cat", [-0.25, -0.1, 0.5, 1.2])), [TRUTH], True, False, 1.0),  # moved to the edges
        (boxes_text(("cat", [0, 0, 0.5, 480])), [TRUTH], False, False, 0.0),  # another scale
        (boxes_text(("cat", [0.5, 1, 0, 0])), [TRUTH], True, False, 1.0),  # as detect reads it
        (boxes_text(("cat", [0, 0, 0, 1])), [TRUTH], False, False, 0.0),
        (boxes_text(("cat", [0, 0, 0, 1])), ["[]"], False, True, 0.0),
        ("[]", [TRUTH], True, False, 0.0),
        ("[]", ["[]"], True, True, 1.0),
        (" [ ] ", ["[]"], True, True, 1.0),
        (TRUTH, ["[]"], True, True, 0.0),
        ("nothing", ["[]"], False, True, 0.0),
        (None, ["[]"], False, True, 0.0),
        (TRUTH, ["[]", TRUTH], True, False, 1.0),
        (f"Sure: {TRUTH}", [TRUTH], False, False, 1.0),
        (f"```json\n{TRUTH}\n```", [TRUTH], False, False, 1.0),
        (TRUTH[:-1], [TRUTH], False, False, 1.0),
        (f"{TRUTH[:-1]}, 3]", [TRUTH], False, False, 1.0),
        ('{"label": "cat", "bbox": [0, 0, 0.5, 1]}', [TRUTH], False, False, 1.0),
        ("{}", [TRUTH], False, False, 0.0),
        ("[3]", [TRUTH], False, False, 0.0),
        ('[{"label": "cat"}]', [TRUTH], False, False, 0.0),
        (boxes_text(("cat", [0, 0, 1])), [TRUTH], False, False, 0.0),
        (boxes_text(("cat", [0, 0, "1", 1])), [TRUTH], False, False, 0.5),  # read, but not its format
        (boxes_text(("cat", [0, 0, True, 1])), [TRUTH], False, False, 0.0),
        ('[{"label": "cat", "bbox": [0, 0, NaN, 1]}]', [TRUTH], False, False, 0.0),
        ('[{"label": "cat", "bbox": [0, 0, 1e999, 1]}]', [TRUTH], False, False, 0.0),
        ('[{"label": "cat", "bbox": [0, 0, ' + "9" * 400 + ", 1]}]", [TRUTH], False, False, 0.0),
        ('[{"label": 5, "bbox": [0, 0, 1, 1]}]', [TRUTH], False, False, 0.0),
        ("[" * 100_000, [TRUTH], False, False, 0.0),
    ],
)
def test_boxes_of_an_answer(
    answer: str | None, accepted: list[str], valid: bool, empty: bool, expected: float
) -> None:
    found = score(answer, accepted)
    assert (found.is_valid, found.is_empty) == (valid, empty)
    assert found.iou == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "boxes", "valid", "expected"),
    [
        ('[{"label": "cat", "bbox_2d": [0, 0, 500, 1000]}]', THOUSAND_BOXES, True, 1.0),
        ('[{"image_id": 0, "bbox_2d": [0, 0, 250, 1000], "label": "cat"}]', THOUSAND_BOXES, True, 0.5),
        ('[{"label": "cat", "bbox_2d": [-5, 0, 500, 1010]}]', THOUSAND_BOXES, True, 1.0),
        ('[{"label": "cat", "bbox": [0, 0, 500, 1000]}]', THOUSAND_BOXES, True, 1.0),  # either key, as detect reads it
        ('[{"label": "cat", "bbox": [0, 0, 0.25, 1]}]', THOUSAND_BOXES, True, 0.5),  # the other format altogether
        ('[{"label": "cat", "bbox_2d": [0, 0, 0.5, 1]}]', FRACTION_BOXES, True, 1.0),
        ('[{"label": "cat", "bbox_2d": [0, 0, ' + "9" * 400 + ", 1000]}]", THOUSAND_BOXES, False, 0.0),
        ('[{"label": "cat", "bbox_2d": [0, 0, "500", 1000]}]', THOUSAND_BOXES, False, 1.0),
        ("image_index=0 cat [0, 0, 500, 1000]\nA cat.", LAYOUT_BOXES, True, 1.0),
        ("Here:\nimage_index=0 cat [0, 0, 500, 1000]\nA cat.", LAYOUT_BOXES, False, 1.0),
        ('[{"label": "cat", "bbox_2d": [0, 0, 320, 480]}]', PIXEL_BOXES, True, 1.0),
        ('[{"label": "cat", "point": [0, 0, 500, 1000]}]', THOUSAND_BOXES, False, 0.0),
    ],
)
def test_boxes_are_read_in_the_format_of_the_model(
    answer: str, boxes: BoxFormat, valid: bool, expected: float
) -> None:
    found = score(answer, [TRUTH], boxes, [(480, 640)])
    assert (found.is_valid, found.iou) == (valid, expected)


def test_boxes_are_matched_within_their_image() -> None:
    truth = '[{"label": "cat", "bbox": [0, 0, 0.5, 1]}, {"label": "cat", "bbox": [0, 0, 1, 1], "image_id": 1}]'
    first = {"image_id": 0, "bbox_2d": [0, 0, 500, 1000], "label": "cat"}
    second = {"image_id": 1, "bbox_2d": [0, 0, 1000, 1000], "label": "cat"}
    two = [(10, 10), (20, 20)]
    for answer, expected in (([second, first], 1.0), ([first], 0.5), ([{**first, "image_id": 1}], 0.25)):
        assert score(json.dumps(answer), [truth], THOUSAND_BOXES, two).iou == expected
    assert score(json.dumps([{**first, "image_id": 2}]), [truth], THOUSAND_BOXES, two).iou == 0
    for image in (-1, 1.5, "0", None, True):
        with pytest.raises(DataError, match="is not a valid box"):
            true_boxes(json.dumps([{"label": "cat", "bbox": [0, 0, 1, 1], "image_id": image}]))


def test_only_lists_of_boxes_are_scored_as_boxes() -> None:
    assert score(TRUTH, [TRUTH, "a cat"]).iou is None
    assert true_boxes("[1, 2]") is None
    assert true_boxes('["cat"]') is None
    assert true_boxes("cat") is None
    assert found_boxes("cat") is None


@pytest.mark.parametrize(
    "bbox", [[0, 0, 640, 480], [0.5, 0, 0.4, 1], [0, 0, 0, 1], [0, 0, 1], [-0.1, 0, 1, 1], ["0", 0, 1, 1], "0 0 1 1"]
)
def test_true_boxes_must_be_fractions(bbox: Any) -> None:
    with pytest.raises(DataError, match="is not a valid box; .* fractions"):
        true_boxes(boxes_text(("cat", bbox)))
    with pytest.raises(DataError, match="is not a valid box"):
        true_boxes('[{"label": null, "bbox": [0, 0, 1, 1]}]')


@given(st.lists(st.tuples(st.sampled_from("ab"), corners), max_size=5), st.lists(corners, max_size=5))
def test_mean_iou_is_between_0_and_1_and_at_most_that_of_the_best_boxes(some: Any, more: Any) -> None:
    truth = [Region(label=label, corners=place) for label, place in some]
    found = [Region(label="a", corners=place) for place in more]
    assert 0 <= mean_iou(found, truth) <= 1
    if truth:
        best = [max((iou(one.corners, b.corners) for b in found if b.label == one.label), default=0) for one in truth]
        assert mean_iou(found, truth) <= sum(best) / len(truth) + 1e-9
