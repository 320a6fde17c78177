"""`lfm2vl-edge watch`: questions about a camera, a video or a folder when something changed."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import note_unused_variables
from lfm2vl_edge.cli._loading import opening
from lfm2vl_edge.cli._output import Interrupt, at_once, reporting, to_json, write_line, write_out
from lfm2vl_edge.config import DEFAULT_PROMPT, GREEDY, require
from lfm2vl_edge.errors import ConfigError, EdgeError, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.watch.frames import Counts
    from lfm2vl_edge.watch.gate import GateSettings
    from lfm2vl_edge.watch.mqtt import Broker, Mqtt
    from lfm2vl_edge.watch.outbox import Command, Outbox, SavedFrames, Webhook
    from lfm2vl_edge.watch.questions import Question
    from lfm2vl_edge.watch.reader import Source
    from lfm2vl_edge.watch.watcher import Sink, WatchSettings

_EVERY: Final = 1.0
"""Seconds between two frames of a camera or a video, by default."""
_END_SECONDS: Final = 5.0
"""Longest time in which each output sends what waits, at the end."""
_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,60}")


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_frames = functools.partial(_option, panel="Frames and changes")
_ask = functools.partial(_option, panel="Questions")
_events = functools.partial(_option, panel="Events")
_guard = functools.partial(_option, panel="Guards")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameOptions:
    """Which frames are taken, and what counts as a change."""

    every: Annotated[
        float | None,
        _frames(
            "--every", min=0, metavar="S", help="Take a frame every S seconds. Default: 1; every file of a folder."
        ),
    ] = None
    min_change: Annotated[
        float,
        _frames("--min-change", min=0, max=1, metavar="SHARE", help="Least share of a frame; 0: ask about each."),
    ] = 0.001
    noise: Annotated[
        float, _frames("--noise", min=0, max=255, help="Differences of a small block, of 255, that do not count.")
    ] = 5.0
    mask: Annotated[
        list[str] | None,
        _frames("--mask", metavar="X,Y,W,H", help="Changes here never count, as of a clock; may be repeated."),
    ] = None
    zone: Annotated[
        list[str] | None,
        _frames("--zone", metavar="X,Y,W,H", help="Ask only after changes here; may be repeated."),
    ] = None
    cooldown: Annotated[float, _frames("--cooldown", min=0, metavar="S", help="Least time between questions.")] = 0.0
    lookback: Annotated[
        int, _frames("--lookback", min=1, max=32, metavar="N", help="Ask about the best of the last N frames.")
    ] = 1
    source_option: Annotated[
        list[str] | None,
        _frames("--source-option", metavar="KEY=VALUE", help="Of FFmpeg: video_size=1280x720; may be repeated."),
    ] = None

    def gate(self) -> GateSettings:
        """Return what counts as a change.

        Raises:
            ConfigError: a mask or a zone is not valid.
        """
        from lfm2vl_edge.watch.gate import Area, GateSettings

        return GateSettings(
            min_change=self.min_change,
            noise=self.noise,
            masks=tuple(Area.of(text, "--mask") for text in self.mask or ()),
            zones=tuple(Area.of(text, "--zone") for text in self.zone or ()),
        )

    def source(self, text: str, max_pixels: int, counts: Counts) -> Source:
        """Return the source; it is not opened.

        Raises:
            ConfigError: there is no such source, or an option of it is not valid.
        """
        from lfm2vl_edge.watch.sources import SourceSettings, source_of

        options = {}
        for given in self.source_option or ():
            key, is_given, value = given.partition("=")
            require(bool(is_given and _KEY.fullmatch(key)), f"--source-option {shorten(given)} is not KEY=VALUE")
            options[key] = value
        settings = SourceSettings(
            every=_EVERY if self.every is None else self.every,
            max_pixels=max_pixels,
            options=options,
            on_skip=functools.partial(counts.add, "skipped"),
            on_damage=functools.partial(counts.add, "truncated"),
        )
        return source_of(text, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionOptions:
    """What is asked about a frame."""

    prompt: Annotated[
        str | None,
        _ask("--prompt", "-p", parser=opt.as_text, metavar="TEXT", help=f"The question. Default: {DEFAULT_PROMPT}"),
    ] = None
    ask: Annotated[
        list[str] | None,
        _ask("--ask", "-a", parser=opt.as_text, metavar="TEXT", help="A further question; may be repeated."),
    ] = None
    choose: Annotated[
        list[str] | None,
        _ask("--choose", parser=opt.as_text, metavar="TEXT", help="A possible answer to -p; give at least two."),
    ] = None
    detect: Annotated[
        list[str] | None,
        _ask("--detect", parser=opt.as_text, metavar="LABEL", help="Find boxes, as detect does; may be repeated."),
    ] = None

    def questions(self, answer: opt.AnswerOptions) -> list[Question]:
        """Return the questions, in order.

        Raises:
            ConfigError: an option is not valid, or two contradict each other.
        """
        from lfm2vl_edge.watch.questions import Question

        options = answer.values()
        form = [name for name in ("schema", "grammar", "regex") if options[name] is not None]
        require(not (form and self.choose), f"--choose and a {form and form[0]} cannot be combined; choose one")
        plain = {name: value for name, value in options.items() if name not in ("schema", "grammar", "regex")}
        found = [Question(text=text, is_search=True, options=plain) for text in self.detect or ()]
        if self.prompt is not None or self.choose or form or not (found or self.ask):
            text = DEFAULT_PROMPT if self.prompt is None else self.prompt
            found.insert(0, Question(text=text, choices=tuple(self.choose or ()), options=options))
        return [*found, *(Question(text=text, options=plain) for text in self.ask or ())]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventOptions:
    """When there is an event, and where it goes beside stdout."""

    on_change: Annotated[bool, _events("--on-change", help="Only if an answer differs from the one before.")] = False
    threshold: Annotated[
        float, _events("--threshold", min=0, max=1, help="Least probability of the choice of --choose.")
    ] = 0.0
    count: Annotated[int, _events("--count", min=0, metavar="N", help="End after N events; 0: never.")] = 0
    name: Annotated[
        str | None, _events("--name", parser=opt.as_text, metavar="TEXT", help="Of the camera, for MQTT.")
    ] = None
    save: Annotated[Path | None, _events("--save", metavar="DIR", help="Store the frames of events as JPEG.")] = None
    keep: Annotated[int, _events("--keep", min=0, metavar="N", help="Keep the newest N of them; 0: all.")] = 0
    mqtt: Annotated[
        str | None,
        _events(
            "--mqtt", metavar="URL", help="mqtt://USER@HOST:PORT/PREFIX, mqtts:// for TLS; only the host is needed."
        ),
    ] = None
    mqtt_password_file: Annotated[
        str | None, _events("--mqtt-password-file", metavar="FILE", help="Password of the user in the MQTT URL.")
    ] = None
    mqtt_ca: Annotated[
        Path | None, _events("--mqtt-ca", metavar="FILE", help="Certificates to trust. Default: the system's.")
    ] = None
    webhook: Annotated[str | None, _events("--webhook", metavar="URL", help="POST each event there.")] = None
    webhook_secret_file: Annotated[
        str | None, _events("--webhook-secret-file", metavar="FILE", help="Key of X-Hub-Signature-256 (HMAC).")
    ] = None
    exec_: Annotated[
        str | None,
        _events("--exec", metavar="COMMAND", help="Run it for each event, which is on its stdin; without a shell."),
    ] = None

    def settings(self, frames: FrameOptions) -> WatchSettings:
        """Return when there is a question, and an event."""
        from lfm2vl_edge.watch.watcher import WatchSettings

        return WatchSettings(
            cooldown=frames.cooldown,
            lookback=frames.lookback,
            on_change=self.on_change,
            threshold=self.threshold,
            most_events=self.count,
        )

    def broker(self, source: str) -> Broker | None:
        """Return where events are published by MQTT, if anywhere.

        Raises:
            ConfigError: the URL is not valid, or a file cannot be read.
        """
        from lfm2vl_edge.watch.mqtt import Broker

        if self.mqtt is None:
            require(self.mqtt_password_file is None and self.mqtt_ca is None, "--mqtt-... needs --mqtt URL; give it")
            return None
        broker = Broker.of(self.mqtt, self.name or source, _secret(self.mqtt_password_file, "password"), self.mqtt_ca)
        broker.client()  # so that a missing file is reported before the model is opened
        return broker

    def hook(self) -> Webhook | None:
        """Return where events are posted, if anywhere.

        Raises:
            ConfigError: the URL is not valid, or the file cannot be read.
        """
        from lfm2vl_edge.watch.outbox import Webhook

        secret = _secret(self.webhook_secret_file, "webhook secret") or ""
        require(bool(self.webhook) or not secret, "--webhook-secret-file needs --webhook URL; give it")
        return None if self.webhook is None else Webhook(url=self.webhook, secret=secret.encode())

    def command(self) -> Command | None:
        """Return what is run for each event, if anything.

        Raises:
            ConfigError: there is no such program, or its quotation marks do not match.
        """
        from lfm2vl_edge.watch.outbox import Command

        if self.exec_ is None:
            return None
        try:
            words = shlex.split(self.exec_)
        except ValueError as error:
            raise ConfigError(f"--exec {shorten(self.exec_)} is not a command: {error}; correct it") from None
        require(bool(words), "--exec is empty; name a program")
        found = shutil.which(words[0])
        require(
            found is not None, f"--exec: there is no program {shorten(words[0])}; check its name, or give its path"
        )
        return Command(words=words)

    def saved(self) -> SavedFrames | None:
        """Return what stores frames, if anything.

        Raises:
            ConfigError: the folder cannot be made.
        """
        from lfm2vl_edge.watch.outbox import SavedFrames

        return None if self.save is None else SavedFrames(self.save, self.keep)


def _secret(path: str | None, kind: str) -> str | None:
    return None if path is None else opt.read_text(path, f"{kind} file").strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions:
    """What a machine that is always on may be asked to do."""

    max_load: Annotated[
        float | None, _guard("--max-load", min=0, help="Ask nothing while the load average (1 minute) is above it.")
    ] = None
    max_temperature: Annotated[
        float | None,
        _guard("--max-temperature", min=0, metavar="C", help="Lower the detail before it. Default: 80 on a Pi."),
    ] = None


@opt.takes_groups
def watch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder (new files), a video, rtsp://..., /dev/video0, the http(s) URL of an image, or - for JPEGs "
            "on stdin.",
        ),
    ],
    frames: FrameOptions,
    questions: QuestionOptions,
    events: EventOptions,
    guards: GuardOptions,
    model: opt.ModelOptions,
    image: opt.ImageOptions,
    answer: Annotated[opt.AnswerOptions, {**GREEDY, "max_tokens": 256}],
    cache: opt.Cache = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Ask when something changed: lfm2vl-edge watch rtsp://door/live -p "Who is there?".

    One line of JSON for each event. Only what changed in a frame is encoded anew.
    """
    with reporting(), at_once(grace=None) as interrupt, ExitStack() as stack:
        plan = _Plan(source, frames, questions, events, guards, image, answer)
        with opening(model, image, verbose, remember=len(plan.questions) > 1, cache=cache) as when_open:
            opened = when_open()
            note_unused_variables(answer.values(), opened)
            _run(plan, opened, interrupt, stack)


