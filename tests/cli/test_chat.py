"""`lfm2vl-edge chat`: lines of a pipe and of a terminal, commands, Ctrl-C, the history."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lfm2vl_edge import Model
from lfm2vl_edge.cli import app
from lfm2vl_edge.cli.chat import HISTORY_BYTES, HISTORY_LINES
from tests.conftest import IMAGES, Pair
from tests.test_chat import CountingEngine, talkative

SMALL, WIDE = str(IMAGES / "small.png"), str(IMAGES / "wide.png")
Converse = Callable[..., Result]
command = importlib.import_module("lfm2vl_edge.cli.chat")  # as an attribute of the package it is the command


@pytest.fixture
def converse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Converse:
    """Conversation with a model whose answers are known, through a pipe, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LFM2VL_DATA", str(tmp_path / "data"))

    def through_pipe(answers: Mapping[str, str], typed: str | bytes, *arguments: str) -> Result:
        model, _ = talkative(answers)
        monkeypatch.setattr(command, "opening", lambda *_, **__: nullcontext(lambda: model))
        return CliRunner().invoke(app, ["chat", *arguments], input=typed)

    return through_pipe


def on_terminal(
    monkeypatch: pytest.MonkeyPatch, model: Model, reads: Sequence[Callable[[], str]], *arguments: str
) -> Result:
    """Conversation with typed lines; each is what a call returns or raises, then comes Ctrl-D."""
    remaining = list(reads)

    def read() -> str:
        if not remaining:
            raise EOFError
        return remaining.pop(0)()

    monkeypatch.setattr(command, "opening", lambda *_, **__: nullcontext(lambda: model))
    monkeypatch.setattr(command, "reading_lines", lambda _: nullcontext(read))
    monkeypatch.setattr(command, "_is_typed", lambda: True)
    return CliRunner().invoke(app, ["chat", *arguments])


def types(text: str) -> Callable[[], str]:
    return lambda: text


def raises(error: BaseException) -> Callable[[], str]:
    def read() -> str:
        raise error

    return read


def errors(result: Result) -> list[str]:
    return result.stderr.splitlines()


def test_lines_of_a_pipe_are_turns_and_stdout_has_the_answers_only(converse: Converse, tmp_path: Path) -> None:
    result = converse({"One?": "Yes.", "One?Yes.Two?": "No."}, "One?\n\n   \r\nTwo?", SMALL)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Yes.\nNo.\n", "")
    assert not (tmp_path / "data").exists()  # no history of a pipe
    assert converse({}, "").exit_code == 0


def test_quit_leaves_and_statistics_go_to_stderr(converse: Converse) -> None:
    result = converse({"One?": "Yes."}, "One?\n/quit\nTwo?\n", "-v", SMALL)
    assert (result.exit_code, result.stdout) == (0, "Yes.\n")
    assert "encode" in result.stderr
    assert "1 of 1 views" in result.stderr


