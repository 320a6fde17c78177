"""Events by MQTT, with Home Assistant's discovery: https://www.home-assistant.io/integrations/mqtt.

Topics, below a prefix: `event` has every event as JSON; `answer`, `answer_2`, ... the answer to each question as JSON,
retained; `availability` and `camera` say `online` or `offline`, retained. The broker itself publishes that
`availability` is `offline` if this program ends without a word.

One thread owns the connection and publishes one event at a time, at least once (QoS 1): it leaves the queue when the
broker has confirmed it. So what a restart of the broker interrupts is sent again afterwards.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
import unicodedata
import urllib.parse
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.config import require
from lfm2vl_edge.errors import ConfigError, EdgeError, clip, shorten
from lfm2vl_edge.image.web import error_text
from lfm2vl_edge.watch.outbox import MOST_EVENTS, NotDelivered
from lfm2vl_edge.watch.questions import Question, Reply

_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
_DISCOVERY: Final = "homeassistant"
"""Home Assistant's default prefix."""
_BIRTH: Final = f"{_DISCOVERY}/status"
"""Home Assistant writes `online` there when it starts."""
_ONLINE, _OFFLINE = b"online", b"offline"
_LONGEST_STATE: Final = 255
"""Most characters of a state in Home Assistant."""
_LONGEST_TOPIC: Final = 200
"""Bytes of a prefix; MQTT's limit of a topic is 65,535."""
_ACK_SECONDS: Final = 20.0
"""Longest time until the broker confirms."""
_CONNECT_SECONDS: Final = 10.0
_KEEPALIVE: Final = 30
"""Seconds; after 1.5 times as long without a word, the broker sends `offline`."""
_STEP: Final = 0.1
"""Seconds between two checks for new events."""
_DELAYS: Final = (1.0, 60.0)
"""First and longest time between attempts to connect, seconds."""
_PROPERTY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,40}")
_MOST_PROPERTIES: Final = 20
_LOG: Final = logging.getLogger(__name__)


