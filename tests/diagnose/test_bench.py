"""Bench: what it makes of values that are known beforehand, with processes and llama.cpp's tools stood in for."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.baseline.server import read_answer, serving
from benchmarks.baseline.tools import decode_speed, encode_seconds, tools_in
from lfm2vl_edge import ConfigError, EngineError, Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.diagnose.bench import Peer, ProcessUsage, Row, bench, lines, own_command, rows_of, run_process
from lfm2vl_edge.opening import OpenOptions, decide
from tests.benchmarks.fake_tools import ENCODED, SPEED, make_peer, make_tool
from tests.conftest import Pair

SIZES = ((256, 256), (600, 1200))
"""Smaller images than bench's own: one view, and two tiles with a thumbnail."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.SIZES", SIZES)
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(pair: Pair) -> Path:
    return pair("a", "F16")


@pytest.fixture
def peer(folder: Path, tmp_path: Path) -> Peer:
    return Peer(folder=make_peer(tmp_path / "tools"), pair=decide(folder, OpenOptions()).pair, n_threads=1)


class Shell:
    """Stands for new processes: cold ones take 8 seconds, ones that find embeddings on disk 2, the baseline's 4."""

    def __init__(self) -> None:
        self.commands: list[Sequence[str]] = []
        self.folders: set[str] = set()

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
        self.commands.append(command)
        if command[0] != sys.executable:
            output = SPEED if command[0].endswith("llama-bench") else "A red circle."
            return ProcessUsage(seconds=4.0, cpu_seconds=7.0, memory_bytes=10**9, output=output, log=ENCODED)
        folder = environment.get("LFM2VL_CACHE", "")
        assert bool(folder) == ("--cache" in command)
        seconds = 2.0 if folder in self.folders else 8.0
        self.folders |= {folder} - {""}
        stats = {"stats": {"first_token_seconds": seconds / 2}}
        return ProcessUsage(seconds=seconds, cpu_seconds=1.0, memory_bytes=5 * 10**8, output=json.dumps(stats))


def test_every_figure_is_gathered(folder: Path) -> None:
    shell = Shell()
    opening, wishes = decide(folder, OpenOptions(n_threads=1)), OpenOptions(n_threads=1)
    rows = {row.name: row for row in bench(opening, wishes, 2, shell)}
    assert all(len(row.runs) == 2 and min(row.runs) >= 0 for row in rows.values())
    for name in ("open the model", "encode a view", "prefill", "decode", "another question, 256x256"):
        assert rows[name].median > 0
    assert rows["second turn, 1200x600"].median < rows["first token, 1200x600"].median
    assert rows["cold run, 1200x600"].runs == (8.0, 8.0)
    memory = rows["cold run, 256x256, peak memory"]
    assert (memory.median, memory.unit) == (500.0, "MB")
    assert rows["cold run, 256x256, cpu"].median == 1.0
    assert rows["new process, embeddings on disk, 1200x600"].runs == (2.0, 2.0)
    assert rows["new process, embeddings on disk, 1200x600, first token, share"].median == 0.25
    assert rows["encode, one of 3 views changed, share"].median > 0
    assert len(shell.commands) == 8
    assert not any(row.peer for row in rows.values())
    assert len(list(lines(list(rows.values())))) == len(rows)


def test_the_peer_takes_turns_on_the_same_files(folder: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(peer.folder / "starts"))
    shell = Shell()
    opening, wishes = decide(folder, OpenOptions(n_threads=1)), OpenOptions(n_threads=1)
    rows = {row.name: row for row in bench(opening, wishes, 2, shell, peer=peer)}
    cold = rows["cold run, 256x256"]
    assert (cold.runs, cold.peer, cold.ratio) == ((8.0, 8.0), (4.0, 4.0), 2.0)
    assert rows["cold run, 256x256, cpu"].peer == (7.0, 7.0)
    assert rows["cold run, 1200x600, peak memory"].peer == (1000.0, 1000.0)
    assert rows["encode a view"].peer == (0.812, 0.812)
    assert rows["decode"].peer == (160.0, 160.0)
    for question in ("first token", "another question", "second turn"):
        assert min(rows[f"{question}, 1200x600"].peer) > 0
    assert rows["prefill"].peer == rows["open the model"].peer == ()
    names = [Path(command[0]).name for command in shell.commands]
    assert names == [
        *("llama-mtmd-cli", "llama-bench"),
        *(Path(sys.executable).name, "llama-mtmd-cli") * 2,
        *(Path(sys.executable).name,) * 2,
        *("llama-mtmd-cli", "llama-bench"),
        *("llama-mtmd-cli", Path(sys.executable).name) * 2,
        *(Path(sys.executable).name,) * 2,
    ]
    described = [command for command in shell.commands if command[0].endswith("llama-mtmd-cli")][1]
    ours = shell.commands[2]
    assert described[described.index("--image") + 1] == ours[ours.index("run") + 1]
    for words in (["-c", "4096"], ["-t", "1"], ["-n", "32"], ["--temp", "0"]):
        assert described[described.index(words[0]) + 1] == words[1]
    with Model.open(folder) as model:
        from lfm2vl_edge.evaluate.verify import drawn
        from lfm2vl_edge.prompt.messages import user_message

        tokens = len(model.token_ids([user_message(drawn(*SIZES[0]), "Describe this image.")]))
    assert shell.commands[1][shell.commands[1].index("-d") + 1] == str(tokens)
    assert not any(map(is_alive, started(peer)))
    table = list(lines(list(rows.values())))
    assert table[0].split() == ["ours", "llama.cpp", "ratio"]
    assert any(line.split() == ["cold", "run,", "256x256", "8", "s", "4", "2.00"] for line in table)