class _Plan:
    """Everything that is checked before the model is opened."""

    def __init__(
        self,
        source: str,
        frames: FrameOptions,
        questions: QuestionOptions,
        events: EventOptions,
        guards: GuardOptions,
        image: opt.ImageOptions,
        answer: opt.AnswerOptions,
    ) -> None:
        try:
            from lfm2vl_edge.watch.frames import Counts
            from lfm2vl_edge.watch.guard import GuardSettings
        except ImportError as error:
            raise EdgeError(f"watch needs {error.name}; install it: pip install 'lfm2vl-edge[watch]'") from None
        opt.refuse_stdin_twice([source, answer.json_schema])
        self.counts = Counts()
        self.gate = frames.gate()
        self.questions = questions.questions(answer)
        self.settings = events.settings(frames)
        self.guard = GuardSettings(max_load=guards.max_load, max_temperature=guards.max_temperature)
        self.source = frames.source(source, image.max_pixels, self.counts)
        self.name = events.name or self.source.name
        self.broker, self.hook, self.command = events.broker(self.source.name), events.hook(), events.command()
        self.saved = events.saved()


def _run(plan: _Plan, model: Model, interrupt: Interrupt, stack: ExitStack) -> None:
    """Watch until the source ends, or a signal comes."""
    from lfm2vl_edge.host import notify
    from lfm2vl_edge.watch.alive import Heart
    from lfm2vl_edge.watch.gate import Gate
    from lfm2vl_edge.watch.guard import Guard
    from lfm2vl_edge.watch.reader import Reader
    from lfm2vl_edge.watch.watcher import Watcher

    boxes = stack.enter_context(_outboxes(plan, model))
    heart = Heart()
    stack.callback(heart.close)
    mqtt = boxes.mqtt
    reader = Reader(
        plan.source,
        plan.counts,
        lookback=plan.settings.lookback,
        on_state=mqtt.show_camera if mqtt is not None else lambda _: None,
    )
    stack.callback(reader.close, 1.0)
    watcher = Watcher(
        model,
        reader,
        Gate(plan.gate),
        Guard(plan.guard, model.budget),
        plan.questions,
        plan.settings,
        plan.counts,
        sinks=boxes.sinks(),
        **({} if plan.saved is None else {"save": plan.saved.save}),
        alive=heart.beat,
    )
    interrupt.cancel = watcher.stop
    interrupt.check()
    with _stopped_by_sigterm(watcher.stop):
        write_line(f"watching {plan.source.name} with {model.config.name}")
        notify("READY=1")
        try:
            watcher.run()
        finally:
            notify("STOPPING=1")
            write_line(", ".join(f"{name} {count}" for name, count in plan.counts.as_dict().items()))


