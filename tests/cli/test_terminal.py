"""Standard streams that are closed, full, narrow or left; names with any bytes; Ctrl-C; in every command."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

from lfm2vl_edge.cli import COMMANDS, build
from tests.conftest import IMAGES, REFERENCE

TINY = Path(__file__).parents[2] / "lfm2vl_edge" / "models" / "tiny"
HOSTILE = os.fsdecode(b"\xff\x1b[31m\xc3\xa9\n")
"""A byte that is not text, an escape sequence, a character outside of ASCII, and a line end."""
IMAGE, MODEL, MISSING, OUT = (f"{kind}{HOSTILE}" for kind in ("image", "model", "missing", "out"))
ASK = (IMAGE, "-m", MODEL, "-n", "2")
WORK: dict[str, list[Sequence[str]]] = {
    "run": [("run", *ASK), ("run", *ASK, "--json", "-a", f"what{HOSTILE}"), ("run", MISSING, MISSING, "a b")],
    "chat": [("chat", *ASK), ("chat", MISSING, "-m", MODEL)],
    "caption": [("caption", *ASK), ("caption", *ASK, "--json")],
    "choose": [
        ("choose", IMAGE, f"is it{HOSTILE}?", "-m", MODEL, "-o", f"yes{HOSTILE}", "-o", "é", "--json"),
        ("choose", IMAGE, f"is it{HOSTILE}?", "-m", MODEL, "-o", f"yes{HOSTILE}", "-o", "é"),
        ("choose", MISSING, "a b", "-o", HOSTILE, "-o", "x"),
    ],
    "detect": [
        ("detect", IMAGE, f"x{HOSTILE}", "-m", MODEL, "--json"),
        ("detect", IMAGE, "-m", MODEL, "--draw", IMAGE),
    ],
    "point": [("point", IMAGE, "-m", MODEL, "--json"), ("point", MISSING)],
    "extract": [("extract", IMAGE, "-m", MODEL, "-s", "schema"), ("extract", IMAGE, "-s", MISSING)],
    "batch": [
        ("batch", IMAGE, "-m", MODEL, "-n", "2", "-p", f"what{HOSTILE}", "-o", f"out{HOSTILE}.jsonl", "--restart"),
        ("batch", MISSING, "-m", MODEL, "-p", "what", "-o", "out.jsonl"),
    ],
    "watch": [("watch", MISSING, "-m", MODEL, "-p", f"what{HOSTILE}")],
    "serve": [
        ("serve", "-m", MISSING, "--port", "0", "--alias", HOSTILE),
        ("serve", "--image-root", MISSING),
        ("serve", "--api-key-file", MISSING),
        ("serve", "--unix-socket", f"{MISSING}/x", "--cors-origin", "https://x.example"),
        ("serve", "--cors-origin", HOSTILE),
        ("serve", "--allow-image-url", HOSTILE),
        ("serve", "--host", HOSTILE, "--port", "0"),
    ],
    "plan": [("plan", IMAGE, "-m", MODEL), ("plan", IMAGE, "--json"), ("plan", MISSING)],
    "tune": [("tune", "-m", MISSING)],
    "bench": [("bench", "-m", MISSING)],
    "eval": [("eval", "rows", "-m", MODEL, "--json"), ("eval", "rows", "-m", MODEL), ("eval", MISSING)],
    "pull": [("pull", MISSING), ("pull", "lfm2.5-vl-450m", "--revision", HOSTILE)],
    "models": [("models",), ("models", "--json")],
    "show": [("show", MODEL), ("show", MODEL, "--json"), ("show", MISSING)],
    "rm": [("rm", MISSING)],
    "convert": [
        ("convert", f"checkpoint{HOSTILE}", "-o", OUT, "-f", "--quant", "F16"),
        ("convert", MISSING),
    ],
    "calibrate": [
        ("calibrate", "-m", MODEL, "-o", f"out{HOSTILE}", "--limit", "1", "-f"),
        ("calibrate", "-m", MISSING, "-o", "x"),
    ],
    "quantize": [("quantize", f"{MODEL}/lfm2vl-tiny-Q8_0.gguf", "-f", "--requantize", "--quant", "Q8_0", "-o", "out")],
    "verify": [("verify", MISSING), ("verify", MODEL, "--against", MISSING)],
    "doctor": [("doctor", "--json")],
    "cache": [("cache", "info"), ("cache", "info", "--json"), ("cache", "clear")],
}
"""What each command is asked for, with names that hold every kind of byte."""
REQUIRED = {
    "choose": ("x", "y", "-o", "a", "-o", "b"),
    "extract": ("x", "--schema", "y"),
    "convert": ("x", "-o", "y"),
    "calibrate": ("x", "-o", "y"),
    "batch": ("x", "-o", "y"),
    **dict.fromkeys(("chat", "serve", "tune", "bench"), ()),
}
"""What else some commands need."""
Ran: TypeAlias = "tuple[int, bytes, bytes]"
DRIVER = """
import contextlib, io, json, os, pathlib, signal, sys, tempfile
import lfm2vl_edge.cli
import importlib
for command in lfm2vl_edge.cli.COMMANDS:  # once, not in every child
    importlib.import_module(f"lfm2vl_edge.cli.{command}")
