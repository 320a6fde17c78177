"""Boxes in answers: read in every notation, scaled to the upright image, and rendered over it."""

from __future__ import annotations

import json
import logging
import random
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm2vl_edge import AnswerError, Box, ConfigError, Model, Point, PromptError
from lfm2vl_edge.config import FRACTION_BOXES, BoxFormat
from lfm2vl_edge.image.draw import draw_boxes
from lfm2vl_edge.models.box_formats import BOX_FORMATS, LAYOUT_BOXES, PIXEL_BOXES, SHORT_BOXES, THOUSAND_BOXES
from lfm2vl_edge.models.registry import find_published
from lfm2vl_edge.structured import grammar_of, parse_answer, read_schema
from lfm2vl_edge.structured.boxes import read_boxes, read_points, read_regions
from tests.fake_engine import CONFIG, FakeEngine

CAR = '[{"label": "red car", "bbox": [0.12, 0.30, 0.25, 0.44]}]'
BOX = Box(label="red car", left=24, top=30, right=50, bottom=44)


def read(answer: str, boxes: BoxFormat = FRACTION_BOXES, height: int = 100, width: int = 200) -> list[Box]:
    return read_boxes(answer, boxes, [(height, width)])


@pytest.mark.parametrize(
    "answer",
    [
        CAR,
        f"Here it is:\n```json\n{CAR}\n```\nAnything else?",
        CAR.replace('"', "'"),
        CAR.replace("bbox", "bbox_2d"),
        CAR.strip("[]"),
        CAR[:-1],
        CAR[:-1] + ', {"label": "re',
        '[{"bbox": [0.25, 0.44, 0.12, 0.30], "label": "red car", "score": 0.9}]',
        '{"boxes": [{"label": "red car",\n\t"bbox": [0.12,0.30,\n0.25,0.44]}]}',
        CAR.replace("0.12", '"0.12"').replace("0.44", '".44"'),
        CAR.replace("[0.12, 0.30, 0.25, 0.44]", '"[0.12, 0.30, 0.25, 0.44]"'),
        CAR.replace("[0.12, 0.30, 0.25, 0.44]", "[[0.12, 0.30], [0.25, 0.44]]"),
        CAR.replace("[0.12, 0.30, 0.25, 0.44]", "(0.12, 0.30, 0.25, 0.44,)"),
        '[{"label": "red car", "x1": 0.12, "y1": 0.30, "x2": 0.25, "y2": 0.44}]',
        '[{"label": "red car", "bbox": {"xmin": 0.12, "ymin": 0.30, "xmax": 0.25, "ymax": 0.44}}]',
        '[{label: "red car", bbox: [0.12, 0.30, 0.25, 0.44],}]',
        '[{"name": "red car", "more": {}, "bbox": [0.12, 0.30, 0.25, 0.44]}]',
        '[{"label": "red car", "colour": {"r": 255}, "bbox": [0.12, 0.30, 0.25, 0.44], "score": null}]',
    ],
)
def test_the_same_box_in_other_notations(answer: str) -> None:
    assert read(answer) == [BOX]


@pytest.mark.parametrize("corners", ["[120, 300, 250, 440]", "[0.12, 0.30, 0.25, 0.44]"])
def test_a_model_of_thousandths_may_answer_with_the_key_of_fractions(corners: str) -> None:
    assert read(f'[{{"label": "red car", "bbox": {corners}}}]', THOUSAND_BOXES) == [BOX]


def test_quotes_inside_of_labels() -> None:
    answer = (
        """[{'label': 'the "O\\'Hara" shop', 'bbox': [0, 0, 1, 1]}, {"label": "it's {here}", "bbox": [0, 0, 1, 1]}]"""
    )
    assert [box.label for box in read(answer)] == ['the "O\'Hara" shop', "it's {here}"]
    labels = [
        'a "big" cat',
        "it's a cat",
        "the dogs' bowl",
        "[x], (y)",
        "{z}",
        "C:\\dir",
        "\\frac",
        "a\nb",
        "é 猫",
        ", ",
    ]
    for quote in "\"'":
        texts = [label.replace("\\", "\\\\") for label in labels]
        answer = ", ".join(f"{{{quote}label{quote}: {quote}{text}{quote}, 'bbox': [0, 0, 1, 1]}}" for text in texts)
        assert [box.label for box in read(f"[{answer}]")] == labels
    assert read(json.dumps([{"label": "\"'{}[]\\\u0007", "bbox": [0, 0, 1, 1]}]))[0].label == "\"'{}[]\\\u0007"