def started(peer: Peer) -> list[int]:
    return [json.loads(line)[0] for line in (peer.folder / "starts").read_text().splitlines()]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_rows_compare_pair_by_pair() -> None:
    ours, peers = (
        [{("a", "s"): value} for value in (1.0, 20.0, 3.0)],
        [{("a", "s"): value} for value in (2.0, 10.0, 6.0)],
    )
    (row,) = rows_of(ours, peers)
    assert (row.median, row.peer_median, row.ratio) == (3.0, 6.0, 0.5)
    own = {"name": "a", "unit": "s", "runs": [1.0, 20.0, 3.0], "median": 3.0}
    assert row.as_dict() == own | {"peer": [2.0, 10.0, 6.0], "peer_median": 6.0, "ratio": 0.5}
    alone = Row(name="encode", unit="s", runs=(3.0, 1.0, 2.5))
    assert alone.median == statistics.median([1, 2.5, 3])
    assert alone.as_dict() == {"name": "encode", "unit": "s", "runs": [3.0, 1.0, 2.5], "median": 2.5}
    assert [" ".join(line.split()) for line in lines([alone])] == ["encode 2.5 s (1 to 3)"]


def test_a_process_names_files_threads_and_gpu(folder: Path) -> None:
    opening = decide(folder, OpenOptions(n_threads=1))
    command = own_command(opening, OpenOptions(n_gpu_layers=4, device="CUDA0"), Path("x.png"))
    for words in (["-t", "1"], ["--gpu-layers", "4"], ["--device", "CUDA0"], ["--mmproj", str(opening.pair.mmproj)]):
        assert command[command.index(words[0]) + 1] == words[1]


def test_processes_are_accounted_for_and_their_failures_told() -> None:
    code = "import os, sys; print(os.environ['X']); sys.stderr.write('log')"
    spent = run_process([sys.executable, "-c", code], {"X": "hello"})
    assert (spent.output, spent.log) == ("hello\n", "log")
    assert spent.seconds > 0
    assert spent.memory_bytes > 10**6
    with pytest.raises(EngineError, match="failed with code 3: alas"):
        run_process([sys.executable, "-c", "import sys; sys.stderr.write('alas'); sys.exit(3)"], {})
    with pytest.raises(EngineError, match="no-such-tool cannot be started: No such file"):
        run_process(["/nowhere/no-such-tool"], {})


def test_the_memory_of_a_process_is_its_own_and_not_that_of_who_measures() -> None:
    ballast = bytearray(b"\1") * 300_000_000
    assert len(ballast) > run_process(["true"], {}).memory_bytes


