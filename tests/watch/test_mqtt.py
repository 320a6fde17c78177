"""MQTT with a real broker: discovery by Home Assistant, restarts, TLS, garbage, names."""

from __future__ import annotations

import gc
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest

from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.watch.mqtt import Broker, Device, Mqtt, node_of, state_of
from lfm2vl_edge.watch.questions import Question, Reply
from tests.watch.conftest import CHOICE, QUESTION, free_port, wait_for
from tests.watch.test_outputs import EVENT

pytest.importorskip("paho.mqtt", reason="needs paho-mqtt: pip install 'lfm2vl-edge[watch]'")
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
needs_mosquitto = pytest.mark.skipif(not MOSQUITTO, reason="needs mosquitto: apt install mosquitto")


@contextmanager
def mosquitto(folder: Path, port: int, *lines: str) -> Iterator[None]:
    """Run a broker until the end of the block, when it is killed."""
    config = folder / "mosquitto.conf"
    config.write_text(
        "\n".join([f"listener {port} 127.0.0.1", "persistence false", *(lines or ("allow_anonymous true",))])
    )
    with subprocess.Popen(
        [str(MOSQUITTO), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(lambda: is_open(port))
            yield
        finally:
            process.kill()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class HomeAssistant:
    """What Home Assistant does with a broker: it reads the discovery, and the topics and templates that it names."""

    def __init__(self, port: int) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.configs: dict[str, dict[str, Any]] = {}
        self.topics: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = self._received
        self._client.connect("127.0.0.1", port)
        self._client.subscribe("#", qos=1)
        self._client.loop_start()

    def _received(self, _client: Any, _data: Any, message: Any) -> None:
        text = message.payload.decode()
        if message.topic.startswith("homeassistant/") and message.topic.endswith("/config"):
            _, component, node, entity, _ = message.topic.split("/")
            assert component in ("sensor", "binary_sensor")
            assert all(part.replace("_", "").replace("-", "").isalnum() for part in (node, entity))
            self.configs[entity] = json.loads(text) | {"component": component}
        elif message.topic.endswith("/event"):
            self.events.append(json.loads(text))
        else:
            self.topics[message.topic] = text

    def state(self, entity: str) -> str | None:
        config = self.configs.get(entity, {})
        gates = [self.topics.get(one["topic"]) for one in config.get("availability", [])]
        if not gates or set(gates) != {"online"}:
            return "unavailable"
        payload = self.topics.get(config["state_topic"])
        if payload is None:
            return None
        template = jinja2.Environment(autoescape=False).from_string(config["value_template"])  # noqa: S701
        state = template.render(value_json=json.loads(payload))
        assert len(state) <= 255
        if config["component"] == "binary_sensor":
            return {config["payload_on"]: "on", config["payload_off"]: "off"}[state]
        assert "options" not in config or state in config["options"]
        return state

    def start(self) -> None:
        """Say that it starts, as after a restart."""
        self._client.publish("homeassistant/status", b"online").wait_for_publish(10)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


SCHEMA = {
    "type": "object",
    "properties": {"people": {"type": "integer"}, "open": {"type": "boolean"}, "a b{{": {"type": "string"}},
}
QUESTIONS = (
    CHOICE,
    Question(text="What kind?", choices=("cat", "dog", "bird")),
    QUESTION,
    Question(text="car", is_search=True),
    Question(text="Count.", options={"schema": SCHEMA}),
)


def replies() -> list[Reply]:
    box = {"label": "car", "left": 1, "top": 2, "right": 3, "bottom": 4}
    answers = ["Yes", "dog", "A long text. " * 50, [box, box], {"people": 3, "open": True, "a b{{": "x"}]
    return [
        Reply(question=question, answer=answer, probability=0.9 if question.choices else None)
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]


DEVICE = Device(name="Front door", model="tiny", version="1", questions=QUESTIONS)
FAST = (0.05, 0.2)


@needs_mosquitto
def test_home_assistant_finds_the_entities_and_their_states(tmp_path: Path) -> None:
    port = free_port()
    with mosquitto(tmp_path, port):
        mqtt = Mqtt(Broker.of(f"mqtt://127.0.0.1:{port}", "Front door"), DEVICE, delays=FAST)
        home = HomeAssistant(port)
        try:
            wait_for(lambda: home.state("answer") is None and len(home.configs) == 7)
            mqtt.send(EVENT, replies())
            wait_for(lambda: home.state("answer_5") not in (None, "unavailable"))
            assert home.state("answer") == "on"
            assert home.state("answer_2") == "dog"
            assert str(home.state("answer_3")).startswith("A long text. A")
            assert home.state("answer_4") == "2"
            assert home.state("answer_5_people") == "3"
            assert home.state("answer_5_open") == "on"
            assert home.events == [EVENT]
            ids = [config["unique_id"] for config in home.configs.values()]
            assert len(set(ids)) == 7
            assert {config["device"]["name"] for config in home.configs.values()} == {"Front door"}
            attributes = json.loads(home.topics[home.configs["answer"]["json_attributes_topic"]])
            assert attributes["probability"] == 0.9
            # The camera is lost and comes back; Home Assistant starts anew and finds all again.
            mqtt.show_camera(False)
            wait_for(lambda: home.state("answer") == "unavailable")
            mqtt.show_camera(True)
            wait_for(lambda: home.state("answer") == "on")
            home.configs.clear()
            home.start()
            wait_for(lambda: len(home.configs) == 7)
            mqtt.close(5)
            wait_for(lambda: home.state("answer") == "unavailable")
        finally:
            mqtt.close(1)
            home.close()
    assert mqtt.dropped == 0


def frames_after(port: int, send: Callable[[], None]) -> list[int]:
    """Return the events that Home Assistant gets until the answer that is sent once it knows the entities."""
    home = HomeAssistant(port)
    try:
        wait_for(lambda: len(home.configs) == 7)
        send()
        wait_for(lambda: home.state("answer") == "on")
        return [event["frame"] for event in home.events]
    finally:
        home.close()


@needs_mosquitto
def test_a_broker_that_is_killed_and_started_again_loses_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    broker = Broker.of(f"mqtt://127.0.0.1:{port}/house/door", "door")
    mqtt = Mqtt(broker, DEVICE, delays=FAST)  # before the broker is there
    try:
        mqtt.send({"frame": 0}, [])
        seen: list[int] = []
        for start in (1, 4):
            with mosquitto(tmp_path, port):
                seen += frames_after(port, lambda start=start: mqtt.send({"frame": start}, replies()[:1]))  # type: ignore[misc]
            mqtt.send({"frame": start + 1}, [])  # into the void
            mqtt.send({"frame": start + 2}, [])
        mqtt.close(0.1)
        assert seen[-3:] == [2, 3, 4]
        assert 1 in seen
        assert mqtt.dropped == 2  # the last two, counted
        assert "is lost" in caplog.text
        assert "is there again" in caplog.text
    finally:
        mqtt.close(0.1)


@needs_mosquitto
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
# paho-mqtt leaves its sockets after a failed handshake
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_and_a_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    key, certificate, users = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "users"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(users), "door", "secret"], check=True, capture_output=True)
    for path in (key, users):
        path.chmod(0o644)
    tmp_path.chmod(0o755)
    lines = (
        f"certfile {certificate}",
        f"keyfile {key}",
        f"password_file {users}",
        "allow_anonymous false",
        "user root",
    )
    url = f"mqtts://door@127.0.0.1:{port}"
    with mosquitto(tmp_path, port, *lines):
        good = Mqtt(Broker.of(url, "door", "secret", certificate), DEVICE, delays=FAST)
        good.send({"frame": 1}, [])
        wait_for(lambda: good.delivered == 1)
        good.close(5)
        assert good.dropped == 0
        for password, authority, reason in (
            ("wrong", certificate, "refuses|uthori"),
            ("secret", None, "(?i)certificate"),
        ):
            caplog.clear()
            bad = Mqtt(Broker.of(url, "door", password, authority), DEVICE, delays=FAST)
            bad.send({"frame": 1}, [])
            wait_for(lambda: "is lost" in caplog.text)
            bad.close(0.1)
            assert bad.dropped == 1
            assert re.search(reason, caplog.text)
            assert "secret" not in caplog.text
            gc.collect()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x02\x00\x05",  # refused
        b"\x20\x02\x00\x00\x32\x05\x00\xff" + b"\xff" * 20,  # accepted, then a message of 255 bytes of topic in 5
        b"\x20\x02\x00\x00" + bytes(range(256)) * 8,
        b"\x20\x02\x00\x00" + b"\x30\xff\xff\xff\x7f",  # a message of 268 MB
        b"\x20\x7f\x00\x00",
        b"\xff" * 100,
    ],
)
def test_a_broker_that_sends_garbage(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(1)
                    try:
                        connection.recv(4096)
                        connection.sendall(answer)
                        stop.wait(0.1)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        mqtt = Mqtt(Broker.of(f"mqtt://127.0.0.1:{listener.getsockname()[1]}", "door"), DEVICE, delays=FAST)
        try:
            mqtt.send({"frame": 1}, [])
            wait_for(lambda: "is lost" in caplog.text)
        finally:
            mqtt.close(0.1)
            stop.set()
            thread.join()
    assert mqtt.delivered == 0
    assert mqtt.dropped == 1
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


def test_events_for_a_broker_that_never_comes_are_bounded() -> None:
    mqtt = Mqtt(Broker.of(f"mqtt://127.0.0.1:{free_port()}", "door"), DEVICE, most=10, delays=FAST)
    for number in range(100):
        mqtt.send({"frame": number}, [])
    mqtt.close(0.1)
    assert mqtt.dropped == 100


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "x",
            "http://h",
            "mqtt://",
            "mqtt://h:0",
            "mqtt://h:x",
            "mqtt://h:99999",
            "mqtt://[::1",
            "mqtt://h/?a=1",
        ),
        *(
            "mqtt://me:secret@h",
            "mqtt://h/a/%23",
            "mqtt://h/+/a",
            "mqtt://h/$SYS/x",
            "mqtt://h/a%00b",
            "mqtt://h/a//b",
        ),
        f"mqtt://h/{'a' * 300}",
    ],
)
def test_bad_brokers(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        Broker.of(url, "door")
    assert "secret" not in str(error.value)
    assert len(str(error.value)) < 300


def test_bad_files_of_a_broker(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    for path in (tmp_path / "missing", tmp_path / "ca"):
        with pytest.raises(ConfigError, match="--mqtt-ca"):
            Broker.of("mqtts://h", "door", authority=path).client()
    with pytest.raises(ConfigError, match="mqtts"):
        Broker.of("mqtt://h", "door", authority=tmp_path / "ca")
    with pytest.raises(ConfigError, match="needs a user"):
        Broker.of("mqtt://h", "door", password="x")
    assert ssl.CERT_REQUIRED  # certificates are checked: see test_tls_and_a_password


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("Front door", "Front_door"),
        ("a/+/#", "a"),
        ("Haustür", "Haustur"),
        ("门", "watch"),
        ("", "watch"),
        ("x" * 99, "x" * 60),
    ],
)
def test_names_in_topics(name: str, node: str) -> None:
    assert node_of(name) == node
    for topic, payload in Device(name=name, model="m" * 500, version="1", questions=QUESTIONS).configs("p"):
        assert set("+# ") & set(topic) == set()
        assert len(json.loads(payload)["device"]["model"]) <= 80


def test_states_are_short() -> None:
    assert state_of(Reply(question=QUESTION, answer="x" * 1000)) == "x" * 252 + "..."
    assert state_of(replies()[4]) == '{"people": 3, "open": true, "a b{{": "x"}'
