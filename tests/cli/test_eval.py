"""`eval` and `verify --data` on the command line: output, exit codes, kill -9 and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.cli import eval as command
from lfm2vl_edge.evaluate import normalised
from lfm2vl_edge.evaluate import run as evaluate_run
from tests.conftest import IMAGES, Pair
from tests.evaluate.test_evaluate import ANSWERS, ROWS, data, write
from tests.evaluate.test_verify import small_images
from tests.fake_engine import FakeEngine, scripted

__all__ = ["data", "small_images"]
SMALL = str(IMAGES / "small.png")
QUESTIONS = [{"image": SMALL, "question": f"What is number {n}?", "answer": str(n)} for n in range(500)]
N_KILLED = 100


@pytest.fixture
def engine(data: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine of the model that `eval` opens in this process, with any arguments."""
    model, engine = scripted(data.parent, ANSWERS)
    opened = Model(engine, model.config, files=model._files)
    monkeypatch.setattr(command, "opening", lambda *_, **__: nullcontext(lambda: opened))
    return engine


def asked(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_table_and_the_object_have_the_same_values(data: Path, engine: FakeEngine) -> None:
    table = asked(data)
    assert (table.exit_code, table.stderr) == (0, "")
    lines = [line.split() for line in table.stdout.splitlines()]
    assert lines[0][:4] == ["group", "rows", "exact", "normalised"]
    assert lines[1][:6] == ["words", "3", "33.3%", "66.7%", "-", "-"]
    assert lines[2][:6] == ["(none)", "1", "0.0%", "0.0%", "-", "-"]
    assert lines[3][:6] == ["boxes", "4", "25.0%", "25.0%", "0.375", "75.0%"]
    assert lines[4][:7] == ["all", "8", "25.0%", "37.5%", "0.375", "75.0%", "4.5"]
    assert "2 of 4 rows have nothing to find, 1 of them were answered with an empty list" in table.stdout
    assert "mean IoU of the others 0.250" in table.stdout
    shown = json.loads(asked(data, "--json").stdout)
    assert (shown["model"], shown["data"]) == ("scripted", str(data))
    assert (shown["rows"], shown["exact"], shown["normalised"]) == (8, 0.25, 0.375)
    assert shown["boxes"]["mean_iou"] == 0.375
    assert [(group["group"], group["rows"]) for group in shown["groups"]] == [("words", 3), (None, 1), ("boxes", 4)]
    assert (shown["failures"], shown["resumed"]) == ([], 0)


def test_boxes_are_read_in_another_format(tmp_path: Path, engine: FakeEngine) -> None:
    truth = [{"label": "cat", "bbox": [0, 0, 0.5, 1]}]
    rows = [{"image": SMALL, "question": "Where?", "answer": json.dumps(truth)}]
    with Image.open(SMALL) as image:
        width, height = image.size
    engine.answers = {"Where?": json.dumps([{"label": "cat", "bbox_2d": [0, 0, width / 2, height]}])}
    found = {}
    for form in ("fractions", "pixels"):
        result = asked(write(tmp_path, rows), "--boxes", form, "--json")
        found[form] = json.loads(result.stdout)["boxes"]["mean_iou"]
    assert found == {"fractions": 0, "pixels": 1}
    assert asked(write(tmp_path, rows), "--boxes", "feet").exit_code == 2


def test_data_without_groups_and_boxes_has_a_plain_table(data: Path, engine: FakeEngine) -> None:
    rows = [{name: value for name, value in row.items() if name != "group"} for row in ROWS[:3]]
    shown = asked(write(data.parent, rows)).stdout
    assert len(shown.splitlines()) == 2
    assert "IoU" not in shown


def test_results_go_through_links_and_into_devices(data: Path, engine: FakeEngine) -> None:
    link, target, null = data.parent / "link", data.parent / "results.jsonl", data.parent / "null"
    link.symlink_to(target)
    null.symlink_to("/dev/null")
    for _ in range(2):
        assert asked(data, "--out", link).exit_code == 0
        assert asked(data, "--out", null).exit_code == 0
    assert link.is_symlink()
    assert null.is_symlink()
    assert len(target.read_text().splitlines()) == len(ROWS)
    full = asked(data, "--out", "/dev/full")
    assert full.exit_code == 1
    assert len(full.stderr.splitlines()) == 1
    assert "cannot write /dev/full" in full.stderr


def test_failed_rows_and_resumed_rows_are_shown(data: Path, engine: FakeEngine) -> None:
    (data.parent / "a.png").write_bytes(b"nothing")
    write(data.parent, [{**ROWS[0], "group": "\x1b[2J"}, *ROWS[1:]])
    out = data.parent / "out.jsonl"
    first = asked(data, "--out", out)
    assert first.exit_code == 0
    assert "failed: 4 of 8 rows have no answer" in first.stdout
    assert "  line 1: " in first.stdout
    assert "\x1b" not in first.stdout
    assert "resumed: " not in first.stdout
    again = asked(data, "--out", out)
    assert "resumed: 8 of 8" in again.stdout
    assert again.stdout.splitlines()[:4] == first.stdout.splitlines()[:4]
    assert len(json.loads(asked(data, "--out", out, "--restart", "--json").stdout)["failures"]) == 4


def test_the_exit_code_follows_the_accuracy_only_if_asked(data: Path, engine: FakeEngine) -> None:
    assert asked(data, "--min-accuracy", 37.5).exit_code == 0
    low = asked(data, "--min-accuracy", 37.6)
    assert low.exit_code == 1
    assert low.stderr == "error: accuracy 37.5 % is below --min-accuracy 37.6\n"
    assert low.stdout.startswith("group")
    write(data.parent, [{**ROWS[0], "answer": "red" if n < 29 else "blue"} for n in range(100)])
    assert asked(data, "--min-accuracy", 29).exit_code == 0
    assert asked(data, "--min-accuracy", 29.1).exit_code == 1


def test_how_to_resume_after_ctrl_c() -> None:
    assert command._how_to_resume(Path("x"), restart=False) == "the same command resumes there"
    assert command._how_to_resume(Path("x"), restart=True) == "the same command without --restart resumes there"
    assert "no results were stored; with --out" in command._how_to_resume(None, restart=False)


def test_options_reach_the_model(data: Path, engine: FakeEngine) -> None:
    shown = json.loads(asked(data, "--limit", 2, "-n", 1, "--temperature", 0.5, "--json").stdout)
    assert (shown["rows"], shown["mean_completion_tokens"]) == (2, 1)
    assert {sampling.temperature for sampling in engine.sampled} == {0.5}
    assert asked(data).exit_code == 0
    assert (engine.sampled[-1].temperature, engine.sampled[-1].repetition_penalty) == (0, 1)
    assert json.loads(asked(data, "--max-megapixels", 0.001, "--json").stdout)["failed"] == 8


def test_wrong_usage_and_bad_data(data: Path, engine: FakeEngine) -> None:
    for wrong in (["--restart"], ["--limit", 0], ["--min-accuracy", 101], ["--no-such"]):
        assert asked(data, *wrong).exit_code == 2
    data.write_text("{}")
    bad = asked(data)
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert "data.jsonl, line 1: 'answer' is missing" in bad.stderr
    assert bad.stderr.startswith("error: ")
    assert engine.asked == []


def command_line(folder: Path, model: Path, *more: object) -> list[str]:
    path = write(folder, QUESTIONS)
    options = ["-m", model, "-n", 12, "-t", 1, "--out", folder / "out.jsonl", "--json", *more]
    return [sys.executable, "-m", "lfm2vl_edge", "eval", str(path), *map(str, options)]


def wait_for_lines(path: Path, count: int) -> None:
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_run_is_resumed(pair: Pair, tmp_path: Path, opened: Callable[[str, str], Model]) -> None:
    line, out = command_line(tmp_path, pair("a", "F16")), tmp_path / "out.jsonl"
    line += ["--limit", str(N_KILLED)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(out, 2)
    process.kill()
    process.wait()
    stored = out.read_bytes()
    stored = stored[: stored.rfind(b"\n") + 1]
    n_stored = stored.count(b"\n")
    assert 2 <= n_stored < N_KILLED
    out.write_bytes(stored + b'{"eval": 2, "id": "line')  # as if it had been killed while writing
    shown = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    assert (shown["rows"], shown["resumed"]) == (N_KILLED, n_stored)
    lines = [json.loads(one) for one in out.read_bytes().splitlines()]
    assert out.read_bytes().startswith(stored)
    assert [one["id"] for one in lines] == [f"line {n}" for n in range(1, N_KILLED + 1)]
    assert [one["encoded_views"] for one in lines] == [int(n in (0, n_stored)) for n in range(N_KILLED)]
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 12}
    for n in (0, n_stored - 1, n_stored, N_KILLED - 1):
        assert lines[n]["answer"] == opened("a", "F16").ask(SMALL, QUESTIONS[n]["question"], **greedy)


def read_terminal(terminal: int, pieces: list[bytes]) -> None:
    """Read until the program at the other end has ended: a terminal that is not read would stop it."""
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            pieces.append(piece)


def test_ctrl_c_reports_progress_and_how_to_resume(pair: Pair, tmp_path: Path) -> None:
    line, out = command_line(tmp_path, pair("a", "F16")), tmp_path / "out.jsonl"
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=other_end, env=os.environ | {"TERM": "xterm"})
    os.close(other_end)
    pieces: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(terminal, pieces))
    reader.start()
    wait_for_lines(out, 2)
    process.send_signal(signal.SIGINT)
    answer, _ = process.communicate(timeout=20)
    reader.join()
    os.close(terminal)
    shown = b"".join(pieces).decode()
    assert (process.returncode, answer) == (130, b"")
    done = out.read_bytes().count(b"\n")
    assert f"interrupted after {done} of 500 rows; the same command resumes there" in shown
    assert "right" in shown  # the bar, on a terminal
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is there again


