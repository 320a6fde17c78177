"""Detail, budgets, predictions, tune and bench on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_edge.cli import app
from lfm2vl_edge.diagnose.bench import ProcessUsage
from tests.conftest import IMAGES, Pair

IMAGE = IMAGES / "photo.png"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LFM2VL_MODEL", raising=False)


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def shown(*arguments: object) -> dict[str, Any]:
    result = shell(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def failed(result: Result, message: str, code: int = 1) -> bool:
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.search(message, " ".join(result.stderr.split())), result.stderr
    return code == 2 or (result.stderr.startswith("error: ") and result.stderr.count("\n") == 1)


def test_plan_shows_seconds_memory_and_cheaper_plans() -> None:
    text = shell("plan", "1440x1440").stdout
    assert "scaled to 720x720 this is 256 tokens instead of 2,560" in text
    assert "--detail fast: 64 tokens instead of 2,560" in text
    assert "a rough guess for a 450M model: nothing was measured here; `lfm2vl-edge tune` measures" in text
    assert re.search(r"seconds \S+ \(encode \S+, prefill \S+\)\nmemory \d+ MB at most", text)
    facts = shown("plan", "1440x1440")
    assert facts["measured"] is False
    assert facts["seconds"]["all"] == pytest.approx(facts["seconds"]["encode"] + facts["seconds"]["prefill"], rel=0.01)
    assert facts["memory_bytes"] > 10**8
    assert [(way["detail"], way["image_tokens"]) for way in facts["cheaper"]] == [
        *((None, 256), ("high", 256)),
        *(("balanced", 121), ("fast", 64)),
    ]
    assert (facts["cheaper"][0]["height"], facts["cheaper"][0]["width"]) == (720, 720)


def test_plan_takes_detail_and_budgets() -> None:
    assert shown("plan", "1440x1440", "--detail", "fast")["image_tokens"] == 64
    assert shown("plan", "1440x1440", "--budget-tokens", 300)["image_tokens"] == 256
    assert shown("plan", "1920x1080", "--budget-tokens", 1000)["image_tokens"] == 764
    text = shell("plan", "1440x1440", "--detail", "high", "--budget-tokens", 99, "--resample", "bicubic").stdout
    assert "(no model given); changed: resample; detail high; at most 99 tokens" in text


def test_wrong_options_are_one_line() -> None:
    assert failed(shell("plan", "900x900", "--detail", "fast", "--max-tiles", 3), "detail 'fast' decides max_tiles")
    assert failed(shell("plan", "900x900", "--detail", "fast", "--no-splitting"), "decides do_image_splitting")
    assert failed(shell("plan", "900x900", "--budget-tokens", 3), "of 3 tokens; the least possible is 25 tokens")
    assert failed(shell("plan", "900x900", "--budget-seconds", 0), "budget_seconds is 0")
    assert failed(shell("plan", "900x900", "--budget-seconds", "nan"), "is not a finite number", code=2)
    assert failed(shell("plan", "900x900", "--budget-seconds", 0.9), "measured on this machine: run `lfm2vl-edge tune")
    assert failed(shell("plan", "900x900", "--budget-seconds", "soon"), "budget-seconds", code=2)
    assert failed(shell("plan", "900x900", "--budget-tokens", 0), "budget-tokens", code=2)
    assert failed(shell("plan", "900x900", "--detail", "huge"), "huge", code=2)


def test_run_takes_detail_budgets_and_gpu(pair: Pair) -> None:
    options = ("-m", pair("a", "F16"), "-n", 2, "--temperature", 0, "-t", 1)
    assert shown("run", IMAGE, *options, "--detail", "fast")["stats"]["image_tokens"] <= 64
    assert shown("run", IMAGE, *options, "--budget-tokens", 700)["stats"]["image_tokens"] <= 700
    statistics = shell("run", IMAGE, *options, "--detail", "balanced", "-v").stderr
    assert "; detail balanced" in statistics
    assert failed(shell("run", IMAGE, *options, "--budget-tokens", 2), "the least possible is")
    assert failed(shell("run", IMAGE, *options, "--device", "CUDA0"), "no effect without n_gpu_layers")
    assert failed(shell("run", IMAGE, *options, "--n-gpu-layers", -3), "n-gpu-layers", code=2)


def test_tune_writes_what_plan_then_uses(pair: Pair) -> None:
    model = ("-m", pair("a", "F16"), "-t", 1)
    before = shown("plan", "900x900", *model)
    assert before["measured"] is False
    result = shell("tune", *model, "--runs", 1)
    assert result.exit_code == 0, result.stderr
    assert "measuring 1 thread: F16" in result.stderr
    assert re.search(r"fastest: 1 thread, mmproj F16; stored in .*devices.*json", result.stdout)
    after = shown("plan", "900x900", *model)
    assert after["measured"] is True
    assert "measured here" in after["costs_from"]
    budget = shown("plan", "900x900", *model, "--budget-seconds", 30)
    assert budget["seconds"]["all"] <= 30
    tuned = shown("tune", *model, "--runs", 1, "--quiet")
    assert tuned["profile"]["threads"] == 1
    Path(tuned["path"]).write_text("{}")
    warned = shell("plan", "900x900", *model)
    assert warned.exit_code == 0
    assert "a rough guess: nothing was measured here" in warned.stdout


@pytest.mark.parametrize("command", ["tune", "bench"])
def test_tune_and_bench_refuse_what_they_cannot_measure(command: str, tmp_path: Path) -> None:
    assert failed(shell(command, "-m", tmp_path), "no language model in")
    assert failed(shell(command, "-m", tmp_path, "--runs", 0), "runs", code=2)


def test_bench_prints_a_table_or_json(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(*_: object) -> ProcessUsage:
        output = json.dumps({"stats": {"first_token_seconds": 1.0}})
        return ProcessUsage(seconds=2.0, cpu_seconds=1.0, memory_bytes=10**8, output=output)

    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.run_process", process)
    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.SIZES", ((256, 256), (600, 1200)))
    model = ("-m", pair("a", "F16"), "-t", 1, "--runs", 1)
    facts = shown("bench", *model)
    assert facts["threads"] == 1
    assert {row["name"]: row["median"] for row in facts["rows"]}["cold run, 256x256"] == 2.0
    table = shell("bench", *model, "-q")
    assert "cold run, 1200x600" in table.stdout
    assert table.stderr == ""