@contextmanager
def _stopped_by_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """End quietly at SIGTERM, as systemd sends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Boxes:
    """Where events go."""

    mqtt: Mqtt | None
    outboxes: Sequence[Outbox]

    def sinks(self) -> list[Sink]:
        """Return what takes events, stdout first."""
        found: list[Sink] = [lambda event, _: write_out(to_json(event))]
        if self.mqtt is not None:
            found.append(self.mqtt.send)
        if self.outboxes:
            found.append(self._send)
        return found

    def _send(self, event: dict[str, Any], _: object) -> None:
        body = to_json(event, "ascii").encode()
        for outbox in self.outboxes:
            outbox.send(body)


@contextmanager
def _outboxes(plan: _Plan, model: Model) -> Iterator[_Boxes]:
    """Give the outputs; at the end, each sends what waits, and what it could not deliver is reported."""
    from lfm2vl_edge import __version__
    from lfm2vl_edge.watch.mqtt import Device, Mqtt
    from lfm2vl_edge.watch.outbox import Outbox

    outboxes = [
        Outbox(name, deliver)
        for name, deliver in (("--webhook", plan.hook), ("--exec", plan.command))
        if deliver is not None
    ]
    mqtt = None
    if plan.broker is not None:
        device = Device(name=plan.name, model=model.config.name, version=__version__, questions=plan.questions)
        mqtt = Mqtt(plan.broker, device)
    try:
        yield _Boxes(mqtt=mqtt, outboxes=outboxes)
    finally:
        outputs: list[Outbox | Mqtt] = [*outboxes, *([] if mqtt is None else [mqtt])]
        for output in outputs:
            output.close(_END_SECONDS)
            if output.failed or output.dropped:
                write_line(f"note: {output.name}: {output.failed} events failed, {output.dropped} were dropped")