def test_progress_is_reported_once_even_if_a_native_call_hangs() -> None:
    code = (
        "import time\n"
        "from lfm2vl_edge.cli._output import at_once\n"
        "with at_once() as interrupt:\n"
        "    interrupt.on_stop = lambda: print('left', flush=True)\n"
        "    print('started', flush=True)\n"
        "    time.sleep(30)\n"  # continues after the signal, as a native call does
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == b"left\n"
    assert process.returncode == 130


def test_verify_compares_the_accuracy_of_two_pairs(
    pair: Pair,
    tmp_path: Path,
    opened: Callable[[str, str], Model],
    small_images: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate_run, "MAX_TOKENS", 24)
    coarse, fine = pair("a", "BF16"), pair("a", "F16")
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 24}
    names = [f"What is number {n}?" for n in range(3)]
    known = [opened("a", "F16").ask(SMALL, name, **greedy) for name in names]
    path = write(tmp_path, [{"image": SMALL, "question": q, "answer": a} for q, a in zip(names, known, strict=True)])
    found = [opened("a", "BF16").ask(SMALL, name, **greedy) for name in names]
    share = sum(normalised(a) == normalised(b) for a, b in zip(found, known, strict=True)) / len(names)
    assert share < 1
    threads = opened("a", "F16").engine.info.n_threads
    line = ["verify", coarse, "--against", fine, "--data", path, "--json", "-t", threads, "-q"]
    bad = CliRunner().invoke(app, [*map(str, line)])
    assert bad.exit_code == 1
    report = json.loads(bad.stdout)
    assert report["accuracy"]["pair"]["normalised"] == share
    assert report["accuracy"]["reference"]["normalised"] == 1
    assert report["accuracy"]["drop"] == 100 * (1 - share)
    assert "points below the baseline's, more than --max-drop 1" in report["verdict"]
    assert len(report["complaints"]) == 1
    good = CliRunner().invoke(app, [*map(str, line[:-3]), "--max-drop", str(100 * (1 - share))])
    assert good.exit_code == 0
    assert "questions with known answers" in good.stderr


def test_verify_alone_only_reports_accuracy(pair: Pair, tmp_path: Path) -> None:
    path = write(tmp_path, [{"image": SMALL, "question": "Who?", "answer": "nobody"}])
    line = ["verify", str(pair("a", "F16")), "--data", str(path)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0
    assert result.stdout.endswith("finite, accuracy 0.00%\n")
    assert "normalised 0.00% of 1" in result.stderr
    path.write_text("[]")
    bad = CliRunner().invoke(app, line)
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert "data.jsonl, line 1: it is a list" in bad.stderr
