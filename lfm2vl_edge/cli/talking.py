"""What the lines of a talk do: questions are answered on stdout; commands speak on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from lfm2vl_edge.cli.answering import figures, show_answer
from lfm2vl_edge.cli.output import Interrupt, at_once
from lfm2vl_edge.errors import ContextFull, EdgeError
from lfm2vl_edge.files import write_beside
from lfm2vl_edge.web import is_address, shown

if TYPE_CHECKING:
    from lfm2vl_edge.chat import Chat
    from lfm2vl_edge.generate import Chunk
    from lfm2vl_edge.image import Pixels
    from lfm2vl_edge.prompt import Message, Picture


class Desk:
    """A talk, and what its commands need to know of it."""

    def __init__(self, *, chat: Chat, load: Callable[[str], Pixels], is_chatty: bool, verbose: int) -> None:
        self.chat = chat
        """The talk."""
        self.load = load
        """From the name of a picture to its pixels."""
        self.last: Chunk | None = None
        """The last chunk of the last answer that came to its end."""
        self.names: dict[Picture, str] = {}
        """What the pictures of the talk were called."""
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
            EdgeError: it cannot be done; the talk is as it was.
            KeyboardInterrupt: the answer was stopped; it stays in the talk as far as it came.
        """
        if line.startswith("/"):
            word, *rest = line.split(maxsplit=1)
            if word not in _COMMANDS:
                raise EdgeError(f"no command {word!r:.40}; /help lists them, and a space before / makes it a question")
            _COMMANDS[word].do(self, "".join(rest).strip())
        elif question := line.strip():
            self._ask(question)

    def show(self, name: str, pixels: Pixels) -> None:
        """Lay a picture down for the next question."""
        picture = self.chat.show(pixels)
        name = shown(name) if is_address(name) else name
        self.names[picture] = name
        size, tokens = f"{picture.plan.width}x{picture.plan.height}", picture.plan.n_image_tokens
        self.note(f"{name:.80}: {size}, {tokens} image tokens, with the next question")

    def _ask(self, question: str) -> None:
        try:
            with at_once(grace=None) as interrupt:
                interrupt.cancel = self.chat.model.cancel
                self.last = show_answer(_watched(self.chat.say(question), interrupt)).last
        except ContextFull as error:
            raise EdgeError(f"{error}; or /reset, which begins a new talk (-c goes no further either)") from error
        if self.last.finish == "length" and self.last.stats:
            self.note(f"(cut off after {self.last.stats.answer_tokens} tokens; --max-tokens allows more)")
        if self._verbose:
            typer.echo("\n".join(figures(self.last, self.chat.model)), err=True)


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
        write_beside(path, [line.encode("utf-8", "replace") for line in lines])
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or error
        raise EdgeError(f"cannot write {str(path)!r:.200}: {why}; give another name") from error
    desk.note(f"{len(lines)} messages in {path}")


def _plain(message: Message, names: Mapping[Picture, str]) -> dict[str, Any]:
    """Return a message with the names of its pictures, not their pixels."""
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
        used, whole = desk.last.stats.prompt_tokens + desk.last.stats.answer_tokens, desk.chat.model.config.n_ctx_train
        lines += [f"context    {used} of {whole} tokens after the last answer", *figures(desk.last, desk.chat.model)]
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