def test_an_error_is_one_line_and_loses_nothing(converse: Converse, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    typed = ["/image " + SMALL, "One?"]
    typed += [
        "/nonsense",
        "/",
        "/image",
        "/image none.png",
        "/image bad.png",
        "/image -",
        "/image .",
        "/image ftp://h/x",
    ]
    typed += ["/image a\0b", "/save", "/save none\0", "/save " + "x" * 5000, "/home/me/x.png is what?", "Two?"]
    result = converse({"One?": "Yes.", "One?Yes.Two?": "No."}, "\n".join(typed))
    assert (result.exit_code, result.stdout) == (1, "Yes.\nNo.\n")
    named = ["no command '/nonsense'; /help", "no command '/'", "/image needs an image", "no image at 'none.png'"]
    named += [
        "bad.png is not an image",
        "stdin is the conversation here",
        "cannot read '.'",
        "only http and https",
        "cannot read",
    ]
    named += ["/save needs a file", "cannot write", "cannot write 'xxx", "no command '/home/me/x.png'"]
    found = errors(result)
    assert len(found) == len(named), found
    for line, message in zip(found, named, strict=True):
        assert line.startswith("error: ")
        assert message in line
    assert converse({"/x?": "A path."}, " /x?\n").stdout == "A path.\n"


def test_a_wrong_first_image_ends_the_command_before_the_first_question(converse: Converse) -> None:
    result = converse({}, "One?\n", "none.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert errors(result) == ["error: no image at 'none.png'; check the path"]
    assert "stdin is the conversation" in converse({}, "One?\n", "-").stderr
    assert "stdin is the conversation" in converse({}, "{}\n", "--json-schema", "-").stderr


def test_a_full_context_names_the_remedy_and_loses_nothing(converse: Converse) -> None:
    long = "x" * 400
    result = converse({long: "y" * 90, "Hi": "New."}, f"{long}\nAnd?????\n/save kept.jsonl\n/reset\nHi\n")
    assert (result.exit_code, result.stdout) == (1, "y" * 90 + "\nNew.\n")
    (line,) = errors(result)
    assert re.search(r"the model's context is 500: .*; or /reset, .*\(-c does not help", line)
    assert len(Path("kept.jsonl").read_text().splitlines()) == 2


def test_commands_change_the_conversation(converse: Converse) -> None:
    answers = {"Be brief.One?": "Yes.", "Be brief.Two?": "No.", "Two?": "Well."}
    result = converse(answers, "One?\n/reset\nTwo?\n/reset\n/system\nTwo?\n", "--system", "Be brief.")
    assert result.stdout == "Yes.\nNo.\nWell.\n"
    assert converse({"Sing.One?": "La."}, "/system  Sing.\nOne?").stdout == "La.\n"


def test_a_saved_conversation_is_what_the_model_got_and_nothing_is_overwritten(
    converse: Converse, tmp_path: Path
) -> None:
    Image.open(SMALL).save("my photo.png")
    typed = "/save early.jsonl\n/image 'my photo.png'\nWhat “é”?\nTwo?\n/save chat.jsonl\n"
    answers = {"Be brief.What “é”?": "A\u2028cat.", "Be brief.What “é”?A\u2028cat.Two?": "No."}
    result = converse(answers, typed, "--system", "Be brief.")
    assert result.stdout == "A\u2028cat.\nNo.\n"
    assert (tmp_path / "early.jsonl").read_text().count("\n") == 1  # the system prompt
    saved = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text("utf-8").split("\n")[:-1]]
    image = {"type": "image", "image": "my photo.png"}
    assert saved == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What “é”?"}]},
        {"role": "assistant", "content": "A\u2028cat."},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}]},
        {"role": "assistant", "content": "No."},
    ]
    model, _ = talkative({"Be brief.What “é”?A\u2028cat.Two?No.Three?": "Good."})
    later = [*saved, {"role": "user", "content": "Three?"}]
    assert "".join(chunk.text for chunk in model.chat(later)) == "Good."
    before = (tmp_path / "chat.jsonl").read_bytes()
    again = converse({"Hi": "Ho."}, "/save chat.jsonl\nHi\n/save chat.jsonl\n/save .\n/save! .\n")
    nothing, there, folder, over = errors(again)
    assert nothing == "error: there is no message yet, so there is nothing to save; ask a question first"
    assert there == "error: chat.jsonl exists already; give another name, or /save! chat.jsonl to replace it"
    assert ". exists already" in folder
    assert "cannot write" in over
    assert (tmp_path / "chat.jsonl").read_bytes() == before
    assert converse({"Hi": "Ho."}, "Hi\n/save! chat.jsonl\n").exit_code == 0
    assert len((tmp_path / "chat.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "early.jsonl", "my photo.png"]


def test_a_conversation_is_saved_through_a_link(converse: Converse, tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "link").symlink_to(tmp_path / "kept.jsonl")
    done = converse({"Hi": "Ho."}, "Hi\n/save! null\n/save! link\n")
    assert (done.exit_code, errors(done)) == (0, [])
    assert (tmp_path / "null").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", "link", "null"]


def test_stats_and_help_go_to_stderr(converse: Converse) -> None:
    result = converse({"One?": "Yes."}, f"/stats\n/image {SMALL}\nOne?\n/stats\n/help\n")
    assert result.stdout == "Yes.\n"
    first, *shown = errors(result)
    assert first == "chat       turns: 0, images: 0"
    assert shown[0] == "chat       turns: 1, images: 1"
    n_image = talkative({})[0].preprocess(SMALL).plan.n_image_tokens
    used = n_image + 4 + len("One?Yes.")  # two markers of the image, two of the turn
    assert shown[1] == f"context    {used} of 500 tokens after the last answer"
    for word in ("/image", "/system", "/reset", "/save", "/save!", "/stats", "/help", "/quit"):
        assert any(line.startswith(word + " ") for line in shown), word


@pytest.mark.parametrize(
    "typed", [b"One\xff?\nTwo?\n", b"\xef\xbb\xbf\0\x1b[2J\nTwo?\n", os.urandom(3000) + b"\nTwo?"]
)
def test_hostile_bytes_are_a_question_like_any_other(converse: Converse, typed: bytes) -> None:
    result = converse({}, typed.replace(b"/", b"x"))
    assert result.stdout.endswith("?\n")
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_line_without_end_is_skipped(converse: Converse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LONGEST_LINE", 100)
    result = converse({"One?": "Yes."}, "x" * 100 + "y" * 350 + "\nOne?\n" + "z" * 100)
    assert (result.exit_code, result.stdout) == (1, "Yes.\n")
    assert [line[:41] for line in errors(result)] == ["error: a line has more than 100 characters"[:41]] * 2


def stopping(answers: Mapping[str, str], at: str) -> tuple[Model, CountingEngine]:
    """A model that is stopped with Ctrl-C at a letter of its answer."""
    model, engine = talkative(answers)
    piece = engine.piece

    def interrupting(token: int) -> bytes:
        if token == ord(at):
            os.kill(os.getpid(), signal.SIGINT)
            while not engine.stopped:  # the watching thread cancels the engine
                time.sleep(0.01)
        return piece(token)

    engine.piece = interrupting  # type: ignore[method-assign]
    return model, engine


def test_ctrl_c_stops_the_answer_but_not_the_conversation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, _ = stopping({"One?": "Yes! No.", "One?Yes!Two?": "Well.", "Two?": "Lost."}, at="!")
    path = tmp_path / "chat.jsonl"
    typed = [types("One?"), raises(KeyboardInterrupt()), types("Two?"), types(f"/save {path}")]
    result = on_terminal(monkeypatch, model, typed)
    assert (result.exit_code, result.stdout) == (0, "Yes!\nWell.\n")
    assert [json.loads(line)["content"] for line in path.read_text().splitlines()][1::2] == ["Yes!", "Well."]
    assert "error" not in result.stderr


def test_ctrl_c_ends_a_pipe(converse: Converse, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stopping({"One?": "Yes! No."}, at="!")
    monkeypatch.setattr(command, "opening", lambda *_, **__: nullcontext(lambda: model))
    result = CliRunner().invoke(app, ["chat"], input="One?\nTwo?\n")
    assert (result.exit_code, result.stdout) == (130, "Yes!\n")


def test_a_terminal_gets_notes_unless_quiet_and_failures_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = talkative({"One?": "Yes."})
    typed = [types(f"/image {SMALL}"), types("/image none"), types("One?")]
    result = on_terminal(monkeypatch, model, typed, "-n", "2", WIDE)
    assert (result.exit_code, result.stdout) == (0, "Ye\n")
    greeting, first, second, error, truncated = errors(result)
    assert greeting.startswith("scripted; /help")
    assert re.fullmatch(rf"{WIDE}: \d+x\d+, \d+ image tokens, with the next question", first)
    assert second.startswith(SMALL)
    assert error.startswith("error: no image at 'none'")
    assert truncated == "(truncated after 2 tokens; --max-tokens allows more)"
    again, _ = talkative({"One?": "Yes."})
    assert errors(on_terminal(monkeypatch, again, typed, "-n", "2", "-q", WIDE)) == [error]


def test_a_url_is_saved_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, converse: Converse
) -> None:
    monkeypatch.setattr("lfm2vl_edge.image.source.fetch", lambda _: Path(SMALL).read_bytes())
    result = converse(
        {}, "/image https://me:secret@host/a.png?key=secret\nHi\n/save chat.jsonl\n/image http://me:x@host:y/"
    )
    assert result.stdout == "?\n"
    saved = (tmp_path / "chat.jsonl").read_text()
    assert "https://host/a.png?..." in saved
    assert "secret" not in saved + result.stderr


def test_the_history_outlives_the_session_within_its_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "data" / "history"
    assert command._load_history(path) == []
    command._store_history(path, [])
    assert not path.exists()
    typed = [f"line {number} é" for number in range(HISTORY_LINES + 5)]
    command._store_history(path, typed)
    assert command._load_history(path) == typed[5:]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    command._store_history(path, ["old", "x" * (HISTORY_BYTES - 4), "new"])
    assert command._load_history(path) == ["new"]
    path.write_bytes(os.urandom(5000) + b"\n\n\x1b[2Jwipe\n\0\nfine\n")
    assert command._load_history(path)[-1] == "fine"
    assert all(line.isprintable() for line in command._load_history(path))
    path.write_bytes(b"x" * (3 * HISTORY_BYTES) + b"\nfine")
    assert command._load_history(path)[-1] == "fine"
    assert caplog.text == ""
    for broken in (tmp_path, path / "below"):
        assert command._load_history(broken) == []
        command._store_history(broken, ["a"])
    assert caplog.text.count("cannot read the history in") >= 1
    assert caplog.text.count("cannot store the history in") == 2


@contextmanager
def terminal(folder: Path, data: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run `chat` on a terminal of its own; yields the process and the terminal's other end."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "LFM2VL_DATA": str(data), "TERM": "dumb", "LFM2VL_CACHE": ""}
    arguments = ["chat", "-m", str(folder), "-n", "30000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lfm2vl_edge", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.communicate()
        os.close(ours)


def await_text(terminal_end: int, text: bytes) -> bytes:
    """Read from a terminal until a text comes."""
    seen = b""
    while text not in seen:
        ready, _, _ = select.select([terminal_end], [], [], 120)
        assert ready, seen
        seen += os.read(terminal_end, 1000)
    return seen


def test_a_terminal_has_editing_ctrl_c_ctrl_d_and_a_history(pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    (tmp_path / "chat_history").write_text("/stats\n")
    with terminal(pair("a", "F32"), tmp_path) as (process, keyboard):
        await_text(keyboard, b"> ")
        os.write(keyboard, b"gox\x7f\r")  # the x is taken back
        await_text(keyboard, b"\r\n")
        os.read(keyboard, 100)  # the answer has started; it would have 30,000 tokens
        process.send_signal(signal.SIGINT)
        await_text(keyboard, b"\r\n> ")
        os.write(keyboard, b"\x10\x10\r")  # two lines up in the history
        await_text(keyboard, b"/stats\r\n> ")
        os.write(keyboard, b"\x04")
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in shown
    assert b"chat       turns: 1, images: 0" in shown
    assert (tmp_path / "chat_history").read_text() == "/stats\ngo\n/stats\n"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/image my photo.png", ["my photo.png"]),
        (r"/image my\ photo.png", ["my photo.png"]),
        ("/image 'my photo.png'  ", ["my photo.png"]),
        ('/image "it\'s.png" my\\ photo.png', ["it's.png", "my photo.png"]),
        ("/image it's.png", ["it's.png"]),
        ("/image file://{here}/my%20photo.png", ["{here}/my photo.png"]),
        ("/image FILE://{here}/it%27s.png file://{here}/my%20photo.png", ["{here}/it's.png", "{here}/my photo.png"]),
        ("{here}/my photo.png", ["{here}/my photo.png"]),
        ("'{here}/my photo.png' ", ["{here}/my photo.png"]),
        ("{here}/my\\ photo.png {here}/it\\'s.png ", ["{here}/my photo.png", "{here}/it's.png"]),
        ("file://{here}/my%20photo.png", ["{here}/my photo.png"]),
        ("/image back\\slash.png", ["back\\slash.png"]),
    ],
)
def test_images_are_named_as_terminals_type_dropped_files(
    converse: Converse, tmp_path: Path, typed: str, expected: list[str]
) -> None:
    for name in ("my photo.png", "it's.png", "back\\slash.png"):
        Image.open(SMALL).save(tmp_path / name)
    result = converse({"One?": "Yes."}, typed.replace("{here}", str(tmp_path)) + "\nOne?\n/save 'a b.jsonl'\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Yes.\n", "")
    saved = json.loads((tmp_path / "a b.jsonl").read_text("utf-8").splitlines()[0])
    names = [part["image"] for part in saved["content"] if part["type"] == "image"]
    assert names == [name.replace("{here}", str(tmp_path)) for name in expected]


@pytest.mark.parametrize("typed", ["/image my\\ photo.png none.png", "/image 'my photo.png' 'no photo.png'"])
def test_of_several_images_all_are_added_or_none(converse: Converse, tmp_path: Path, typed: str) -> None:
    Image.open(SMALL).save(tmp_path / "my photo.png")
    result = converse({"One?": "Yes."}, f"{typed}\nOne?\n/stats\n")
    assert "no image at 'no" in result.stderr
    assert "images: 0" in result.stderr


def test_a_question_about_a_path_is_a_question(converse: Converse, tmp_path: Path) -> None:
    Image.open(SMALL).save(tmp_path / "a.png")
    for question in ("'What is this?'", "a.png", "'a.png' is what?", "it's what?"):
        assert converse({question: "Yes."}, question).stdout == "Yes.\n"
