"""`lfm2vl-edge chat`: a conversation about images, line by line."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from codecs import lookup
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import unquote

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_unused_variables, show_answer, statistics
from lfm2vl_edge.cli._loading import load_argument, opening
from lfm2vl_edge.cli._output import EXIT_FAILED, Interrupt, at_once, report, reporting, to_json, write_line
from lfm2vl_edge.errors import ContextFull, EdgeError
from lfm2vl_edge.host import data_folder, is_special, write_whole
from lfm2vl_edge.image.web import display_url, is_url

if TYPE_CHECKING:
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.generate import Chunk, Turn
    from lfm2vl_edge.image.load import OpenedImage
    from lfm2vl_edge.image.tiles import PreprocessedImage
    from lfm2vl_edge.prompt.messages import Message

HISTORY_LINES: Final = 1000
"""The history keeps this many lines at most, the newest."""
HISTORY_BYTES: Final = 1_000_000
"""And no more than this, whatever their lengths."""
LONGEST_LINE: Final = 10_000_000
"""Characters; an image as a data URL fits, an endless stream without line ends does not."""
_HISTORY: Final = "chat_history"
_PROMPT: Final = "> "
_PRIVATE: Final = 0o600
_LOG: Final = logging.getLogger(__name__)


@opt.takes_groups
def chat(
    model: opt.AskedModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]...", help="Images for the first question: paths or http(s) URLs."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", parser=opt.as_text, metavar="TEXT", help="A system prompt before the conversation."),
    ] = None,
    cache: opt.Cache = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Have a conversation about images: lfm2vl-edge chat photo.jpg -m MODEL.

    Every line is a question; /help lists the commands, among them /image, /reset and /save.
    Ctrl-C stops an answer, Ctrl-D leaves. Each turn decodes only what is new.
    Lines of a pipe are questions too; the exit code is then 1 if one of them failed.
    """
    with reporting(), ExitStack() as stack:
        if answer.json_schema == opt.STDIN:
            raise EdgeError("stdin is the conversation here, not a schema; give --json-schema a file")
        options, load = answer.values(), partial(_load, max_pixels=image.max_pixels, cache=cache)
        with at_once():
            when_open = stack.enter_context(opening(model, image, verbose, remember=True, cache=cache))
            loaded = [(name, load(name)) for name in images or ()]
            opened = when_open()
            note_unused_variables(options, opened)
        from lfm2vl_edge.chat import Chat

        is_typed = _is_typed()
        read = stack.enter_context(reading_lines(data_folder() / _HISTORY))
        conversation = Chat(opened, system=system, **options)
        session = Session(conversation, load=load, has_notes=is_typed and not quiet, verbose=verbose)
        session.note(f"{opened.config.name}; /help lists the commands, Ctrl-D leaves")
        for name, one in loaded:
            session.add_image(name, one)
        has_failed = _take_lines(session, read, is_typed=is_typed)
    if has_failed and not is_typed:
        raise typer.Exit(EXIT_FAILED)


def _load(name: str, max_pixels: int, cache: bool | None) -> OpenedImage:
    if name == opt.STDIN:
        raise EdgeError("stdin is the conversation here, not an image; give a path or an http(s) URL")
    return load_argument(name, max_pixels, cache)


def _take_lines(session: Session, read: Callable[[], str], *, is_typed: bool) -> bool:
    """Take line after line to the end, and return whether one of them failed."""
    has_failed = False
    while True:
        try:
            session.take(read())
        except EOFError:  # Ctrl-D, the end of a pipe, or /quit
            return has_failed
        except EdgeError as error:
            has_failed = True
            report(error)
        except KeyboardInterrupt:
            if not is_typed:
                raise


