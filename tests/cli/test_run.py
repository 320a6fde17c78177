"""The command line as a shell sees it: stdout, stderr, exit codes, files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import ConfigError, Model
from lfm2vl_edge.cli._options import read_stdin
from lfm2vl_edge.cli.run import split_arguments
from tests.conftest import IMAGES, REFERENCE, Pair

SMALL, WIDE, LARGE = (IMAGES / name for name in ("small.png", "wide.png", "photo.png"))
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the command in an empty folder, away from the caller's settings."""
    data = tmp_path_factory.mktemp("data")

    def in_shell(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LFM2VL_")}
        clean["LFM2VL_DATA"] = str(data)  # no downloaded models
        command = [sys.executable, "-m", "lfm2vl_edge", *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, cwd=tmp_path, env=clean | environment)

    return in_shell


def failed(result: subprocess.CompletedProcess[bytes], message: str, code: int = 1) -> bool:
    """One line on stderr that starts with error:, nothing on stdout, no traceback."""
    lines = result.stderr.decode().splitlines()
    assert result.returncode == code, result
    assert result.stdout == b""
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    return lines[0].startswith("error: ")


GREEDY = ("--temperature", 0, "-n", 12)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["models --json", "models --help", "--help", "--version"])
def test_output_that_cannot_be_written_is_an_error(unbuffered: str, arguments: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "lfm2vl_edge", *arguments.split()]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert result.returncode == 1
    assert result.stderr.decode() == "error: stdout: No space left on device; make room, or check the path\n"


def test_the_process_ends_at_once_unless_something_would_be_lost() -> None:
    code = (
        "import os, sys, threading\n"
        "from lfm2vl_edge import cli\n"
        "codes = []\n"
        "os._exit = codes.append\n"
        "go = threading.Event()\n"
        "thread = threading.Thread(target=go.wait)\n"
        "threading.Thread(target=go.wait, daemon=True).start()\n"
        "cli._exit_at_once(None), cli._exit_at_once(0), cli._exit_at_once(3)\n"
        "assert codes == [0, 0, 3], codes\n"
        "thread.start(); cli._exit_at_once(0); go.set(); thread.join()\n"
        "cli._exit_at_once('a reason')\n"
        "sys.argv = ['lfm2vl-edge', '--version']\n"
        "sys.setprofile(lambda *_: None)\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.setprofile(None)\n"
        "assert codes == [0, 0, 3], codes\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert codes == [0, 0, 3, 0], codes\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_does_not_wait_for_the_reading_of_the_model(pair: Pair) -> None:
    code = (
        "import sys, time\n"
        "from lfm2vl_edge.engine.language import LanguageFile\n"
        "LanguageFile._load = lambda self, verbose: time.sleep(60)\n"
        "from lfm2vl_edge.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "run", "nothing.png", "-m", str(pair("a", "F16"))]
    result = subprocess.run(command, capture_output=True, timeout=30)
    assert failed(result, "no image at 'nothing.png'")


def test_run_prints_the_answer_and_nothing_else(run: Run, pair: Pair, model: Model) -> None:
    result = run("run", SMALL, "What is this?", "-m", pair("a", "F32"), *GREEDY)
    assert result.returncode == 0
    assert result.stderr == b"note: the answer is truncated here; --max-tokens allows more\n"
    assert result.stdout.decode() == model.ask(SMALL, "What is this?", temperature=0.0, max_tokens=12) + "\n"


def test_run_takes_several_images_stdin_and_a_system_prompt(run: Run, pair: Pair, model: Model) -> None:
    folder = pair("a", "F32")
    data = WIDE.read_bytes()
    result = run("run", SMALL, "-", "And?", "--system", "Be brief.", *GREEDY, stdin=data, LFM2VL_MODEL=str(folder))
    images = [{"type": "image", "image": image} for image in (SMALL, data)]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*images, {"type": "text", "text": "And?"}]},
    ]
    expected = "".join(chunk.text for chunk in model.chat(messages, temperature=0.0, max_tokens=12))
    assert result.stdout.decode() == expected + "\n"


