"""`POST /v1/boxes/question` and `/v1/boxes`: together they do what `detect` does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lfm2vl_edge.cli import app
from tests.server.conftest import SCENE, Here, Serve, question

SIZE = {"height": 200, "width": 400}


def read(here: Here, answer: str, **fields: Any) -> Any:
    response = here.send("POST", "/v1/boxes", {"answer": answer, "images": [SIZE], **fields})
    assert response.status == 200, response.body
    return response.json


def test_boxes_as_of_the_command(here: Here) -> None:
    result = CliRunner().invoke(app, ["detect", str(SCENE), "purple heart", "-m", "tiny", "--json", "-t", "1"])
    expected = json.loads(result.stdout)
    how = here.send("POST", "/v1/boxes/question", {"what": "purple heart"}).json
    assert how["question"] == "Detect the purple heart."
    assert (how["system"], how["all_at_once"]) == ("", False)
    form = {"type": "json_schema", "json_schema": {"name": "boxes", "schema": how["schema"]}}
    answer = here.chat(question(how["question"], response_format=form, max_tokens=200)).text
    size = {name: expected[name] for name in ("height", "width")}
    found = here.send("POST", "/v1/boxes", {"answer": answer, "images": [size]}).json["found"]
    assert len(found) == len(expected["boxes"]) == 2
    for region, box in zip(found, expected["boxes"], strict=True):
        sides = [expected["width"], expected["height"]] * 2
        pixels = [box[name] for name in ("left", "top", "right", "bottom")]
        assert [round(corner * side) for corner, side in zip(region["corners"], sides, strict=True)] == pixels
        assert (region["label"], region["is_point"], region["image"]) == (box["label"], False, 0)


def test_each_format(here: Here) -> None:
    """The examples of docs/detection.md, worked out by hand."""
    pixels = '[{"label": "cat", "bbox_2d": [100, 50, 300, 150]}]'
    thousandths = '[{"image_id": 1, "bbox_2d": [100, 200, 500, 900], "label": "cat"}]'
    layout = "image_index=0 title [100, 200, 500, 900]\nA heading"
    assert read(here, pixels, boxes="pixels")["found"][0]["corners"] == [0.25, 0.25, 0.75, 0.75]
    second = read(here, thousandths, boxes="thousandths", images=[SIZE, SIZE])["found"][0]
    assert (second["corners"], second["image"]) == ([0.1, 0.2, 0.5, 0.9], 1)
    region = read(here, layout, boxes="layout")["found"][0]
    assert (region["label"], region["content"]) == ("title", "A heading")
    point = read(here, 'Here: {"label": "nose", "point": [0.5, 0.25]}')["found"][0]
    assert (point["is_point"], point["corners"]) == (True, [0.5, 0.25, 0.5, 0.25])


def test_what_is_not_a_box_is_named(here: Here) -> None:
    assert read(here, "[]") == {"found": [], "dropped": []}
    assert read(here, "A cat.")["found"] == []
    assert "holds no boxes" in read(here, "A cat.")["dropped"][0]
    mixed = '[{"label": "a", "bbox": [0, 0, 1, 1]}, {"label": "b", "bbox": [5, 5, 9, 9]}, {"label": "c", "bb'
    values = read(here, mixed)
    assert [region["label"] for region in values["found"]] == ["a"]
    assert len(values["dropped"]) == 2


def test_questions_of_other_formats(here: Here) -> None:
    how = here.send("POST", "/boxes/question", {"boxes": "thousandths", "n_images": 3}).json
    assert how["all_at_once"] is True
    assert how["question"] == "Provide bounding boxes for all objects."
    assert "image_id" in how["system"]
    assert how["schema"]["items"]["properties"]["image_id"]["maximum"] == 2
    assert here.send("POST", "/v1/boxes/question", {"boxes": "layout"}).json["schema"] is None


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("boxes", {"images": [SIZE]}, "answer"),
        ("boxes", {"answer": 5, "images": [SIZE]}, "answer"),
        ("boxes", {"answer": "[]"}, "images"),
        ("boxes", {"answer": "[]", "images": SIZE}, "images"),
        ("boxes", {"answer": "[]", "images": [SIZE, 5]}, "images"),
        ("boxes", {"answer": "[]", "images": [{"height": 5}]}, "images"),
        ("boxes", {"answer": "[]", "images": [{"height": -5, "width": 5}]}, "images"),
        ("boxes", {"answer": "[]", "images": [{"height": 10**9, "width": 5}]}, "images"),
        ("boxes", {"answer": "[]", "images": [{"height": "5", "width": 5}]}, "height"),
        ("boxes", {"answer": "[]", "images": [SIZE], "boxes": "none"}, "boxes"),
        ("boxes", {"answer": "[]", "images": [SIZE], "boxes": {"scale": 1}}, "boxes"),
        ("boxes/question", {"what": ["cat"]}, "what"),
        ("boxes/question", {"n_images": 0}, "n_images"),
        ("boxes/question", {"n_images": 9}, "n_images"),
        ("boxes/question", {"boxes": 5}, "boxes"),
    ],
)
def test_what_cannot_be_read(here: Here, path: str, body: Any, named: str) -> None:
    response = here.send("POST", f"/v1/{path}", body)
    assert response.status == 400
    assert named in response.error["message"]


def test_a_very_long_answer(here: Here) -> None:
    assert "characters" in read(here, "[" * 200_000)["dropped"][0]
    assert read(here, "{" * 100_000)["found"] == []


def test_a_key_is_needed(serve: Serve) -> None:
    here = serve(keys=("secret",))
    assert here.send("POST", "/v1/boxes", {"answer": "[]", "images": [SIZE]}).status == 401