class Session:
    """A conversation on the command line: what a line does, and what its commands need to know."""

    def __init__(self, chat: Chat, *, load: Callable[[str], OpenedImage], has_notes: bool, verbose: int) -> None:
        self._chat = chat
        self._load = load
        self._has_notes = has_notes
        self._verbose = verbose
        self._last: Turn | None = None
        self._names: dict[PreprocessedImage, str] = {}

    def take(self, line: str) -> None:
        """Run a command, which starts with a slash, or ask a question.

        Raises:
            EOFError: the user leaves.
            EdgeError: it failed; the conversation is unchanged.
            KeyboardInterrupt: the answer was stopped; it stays in the conversation as far as it came.
        """
        if dropped := _dropped_files(line):
            self._add_images(dropped)
        elif line.startswith("/"):
            word, *rest = line.split(maxsplit=1)
            if word not in self.commands:
                raise EdgeError(f"no command {word!r:.40}; /help lists them, and a space before / makes it a question")
            self.commands[word][-1](self, "".join(rest).strip())
        elif question := _as_text(line).strip():
            self._ask(question)

    def note(self, text: str) -> None:
        """Write a note to stderr, if a person types the lines and did not choose --quiet."""
        if self._has_notes:
            write_line(text)

    def add_image(self, name: str, opened: OpenedImage) -> None:
        """Add an image to the next question."""
        image = self._chat.add_image(opened)
        name = display_url(name) if is_url(name) else name
        self._names[image] = name
        size, tokens = f"{image.plan.width}x{image.plan.height}", image.plan.n_image_tokens
        self.note(f"{name:.80}: {size}, {tokens} image tokens, with the next question")

    def _ask(self, question: str) -> None:
        try:
            with at_once(grace=None) as interrupt:
                interrupt.cancel = self._chat.model.cancel
                self._last = show_answer(_watched(self._chat.send(question), interrupt))
        except ContextFull as error:
            raise EdgeError(f"{error}; or /reset, which starts a new conversation (-c does not help)") from error
        if self._last.finish_reason == "length" and self._last.stats:
            self.note(f"(truncated after {self._last.stats.completion_tokens} tokens; --max-tokens allows more)")
        if self._verbose:
            write_line("\n".join(statistics(self._last, self._chat.model)))

    def _image(self, rest: str) -> None:
        if not rest:
            raise EdgeError("/image needs an image: /image photo.jpg, or /image https://host/photo.jpg")
        self._add_images(_file_names(rest))

    def _add_images(self, names: Sequence[str]) -> None:
        """Add all images, or none if one cannot be loaded."""
        for name, opened in [(name, self._load(name)) for name in names]:
            self.add_image(name, opened)

    def _system(self, rest: str) -> None:
        self._chat.system = _as_text(rest) or None
        self.note("the system prompt is set for the next answer" if rest else "there is no system prompt now")

    def _reset(self, _rest: str) -> None:
        self._chat.reset()
        self._names.clear()
        self._last = None
        self.note("a new conversation starts")

    def _save(self, rest: str) -> None:
        self._write(rest, replace=False)

    def _save_over(self, rest: str) -> None:
        self._write(rest, replace=True)

    def _write(self, rest: str, *, replace: bool) -> None:
        if not rest:
            raise EdgeError("/save needs a file: /save chat.jsonl")
        if not self._chat.messages:
            raise EdgeError("there is no message yet, so there is nothing to save; ask a question first")
        path = Path(_file_name(_unquoted(rest)))
        lines = [to_json(_plain(one, self._names), "utf-8") + "\n" for one in self._chat.messages]
        try:
            if path.exists() and not replace and not is_special(path):
                raise EdgeError(f"{path} exists already; give another name, or /save! {path} to replace it")
            write_whole(path, [line.encode() for line in lines])
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            why = getattr(error, "strerror", None) or error
            raise EdgeError(f"cannot write {str(path)!r:.200}: {why}; give another name") from error
        self.note(f"{len(lines)} messages in {path}")

    def _stats(self, _rest: str) -> None:
        model, turns = self._chat.model, sum(message["role"] == "user" for message in self._chat.messages)
        lines = [f"chat       turns: {turns}, images: {len(self._names)}"]
        if self._last is not None and self._last.stats is not None:
            used = self._last.stats.prompt_tokens + self._last.stats.completion_tokens
            lines += [f"context    {used} of {model.config.n_ctx_train} tokens after the last answer"]
            lines += statistics(self._last, model)
        write_line("\n".join(lines))

    def _help(self, _rest: str) -> None:
        usages = {f"{word} {argument}".strip(): text for word, (argument, text, _) in self.commands.items()}
        lines = [f"{usage:<{max(map(len, usages))}}  {text}" for usage, text in usages.items()]
        write_line("\n".join([*lines, "Anything else is a question. Ctrl-C stops an answer."]))

    def _quit(self, _rest: str) -> None:
        raise EOFError

    commands: Final[Mapping[str, tuple[str, str, Callable[[Session, str], None]]]] = {
        "/image": ("PATH|URL", "add an image to the next question", _image),
        "/system": ("TEXT", "set the system prompt; without a text, remove it", _system),
        "/reset": ("", "forget the conversation and its images", _reset),
        "/save": ("FILE", "write the conversation as JSON Lines, one message per line", _save),
        "/save!": ("FILE", "the same, replacing an existing file", _save_over),
        "/stats": ("", "what the last answer cost, and how full the context is", _stats),
        "/help": ("", "this list", _help),
        "/quit": ("", "leave, as Ctrl-D does", _quit),
    }
    """Word -> argument, help, method."""


def _watched(chunks: Generator[Chunk, None, None], interrupt: Interrupt) -> Iterator[Chunk]:
    """Yield chunks until Ctrl-C, also if it came before the engine started."""
    with closing(chunks):
        for chunk in chunks:
            yield chunk
            interrupt.check()


def _plain(message: Message, names: Mapping[PreprocessedImage, str]) -> dict[str, Any]:
    """Return a message with the names of its images instead of their pixels."""
    content = message["content"]
    if isinstance(content, str):
        return {**message}
    parts = [{**part, "image": names[part["image"]]} if part["type"] == "image" else part for part in content]
    return {**message, "content": parts}