@pytest.mark.parametrize("answer", ["[]", "[ ]", "```json\n[]\n```", '{"boxes": []}'])
def test_no_boxes_are_an_empty_list(answer: str) -> None:
    assert read(answer) == []


@pytest.mark.parametrize(
    "answer", ["", "There is no car.", "[0.1, 0.2, 0.3, 0.4]", "{", '{"label": "x"', "[" * 10_000]
)
def test_an_answer_without_boxes_is_an_error(answer: str) -> None:
    with pytest.raises(AnswerError, match="holds no boxes"):
        read(answer)


def test_an_endless_answer_is_an_error() -> None:
    with pytest.raises(AnswerError, match="200000 characters, too many"):
        read("[" * 200_000)


HOSTILE = (
    *('{"', "{'", '{"\\"', '{"a" "', "{' ' ", '{:"', "{ a='b' ", '{"\\\\"', "{a:[", "{a:[(", "{a:{b", "{", "{}", "["),
    *("image_index=0 t [1,2,3,4]\n", "image_index=0 ", "image_id=", "{" + '"a":1,' * 50, '{"' + " " * 400),
    *("{a:[" + "1," * 300, "{a:" + "[" * 300, "{'" + '"' * 300, '{"a":{' + '"b":"c",' * 60, "{" + "a:{b}" * 100),
)