def test_run_as_json_is_one_object(run: Run, pair: Pair, model: Model) -> None:
    result = run("run", SMALL, "-m", pair("a", "F32"), "--json", *GREEDY)
    shown = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1
    assert shown["answer"] == model.ask(SMALL, temperature=0.0, max_tokens=12)
    assert shown["finish_reason"] in ("stop", "length")
    assert shown["stats"]["image_tokens"] == len(model.embed_image(SMALL))


def test_several_questions_encode_the_image_once(run: Run, pair: Pair, model: Model) -> None:
    folder = pair("a", "F32")
    questions = ("What is this?", "And behind it?")
    asked = [word for question in questions for word in ("--ask", question)]
    expected = [model.ask(WIDE, question, temperature=0.0, max_tokens=12) for question in questions]
    assert run("run", WIDE, *asked, "-m", folder, *GREEDY).stdout.decode() == "".join(f"{one}\n" for one in expected)
    shown = json.loads(run("run", WIDE, *asked, "-m", folder, "--json", *GREEDY).stdout)
    assert [(one["question"], one["answer"]) for one in shown["answers"]] == [*zip(questions, expected, strict=True)]
    assert [one["stats"]["encoded_views"] for one in shown["answers"]] == [4, 0]
    assert shown["answers"][1]["stats"]["restored_tokens"] > shown["answers"][1]["stats"]["image_tokens"]
    first = run("run", WIDE, "-p", questions[0], "-a", questions[1], "-m", folder, *GREEDY).stdout.decode()
    assert first == "".join(f"{one}\n" for one in expected)
    alone = json.loads(run("run", WIDE, "-a", questions[0], "-m", folder, "--json", *GREEDY).stdout)
    assert [one["answer"] for one in alone["answers"]] == expected[:1]


def test_statistics_go_to_stderr(run: Run, pair: Pair) -> None:
    result = run("run", SMALL, "hi", "-m", pair("a", "F32"), "-v", *GREEDY)
    shown = result.stderr.decode()
    assert all(word in shown for word in ("open ", "encode", "prefill", "first token", "decode", "memory", "settings"))
    assert "llama_" not in shown
    assert "llama_" in run("run", SMALL, "hi", "-m", pair("a", "F32"), "-vv", *GREEDY).stderr.decode()


def test_image_options_work_in_run(run: Run, pair: Pair) -> None:
    options = ("--no-splitting", "--max-image-tokens", 64, "--json", *GREEDY)
    shown = json.loads(run("run", LARGE, "-m", pair("a", "F32"), *options).stdout)
    assert shown["stats"]["views"] == 1
    assert shown["stats"]["image_tokens"] <= 64


@pytest.mark.parametrize(
    ("arguments", "prompt", "expected"),
    [
        (["a.jpg"], None, (["a.jpg"], "Describe this image.")),
        (["a.jpg", "What?"], None, (["a.jpg"], "What?")),
        (["a.jpg", "b.PNG"], None, (["a.jpg", "b.PNG"], "Describe this image.")),
        (["a.jpg", "b", "What is in b.png?"], None, (["a.jpg", "b"], "What is in b.png?")),
        (["a", "-"], None, (["a", "-"], "Describe this image.")),
        (["a.jpg", "b"], "What?", (["a.jpg", "b"], "What?")),
        (["a.jpg", "x" * 5000], None, (["a.jpg"], "x" * 5000)),
        (["a.jpg", "zero\0byte"], None, (["a.jpg"], "zero\0byte")),
        (["a.jpg", ""], None, (["a.jpg"], "")),
        (["a.jpg", "IMG_0042.HEIC"], None, (["a.jpg", "IMG_0042.HEIC"], "Describe this image.")),
        (
            ["a.jpg", "DATA:image/png;base64,AA=="],
            None,
            (["a.jpg", "DATA:image/png;base64,AA=="], "Describe this image."),
        ),
        ([], "What?", ([], "What?")),
    ],
)
def test_images_first_prompt_last(arguments: list[str], prompt: str | None, expected: tuple[list[str], str]) -> None:
    assert split_arguments(arguments, prompt) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (SMALL, "What", "is", "this?"),
            'no image at .What.; .* put the question between quotation marks: "What is this',
        ),
        (("What", "is", "this?"), "put the question between quotation marks"),
        (("What is this?",), "no image before 'What is this.'; give one, or --prompt"),
        ((SMALL, "IMG_0042.HEIC"), "no image at 'IMG_0042.HEIC'"),
        ((SMALL, "missing.jpg"), "no image at 'missing.jpg'"),
    ],
)
def test_a_missing_image_or_quotation_mark_is_no_question(
    run: Run, arguments: tuple[object, ...], message: str
) -> None:
    assert failed(run("run", *arguments, "-m", "tiny"), message)


