"""`lfm2vl-edge chat`: a conversation about images, line by line."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import show_answer, statistics
from lfm2vl_edge.cli._loading import STDIN, load_argument, open_model
from lfm2vl_edge.cli._output import EXIT_FAILED, Interrupt, at_once, report, reporting
from lfm2vl_edge.errors import ContextFull, EdgeError
from lfm2vl_edge.host import data_folder, write_whole
from lfm2vl_edge.image.web import display_url, is_url

if TYPE_CHECKING:
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.generate import Chunk, Turn
    from lfm2vl_edge.image.load import Pixels
    from lfm2vl_edge.image.tiles import PreprocessedImage
    from lfm2vl_edge.prompt.messages import Message

HISTORY_LINES: Final = 1000
"""The history keeps this many lines at most, the newest."""
HISTORY_BYTES: Final = 1_000_000
"""And no more than this, whatever their lengths."""
LONGEST_LINE: Final = 10_000_000
"""Characters; an image as a data URL fits, an endless stream without line ends does not."""
_PROMPT: Final = "> "
_PRIVATE: Final = 0o600
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Where lines come from."""

    is_terminal: bool
    """Whether somebody types them."""
    read: Callable[[], str]
    """Returns the next line without its end.

    Raises:
        EOFError: there is none any more.
        EdgeError: the line is too long; it was skipped.
    """


@contextmanager
def lines_of_user(history: Path) -> Iterator[Lines]:
    """Give what reads the lines of stdin. A prompt is written on a terminal only, and never into a file of answers.

    Args:
        history: where typed lines are kept for the next session; if that fails, there is a warning and no history.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield Lines(is_terminal=False, read=_next_line)
    elif not sys.stdout.isatty():
        yield Lines(is_terminal=True, read=_prompted)
    else:
        with _remembered(history):
            yield Lines(is_terminal=True, read=_edited)


def _edited() -> str:
    try:
        return input(_PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stderr.write("\n")  # what comes next begins on a line of its own
        raise


def _next_line() -> str:
    line = sys.stdin.readline(LONGEST_LINE)
    if not line:
        raise EOFError
    if len(line) == LONGEST_LINE and not line.endswith("\n"):
        while (rest := sys.stdin.readline(LONGEST_LINE)) and not rest.endswith("\n"):
            pass
        raise EdgeError(
            f"a line has more than {LONGEST_LINE:,} characters and was left out; give pictures by their path"
        )
    return line.rstrip("\r\n")


def _prompted() -> str:
    sys.stderr.write(_PROMPT)
    sys.stderr.flush()
    return _next_line()


@contextmanager
def _remembered(path: Path) -> Iterator[None]:
    """Let lines be edited, with those of earlier sessions at hand, where Python was built with readline."""
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
    """Return the lines of an earlier session; of a file that is none, or too long, what can be used."""
    try:
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - HISTORY_BYTES))
            lines = file.read(HISTORY_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        _LOG.warning("cannot read the history in %s: %s; going on without it", path, error.strerror or error)
        return []
    return [line for line in lines if line and line.isprintable()][-HISTORY_LINES:]


def _store_history(path: Path, lines: Sequence[str]) -> None:
    """Keep the newest lines, for the user's eyes only; nothing is written if nothing was typed."""
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
        _LOG.warning("cannot keep the history in %s: %s", path, error.strerror or error)