@pytest.mark.parametrize("part", HOSTILE, ids=lambda part: part[:12])
def test_hostile_answers_take_bounded_time_and_memory(part: str) -> None:
    """A search from every brace to the end of the answer would take minutes; the limit is far above what is needed."""
    before = time.process_time()
    tracemalloc.start()
    try:
        for start, end in (("", ""), ('[{"boxes": [', "]}]"), ("", '"}')):
            text = start + part * ((1 << 15) // len(part) - 9) + end
            try:
                read_regions(text, THOUSAND_BOXES, [(100, 100)])
            except AnswerError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - before < 15


def test_hundreds_of_boxes_are_read_and_only_the_broken_ones_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(0)
    expected = []
    for number in range(900):
        left, top = rng.randrange(900), rng.randrange(900)
        expected.append((f"thing {number}", left, top, left + rng.randrange(1, 99), top + rng.randrange(1, 99)))
    entries = [json.dumps({"bbox_2d": corners, "label": label}) for label, *corners in expected]
    entries.insert(300, '{"label": "x", "bbox_2d": [1, 2')
    answer = f"[{', '.join(entries)}, " + '{"label": "trunca'
    found = read(answer, THOUSAND_BOXES, 1000, 1000)
    assert [(box.label, box.left, box.top, box.right, box.bottom) for box in found] == expected
    assert "not a complete object" in caplog.text
    assert caplog.text.count("left out") == 1
    assert len(read_regions(answer, THOUSAND_BOXES, [(9, 9)]).dropped) == 2


@pytest.mark.parametrize(
    "entry",
    [
        '{"label": "x"}',
        '{"bbox": [0, 0, 1, 1]}',
        '{"label": 5, "bbox": [0, 0, 1, 1]}',
        '{"label": "x", "bbox": [0, 0, 1]}',
        '{"label": "x", "bbox": [0, 0, 1, true]}',
        '{"label": "x", "bbox": [0, 0, 1, "one"]}',
        '{"label": "x", "bbox": [0, 0, 1, 1, 1]}',
        '{"label": "x", "bbox": [0, 0, 1, null]}',
        '{"label": "x", "point": [0.5, 0.5]}',
        '{"label": "x", "bbox": [0, 0, 1, 1.3]}',
        '{"label": "x", "bbox": [1.1, 0, 1.2, 1]}',
        '{"label": "x", "bbox": [0, 0, 1, NaN]}',
        '{"label": "x", "bbox": [0, 0, 1, 1e999]}',
        '{"label": "x", "bbox": "everywhere"}',
        '{"label": {"value": "x"}, "bbox": [[1, "a"], 0, 1, 1]}',
        '{"label": "x", "bbox": }',
        '{"label": "x", "bbox": [0.5, 0.1, 0.5, 0.9]}',
        '{"label": "x", "bbox": [10, 20, 300, 400]}',
        '{"label": "x", "bbox": [0, 0, 1, ' + "9" * 400 + "]}",
        '{"label": "x", "bbox": [0, 0, 1, ' + "9" * 5000 + "]}",
        "{bbox}",
    ],
)
def test_an_invalid_box_is_left_out_with_a_warning(entry: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lfm2vl_edge.structured.boxes"):
        assert read(f"[{entry}, {CAR[1:]}") == [BOX]
    assert "not a valid box of the image" in caplog.text


def test_a_scale_of_a_thousand() -> None:
    answer = '[{"bbox_2d": [120, 300, 250, 440], "label": "red car"}]'
    assert read(answer, THOUSAND_BOXES) == [BOX]
    assert read(answer, FRACTION_BOXES) == []


DOCUMENTED = (
    '[{"image_id": 0, "bbox_2d": [540, 49, 1000, 774], "label": "cat on the right"}, '
    '{"image_id": 0, "bbox_2d": [10, 112, 497, 986], "label": "cat on the left"}]'
)
"""Of LFM2.5-VL-3B's documentation."""
LAYOUT = """image_index=0 title [76, 68, 144, 94]
Acme Inc.

image_index=1 table [78, 104, 600, 700]
<fcel>a [1, 2, 3, 4]<nl>

{"label": "x", "bbox_2d": [1, 2, 3, 4]}

image_index=1 page_number [900, 950, 950, 990]
7
"""


def test_documented_answers_by_hand() -> None:
    right = Box(label="cat on the right", left=346, top=24, right=640, bottom=372)  # 540 x 0.64, 49 x 0.48
    left = Box(label="cat on the left", left=6, top=54, right=318, bottom=473)
    assert read(DOCUMENTED, THOUSAND_BOXES, 480, 640) == [right, left]
    regions = [
        Box(label="title", left=76, top=34, right=144, bottom=47, content="Acme Inc."),
        Box(
            label="table",
            left=156,
            top=104,
            right=1200,
            bottom=700,
            image=1,
            content='<fcel>a [1, 2, 3, 4]<nl>\n\n{"label": "x", "bbox_2d": [1, 2, 3, 4]}',
        ),
        Box(label="page_number", left=1800, top=950, right=1900, bottom=990, image=1, content="7"),
    ]
    sizes = [(500, 1000), (1000, 2000)]
    for boxes in (LAYOUT_BOXES, THOUSAND_BOXES):  # a model may write either form
        assert read_boxes(LAYOUT, boxes, sizes) == regions
        assert read_boxes(f"Here:\n\n{LAYOUT}".replace("\n", "\r\n"), boxes, sizes)[0] == regions[0]
        assert read_boxes(f"```text\n{LAYOUT}```", boxes, sizes) == regions
    assert read_boxes(DOCUMENTED.replace('"image_id": 0', "'image_id': '1'"), LAYOUT_BOXES, sizes)[0].image == 1


def test_a_truncated_layout_keeps_its_whole_regions(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(500, 1000), (1000, 2000)]
    for end in ("[900, 95", "", "[900, 950, 950, 990] x"):
        text = LAYOUT[: LAYOUT.index("[900")] + end
        assert [box.label for box in read_boxes(text, LAYOUT_BOXES, sizes)] == ["title", "table"]
    assert "no four numbers" in caplog.text


@pytest.mark.parametrize(
    "image", ['"image_id": 2, ', '"image_id": -1, ', '"image_id": 0.5, ', '"image_id": "x", ', ""]
)
def test_a_box_of_an_unknown_image_is_left_out(image: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = f'{{{image}"bbox_2d": [0, 0, 500, 500], "label": "x"}}'
    two = [(10, 10), (10, 10)]
    assert read_boxes(f"[{entry}, {DOCUMENTED[1:]}", THOUSAND_BOXES, two)[0].label == "cat on the right"
    assert "not in one of the 2 images" in caplog.text
    assert read_boxes(entry, THOUSAND_BOXES, two[:1])[0].image == 0, "there is only one that it can mean"


@pytest.mark.parametrize(
    ("corners", "boxes", "expected"),
    [
        ([0.1, 0.2, 0.5, 0.9], FRACTION_BOXES, (20, 20, 100, 90)),
        ([100, 200, 500, 900], THOUSAND_BOXES, (20, 20, 100, 90)),
        ([0.1, 0.2, 0.5, 0.9], THOUSAND_BOXES, (20, 20, 100, 90)),  # decimals are fractions
        ([0, 0, 1, 1], THOUSAND_BOXES, (0, 0, 1, 1)),  # integers are not
        ([20, 20, 100, 90], PIXEL_BOXES, (20, 20, 100, 90)),
        ([20, 20, 230, 110], PIXEL_BOXES, (20, 20, 200, 100)),
        ([0.1, 0.2, 0.5, 0.9], PIXEL_BOXES, (20, 20, 100, 90)),
        ([500, 900, 100, 200], THOUSAND_BOXES, (20, 20, 100, 90)),
        ([500, 200, 100, 900], THOUSAND_BOXES, (20, 20, 100, 90)),
        ([-200, -1, 1200, 1100], THOUSAND_BOXES, (0, 0, 200, 100)),
        ([1000, 999, 990, 1000], THOUSAND_BOXES, (198, 99, 200, 100)),
        ([500, 500, 500.4, 500.4], THOUSAND_BOXES, (100, 50, 101, 51)),  # at least one pixel
        ([100, 200, 500, 1300], THOUSAND_BOXES, None),  # pixels of a larger image
        ([100, 200, 100, 900], THOUSAND_BOXES, None),
        ([1001, 0, 1100, 500], THOUSAND_BOXES, None),
        ([120, 300, 250, 440], FRACTION_BOXES, None),
    ],
)
def test_corners_of_every_scale_by_hand(
    corners: list[float], boxes: BoxFormat, expected: tuple[int, ...] | None
) -> None:
    found = read(json.dumps([{"label": "x", boxes.key: corners}]), boxes)
    assert [(box.left, box.top, box.right, box.bottom) for box in found] == ([] if expected is None else [expected])


def test_points_and_centers() -> None:
    answer = (
        '[{"point_2d": [250, 500], "label": "a"}, {"x": 999, "y": "0", "label": "b"}, '
        '{"point": [0.5, 0.5], "label": "c"}, {"bbox_2d": [0, 0, 500, 1000], "label": "d"}, {"x": 5, "label": "e"}]'
    )
    expected = [("a", 50, 50), ("b", 199, 0), ("c", 100, 50), ("d", 50, 50)]
    assert [(one.label, one.x, one.y) for one in read_points(answer, THOUSAND_BOXES, [(100, 200)])] == expected
    assert [box.label for box in read(answer, THOUSAND_BOXES)] == ["d"]


@given(
    label=st.text(max_size=30),
    corners=st.tuples(*[st.floats(-0.24, 1.24)] * 4),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
)
@settings(max_examples=300, deadline=None)
def test_boxes_are_within_the_image_and_at_their_corners(
    label: str, corners: tuple[float, float, float, float], height: int, width: int
) -> None:
    answer = json.dumps([{"label": label, "bbox": corners}])
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
    found = read(answer, height=height, width=width)
    if x1 == x2 or y1 == y2:
        assert found == []
        return
    box = found[0]
    assert box.label == label
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    ends = [(box.left, min(x1, x2) * width), (box.right, max(x1, x2) * width)]
    ends += [(box.top, min(y1, y2) * height), (box.bottom, max(y1, y2) * height)]
    assert all(abs(pixel - exact) <= 1.5 for pixel, exact in ends)  # rounded, and at least one pixel wide
    assert box.left <= box.center.x < box.right
    assert box.top <= box.center.y < box.bottom


@given(st.text(alphabet="[]{}\"'\\,:0.19e-labelbox \n", max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_an_answer_error(text: str) -> None:
    try:
        boxes = read(text)
    except AnswerError:
        return
    assert all(isinstance(box, Box) for box in boxes)


def test_questions_and_formats_of_the_models() -> None:
    assert SHORT_BOXES.ask("red circle") == "Detect the red circle."
    assert [SHORT_BOXES.ask(what) for what in ("every square", "the cat", None, " ")] == [
        "Detect every square.",
        "Detect the cat.",
        "Detect all objects.",
        "Detect all objects.",
    ]
    assert FRACTION_BOXES.ask("{what}").startswith("Detect all instances of: {what}. Response must be a JSON array: ")
    formats = {
        "LFM2.5-VL-450M": FRACTION_BOXES,
        "LFM2.5-VL-3B": THOUSAND_BOXES,
        "lfm2vl-tiny": SHORT_BOXES,
        "Lfm2vl Tiny": SHORT_BOXES,
    }
    for name, boxes in formats.items():
        published = find_published(name)
        assert published is not None
        assert published.boxes is boxes


@pytest.mark.parametrize("boxes", [SHORT_BOXES, THOUSAND_BOXES], ids=["fractions", "thousandths"])
def test_answers_in_the_format_are_read(boxes: BoxFormat, model: Model) -> None:
    text = json.dumps(boxes.schema()).replace('"maxItems": 100', '"maxItems": 2')
    schema = json.loads(text.replace('"maxLength": 100', '"maxLength": 3'))  # an untrained model never ends
    for seed in range(3):
        options: dict[str, Any] = {"seed": seed, "temperature": 2.0, "min_p": 0.0, "max_tokens": 1000}
        answer = model.ask([], "Detect all objects.", schema=schema, **options)
        entries = json.loads(answer)
        assert len(entries) <= 2
        for entry in entries:
            assert set(entry) - {"image_id"} == {"label", boxes.key}
            assert entry.get("image_id", 0) == 0
            assert len(entry[boxes.key]) == 4
            assert all(0 <= corner <= boxes.scale for corner in entry[boxes.key])
        assert len(read(answer, boxes)) <= len(entries)


@pytest.mark.parametrize("answer", [CAR, "[]", '[{"bbox": [0, 0.5, 1, 1.0], "label": "x"}]'])
def test_answers_of_the_training_data_match_the_format(answer: str) -> None:
    assert parse_answer(answer, read_schema(SHORT_BOXES.schema())) == json.loads(answer)


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: 60 x 20 in the file is displayed as 20 x 60
    Image.new("RGB", (60, 20)).save(path, exif=exif)
    question = SHORT_BOXES.ask("red car")
    engine = FakeEngine({question: CAR, "Where?": f"Here: {CAR}"})
    model = Model(engine, replace(CONFIG, boxes=SHORT_BOXES))
    expected = Box(label="red car", left=2, top=18, right=5, bottom=26)
    assert model.detect(path, "red car") == [expected]
    assert engine.grammars == [grammar_of(read_schema(SHORT_BOXES.schema()))]
    assert engine.sampled[0].temperature == 0.0
    assert model.detect(path, prompt="Where?", free=True, temperature=0.5) == [expected]
    assert (engine.grammars[1], engine.sampled[1].temperature) == (None, 0.5)
    assert model.point(model.preprocess(path), "red car") == [Point(label="red car", x=3, y=22)]
    shown = {"label": "red car", "left": 2, "top": 18, "right": 5, "bottom": 26, "image": 0, "content": ""}
    assert asdict(expected) == shown


ONE_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content if message.content is not string %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% else %}{{ message.content }}|{% endfor %}{% endfor %}"
)
"""With a system prompt, which is text."""
IMAGES = [np.zeros((20, 40, 3), np.uint8), np.zeros((40, 20, 3), np.uint8)]


def scripted(boxes: BoxFormat, answers: dict[str, str]) -> tuple[Model, FakeEngine]:
    engine = FakeEngine(answers)
    return Model(engine, replace(CONFIG, boxes=boxes, chat_template=ONE_TEMPLATE, n_ctx_train=5000)), engine


def test_a_format_with_an_index_asks_once_about_all_images() -> None:
    answer = '[{"image_id": 1, "bbox_2d": [500, 500, 1000, 1000], "label": "cat"}, '
    answer += '{"image_id": 0, "bbox_2d": [0, 0, 500, 1000], "label": "cat"}]'
    asked = f"{THOUSAND_BOXES.system}|Provide bounding boxes for the cat."
    model, engine = scripted(
        THOUSAND_BOXES, {asked: answer, "Where?": answer, f"{THOUSAND_BOXES.system}|Where?": answer}
    )
    found = [
        Box(label="cat", left=10, top=20, right=20, bottom=40, image=1),
        Box(label="cat", left=0, top=0, right=20, bottom=20, image=0),
    ]
    assert model.detect(IMAGES, "cat") == found
    assert engine.asked == [asked]
    assert engine.grammars == [grammar_of(read_schema(THOUSAND_BOXES.schema(2)))]
    assert model.point(tuple(IMAGES), "cat") == [box.center for box in found]
    assert model.detect(IMAGES, prompt="Where?", free=True) == found
    assert engine.asked[-1] == "Where?", "a question of one's own, and nothing else"
    assert model.detect(IMAGES, prompt="Where?") == found
    with pytest.raises(AnswerError):  # the answer is held to the only image
        model.detect(IMAGES[:1], "cat")


def test_a_format_without_an_index_asks_about_each_image(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = scripted(THOUSAND_BOXES, {"Detect the red car.": CAR})
    found = model.detect(IMAGES, "red car", boxes="short")
    assert [(box.image, box.left, box.top, box.right, box.bottom) for box in found] == [
        (0, 5, 6, 10, 9),
        (1, 2, 12, 5, 18),
    ]
    assert engine.asked == ["Detect the red car."] * 2
    assert model.detect(IMAGES[1], "red car", boxes=SHORT_BOXES) == [replace(found[1], image=0)]
    assert caplog.text == ""
    assert len(model.detect(IMAGES, "red car", boxes="short", free=True, max_tokens=len(CAR) - 1)) == 2
    assert "the answer is truncated" in caplog.text


@pytest.mark.parametrize("boxes", ["", "feet", "x" * 500, 5, ("layout",), {}])
def test_a_bad_format_or_no_image_is_one_line(boxes: Any) -> None:
    model, engine = scripted(SHORT_BOXES, {})
    with pytest.raises(ConfigError, match="it must be a BoxFormat, or one of fractions, thousandths, layout") as error:
        model.detect(IMAGES, boxes=boxes)
    assert len(str(error.value)) < 250
    for find in (model.detect, model.point):
        with pytest.raises(PromptError, match="no image"):
            find([])
    assert engine.asked == []


@pytest.mark.parametrize("name", BOX_FORMATS)
def test_every_format_can_hold_answers(name: str) -> None:
    boxes = BOX_FORMATS[name]
    schema = read_schema(boxes.schema(3))
    high = boxes.scale or 99_999
    index = {boxes.image_key: 2} if boxes.image_key else {}
    assert parse_answer(json.dumps([index | {boxes.key: [0, 0, high, high], "label": "x"}]), schema)
    for wrong in ([0, 0, high], [0, 0, high, high + 1], [-1, 0, 1, 1], ["0", 0, 1, 1]):
        with pytest.raises(AnswerError):
            parse_answer(json.dumps([index | {boxes.key: wrong, "label": "x"}]), schema)
    for more in ({boxes.image_key: 3}, {"label": ""}, {"label": 5}, {boxes.image_key: None}, {"score": 1}):
        with pytest.raises(AnswerError):
            parse_answer(json.dumps([index | {boxes.key: [0, 0, 1, 1], "label": "x"} | more]), schema)
    if boxes is THOUSAND_BOXES:
        assert len(parse_answer(DOCUMENTED, schema)) == 2


def test_frames_are_rendered_at_the_boxes() -> None:
    image = np.full((120, 200, 3), 128, np.uint8)
    boxes = [
        Box(label="a\nb", left=20, top=30, right=180, bottom=110),
        Box(label="猫", left=0, top=0, right=1, bottom=1),
    ]
    rendered = draw_boxes(image, boxes)
    assert (image == 128).all()
    assert rendered.shape == image.shape
    frame = (255, 64, 64)
    assert all((rendered[row, 20:180] == frame).all() for row in (30, 109))
    assert all((rendered[30:110, column] == frame).all() for column in (20, 179))
    assert (rendered[0, 0] == frame).all() or (rendered[0, 0] != 128).any()
    untouched = np.ones((120, 200), bool)
    untouched[30:110, 20:180] = False
    untouched[:30, :60] = False  # the label of the small one
    assert (rendered[untouched] == 128).mean() > 0.9
    assert (rendered[60:100, 40:160] == 128).all()


def test_labels_stay_within_the_image() -> None:
    image = np.full((60, 90, 3), 128, np.uint8)
    rendered = draw_boxes(image, [Box(label="person", left=80, top=50, right=90, bottom=60)])
    changed = np.argwhere((rendered != 128).any(axis=2))
    white = np.argwhere((rendered > 160).all(axis=2))
    inner = draw_boxes(image, [Box(label="person", left=10, top=10, right=20, bottom=20)])
    assert len(white) == (inner > 160).all(axis=2).sum() > 20, "the whole text, as with room"
    assert white[:, 1].max() < 89
    assert changed[:, 1].min() > 30
    narrow = draw_boxes(image[:, :12], [Box(label="person", left=2, top=2, right=8, bottom=8)])
    assert narrow.shape == (60, 12, 3), "a text that is wider than the image starts at its left edge"
