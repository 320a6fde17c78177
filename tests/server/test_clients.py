"""Requests as programs send them that cannot be installed here, by their documentation; see docs/clients.md."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.evaluate import evaluate, read_rows, summarise
from tests.server.conftest import DATA, Here, data_url, encoded, question

CAPTION = "What is in the picture?"  # quote
JPEG = {"type": "image_url", "image_url": {"url": data_url(), "detail": "low"}}


def test_the_program_of_the_page(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes((DATA / "0003.png").read_bytes())
    assert "http://127.0.0.1:8080/v1" in code
    names: dict[str, Any] = {}
    exec(compile(code.replace("http://127.0.0.1:8080", here.url), "server.md", "exec"), names)  # noqa: S102
    names["client"].close()
    assert "CompletionUsage" in capsys.readouterr().out


def blocks_of(page: str, language: str) -> list[str]:
    """Return the blocks of code of a page in docs/."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["clients.md", "server.md"])
def test_the_commands_with_curl_work(page: str, here: Here, tmp_path: Path) -> None:
    """As they are written, about an image of 150 KB: more than an argument of a program may have."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg", format="PNG")
    assert (tmp_path / "photo.jpg").stat().st_size > 150_000
    commands = [one for one in blocks_of(page, "sh") if one.startswith("curl ")]
    assert commands
    for command in commands:
        script = command.replace("http://127.0.0.1:8080", here.url)
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True, timeout=60)
        answer = json.loads(done.stdout)
        assert "choices" in answer or "probabilities" in answer, answer


def test_the_configurations_of_the_page_are_valid() -> None:
    compose, automation, frigate, proxy = map(yaml.safe_load, blocks_of("clients.md", "yaml"))
    base, whole = "http://HOST:8080/v1", "http://HOST:8080/v1/chat/completions"
    service = compose["services"]["open-webui"]
    assert service["environment"]["OPENAI_API_BASE_URL"] == base.replace("HOST", "host.docker.internal")
    assert set(map(type, service["environment"].values())) == {str}
    assert set(compose["volumes"]) == {one.partition(":")[0] for one in service["volumes"]}
    provider = frigate["genai"]["edge"]
    assert (provider["provider"], provider["base_url"], provider["model"]) == ("openai", base, "eyes")
    assert set(provider["roles"]) == {"descriptions", "chat"}
    assert proxy["model_list"][0]["litellm_params"]["api_base"] == base
    (asked, told) = automation[0]["actions"]
    assert asked["data"]["model"] == "eyes"
    assert asked["response_variable"] in told["if"]
    assert automation[0]["triggers"][0]["to"] == "on"
    assert f"`{whole}`; the key is" in (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # of other packages
def test_langchain_as_on_the_page(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Compiled everywhere, run if LangChain is installed."""
    (code,) = blocks_of("clients.md", "python")
    assert "http://127.0.0.1:8080/v1" in code
    compiled = compile(code.replace("http://127.0.0.1:8080", here.url), "clients.md", "exec", dont_inherit=True)
    pytest.importorskip("langchain_openai")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes((DATA / "0003.png").read_bytes())
    exec(compiled, {})  # noqa: S102
    whole, streamed = capsys.readouterr().out.split("\n")
    assert whole == streamed != ""


def test_open_webui(here: Here) -> None:
    """It lists the models, streams an answer about an image, and then asks for a title of the conversation."""
    listed = here.send("GET", "/v1/models", headers={"Authorization": "Bearer KEY"}).json
    assert listed["data"][0]["id"]
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    content = [{"type": "text", "text": "Count the purple objects."}, image]
    messages: list[Any] = [{"role": "user", "content": content}]
    body = {"stream": True, "model": "scenes", "messages": messages, "stream_options": {"include_usage": True}}
    events = here.chat(body).events
    streamed = "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"])
    assert streamed == here.chat(body | {"stream": False}).text != ""
    assert events[-1]["usage"]["completion_tokens"] > 0
    title = {
        "role": "user",
        "content": "### Task:\nGenerate a concise title.\n<chat_history>\nUSER: x\n</chat_history>",
    }
    task = {"stream": False, "model": "scenes", "messages": [title], "max_completion_tokens": 8}
    assert here.chat(task).status == 200


