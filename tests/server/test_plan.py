"""`POST /v1/plan` gives what `plan --json` prints, which is compared with golden data elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lfm2vl_edge.cli import app
from tests.server.conftest import SCENE, Here, data_url, question


def by_command(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *arguments, "-m", "tiny", "--json", "-t", "1"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_server(here: Here, body: Any) -> Any:
    response = here.send("POST", "/v1/plan", body)
    assert response.status == 200, response.body
    values = response.json
    assert values.pop("fits") is True
    assert values.pop("n_ctx") == 2048
    return values


def test_the_plan_of_a_size_and_of_an_image(here: Here) -> None:
    assert by_server(here, {"height": 300, "width": 700}) == by_command("700x300")
    assert by_server(here, {"image": data_url()}) == by_command(str(SCENE))
    fast = by_command(str(SCENE), "--detail", "fast")
    assert by_server(here, {"image": data_url(), "detail": "low"})["views"] == fast["views"]
    part = {"type": "image_url", "image_url": {"url": data_url(), "detail": "low"}}
    assert by_server(here, {"image": part})["views"] == fast["views"]


def test_an_answer_takes_what_was_planned(here: Here) -> None:
    planned = by_server(here, {"image": data_url()})
    usage = here.chat(question(max_tokens=1)).json["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == planned["image_tokens"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"height": 5},
        {"height": 0, "width": 5},
        {"height": 10**9, "width": 5},
        {"height": "5", "width": 5},
        {"image": "/etc/passwd"},
        {"image": {"type": "text", "text": "x"}},
        {"image": 5},
        {"image": []},
        {"height": 300, "width": 700, "budget_tokens": 1},
    ],
)
def test_what_cannot_be_planned(here: Here, body: Any) -> None:
    response = here.send("POST", "/v1/plan", body)
    assert response.status == 400
    assert response.error