class Desk:
    """A conversation, and what its commands need to know of it."""

    def __init__(self, *, chat: Chat, load: Callable[[str], Pixels], is_chatty: bool, verbose: int) -> None:
        self.chat = chat
        """The conversation."""
        self.load = load
        """From the name of an image to its pixels."""
        self.last: Turn | None = None
        """The last turn that came to its end."""
        self.names: dict[PreprocessedImage, str] = {}
        """What the images of the conversation were called."""
        self._is_chatty = is_chatty
        self._verbose = verbose

    def note(self, text: str) -> None:
        """Say something that nobody asked for, if it is wanted at all."""
        if self._is_chatty:
            typer.echo(text, err=True)

    def take(self, line: str) -> None:
        """Do what a line says: a command if it begins with a slash, a question otherwise.

        Raises:
            EOFError: the user leaves.
            EdgeError: it cannot be done; the conversation is as it was.
            KeyboardInterrupt: the answer was stopped; it stays in the conversation as far as it came.
        """
        if line.startswith("/"):
            word, *rest = line.split(maxsplit=1)
            if word not in _COMMANDS:
                raise EdgeError(f"no command {word!r:.40}; /help lists them, and a space before / makes it a question")
            _COMMANDS[word].do(self, "".join(rest).strip())
        elif question := line.strip():
            self._ask(question)

    def show(self, name: str, pixels: Pixels) -> None:
        """Lay an image down for the next question."""
        picture = self.chat.add_image(pixels)
        name = display_url(name) if is_url(name) else name
        self.names[picture] = name
        size, tokens = f"{picture.plan.width}x{picture.plan.height}", picture.plan.n_image_tokens
        self.note(f"{name:.80}: {size}, {tokens} image tokens, with the next question")

    def _ask(self, question: str) -> None:
        try:
            with at_once(grace=None) as interrupt:
                interrupt.cancel = self.chat.model.cancel
                self.last = show_answer(_watched(self.chat.send(question), interrupt))
        except ContextFull as error:
            raise EdgeError(f"{error}; or /reset, which begins a new talk (-c goes no further either)") from error
        if self.last.finish_reason == "length" and self.last.stats:
            self.note(f"(cut off after {self.last.stats.completion_tokens} tokens; --max-tokens allows more)")
        if self._verbose:
            typer.echo("\n".join(statistics(self.last, self.chat.model)), err=True)


def _watched(chunks: Generator[Chunk, None, None], interrupt: Interrupt) -> Iterator[Chunk]:
    """Yield chunks until Ctrl-C: one that came before the engine began would not stop it."""
    with closing(chunks):
        for chunk in chunks:
            yield chunk
            interrupt.check()


def _image(desk: Desk, rest: str) -> None:
    if not rest:
        raise EdgeError("/image needs a picture: /image photo.jpg, or /image https://host/photo.jpg")
    name = _name(rest)
    desk.show(name, desk.load(name))


def _system(desk: Desk, rest: str) -> None:
    desk.chat.system = rest or None
    desk.note("the next answer heeds it" if rest else "there is no system prompt now")


def _reset(desk: Desk, _rest: str) -> None:
    desk.chat.reset()
    desk.names.clear()
    desk.last = None
    desk.note("a new talk begins")


def _save(desk: Desk, rest: str) -> None:
    _write(desk, rest, replace=False)


def _save_over(desk: Desk, rest: str) -> None:
    _write(desk, rest, replace=True)


def _write(desk: Desk, rest: str, *, replace: bool) -> None:
    if not rest:
        raise EdgeError("/save needs a file: /save talk.jsonl")
    if not desk.chat.messages:
        raise EdgeError("nothing was said yet, so there is nothing to save")
    path = Path(_name(rest))
    lines = [json.dumps(_plain(message, desk.names), ensure_ascii=False) + "\n" for message in desk.chat.messages]
    try:
        if path.exists() and not replace:
            raise EdgeError(f"{path} is there already; give another name, or /save! {path} to replace it")
        write_whole(path, [line.encode("utf-8", "replace") for line in lines])
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or error
        raise EdgeError(f"cannot write {str(path)!r:.200}: {why}; give another name") from error
    desk.note(f"{len(lines)} messages in {path}")


def _plain(message: Message, names: Mapping[PreprocessedImage, str]) -> dict[str, Any]:
    """Return a message with the names of its images, not their pixels."""
    content = message["content"]
    if isinstance(content, str):
        return {**message}
    parts = [{**part, "image": names[part["image"]]} if part["type"] == "image" else part for part in content]
    return {**message, "content": parts}


def _stats(desk: Desk, _rest: str) -> None:
    messages = desk.chat.messages
    turns = sum(message["role"] == "user" for message in messages)
    lines = [f"talk       turns: {turns}, pictures: {len(desk.names)}"]
    if desk.last is not None and desk.last.stats is not None:
        used, whole = (
            desk.last.stats.prompt_tokens + desk.last.stats.completion_tokens,
            desk.chat.model.config.n_ctx_train,
        )
        lines += [
            f"context    {used} of {whole} tokens after the last answer",
            *statistics(desk.last, desk.chat.model),
        ]
    typer.echo("\n".join(lines), err=True)