def test_frigate_as_openai(here: Here) -> None:
    """A text first, then several frames, and a strict schema; the context is read from the list of models."""
    schema = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 20},
            "potential_threat_level": {"type": "integer", "enum": [0, 1, 2]},
        },
        "required": ["title", "potential_threat_level"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": schema}}
    content = [{"type": "text", "text": CAPTION}, JPEG, JPEG, JPEG]
    with here.client() as client:
        assert client.models.list().data[0].model_dump()["max_model_len"] == 2048
        body: Any = {"messages": [{"role": "user", "content": content}], "response_format": form, "timeout": 60}
        answer = client.chat.completions.create(model="scenes", **body)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_frigate_as_llama_cpp(here: Here) -> None:
    listed = here.send("GET", "/v1/models").json["data"]
    assert any("scenes" in (one["id"], *one["aliases"]) for one in listed)
    assert "image" in listed[0]["architecture"]["input_modalities"]
    props = here.send("GET", "/props?model=scenes").json
    assert props["modalities"]["vision"]
    assert set(props["chat_template_caps"].values()) <= {True, False}
    assert props["media_marker"]
    more = {"chat_template_kwargs": {"enable_thinking": False}, "timings_per_token": True}
    sizes = {}
    for count in (0, 1, 2):  # it measures the tokens of an image by answers of one token
        message = {"role": "user", "content": [{"type": "text", "text": "x"}, *[JPEG] * count]}
        response = here.send("POST", "/chat/completions", {"messages": [message], "max_tokens": 1, **more})
        sizes[count] = response.json["usage"]["prompt_tokens"]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
    stream = {"messages": [message], "max_tokens": 4, "stream": True, **more}
    assert here.send("POST", "/v1/chat/completions", stream).events[-1]["timings"]["predicted_n"] > 0


def test_llm_vision_of_home_assistant(here: Here) -> None:
    content: list[Any] = []
    for number in (1, 2):
        content += [{"type": "text", "text": f"Image {number}:"}, JPEG]
    content.append({"type": "text", "text": CAPTION})
    body = {
        "model": "scenes",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 20,
        "temperature": 0.5,
    }
    response = here.chat(body)
    assert response.headers["content-type"].startswith("application/json")
    assert response.text


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_evaluation_harnesses(here: Here, limit: str) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(), "detail": "high"}}
    content = [image, {"type": "text", "text": "Count the purple objects."}]
    body = {"model": "scenes", "messages": [{"role": "user", "content": content}], "n": 1, limit: 8, "temperature": 0}
    assert here.chat(body).text == "2"