def test_a_process_without_figures_is_an_error(folder: Path) -> None:
    def silent(command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
        return ProcessUsage(seconds=1.0, cpu_seconds=1.0, memory_bytes=1, output="hm")

    opening = decide(folder, OpenOptions(n_threads=1))
    with pytest.raises(EngineError, match="printed no figures: 'hm'"):
        bench(opening, OpenOptions(n_threads=1), 1, silent)


def of(output: str = "", log: str = "") -> ProcessUsage:
    return ProcessUsage(seconds=1.0, cpu_seconds=1.0, memory_bytes=1, output=output, log=log)


def test_what_the_tools_print_is_read() -> None:
    assert encode_seconds(of(log=ENCODED)) == 0.812
    assert encode_seconds(of(log=ENCODED + ENCODED)) == 1.624
    assert encode_seconds(of(log="encoding image slice...\nimage slice encoded in 77 ms\n")) == 0.077
    assert decode_speed(of(SPEED)) == 160.0
    with pytest.raises(EngineError, match="llama-mtmd-cli does not tell how long it encoded: 'main: hm'; take the"):
        encode_seconds(of(log="main: hm\n"))
    for broken in ("", "[]", "[1]", "{}", SPEED.replace("avg_ts", "speed"), SPEED[:90], SPEED.replace("160.0", "-")):
        with pytest.raises(EngineError, match="llama-bench printed no figures"):
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

    begin = time.perf_counter()
    answer = read_answer(events(), begin)
    assert answer.text == "A cat"
    assert times[0] <= begin + answer.first_token_seconds <= times[1]


@pytest.mark.parametrize(
    "broken",
    [b"data: {", b"data: []", b'data: {"choices": []}', b'data: {"choices": [{}]}', b'error: {"message": "full"}'],
)
def test_a_broken_answer_of_the_server_is_an_error(broken: bytes) -> None:
    with pytest.raises(EngineError, match="llama-server answers with .* which is no piece of an answer"):
        read_answer(iter([broken]), 0.0)
    with pytest.raises(EngineError, match="ended an answer without a word"):
        read_answer(iter([b"\n", b"data: [DONE]\n"]), 0.0)


def test_the_server_is_stopped_whatever_happens(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(peer.folder / "starts"))
    with pytest.raises(EngineError, match="seen alive: True"), serving(peer):
        raise EngineError(f"seen alive: {is_alive(started(peer)[0])}")
    assert not is_alive(started(peer)[0])
    command = json.loads((peer.folder / "starts").read_text())[1:]
    for words in (["--host", "127.0.0.1"], ["-np", "1"], ["-c", "4096"], ["--mmproj", str(peer.pair.mmproj)]):
        assert command[command.index(words[0]) + 1] == words[1]


def test_a_server_that_does_not_listen_to_reason_is_killed(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_STARTS", str(peer.folder / "starts"))
    monkeypatch.setattr("benchmarks.baseline.server._STOP_SECONDS", 0.1)
    tool = peer.folder / "llama-server"
    make_tool(tool, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + tool.read_text())
    with serving(peer):
        pass
    assert not is_alive(started(peer)[0])


def test_a_server_that_cannot_serve_is_an_error(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = make_tool(peer.folder / "llama-server", "import sys; sys.exit('error: no memory')")
    with pytest.raises(EngineError, match="llama-server ended with code 1: error: no memory"), serving(peer):
        pass
    make_tool(tool, "import time; time.sleep(60)")
    monkeypatch.setattr("benchmarks.baseline.server._START_SECONDS", 0.2)
    with pytest.raises(EngineError, match="was not ready after 0 s"), serving(peer):
        pass
    tool.unlink()
    with pytest.raises(EngineError, match="cannot be started: No such file"), serving(peer):
        pass


def test_a_refused_question_is_an_error(peer: Peer) -> None:
    with serving(peer) as server, pytest.raises(EngineError, match="llama-server broke off an answer"):
        server.ask([{"role": "user", "content": "no picture"}])


def test_a_folder_of_tools_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_peer(tmp_path / "build" / "bin")
    assert tools_in(tmp_path / "build") == tools_in(tmp_path / "build" / "bin") == tmp_path / "build" / "bin"
    monkeypatch.chdir(tmp_path / "build" / "bin")
    assert tools_in(Path()).is_absolute()
    (tmp_path / "build" / "bin" / "llama-bench").chmod(0o644)
    with pytest.raises(ConfigError, match="bin lacks llama-bench; name the folder"):
        tools_in(tmp_path / "build" / "bin")
    with pytest.raises(ConfigError, match="lacks llama-mtmd-cli, llama-bench, llama-server"):
        tools_in(tmp_path / "nowhere")


def failed(*words: object) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_options_that_contradict_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    model = ("-m", folder)
    assert "give --peer or --peer-build too" in failed(*model, "--peer-mmproj", tmp_path)
    assert "leave --gpu-layers out" in failed(*model, "--peer", "--gpu-layers", 2)
    assert "lacks llama-mtmd-cli" in failed(*model, "--peer-build", tmp_path)
    tools = make_peer(tmp_path / "tools")
    assert "no mmproj at" in failed(*model, "--peer-build", tools, "--peer-mmproj", tmp_path / "none.gguf")


def test_the_command_compares(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.diagnose.bench.run_process", Shell())
    other = tmp_path / "mmproj-other-F16.gguf"
    other.symlink_to(next(folder.glob("mmproj-*")))
    options = ["-m", folder, "-t", 1, "--runs", 1, "--peer-build", make_peer(tmp_path / "tools")]
    result = CliRunner().invoke(app, ["bench", *map(str, options), "--peer-mmproj", str(other), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["peer_mmproj"] == other.name != facts["mmproj"]
    rows = {row["name"]: row for row in facts["rows"]}
    assert (rows["cold run, 256x256"]["peer_median"], rows["cold run, 256x256"]["ratio"]) == (4.0, 2.0)
    assert "ratio" not in rows["prefill"]
