"""The comparison with llama.cpp's tools, which scripts and known values stand in for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.baseline.__main__ import app
from benchmarks.baseline.compare import ComparedRow, compare, lines, rows_of
from benchmarks.baseline.server import read_answer, serving
from benchmarks.baseline.tools import Baseline, decode_speed, encode_seconds, tools_in
from lfm2vl_edge import ConfigError, EngineError, Model
from lfm2vl_edge.diagnose.bench import ProcessUsage, Row
from lfm2vl_edge.image.synthetic import sample_image
from lfm2vl_edge.opening import OpenOptions, decide
from lfm2vl_edge.prompt.messages import user_message
from tests.benchmarks.fake_tools import ENCODED, SPEED, make_tool, make_tools
from tests.diagnose.test_bench import SIZES, FakeProcesses, folder, small_images

__all__ = ["folder", "small_images"]


@pytest.fixture
def baseline(folder: Path, tmp_path: Path) -> Baseline:
    return Baseline(folder=make_tools(tmp_path / "tools"), pair=decide(folder, OpenOptions()).pair, n_threads=1)


def test_both_sides_take_turns_on_the_same_files(
    folder: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(baseline.folder / "starts"))
    processes = FakeProcesses()
    opening, options = decide(folder, OpenOptions(n_threads=1)), OpenOptions(n_threads=1)
    rows = {row.ours.name: row for row in compare(opening, options, baseline, 2, processes)}
    cold = rows["cold run, 256x256"]
    assert (cold.ours.runs, cold.baseline, cold.ratio) == ((8.0, 8.0), (4.0, 4.0), 2.0)
    assert rows["cold run, 256x256, cpu"].baseline == (7.0, 7.0)
    assert rows["cold run, 1200x600, peak memory"].baseline == (1000.0, 1000.0)
    assert rows["encode a view"].baseline == (0.812, 0.812)
    assert rows["decode"].baseline == (160.0, 160.0)
    for question in ("first token", "another question", "second turn"):
        assert min(rows[f"{question}, 1200x600"].baseline) > 0
    assert rows["prefill"].baseline == rows["open the model"].baseline == ()
    names = [Path(command[0]).name for command in processes.commands]
    assert names == [
        *("llama-mtmd-cli", "llama-bench"),
        *(Path(sys.executable).name, "llama-mtmd-cli") * 2,
        *(Path(sys.executable).name,) * 2,
        *("llama-mtmd-cli", "llama-bench"),
        *("llama-mtmd-cli", Path(sys.executable).name) * 2,
        *(Path(sys.executable).name,) * 2,
    ]
    described = [command for command in processes.commands if command[0].endswith("llama-mtmd-cli")][1]
    ours = processes.commands[2]
    assert described[described.index("--image") + 1] == ours[ours.index("run") + 1]
    for words in (["-c", "4096"], ["-t", "1"], ["-n", "32"], ["--temp", "0"]):
        assert described[described.index(words[0]) + 1] == words[1]
    with Model.open(folder) as model:
        tokens = len(model.token_ids([user_message(sample_image(*SIZES[0]), "Describe this image.")]))
    assert processes.commands[1][processes.commands[1].index("-d") + 1] == str(tokens)
    assert not any(map(is_alive, started(baseline)))
    table = list(lines(list(rows.values())))
    assert table[0].split() == ["ours", "llama.cpp", "ratio"]
    assert any(line.split()[:7] == ["cold", "run,", "256x256", "8", "s", "4", "2.00"] for line in table)


def started(baseline: Baseline) -> list[int]:
    return [json.loads(line)[0] for line in (baseline.folder / "starts").read_text().splitlines()]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_rows_compare_pair_by_pair() -> None:
    ours, baseline = (
        [{("a", "s"): value} for value in (1.0, 20.0, 3.0)],
        [{("a", "s"): value} for value in (2.0, 10.0, 6.0)],
    )
    (row,) = rows_of(ours, baseline)
    assert (row.ours.median, row.baseline_median, row.ratio) == (3.0, 6.0, 0.5)
    own = {"name": "a", "unit": "s", "runs": [1.0, 20.0, 3.0], "median": 3.0}
    assert row.as_dict() == own | {"baseline": [2.0, 10.0, 6.0], "baseline_median": 6.0, "ratio": 0.5}
    alone = ComparedRow(ours=Row(name="encode", unit="s", runs=(3.0, 1.0, 2.5)))
    assert alone.as_dict() == alone.ours.as_dict()
    assert [" ".join(line.split()) for line in lines([row, alone])] == [
        *("ours llama.cpp ratio", "a 3 s 6 0.50 (0.50 to 2.00)", "encode 2.5 s (1 to 3)")
    ]


def of(output: str = "", log: str = "") -> ProcessUsage:
    return ProcessUsage(seconds=1.0, cpu_seconds=1.0, memory_bytes=1, output=output, log=log)


def test_the_output_of_the_tools_is_read() -> None:
    assert encode_seconds(of(log=ENCODED)) == 0.812
    assert encode_seconds(of(log=ENCODED + ENCODED)) == 1.624
    assert encode_seconds(of(log="encoding image slice...\nimage slice encoded in 77 ms\n")) == 0.077
    assert decode_speed(of(SPEED)) == 160.0
    with pytest.raises(EngineError, match="llama-mtmd-cli does not report its encoding time: 'main: hm'; use the"):
        encode_seconds(of(log="main: hm\n"))
    for broken in ("", "[]", "[1]", "{}", SPEED.replace("avg_ts", "speed"), SPEED[:90], SPEED.replace("160.0", "-")):
        with pytest.raises(EngineError, match="llama-bench does not report a speed"):
            decode_speed(of(broken))


def event(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n".encode()


def test_answers_of_the_server_are_read_piece_by_piece() -> None:
    times = []

    def events() -> Iterator[bytes]:
        yield b": ping\n"
        yield b"\n"
        for piece in ("A ", "cat"):
            time.sleep(0.01)
            times.append(time.perf_counter())
            yield event(piece)
        yield b"data: [DONE]\n"
        yield b"rubbish\n"

    start = time.perf_counter()
    text, first_token_seconds = read_answer(events(), start)
    assert text == "A cat"
    assert times[0] <= start + first_token_seconds <= times[1]


@pytest.mark.parametrize(
    "broken",
    [b"data: {", b"data: []", b'data: {"choices": []}', b'data: {"choices": [{}]}', b'error: {"message": "full"}'],
)
def test_a_malformed_answer_of_the_server_is_an_error(broken: bytes) -> None:
    with pytest.raises(EngineError, match="llama-server sent .* which is not a piece of an answer"):
        read_answer(iter([broken]), 0.0)
    with pytest.raises(EngineError, match="sent an empty answer"):
        read_answer(iter([b"\n", b"data: [DONE]\n"]), 0.0)


def test_the_server_is_stopped_after_an_error(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(baseline.folder / "starts"))
    with pytest.raises(EngineError, match="alive: True"), serving(baseline):
        raise EngineError(f"alive: {is_alive(started(baseline)[0])}")
    assert not is_alive(started(baseline)[0])
    command = json.loads((baseline.folder / "starts").read_text())[1:]
    for words in (["--host", "127.0.0.1"], ["-np", "1"], ["-c", "4096"], ["--mmproj", str(baseline.pair.mmproj)]):
        assert command[command.index(words[0]) + 1] == words[1]


def test_a_server_that_ignores_sigterm_is_killed(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(baseline.folder / "starts"))
    monkeypatch.setattr("benchmarks.baseline.server._STOP_SECONDS", 0.1)
    tool = baseline.folder / "llama-server"
    make_tool(tool, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + tool.read_text())
    with serving(baseline):
        pass
    assert not is_alive(started(baseline)[0])


def test_a_server_that_does_not_start_is_an_error(baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = make_tool(baseline.folder / "llama-server", "import sys; sys.exit('error: no memory')")
    with pytest.raises(EngineError, match="llama-server ended with code 1: error: no memory"), serving(baseline):
        pass
    make_tool(tool, "import time; time.sleep(60)")
    monkeypatch.setattr("benchmarks.baseline.server._START_SECONDS", 0.2)
    with pytest.raises(EngineError, match="was not ready after 0 s"), serving(baseline):
        pass
    tool.unlink()
    with pytest.raises(EngineError, match="cannot be started: No such file"), serving(baseline):
        pass


def test_a_refused_question_is_an_error(baseline: Baseline) -> None:
    with serving(baseline) as server, pytest.raises(EngineError, match="llama-server did not complete an answer"):
        server.ask([{"role": "user", "content": "no image"}])


def test_a_folder_of_tools_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tools(tmp_path / "build" / "bin")
    assert tools_in(tmp_path / "build") == tools_in(tmp_path / "build" / "bin") == tmp_path / "build" / "bin"
    monkeypatch.chdir(tmp_path / "build" / "bin")
    assert tools_in(Path()).is_absolute()
    (tmp_path / "build" / "bin" / "llama-bench").chmod(0o644)
    with pytest.raises(ConfigError, match="bin lacks llama-bench; give the folder"):
        tools_in(tmp_path / "build" / "bin")
    with pytest.raises(ConfigError, match="lacks llama-mtmd-cli, llama-bench, llama-server"):
        tools_in(tmp_path / "nowhere")


def failed(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_options_that_cannot_work_are_refused(folder: Path, tmp_path: Path) -> None:
    model = ("-m", folder)
    assert CliRunner().invoke(app, [*map(str, model), "--n-gpu-layers", "2"]).exit_code == 2
    assert "lacks llama-mtmd-cli" in failed(*model, "--build", tmp_path)
    tools = make_tools(tmp_path / "tools")
    assert "no mmproj at" in failed(*model, "--build", tools, "--baseline-mmproj", tmp_path / "none.gguf")


def test_the_command_compares(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.run_process", FakeProcesses())
    other = tmp_path / "mmproj-other-F16.gguf"
    other.symlink_to(next(folder.glob("mmproj-*")))
    options = ["-m", folder, "-t", 1, "--runs", 1, "--build", make_tools(tmp_path / "tools")]
    result = CliRunner().invoke(app, [*map(str, options), "--baseline-mmproj", str(other), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["baseline_mmproj"] == other.name != facts["mmproj"]
    rows = {row["name"]: row for row in facts["rows"]}
    assert (rows["cold run, 256x256"]["baseline_median"], rows["cold run, 256x256"]["ratio"]) == (4.0, 2.0)
    assert "ratio" not in rows["prefill"]
