"""No error repeats more than 80 characters of what was given, whatever it was and wherever it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import EdgeError, ImageConfig, Model, ModelNotPulled, load_image, pull
from lfm2vl_edge.cli import app
from lfm2vl_edge.errors import clip, shorten
from lfm2vl_edge.evaluate.rows import read_rows
from tests.conftest import IMAGES, REFERENCE

LONG = ["a b " * 1500, "é\n" * 3000, "y" * 200 + "/" + "z" * 200 + ".png"]
CHECKPOINT = REFERENCE / "a" / "checkpoint"
IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open("tiny", n_ctx=2048) as opened:
        yield opened


def ask(model: Model, **options: Any) -> object:
    return model.ask(IMAGE, "What?", **{"max_tokens": 1, **options})


def chat(model: Model, *messages: Any, **options: Any) -> object:
    return list(model.chat(list(messages), max_tokens=1, **options))


Call = Callable[[Model, str], object]
IMAGES_GIVEN: dict[str, Call] = {
    "path": lambda _, text: load_image(text),
    "home": lambda _, text: load_image("~/" + text),
    "Path": lambda _, text: load_image(Path(text)),
    "bytes": lambda _, text: load_image(text.encode()),
    "URL": lambda _, text: load_image("https://host:0/" + text),
    "other URL": lambda _, text: load_image("ftp://host/" + text),
    "file URL": lambda _, text: load_image("file:///" + text),
    "data": lambda _, text: load_image("data:image/png," + text),
    "base64": lambda _, text: load_image("data:image/png;base64," + text),
    "media type": lambda _, text: load_image(f"data:{text}"),
    "no head": lambda _, text: load_image("iVBORw0KGgo" + text),
    "class": lambda _, text: load_image(type(text.encode().hex(), (), {})()),
}
OPTIONS: dict[str, Call] = {
    **{
        name: lambda model, text, name=name: ask(model, **{name: text})  # type: ignore[misc]
        for name in ("max_tokens", "temperature", "top_k", "seed", "schema", "grammar", "detail", "budget_seconds")
    },
    "stop": lambda model, text: ask(model, stop={text: text}),
    "name": lambda model, text: ask(model, **{text: 1}),
    "option twice": lambda model, text: model.choose([], "Who?", [text, text]),
    "option of one": lambda model, text: model.choose([], "Who?", text),
    "template": lambda model, text: ask(model, template_options=text),
    "open": lambda _, text: Model.open("tiny", **{text: 1}),  # type: ignore[arg-type]
    "device": lambda _, text: Model.open("tiny", device=text),
    "open detail": lambda _, text: Model.open("tiny", detail=text),  # type: ignore[arg-type]
    "image": lambda _, text: ImageConfig(tile_size=text),  # type: ignore[arg-type]
}
MODELS: dict[str, Call] = {
    "name": lambda _, text: Model.open(text),
    "file": lambda _, text: Model.open(text + ".gguf"),
    "hub": lambda _, text: Model.open("owner/" + text),
    "type": lambda _, text: Model.open("lfm2.5-vl-450m:" + text),
    "pull": lambda _, text: pull("owner/" + text),
    "mmproj": lambda _, text: Model.open("tiny", mmproj=text),
    "load": lambda model, text: model.load_encoded_image(text),
    "checkpoint": lambda _, text: convert_checkpoint(text, "unused"),
    "written type": lambda _, text: convert_checkpoint(CHECKPOINT, "unused", quant=text),
    "mmproj type": lambda _, text: convert_checkpoint(CHECKPOINT, "unused", mmproj_quant=text),
    "rows": lambda _, text: read_rows(Path(text)),
}
MESSAGES: dict[str, Call] = {
    "text": chat,
    "role": lambda model, text: chat(model, {"role": text, "content": "a"}),
    "type": lambda model, text: chat(model, {"role": "user", "content": [{"type": text}]}),
    "content": lambda model, text: chat(model, {"role": "user", "content": {text: text}}),
    "video": lambda model, text: chat(model, {"role": "user", "content": [{"type": "video", "video": text}]}),
    "image": lambda model, text: chat(model, {"role": "user", "content": [{"type": "image", "path": text}]}),
    "base64 part": lambda model, text: chat(model, {"role": "user", "content": [{"type": "image", "base64": text}]}),
    "tool_calls": lambda model, text: chat(model, {"role": "assistant", "tool_calls": text}),
    "arguments": lambda model, text: chat(
        model, {"role": "assistant", "tool_calls": [{"function": {"name": text, "arguments": text}}]}
    ),
    "tool": lambda model, text: chat(model, {"role": "user", "content": "a"}, tools=[{text: text}]),
}
SCHEMAS: dict[str, Callable[[str], Any]] = {
    "text": lambda text: text,
    "type": lambda text: {"type": text},
    "keyword": lambda text: {"minLength": text},
    "reference": lambda text: {"$ref": text},
    "pattern": lambda text: {"type": "string", "pattern": text + "("},
    "format": lambda text: {"type": "string", "format": text},
    "property": lambda text: {"type": "object", "properties": {text: {"type": text}}},
    "required": lambda text: {"type": "object", "properties": {"a": {"type": "string"}}, "required": [text]},
}
CALLS: dict[str, Call] = {
    **{f"image as {name}": call for name, call in IMAGES_GIVEN.items()},
    **{f"option {name}": call for name, call in OPTIONS.items()},
    **{f"model {name}": call for name, call in MODELS.items()},
    **{f"message {name}": call for name, call in MESSAGES.items()},
    **{
        f"schema {name}": lambda model, text, schema=schema: model.extract(IMAGE, schema(text), max_tokens=1)  # type: ignore[misc]
        for name, schema in SCHEMAS.items()
    },
}


def check(message: str, text: str) -> None:
    assert "\n" not in message.strip()
    pieces = [text[start : start + 81] for start in range(0, len(text) - 81, 7)]
    assert not any(piece in message or repr(piece)[1:-1] in message for piece in pieces), message[:300]


@pytest.mark.parametrize("name", CALLS)
def test_errors_are_short(name: str, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in LONG:
        with pytest.raises(EdgeError) as caught:
            CALLS[name](model, text)
        check(str(caught.value), text)


COMMANDS = {
    "image": lambda text: ["run", text + ".jpg", "What?", "-m", "tiny"],
    "model": lambda text: ["run", str(IMAGES / "small.png"), "What?", "-m", text],
    "mmproj": lambda text: ["run", str(IMAGES / "small.png"), "What?", "-m", "tiny", "--mmproj", text],
    "grammar": lambda text: ["run", str(IMAGES / "small.png"), "What?", "-m", "tiny", "--grammar", text],
    "schema": lambda text: ["extract", str(IMAGES / "small.png"), "--schema", text, "-m", "tiny"],
    "plan": lambda text: ["plan", text],
    "eval": lambda text: ["eval", text, "-m", "tiny"],
    "plot": lambda text: ["eval", str(IMAGES / "small.png"), "-m", "tiny", "--plot", text],
    "choose": lambda text: ["choose", text + ".jpg", "What?", "-o", "a", "-o", "b", "-m", "tiny"],
    "option": lambda text: ["choose", "-p", "What?", "-o", text, "-o", text, "-m", "tiny"],
    "show": lambda text: ["show", text],
    "rm": lambda text: ["rm", text],
    "convert": lambda text: ["convert", text, "-o", "unused"],
    "quantize": lambda text: ["quantize", text, "-o", "unused"],
    "verify": lambda text: ["verify", text],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_errors_of_commands_are_short(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in LONG:
        result = CliRunner().invoke(app, COMMANDS[name](text))
        assert (result.exit_code, result.stdout) == (1, "")
        check(result.stderr, text)


def test_what_is_shortened_keeps_its_start_and_its_end() -> None:
    assert clip("short") == "short"
    assert clip("a" * 80) == "a" * 80
    assert clip("/folder/" + "x" * 100 + "/image.png").startswith("/folder/")
    assert clip("/folder/" + "x" * 100 + "/image.png").endswith("x/image.png")
    for value in ("x" * 81, "\0" * 1000, b"\0" * 1000, ["x"] * 1000, {"x" * 1000: 1}, 10**5000, "'\"" * 60):
        assert len(shorten(value)) <= 80
    assert len(clip("\n" * 81)) == 80
    assert "pull owner/name" in str(ModelNotPulled("owner/name"))