def test_answers_are_those_of_eval(here: Here, tmp_path: Path) -> None:
    """What a harness sends for each row of a data set, four at a time, gives the answers of `eval`.

    Boxes are left out: when several answers are computed together, their last digit may differ.
    """
    out = tmp_path / "out.jsonl"
    command = [
        "eval",
        str(DATA / "data.jsonl"),
        "-m",
        "tiny",
        "-t",
        "1",
        "--limit",
        "28",
        "--out",
        str(out),
        "-n",
        "40",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    results = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    rows = [json.loads(line) for line in (DATA / "data.jsonl").read_text().splitlines()[:28]]
    rows = [row for row in rows if row["group"] != "detect"]
    expected = {row["id"]: results[row["id"]]["answer"] for row in rows}
    assert len(expected) == 25

    def ask(row: dict[str, Any]) -> str:
        image = {"type": "image_url", "image_url": {"url": data_url(DATA / row["image"]), "detail": "high"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]
        greedy = {"temperature": 0, "repetition_penalty": 1, "max_tokens": 40, "n": 1}
        return here.chat({"messages": messages, **greedy}).text

    with ThreadPoolExecutor(4) as pool:
        assert dict(zip((row["id"] for row in rows), pool.map(ask, rows), strict=True)) == expected


def test_a_multiple_choice_set_of_a_harness(here: Here, tmp_path: Path) -> None:
    """VLMEvalKit and lmms-eval send question and options, and search the answer for an option.

    Without letters before the options, which the demonstration model does not know.
    """
    rows = [json.loads(line) for line in (DATA / "data.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["group"] in ("background", "yes/no", "color", "shape")]  # quote
    for row in rows:
        known = sorted({other["answer"] for other in rows if other["group"] == row["group"]})
        row |= {"options": known, "image": str(DATA / row["image"])}
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Model.open("tiny", n_threads=1, cache=False) as model:
        found = summarise(evaluate(model, read_rows(tmp_path / "choices.jsonl"))).total

    def is_right(row: dict[str, Any], limit: str) -> bool:
        image = {"type": "image_url", "image_url": {"url": data_url(Path(row["image"])), "detail": "high"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]
        answer = here.chat({"model": "scenes", "messages": messages, "n": 1, "temperature": 0, limit: 16}).text
        inferred = [option for option in row["options"] if re.search(rf"\b{option}\b", answer)]
        return inferred == [row["answer"]]

    with ThreadPoolExecutor(4) as pool:
        for limit in ("max_tokens", "max_completion_tokens"):
            right = list(pool.map(is_right, rows, [limit] * len(rows)))
            assert sum(right) / len(rows) == pytest.approx(found.exact)
            assert sum(right) > len(rows) / 2


def test_langchain_and_n8n(here: Here) -> None:
    """Parts without a type, and the URL of an image as a text."""
    for image in ({"image_url": data_url()}, {"type": "image_url", "image_url": data_url()}):
        content = [image, {"text": "Count the purple objects."}]
        assert here.chat({"messages": [{"role": "user", "content": content}], "temperature": 0}).text == "2"


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("as_responses", [False, True])
def test_langchain_itself(here: Here, as_responses: bool) -> None:
    """Where it is installed; `pip install langchain-openai` brings thirty packages."""
    openai = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")
    options = {"api_key": "none", "model": "x", "temperature": 0, "max_retries": 0, "use_responses_api": as_responses}
    model = openai.ChatOpenAI(base_url=f"{here.url}/v1", **options)
    text = {"type": "text", "text": "Count the purple objects."}
    url = {"type": "image_url", "image_url": {"url": data_url()}}
    own = {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": encoded()}
    for image in (url, own):
        assert model.invoke([messages.HumanMessage(content=[image, text])]).text == "2"
    asked = [messages.HumanMessage(content=[url, text])]
    assert "".join(chunk.text for chunk in model.stream(asked)) == "2"
    schema = {
        "title": "n",
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}},
        "required": ["n"],
    }
    assert set(model.with_structured_output(schema, method="json_schema").invoke(asked)) == {"n"}


@pytest.mark.filterwarnings("ignore")  # of other packages
def test_litellm_itself(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # instead of a download
    litellm = pytest.importorskip("litellm")
    body = question()
    given = {"model": "openai/scenes", "api_base": f"{here.url}/v1", "api_key": "none", **body}
    answer = litellm.completion(**given)
    assert answer.choices[0].message.content == "2"
    assert answer.usage.prompt_tokens > 0
    chunks = list(litellm.completion(stream=True, **given))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "2"


def test_agents(with_tools: Here) -> None:
    """Results of tools that are lists of parts, keys that only the client knows, and several calls."""
    function = {"name": "look_up", "arguments": '{"place": "Bergen"}'}
    call = {"id": "call_1", "type": "function", "function": function, "index": 0}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hello", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": None},
        {"role": "tool", "tool_call_id": "call_1", "name": "look_up", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "", "function_call": None, "audio": None, "annotations": []},
        {"role": "user", "content": "Thanks"},
    ]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    for tools in ([], [tool]):
        body = {"messages": messages, "tools": tools, "max_tokens": 3, "temperature": 0}
        assert with_tools.chat(body).status in (200, 422)
    assert with_tools.chat({"messages": messages, "max_tokens": 3}).status == 200