def _file_names(text: str) -> list[str]:
    """Return the images that a text names: one as it is or quoted, or several, quoted as for a shell.

    A terminal quotes the names of files that are dropped on it: with quotation marks, or backslashes before spaces.
    """
    name = _file_name(text)
    if _is_file(name):
        return [name]
    words = [_file_name(word) for word in _words(text)]
    several = len(words) > 1 and any(is_url(word) or _is_file(word) for word in words)
    return words if several else [_file_name(_unquoted(text))]


def _dropped_files(line: str) -> list[str]:
    """Return the files of a line that has only full paths of files, as a terminal types them for dropped files."""
    if not line.lstrip().startswith(("/", "~/", "file:///", "'", '"')):
        return []
    if Path(line.strip()).is_absolute() and _is_file(line.strip()):
        return [line.strip()]
    names = [_file_name(word) for word in _words(line)]
    return names if names and all(Path(name).is_absolute() and _is_file(name) for name in names) else []


def _words(text: str) -> list[str]:
    """Return the words of a text as a shell takes it apart; none if a quotation mark is left open."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _unquoted(text: str) -> str:
    """Return a text without the quotation marks or backslashes of a shell, if it is one word with them."""
    words = _words(text)
    return words[0] if len(words) == 1 else text


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _file_name(name: str) -> str:
    """Return the path of a file:// URL, and a path with ~ expanded; other names as they are."""
    if name[:8].lower() == "file:///":
        name = unquote(name[7:], errors="surrogateescape")
    elif name.startswith("~"):
        with suppress(RuntimeError):  # no such user, or no home
            name = str(Path(name).expanduser())
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))  # the locale may be another


def _as_text(line: str) -> str:
    """Return a line with U+FFFD for bytes that are not UTF-8."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_typed() -> bool:
    """Return whether a person types the lines."""
    return sys.stdin.isatty()


@contextmanager
def reading_lines(history: Path) -> Iterator[Callable[[], str]]:
    """Give a function that returns the next line of stdin without its end.

    It raises EOFError at the end, and EdgeError for a line that is too long, which is skipped. A prompt is written on
    a terminal only, and never into a file of answers.

    Args:
        history: file of typed lines for the next session; if it cannot be used, there is a warning and no history.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            is_unknown = lookup(sys.stdin.encoding).name == "ascii"  # no locale was set
            sys.stdin.reconfigure(encoding="utf-8" if is_unknown else None, errors="surrogateescape")
    if not _is_typed():
        yield _next_line
    elif not sys.stdout.isatty():
        yield _prompted_line
    else:
        with _editing(history):
            yield _edited_line


def _next_line() -> str:
    try:
        line = sys.stdin.readline(LONGEST_LINE)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdin") from error
    if not line:
        raise EOFError
    if len(line) == LONGEST_LINE and not line.endswith("\n"):
        while (rest := sys.stdin.readline(LONGEST_LINE)) and not rest.endswith("\n"):
            pass
        raise EdgeError(f"a line has more than {LONGEST_LINE:,} characters and was skipped; give images by their path")
    return line.rstrip("\r\n")


def _prompted_line() -> str:
    sys.stderr.write(_PROMPT)
    sys.stderr.flush()
    return _next_line()


def _edited_line() -> str:
    try:
        return input(_PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stderr.write("\n")  # what comes next starts on a line of its own
        raise


@contextmanager
def _editing(path: Path) -> Iterator[None]:
    """Let lines be edited, with those of earlier sessions, if Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.clear_history()
    for line in _load_history(path):
        readline.add_history(line)
    try:
        yield
    finally:
        _store_history(
            path, [readline.get_history_item(1 + index) for index in range(readline.get_current_history_length())]
        )


def _load_history(path: Path) -> list[str]:
    """Return the lines of earlier sessions; of a damaged or too large file, those that can be used."""
    try:
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - HISTORY_BYTES))
            lines = file.read(HISTORY_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        _LOG.warning("cannot read the history in %s: %s; continuing without it", path, error.strerror or error)
        return []
    return [line for line in lines if line and line.isprintable()][-HISTORY_LINES:]


def _store_history(path: Path, lines: Sequence[str]) -> None:
    """Store the newest lines, readable for the user only; nothing is written if nothing was typed."""
    kept: list[bytes] = []
    room = HISTORY_BYTES
    for line in reversed(lines[-HISTORY_LINES:]):
        data = line.encode("utf-8", "replace") + b"\n"
        room -= len(data)
        if room < 0:
            break
        kept.append(data)
    try:
        if kept:
            write_whole(path, reversed(kept), mode=_PRIVATE)
    except OSError as error:
        _LOG.warning("cannot store the history in %s: %s", path, error.strerror or error)