import jinja2, numpy, PIL.Image, rich.console, typer.rich_utils
import lfm2vl_convert, lfm2vl_edge.engine.llama, lfm2vl_edge.evaluate
import lfm2vl_edge.image.load, lfm2vl_edge.prompt.render

def open_as(mode, name):
    target = 1 if name == "stdout" else 2
    if mode == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), target)
    elif mode == "left":
        reader, writer = os.pipe()
        os.dup2(writer, target)
        os.close(reader)
    else:
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)

def stream(number, mode, encoding, errors):
    try:
        os.fstat(number)
    except OSError:
        return None  # as Python does at its start
    return open(number, mode, encoding=encoding, errors=errors, closefd=False, buffering=1 if number == 2 else -1)

def child(words, modes, encoding):
    signal.alarm(60)
    os.dup2(os.open("lines", os.O_RDONLY), 0)
    for name in ("stdout", "stderr"):
        open_as(modes.get(name, "file"), name)
    os.closerange(3, 100)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if modes.get(name) == "closed":
            os.close(number)
    sys.stdin, sys.stdout = stream(0, "r", encoding, "strict"), stream(1, "w", encoding, "strict")
    sys.stderr = stream(2, "w", encoding, "backslashreplace")
    sys.argv = ["lfm2vl-edge", *words]
    lfm2vl_edge.cli.main()