def node_of(name: str) -> str:
    """Return a name as Home Assistant allows it in topics and ids: letters, digits, _ and -."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "_", plain)[:60].strip("_") or "watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where events are published.

    Attributes:
        host: of the broker.
        port: of the broker.
        prefix: of all topics.
        username: if the broker needs one.
        password: if the broker needs one.
        is_encrypted: whether TLS is used; certificates are checked.
        authority: file of the certificates that are trusted; None: those of the system.
    """

    host: str
    port: int
    prefix: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    is_encrypted: bool = False
    authority: Path | None = None

    @classmethod
    def of(cls, url: str, name: str, password: str | None = None, authority: Path | None = None) -> Broker:
        """Read `mqtt://[USER@]HOST[:PORT][/PREFIX]`, or mqtts:// for TLS; the default prefix is lfm2vl-edge/NAME.

        Raises:
            ConfigError: the URL is not valid, holds a password, or its prefix is not a valid topic.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, 0
        form = "its form is mqtt://[USER@]HOST[:PORT][/PREFIX], or mqtts:// for TLS"
        if not host or port == 0 or parts.scheme not in _PORTS or parts.query or parts.fragment:
            raise ConfigError(f"the URL of the MQTT broker is not valid; {form}")
        require(parts.password is None, "a password in the MQTT URL can be seen by others; use --mqtt-password-file")
        is_encrypted = parts.scheme == "mqtts"
        require(authority is None or is_encrypted, "--mqtt-ca is for mqtts:// only; change the URL")
        prefix = urllib.parse.unquote(parts.path).strip("/") or f"lfm2vl-edge/{node_of(name)}"
        _check_topic(prefix)
        user = None if parts.username is None else urllib.parse.unquote(parts.username)
        require(password is None or user is not None, f"--mqtt-password-file needs a user in the URL; {form}")
        return cls(
            host=host,
            port=port or _PORTS[parts.scheme],
            prefix=prefix,
            username=user,
            password=password,
            is_encrypted=is_encrypted,
            authority=authority,
        )

    @property
    def name(self) -> str:
        """The broker for messages."""
        return f"the MQTT broker {clip(self.host)}:{self.port}"

    def client(self) -> Any:
        """Return a client that is not connected.

        Raises:
            EdgeError: paho-mqtt is not installed, or the certificates cannot be read.
        """
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise EdgeError("MQTT needs paho-mqtt; install it: pip install 'lfm2vl-edge[watch]'") from None
        client = Client(CallbackAPIVersion.VERSION2, client_id=f"lfm2vl-{random.getrandbits(64):x}")
        client.connect_timeout = _CONNECT_SECONDS
        if self.username is not None:
            client.username_pw_set(self.username, self.password)
        if self.is_encrypted:
            try:
                client.tls_set(ca_certs=None if self.authority is None else str(self.authority))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error_text(error)
                raise ConfigError(f"cannot read --mqtt-ca {clip(str(self.authority))}: {reason}; check it") from error
        client.will_set(f"{self.prefix}/availability", _OFFLINE, qos=1, retain=True)
        return client


def _check_topic(prefix: str) -> None:
    is_valid = prefix.isprintable() and not set("+#") & set(prefix) and not prefix.startswith("$")
    is_short = len(prefix.encode("utf-8", "replace")) <= _LONGEST_TOPIC
    require(
        is_valid and is_short and "//" not in prefix,
        f"the MQTT topic {shorten(prefix)} is not valid; it must not have +, #, empty levels or more than "
        f"{_LONGEST_TOPIC} bytes",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What Home Assistant shows: the program at one source, with an entity for each question.

    Attributes:
        name: for people; its letters and digits are the device's id.
        model: name of the model.
        version: of this program.
        questions: in order.
    """

    name: str
    model: str
    version: str
    questions: Sequence[Question]

    def configs(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Yield topic and payload of the discovery of each entity."""
        node = node_of(self.name)
        for key, question in zip(keys_of(self.questions), self.questions, strict=True):
            for suffix, component, more in _entities(question):
                values = {
                    "name": clip(question.text) if not suffix else suffix.strip("_"),
                    "unique_id": f"{node}_{key}{suffix}",
                    "state_topic": f"{prefix}/{key}",
                    "json_attributes_topic": f"{prefix}/{key}",
                    "availability": [{"topic": f"{prefix}/availability"}, {"topic": f"{prefix}/camera"}],
                    "availability_mode": "all",
                    "device": {
                        "identifiers": [f"lfm2vl-edge_{node}"],
                        "name": clip(self.name),
                        "manufacturer": "lfm2vl-edge",
                        "model": clip(self.model),
                        "sw_version": self.version,
                    },
                    "origin": {"name": "lfm2vl-edge", "sw_version": self.version},
                    **more,
                }
                yield f"{_DISCOVERY}/{component}/{node}/{key}{suffix}/config", json.dumps(values).encode()


def keys_of(questions: Sequence[Question]) -> list[str]:
    """Return the name of each question in topics: answer, answer_2, and so on."""
    return [f"answer_{number}" if number > 1 else "answer" for number in range(1, len(questions) + 1)]


def _entities(question: Question) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield suffix of the id, component and settings of each entity of a question."""
    template = "{{ value_json.state }}"
    if len(question.choices) == 2:
        on, off = question.choices
        yield "", "binary_sensor", {"value_template": template, "payload_on": on, "payload_off": off}
        return
    if question.choices and all(len(choice) <= _LONGEST_STATE for choice in question.choices):
        yield "", "sensor", {"value_template": template, "device_class": "enum", "options": [*question.choices]}
        return
    yield "", "sensor", {"value_template": template}
    schema = question.options.get("schema") if question.is_json else None
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    for name, described in list((properties or {}).items())[:_MOST_PROPERTIES]:
        if not _PROPERTY.fullmatch(name) or not isinstance(described, Mapping):
            continue
        more: dict[str, Any] = {"value_template": f"{{{{ value_json.answer.{name} }}}}"}
        if described.get("type") == "boolean":
            yield f"_{name}", "binary_sensor", more | {"payload_on": "True", "payload_off": "False"}
        elif described.get("type") in ("integer", "number", "string") or "enum" in described:
            yield f"_{name}", "sensor", more


def state_of(reply: Reply) -> str:
    """Return an answer as a state of Home Assistant: of boxes, their number; of JSON, its text, shortened."""
    answer = reply.answer
    if reply.question.is_search:
        return str(len(answer))
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return text if len(text) <= _LONGEST_STATE else f"{text[: _LONGEST_STATE - 3]}..."


class Mqtt:
    """Publishes events; see the top of this file.

    Attributes:
        delivered: messages that the broker confirmed.
        dropped: messages that found no room, or were left at the end.

    Raises:
        EdgeError: paho-mqtt is not installed, or the certificates cannot be read.
    """

    name = "mqtt"

    def __init__(
        self, broker: Broker, device: Device, *, most: int = MOST_EVENTS, delays: tuple[float, float] = _DELAYS
    ) -> None:
        self._broker, self._device, self._most, self._delays = broker, device, most, delays
        self.delivered = self.dropped = self.failed = 0
        self._waiting: deque[tuple[str, bytes, bool]] = deque()
        self._lock = threading.Lock()
        self._is_camera_on = True
        self._closing, self._stop = threading.Event(), threading.Event()
        self._is_lost = False
        broker.client()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mqtt")
        self._thread.start()

    def send(self, event: Mapping[str, Any], replies: Sequence[Reply]) -> None:
        """Add an event."""
        head = {name: event[name] for name in ("time", "frame", "file") if name in event}
        self._add("event", dict(event), is_retained=False)
        keys = keys_of(self._device.questions)
        for reply in replies:
            key = keys[self._device.questions.index(reply.question)]
            self._add(key, {"state": state_of(reply), **reply.as_dict(), **head}, is_retained=True)

    def show_camera(self, is_on: bool) -> None:
        """Publish whether the source gives frames."""
        self._is_camera_on = is_on

    def close(self, seconds: float) -> None:
        """Publish what waits, for so long at most, say `offline`, and end the thread."""
        self._closing.set()
        self._thread.join(seconds)
        self._stop.set()
        self._thread.join(_CONNECT_SECONDS + 5)
        with self._lock:
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def _add(self, key: str, value: Mapping[str, Any], *, is_retained: bool) -> None:
        with self._lock:
            if len(self._waiting) >= self._most:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append((f"{self._broker.prefix}/{key}", json.dumps(value).encode(), is_retained))

    def _work(self) -> None:
        delay, longest = self._delays
        while not self._stop.is_set():
            client = self._broker.client()
            connection = _Connection(client)
            try:
                self._publish(connection)
                self._stop.set()
            except Exception as error:  # noqa: BLE001  # a broker may send anything, on which paho-mqtt fails in many ways
                if not self._is_lost:
                    _LOG.warning("%s is lost: %s; events wait", self._broker.name, error_text(error))
                self._is_lost = True
            finally:
                connection.close()
            if connection.was_open:
                delay = self._delays[0]
            if self._closing.is_set() or self._stop.wait(delay * random.uniform(0.8, 1.2)):  # noqa: S311
                return
            delay = min(2 * delay, longest)

    def _publish(self, connection: _Connection) -> None:
        """Connect, announce the entities, and publish events until `close`.

        Raises:
            Exception: of any kind, when the connection is lost.
        """
        connection.open(self._broker, self._stop)
        if self._is_lost:
            _LOG.warning("%s is there again", self._broker.name)
            self._is_lost = False
        shown: bool | None = None
        while not self._stop.is_set():
            if connection.is_asked_again:
                connection.is_asked_again = False
                self._announce(connection)
                shown = None
            if shown is not self._is_camera_on:
                shown = self._is_camera_on
                connection.publish(f"{self._broker.prefix}/camera", _ONLINE if shown else _OFFLINE, True)
            if not self._publish_next(connection):
                if self._closing.is_set():
                    break
                connection.step(_STEP)
        connection.publish(f"{self._broker.prefix}/availability", _OFFLINE, True)

    def _announce(self, connection: _Connection) -> None:
        for topic, payload in self._device.configs(self._broker.prefix):
            connection.publish(topic, payload, True)
        connection.publish(f"{self._broker.prefix}/availability", _ONLINE, True)

    def _publish_next(self, connection: _Connection) -> bool:
        """Publish the oldest event, and return whether there was one."""
        with self._lock:
            message = self._waiting[0] if self._waiting else None
        if message is None:
            return False
        connection.publish(*message)
        with self._lock:
            self.delivered += 1
            if self._waiting and self._waiting[0] is message:  # else it was dropped meanwhile, for want of room
                self._waiting.popleft()
        return True


class _Connection:
    """A connection of one thread: each `publish` returns when the broker has confirmed it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.was_open = False
        """Whether the broker accepted it."""
        self.is_asked_again = True
        """Whether the entities must be announced: at first, and after each start of Home Assistant."""
        self._confirmed: set[int] = set()
        self._refusal: str | None = None
        client.on_connect, client.on_publish, client.on_message = self._connected, self._published, self._received

    def open(self, broker: Broker, stop: threading.Event) -> None:
        self._client.connect(broker.host, broker.port, keepalive=_KEEPALIVE)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not self.was_open:
            self.step(_STEP)
            if stop.is_set() or time.monotonic() > deadline:
                raise NotDelivered(f"no answer in {_CONNECT_SECONDS:g} s")
        self._client.subscribe(_BIRTH)

    def step(self, seconds: float) -> None:
        """Send and receive for so long at most.

        Raises:
            NotDelivered: the connection is lost.
        """
        from paho.mqtt.client import MQTT_ERR_SUCCESS, error_string

        code = self._client.loop(seconds)
        if code != MQTT_ERR_SUCCESS:
            raise NotDelivered(f"it refuses: {self._refusal}" if self._refusal else error_string(code))

    def publish(self, topic: str, payload: bytes, is_retained: bool) -> None:
        sent = self._client.publish(topic, payload, qos=1, retain=is_retained)
        deadline = time.monotonic() + _ACK_SECONDS
        while sent.mid not in self._confirmed:
            self.step(_STEP)
            if time.monotonic() > deadline:
                raise NotDelivered(f"it does not confirm in {_ACK_SECONDS:g} s")
        self._confirmed.discard(sent.mid)

    def close(self) -> None:
        client, self._client = self._client, None
        try:
            client.disconnect()
            client.loop(_STEP)
        except Exception:  # noqa: BLE001  # it is being given up
            _LOG.debug("closing the connection failed", exc_info=True)
        finally:
            client.on_connect = client.on_publish = client.on_message = None
            if (socket := client.socket()) is not None:  # the broker does not answer
                socket.close()

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.was_open = not reason.is_failure
        self._refusal = str(reason) if reason.is_failure else None

    def _published(self, _client: Any, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        self._confirmed.add(mid)

    def _received(self, _client: Any, _data: Any, message: Any) -> None:
        self.is_asked_again = self.is_asked_again or message.payload == _ONLINE