def _help(_desk: Desk, _rest: str) -> None:
    width = max(len(command.usage) for command in _COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in _COMMANDS.values()]
    typer.echo("\n".join([*lines, "Anything else is a question. Ctrl-C stops an answer."]), err=True)


def _quit(_desk: Desk, _rest: str) -> None:
    raise EOFError


def _name(rest: str) -> str:
    """Return the name of a file as the user means it: quotation marks of a dragged file and ~ are resolved."""
    if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\"":
        rest = rest[1:-1]
    if not rest.startswith("~"):
        return rest
    try:
        return str(Path(rest).expanduser())
    except RuntimeError:  # no such user, or no home
        return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """What a line that begins with a slash does."""

    usage: str
    """How it is typed."""
    help: str
    """What it does, in a phrase."""
    do: Callable[[Desk, str], None]
    """Does it, given what follows the word."""


def _table(commands: Sequence[_Command]) -> dict[str, _Command]:
    return {command.usage.partition(" ")[0]: command for command in commands}


_COMMANDS: Final[Mapping[str, _Command]] = _table(
    [
        _Command(usage="/image PATH|URL", help="a picture for the next question", do=_image),
        _Command(usage="/system TEXT", help="what the model is told before the talk; nothing: no more", do=_system),
        _Command(usage="/reset", help="forget the talk and its pictures", do=_reset),
        _Command(usage="/save FILE", help="write the talk as JSON Lines, a message on each", do=_save),
        _Command(usage="/save! FILE", help="the same, in place of a file that is there", do=_save_over),
        _Command(usage="/stats", help="what the last answer cost, and how full the context is", do=_stats),
        _Command(usage="/help", help="this list", do=_help),
        _Command(usage="/quit", help="leave, as Ctrl-D does", do=_quit),
    ]
)


_HISTORY = "chat_history"


@opt.takes_groups
def chat(
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: opt.AnswerOptions,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]...", help="Pictures for the first question: paths or http(s) addresses."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt before the talk.")] = None,
    cache: opt.Cache = None,
    max_megapixels: opt.MaxMegapixels = 200,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Conversation about images: lfm2vl-edge chat photo.jpg -m MODEL.

    Every line is a question; /help lists the commands, among them /image, /reset and /save.
    Ctrl-C stops an answer, Ctrl-D leaves. Only what is new is decoded.
    Lines of a pipe are questions too; the exit code is then 1 if one of them failed.
    """
    from lfm2vl_edge.chat import Chat

    with reporting():
        if answer.json_schema == STDIN:
            raise EdgeError("stdin is the talk here, no schema; give --json-schema a file")
        options = answer.values()
        pictures = [(name, _load(name, max_megapixels)) for name in images or ()]
        with at_once():
            opened = open_model(model, image, verbose, remember=True, cache=cache)
        with opened, lines_of_user(data_folder() / _HISTORY) as lines:
            desk = Desk(
                chat=Chat(opened, system=system, **options),
                load=lambda name: _load(name, max_megapixels),
                is_chatty=lines.is_terminal and not quiet,
                verbose=verbose,
            )
            all_well = _talk(desk, lines, pictures)
    if not all_well and not lines.is_terminal:
        raise typer.Exit(EXIT_FAILED)


def _load(name: str, max_megapixels: float) -> Pixels:
    if name == STDIN:
        raise EdgeError("stdin is the talk here, no picture; give a path or an http(s) address")
    return load_argument(name, max_megapixels)


def _talk(desk: Desk, lines: Lines, pictures: Sequence[tuple[str, Pixels]]) -> bool:
    """Take line after line until there is none, and tell whether each could be done."""
    desk.note(f"{desk.chat.model.config.name}; /help lists the commands, Ctrl-D leaves")
    for name, pixels in pictures:
        desk.show(name, pixels)
    all_well = True
    while True:
        try:
            desk.take(lines.read())
        except EOFError:  # Ctrl-D, the end of a pipe, or /quit
            return all_well
        except EdgeError as error:
            all_well = False
            report(error)
        except KeyboardInterrupt:
            if not lines.is_terminal:
                raise