for line in sys.stdin:
    words, modes, encoding = json.loads(line)
    for name in ("stdout", "stderr"):
        pathlib.Path(f"{name}.txt").write_bytes(b"")
    pid = os.fork()
    if not pid:
        code = 99
        try:
            child(words, modes, encoding)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LFM2VL_", "HF_", "PYTHONUTF8"))}
    own = {"LFM2VL_DATA": str(folder / "data"), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    return {**kept, **own, "LC_ALL": "C.UTF-8", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a model, a checkpoint and data of hostile names."""
    folder = tmp_path_factory.mktemp("terminal")
    shutil.copy(IMAGES / "small.png", folder / IMAGE)
    (folder / MODEL).mkdir()
    for file in TINY.glob("*.gguf"):
        (folder / MODEL / file.name).symlink_to(file)
    (folder / f"checkpoint{HOSTILE}").symlink_to(REFERENCE / "a" / "checkpoint")
    (folder / "schema").write_text('{"const": "gr\\u00f6\\u00dfe \\ud83d\\ude00"}')
    text = HOSTILE[1:]  # a row has to be text
    shutil.copy(IMAGES / "small.png", folder / text)
    row = {"id": f"row{text}", "group": text, "image": text, "question": "?", "answer": "3"}
    (folder / "rows").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"id": "b", "image": f"missing{text}"}) + "\n"
    )
    (folder / "lines").write_bytes(
        b"What?\n/image missing\xff\x1b.png\n/stats\n\xff\xfe?\n/save out\xff\x1b\n/save! out\xff\n"
    )
    return folder


class Driver:
    """Runs commands in processes that fork from one in which everything is imported, so that hundreds take seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment(folder),
        )

    def run(self, words: Sequence[str], modes: Mapping[str, str] | None = None, encoding: str = "utf-8") -> Ran:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([words, modes or {}, encoding]).encode() + b"\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        out, err = ((self.folder / f"{name}.txt").read_bytes() for name in ("stdout", "stderr"))
        return code, out, err


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    driver = Driver(folder)
    yield driver
    driver.process.communicate()


def check_quiet(ran: Ran, *codes: int) -> None:
    code, out, err = ran
    for text in (b"Traceback", b"Exception ignored", b"Error: ", b"\x1b"):
        assert text not in out + err, (out + err).decode(errors="replace")[-700:]
    (out + err).decode()
    assert code in codes, ran


def test_every_command_is_tried() -> None:
    assert set(WORK) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_names_and_characters_in_every_command(driver: Driver, command: str) -> None:
    for words in WORK[command]:
        plain, narrow = driver.run(words), driver.run(words, encoding="ascii")
        check_quiet(plain, 0, 1)
        check_quiet(narrow, plain[0])
        assert (narrow[1] + narrow[2]).isascii()
        if "--json" in words and plain[0] == 0:
            assert json.loads(narrow[1]).keys() == json.loads(plain[1]).keys()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("command", COMMANDS)
def test_streams_of_every_command(driver: Driver, command: str) -> None:
    words = WORK[command][0]
    code, out, _ = driver.run(words)
    lost = 1 if out else code
    for mode in ("closed", "left"):
        ran = driver.run(words, {"stdout": mode})
        check_quiet(ran, lost)
        assert mode == "left" or not out or b"error: stdout is closed" in ran[2], ran
    silent = driver.run(words, {"stderr": "full"})
    assert (silent[0], bool(silent[1])) == (code, bool(out))
    assert driver.run(words, dict.fromkeys(("stdin", "stdout", "stderr"), "closed"))[0] == lost
    full = driver.run((command, "--help"), {"stdout": "full"}, encoding="ascii")
    assert full == (1, b"", b"error: stdout: No space left on device; make room, or check the path\n")


def test_a_closed_stdin_fails_only_if_it_is_read(driver: Driver) -> None:
    closed = {"stdin": "closed"}
    assert driver.run(("run", *ASK), closed)[0] == 0
    for words in (("run", "-", "x", "-m", MODEL), ("chat", *ASK), ("extract", IMAGE, "-s", "-"), ("plan", "-")):
        ran = driver.run(words, closed)
        check_quiet(ran, 1)
        assert ran[1] == b""
        assert re.fullmatch(rb"error: .*(stdin is closed|stdin: Bad file|JSON schema -: .*stdin).*\n", ran[2]), ran


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:replace"])
def test_answers_in_narrow_encodings(folder: Path, encoding: str) -> None:
    answer = "größe “😀”"
    (folder / "grammar").write_text(f'root ::= "{answer}"', encoding="utf-8")
    command = [sys.executable, "-m", "lfm2vl_edge", "run", IMAGE, "-m", MODEL, "--grammar", "grammar"]
    env = environment(folder, PYTHONIOENCODING=encoding)
    done = subprocess.run(command, capture_output=True, cwd=folder, env=env, check=True)
    name, _, errors = encoding.partition(":")
    assert done.stdout == f"{answer}\n".encode(name, errors or "backslashreplace")
    assert done.stderr == b""


def test_a_locale_without_umlauts_changes_no_question_and_no_path(folder: Path) -> None:
    shutil.copy(IMAGES / "small.png", folder / "größe.png")
    env = environment(folder, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LFM2VL_MODEL="tiny")
    command = [sys.executable, "-m", "lfm2vl_edge", "run", "größe.png", "--ask", "größe", "--json", "-n", "1"]
    done = subprocess.run([os.fsencode(word) for word in command], capture_output=True, cwd=folder, env=env)
    assert done.stderr == b""
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["answers"][0]["question"] == "größe"
    lines = "/image größe.png\nund größe?\n/save größe.jsonl\n".encode()
    chat = [sys.executable, "-m", "lfm2vl_edge", "chat", "-n", "1"]
    done = subprocess.run(chat, input=lines, capture_output=True, cwd=folder, env=env)
    assert done.stderr == b""
    saved = json.loads((folder / "größe.jsonl").read_text("utf-8").splitlines()[0])
    assert saved["content"][-1]["text"] == "und größe?"


@pytest.mark.parametrize("arguments", ["run {image} x -m tiny", "chat -m tiny", "plan {image} -m tiny", "--help"])
@pytest.mark.parametrize("n_imports", [1, 30, 90, 200])
def test_ctrl_c_is_quiet_from_the_first_import_on(folder: Path, arguments: str, n_imports: int) -> None:
    code = (
        "import os, signal, sys\n"
        "import lfm2vl_edge.cli\n"
        "class Finder:\n"
        "    left = int(sys.argv.pop(1))\n"
        "    def find_spec(self, *_):\n"
        "        Finder.left -= 1\n"
        "        if Finder.left == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "lfm2vl_edge.cli.main()\n"
    )
    words = [IMAGE if word == "{image}" else word for word in arguments.split()]
    command = [sys.executable, "-c", code, str(n_imports), *words]
    done = subprocess.run(command, input=b"", capture_output=True, cwd=folder, env=environment(folder), timeout=60)
    assert done.stderr == b"", done.stderr.decode()
    assert done.returncode in ((130,) if n_imports <= 90 else (130, 0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_the_process_quietly(folder: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "lfm2vl_edge",
        "run",
        IMAGE,
        "x",
        "-m",
        MODEL,
        "-n",
        "30000",
        "--regex",
        "[a-z]{9000}",
    ]
    chat = [sys.executable, "-m", "lfm2vl_edge", "chat", IMAGE, "-m", MODEL]
    for words in (command, chat):
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment(folder),
        ) as process:
            time.sleep(0.7)
            process.send_signal(number)
            _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (-number, b"")


def test_a_job_that_ignores_ctrl_c_still_does(folder: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    words = ["-m", "lfm2vl_edge", "chat", "-m", MODEL, "-n", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
        env=environment(folder),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"One?\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(b"Two?\n", timeout=20)
    assert (process.returncode, bool(out)) == (0, True)


def test_files_dropped_on_a_terminal_become_images(folder: Path) -> None:
    folder_name = str(folder)
    shutil.copy(IMAGES / "small.png", folder / "two words.png")
    shutil.copy(IMAGES / "small.png", folder / "it's.png")
    typed = [
        rf"{folder_name}/two\ words.png {folder_name}/it\'s.png ",  # macOS, Konsole
        f"'{folder_name}/two words.png' ",  # GNOME
        f"file://{folder_name}/two%20words.png",
        '/image two\\ words.png "it\'s.png"',
        "/quit",
    ]
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "lfm2vl_edge", "chat", "-m", "tiny"]
    env = environment(folder, TERM="dumb")
    with subprocess.Popen(
        command, stdin=secondary, stdout=secondary, stderr=secondary, cwd=folder, env=env
    ) as process:
        os.close(secondary)
        shown = _read_until(primary, b"Ctrl-D leaves")
        for line in typed:
            os.write(primary, line.encode() + b"\n")
        process.wait(30)
        shown += _read_until(primary, None)
    os.close(primary)
    assert process.returncode == 0
    notes = re.findall(r"(two words|it's)\.png: \d+x\d+, \d+ image tokens", shown.decode())
    assert notes == ["two words", "it's", "two words", "two words", "two words", "it's"], shown.decode()
    assert "error" not in shown.decode()


def _read_until(terminal: int, text: bytes | None, seconds: float = 30) -> bytes:
    """Return what a terminal shows up to a text, or if it is None, what is there."""
    shown = b""
    while text is None or text not in shown:
        if not select.select([terminal], [], [], 0.2 if text is None else seconds)[0]:
            break
        try:
            shown += os.read(terminal, 10_000)
        except OSError:  # Linux: the other side was closed
            break
    return shown


@pytest.mark.parametrize("text", ["novalue", "=1", "a b=1", "messages=[]", "tools=1", "1a=2", ""])
def test_a_template_option_without_key_and_value_is_wrong_usage(driver: Driver, text: str) -> None:
    code, out, err = driver.run(("run", IMAGE, "x", "-m", MODEL, "--template-option", text))
    assert (code, out) == (2, b"")
    assert b"KEY=VALUE" in err
    assert b"--template-option" in err


@pytest.mark.parametrize("words", [("run", *ASK), ("caption", *ASK), ("chat", *ASK), ("detect", IMAGE, "-m", MODEL)])
def test_a_template_option_that_the_template_does_not_use_is_noted(driver: Driver, words: Sequence[str]) -> None:
    plain = driver.run(words)
    ran = driver.run((*words, "--template-option", "flavour=1", "--template-option", "messages_=x"))
    assert ran[:2] == plain[:2]
    note = b"note: the model's chat template does not use flavour, messages_\n"
    assert ran[2].startswith(note)
    used = driver.run((*words, "--template-option", "add_generation_prompt=true"))
    assert used[:2] == plain[:2]
    assert b"note: the model's chat template" not in used[2]


def test_template_options_are_json_or_text() -> None:
    from lfm2vl_edge.cli._options import AnswerOptions

    given = ["a=1", "b=x=y", 'c={"d": [true, null]}', "e=", "a=false", "f=größe", "g=NaN x"]
    expected = {"a": False, "b": "x=y", "c": {"d": [True, None]}, "e": "", "f": "größe", "g": "NaN x"}
    assert AnswerOptions(template_option=given).values()["template_options"] == expected
    assert AnswerOptions().values()["template_options"] is None


def test_every_command_that_samples_takes_template_options() -> None:
    from typer.main import get_command

    commands = get_command(build()).commands  # type: ignore[attr-defined]
    options = {name: {option for one in command.params for option in one.opts} for name, command in commands.items()}
    sampling = {name for name, opts in options.items() if "--temperature" in opts}
    assert sampling >= {"run", "chat", "caption", "detect", "point", "extract", "eval"}
    assert {name for name, opts in options.items() if "--template-option" in opts} == sampling


def test_template_options_reach_the_template(tmp_path: Path) -> None:
    from lfm2vl_convert import convert_checkpoint

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE / "a" / "checkpoint", checkpoint)
    template = checkpoint / "chat_template.jinja"
    template.chmod(0o644)
    template.write_text("{% if flavour %}{{ 'word ' * flavour }}{% endif %}" + template.read_text())
    convert_checkpoint(checkpoint, tmp_path / "pair", quant="F16", mmproj_quant="F16")
    tokens = []
    for value in ("0", "7"):
        words = [
            "run",
            "-p",
            "x",
            "-m",
            str(tmp_path / "pair"),
            "-n",
            "1",
            "--json",
            "--template-option",
            f"flavour={value}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "lfm2vl_edge", *words], capture_output=True, env=environment(tmp_path), check=True
        )
        assert done.stderr == b""
        tokens.append(json.loads(done.stdout)["stats"]["prompt_tokens"])
    assert tokens[1] >= tokens[0] + 7