def test_without_an_image_the_language_model_answers_alone(run: Run, pair: Pair, model: Model) -> None:
    options = ("-m", pair("a", "F32"), "--json", *GREEDY)
    shown = json.loads(run("run", "-p", "Why?", *options).stdout)
    assert shown["answer"] == model.ask([], "Why?", temperature=0.0, max_tokens=12)
    assert (shown["stats"]["images"], shown["stats"]["image_tokens"]) == (0, 0)
    (answer,) = json.loads(run("run", "--ask", "Why?", *options).stdout)["answers"]
    assert answer["answer"] == shown["answer"]


def test_errors_are_one_line_that_says_what_to_do(run: Run, pair: Pair, tmp_path: Path) -> None:
    folder = pair("a", "F32")
    assert failed(run("run", SMALL, "hi", "-m", "nothing"), "no model 'nothing'")
    assert failed(run("run", "no.png", "hi", "-m", folder), "no image at 'no.png'")
    assert failed(run("run", SMALL, "-m", folder, "--temperature", -1), "temperature is -1")
    assert failed(run("run", SMALL, "-m", folder, "--min-tiles", 11), "min_tiles 11 is above max_tiles 10")
    assert failed(run("run", "-", "-m", folder), "not an image")
    assert failed(run("run", SMALL, "-m", folder, "--max-megapixels", 0.001), "megapixels; the limit")
    (tmp_path / "text.png").write_text("text")
    assert failed(run("run", "text.png", "-m", folder), "text.png is not an image")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--system", "x"],
        ["plan"],
        ["plan", "9x9", "--detail", "huge"],
        ["plan", "9x9", "--resample", "x"],
        ["run", "x", "--no-such"],
        ["run", "x", "--top-k", "many"],
    ],
)
def test_wrong_usage_exits_with_two(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert b"Usage" in result.stderr
    assert result.stdout == b""


def test_ctrl_c_ends_a_run_at_once(pair: Pair) -> None:
    command = [sys.executable, "-m", "lfm2vl_edge", "run", str(SMALL), "go", "-m", str(pair("a", "F32"))]
    command += ["-n", "30000", "--temperature", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == b"", errors.decode()
    assert time.monotonic() - start < 5


def test_a_reader_that_leaves_causes_no_traceback(pair: Pair) -> None:
    command = (
        f"{sys.executable} -m lfm2vl_edge run {SMALL} go -m {pair('a', 'F32')} -n 3000 --temperature 0 | head -c 1"
    )
    result = subprocess.run(command, shell=True, capture_output=True)  # noqa: S602 - the pipe is what is tested
    assert result.stderr == b""


def test_plan_of_a_size(run: Run) -> None:
    result = run("plan", "3000x1000", "--json")
    shown = json.loads(result.stdout)
    assert {name: shown[name] for name in list(shown)[:8]} == {
        "height": 1000,
        "width": 3000,
        "rows": 1,
        "cols": 3,
        "views": [
            *({"kind": "tile", "row": 0, "col": c, "height": 512, "width": 512, "tokens": 256} for c in range(3)),
            {"kind": "thumbnail", "row": 0, "col": 0, "height": 288, "width": 864, "tokens": 243},
        ],
        "image_tokens": 1011,
        "markers": 6,
        "prompt_tokens": 1017,
    }


def test_plan_names_the_source_of_its_settings(run: Run, pair: Pair) -> None:
    assert "the documented defaults (no model given)" in run("plan", "720x720").stdout.decode()
    shown = run("plan", "720x720", "-m", pair("b", "F16"), "--no-thumbnail").stdout.decode()
    assert "from the model's file mmproj-checkpoint-F16.gguf; changed: use_thumbnail" in shown
    options = ("--min-image-tokens", 32, "--max-image-tokens", 64, "--tolerance", 1.5, "--max-tiles", 4)
    narrow = json.loads(run("plan", "900x600", *options, "--min-tiles", 1, "--resample", "bicubic", "--json").stdout)
    assert len(narrow["views"]) <= 5
    assert json.loads(run("plan", "900x600", "--no-splitting", "--json").stdout)["views"][0]["kind"] == "single"


def test_plan_equals_the_statistics_of_a_run(run: Run, pair: Pair) -> None:
    folder = pair("c", "F16")
    planned = json.loads(run("plan", LARGE, "-m", folder, "--json").stdout)
    stats = json.loads(run("run", LARGE, "-m", folder, "--json", *GREEDY).stdout)["stats"]
    assert planned["image_tokens"] == stats["image_tokens"]
    assert len(planned["views"]) == stats["views"]


def test_plan_draws_the_grid(run: Run, tmp_path: Path) -> None:
    assert run("plan", LARGE, "--draw", "grid.png").returncode == 0
    after, before = (
        np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (tmp_path / "grid.png", LARGE)
    )
    assert after.shape == before.shape
    height, width = before.shape[:2]
    changed = (after != before).any(axis=2)
    for row in range(3):
        assert changed[row * height // 3 + 1].mean() > 0.9  # a line along the top of every row of tiles
    for col in range(2):
        assert changed[:, col * width // 2 + 1].mean() > 0.9
    assert changed.mean() < 0.3
    assert failed(run("plan", LARGE, "--draw", "grid.png"), "grid.png exists already; .*--force")
    assert run("plan", SMALL, "--draw", "grid.png", "--force").returncode == 0
    assert failed(run("plan", "10x10", "--draw", "x.png"), "not a size")
    assert failed(run("plan", SMALL, "--draw", "grid.png/x.png"), "cannot write grid.png/x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png"]


@pytest.mark.parametrize("size", ["0x5", "5x0"])
def test_plan_refuses_an_empty_size(run: Run, size: str) -> None:
    assert failed(run("plan", size), "is empty")


def test_convert_writes_a_pair_that_runs(run: Run, tmp_path: Path) -> None:
    checkpoint = REFERENCE / "a" / "checkpoint"
    result = run("convert", checkpoint, "-o", "out", "--quant", "bf16", "--mmproj-quant", "F16", "-q")
    assert result.returncode == 0
    assert result.stderr == b""
    assert result.stdout.decode().split() == ["out/checkpoint-BF16.gguf", "out/mmproj-checkpoint-F16.gguf"]
    assert run("run", SMALL, "hi", "-m", "out", *GREEDY).returncode == 0
    again = ("convert", checkpoint, "-o", "out", "--quant", "BF16", "--mmproj-quant", "F16")
    assert failed(run(*again), "checkpoint-BF16.gguf.*--force")
    assert run(*again, "--force").returncode == 0
    assert failed(run("convert", tmp_path / "nothing"), "nothing")
    assert run("convert", checkpoint, "--quant", "Q9").returncode == 2


def test_convert_quantizes_and_reports(run: Run, tmp_path: Path) -> None:
    checkpoint = REFERENCE / "a" / "checkpoint"
    result = run("convert", checkpoint, "--tensor-type", r"^blk.*ffn_down=Q8_0", "--json")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    model, mmproj = (tmp_path / file["path"] for file in report["files"])
    assert model.name == "checkpoint-Q4_0.gguf"
    assert re.fullmatch(r"mmproj-checkpoint-B?F16.gguf", mmproj.name)
    assert [file["bytes"] for file in report["files"]] == [model.stat().st_size, mmproj.stat().st_size]
    stored = [tensor for path in (model, mmproj) for tensor in gguf.GGUFReader(path).tensors]
    assert sum(group["tensors"] for group in report["groups"]) == len(stored)
    assert sum(group["n_bytes"] for group in report["groups"]) == sum(int(tensor.n_bytes) for tensor in stored)
    errors = {(group["file"], group["group"], group["type"]): group["error"] for group in report["groups"]}
    assert 0.05 < errors[model.name, "feed-forward", "Q4_0"] < 0.15
    assert 0.001 < errors[model.name, "feed-forward", "Q8_0"] < 0.01
    assert errors[model.name, "norms and biases", "F32"] == 0
    table = result.stderr.decode()
    assert "checkpoint-Q4_0.gguf" in table
    assert table.count("total") == 2
    assert failed(run("convert", checkpoint, "--tensor-type", "x", "--force"), "not a valid PATTERN=TYPE")


def test_quantize_makes_what_convert_makes(run: Run, tmp_path: Path, pair: Pair) -> None:
    checkpoint = REFERENCE / "a" / "checkpoint"
    types = ("--quant", "Q5_0", "--mmproj-quant", "Q8_0")
    result = run("quantize", pair("a", "BF16"), *types)
    assert result.returncode == 0
    made = ["checkpoint-Q5_0.gguf", "mmproj-checkpoint-Q8_0.gguf"]
    assert result.stdout.decode().split() == made
    assert "feed-forward" in result.stderr.decode()
    assert run("convert", checkpoint, "-o", "direct", *types).returncode == 0
    assert [(tmp_path / name).read_bytes() for name in made] == [
        (tmp_path / "direct" / name).read_bytes() for name in made
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [made[0], "direct", made[1]]


def test_quantize_takes_one_file_and_refuses_wrong_ones(run: Run, tmp_path: Path, pair: Pair) -> None:
    mmproj = pair("a", "BF16") / "mmproj-checkpoint-BF16.gguf"
    assert run("quantize", mmproj, "--mmproj-quant", "q8_0", "-q").stderr == b""
    made = tmp_path / "mmproj-checkpoint-Q8_0.gguf"
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    assert failed(run("quantize", mmproj, "--mmproj-quant", "Q8_0"), "exists; .*--force")
    assert failed(run("quantize", made, "--mmproj-quant", "Q4_0"), "quantized already.*--requantize")
    assert run("quantize", made, "--mmproj-quant", "Q4_0", "--requantize").returncode == 0
    assert failed(run("quantize", made, "--mmproj-quant", "Q8_0", "--requantize", "--force"), "is Q8_0 already")
    assert failed(run("quantize", mmproj, "--mmproj-quant", "F16", "--tensor-type", "ffn=F32"), "becomes all F16")
    assert failed(
        run("quantize", mmproj, "--mmproj-quant", "Q8_0", "--tensor-type", "x=F32"), "x=F32 matches no matrix"
    )
    assert failed(run("quantize", tmp_path / "nothing.gguf"), "no model .*nothing.gguf.: there is no such file")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert failed(run("quantize", tmp_path / "x.gguf"), "x.gguf is truncated or corrupt")


def test_stdin_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[int] = []

    def read(n_bytes: int) -> bytes:
        requested.append(n_bytes)
        return bytes(n_bytes)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))
    with pytest.raises(ConfigError, match="stdin has more than 512000000 bytes; give a smaller image"):
        read_stdin()
    assert requested == [512_000_001]
