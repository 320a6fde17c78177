"""Every kind of source, with real parts: files that are still written, videos, streams, servers that come back."""

from __future__ import annotations

import http.server
import io
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge.errors import ConfigError, EdgeError, ImageError
from lfm2vl_edge.image.load import Pixels
from lfm2vl_edge.watch.frames import Counts, Frame, Shot
from lfm2vl_edge.watch.jpegs import jpegs_in
from lfm2vl_edge.watch.reader import Reader, Source, SourceLost
from lfm2vl_edge.watch.sources import SourceSettings, source_of
from tests.watch.conftest import scene, wait_for

av = pytest.importorskip("av", reason="needs PyAV: pip install 'lfm2vl-edge[watch]'")
pytest.importorskip("watchfiles", reason="needs watchfiles: pip install 'lfm2vl-edge[watch]'")
SYSTEM_PYTHON = Path("/usr/bin/python3")


def jpeg(pixels: Pixels, **options: Any) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="JPEG", **options)
    return encoded.getvalue()


@contextmanager
def reading(source: Source, counts: Counts | None = None, **options: Any) -> Iterator[Reader]:
    reader = Reader(source, counts or Counts(), first_delay=0.05, **options)
    try:
        yield reader
    finally:
        reader.close()
        assert reader.is_ended


def take(reader: Reader) -> Frame:
    frames: list[Frame] = wait_for(lambda: reader.take(0.2))
    return frames[-1]


# Folders


def test_a_file_is_taken_once_it_is_closed(folder: Path) -> None:
    data = jpeg(scene())
    with reading(source_of(str(folder), SourceSettings())) as reader:
        time.sleep(0.3)  # inotify is set up by another thread
        with (folder / "a.jpg").open("wb") as file:
            file.write(data[:1000])
            file.flush()
            assert reader.take(0.8) == []
            file.write(data[1000:])
        assert take(reader).shot.name == "a.jpg"
        assert reader.take(0.3) == []


def test_files_come_in_the_folders_below_and_by_renaming_and_again_after_a_change(folder: Path) -> None:
    below = folder / "2026" / "11"
    below.mkdir(parents=True)
    (folder / "old.jpg").write_bytes(jpeg(scene()))
    with reading(source_of(str(folder), SourceSettings())) as reader:
        time.sleep(0.3)
        (below / "b.jpg").write_bytes(jpeg(scene()))
        assert take(reader).shot.name == "b.jpg"
        (folder / "c.jpg.part").write_bytes(jpeg(scene()))
        (folder / ".hidden.jpg").write_bytes(jpeg(scene()))
        assert reader.take(0.4) == []
        (folder / "c.jpg.part").rename(folder / "c.jpg")
        assert take(reader).shot.name == "c.jpg"
        (below / "b.jpg").write_bytes(jpeg(scene((0, 0))))
        frame = take(reader)
        assert frame.shot.name == "b.jpg"
        assert frame.shot.open().pixels().shape == (240, 320, 3)


def test_many_files_at_once_are_dropped_beyond_the_backlog(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.watch.sources.FOLDER_BACKLOG", 5)
    counts = Counts()
    with reading(source_of(str(folder), SourceSettings()), counts) as reader:
        time.sleep(0.3)
        for number in range(20):
            (folder / f"{number}.jpg").write_bytes(b"x")
        wait_for(lambda: counts["frames"] == 20)
        assert counts["dropped"] == 15
        assert len([1 for _ in range(9) if reader.take(0.05)]) == 5


def test_a_folder_that_is_removed_ends_the_source(folder: Path) -> None:
    with reading(source_of(str(folder), SourceSettings())) as reader:
        time.sleep(0.3)
        shutil.rmtree(folder)
        with pytest.raises(SourceLost, match="gone|watch"):
            wait_for(lambda: reader.take(0.1))


# Videos


def video(path: Path, frames: list[Pixels], rate: int = 10, codec: str = "mpeg4") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def all_frames(source: Source, counts: Counts | None = None) -> list[Frame]:
    found: list[Frame] = []
    with reading(source, counts) as reader:
        while not (reader.is_ended and not reader.has_frames):
            found += reader.take(0.2)
    return found


def test_a_video_gives_every_frame_that_is_due_and_none_is_dropped(tmp_path: Path) -> None:
    frames = [scene((8 * number, 100)) for number in range(30)]
    path, counts = video(tmp_path / "v.mp4", frames), Counts()
    found = all_frames(source_of(str(path), SourceSettings()), counts)
    assert [round(frame.shot.position or 0, 2) for frame in found] == [round(0.1 * number, 2) for number in range(30)]
    assert np.abs(found[9].shot.open().pixels().astype(int) - frames[9]).mean() < 4
    skipped = Counts()
    settings = SourceSettings(every=1.0, on_skip=lambda: skipped.add("skipped"))
    due = all_frames(source_of(str(path), settings), counts)
    assert [frame.shot.position for frame in due] == [0.0, 1.0, 2.0]
    assert skipped["skipped"] == 27
    assert counts["dropped"] == 0


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg: apt install ffmpeg")
def test_a_video_of_a_phone_is_upright(tmp_path: Path) -> None:
    stored, turned = video(tmp_path / "v.mp4", [scene()]), tmp_path / "turned.mp4"
    ways = (["-display_rotation:v:0", "90"], ["-c", "copy", "-metadata:s:v", "rotate=270"])  # ffmpeg 6, and before
    commands = [
        ["ffmpeg", "-v", "error", "-y", *ways[0], "-i", str(stored), "-c", "copy", str(turned)],
        ["ffmpeg", "-v", "error", "-y", "-i", str(stored), *ways[1], str(turned)],
    ]
    assert any(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    shown = tmp_path / "shown.png"  # ffmpeg applies the rotation itself when it decodes
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(turned), "-frames:v", "1", str(shown)], check=True)
    opened = all_frames(source_of(str(turned), SourceSettings()))[0].shot.open()
    assert (opened.height, opened.width) == (320, 240)
    assert np.abs(opened.pixels().astype(int) - np.asarray(Image.open(shown).convert("RGB"))).mean() < 3


def test_damaged_videos(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", [scene((8 * number, 100)) for number in range(20)])
    data = path.read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("no video at all\n" * 1000)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("half", "text", "empty"):
        with pytest.raises(EdgeError, match="cannot be read"):
            all_frames(source_of(str(tmp_path / f"{name}.mp4"), SourceSettings()))
    damaged, counts = bytearray(data), Counts()
    for at in range(data.index(b"mdat") + 2000, len(data) - 4000, 500):
        damaged[at : at + 20] = b"\xff" * 20
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    settings = SourceSettings(on_damage=lambda: counts.add("truncated"))
    found = all_frames(source_of(str(tmp_path / "damaged.mp4"), settings))
    assert len(found) + counts["truncated"] >= 10


def test_a_frame_that_is_too_large_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", [scene()])
    (frame,) = all_frames(source_of(str(path), SourceSettings(max_pixels=1000)))
    with pytest.raises(ImageError, match="320x240"):
        frame.shot.open()


# JPEGs in a stream


def with_thumbnail() -> bytes:
    """Return a JPEG with another one in its metadata, as cameras write them."""
    exif = Image.Exif()
    exif[270] = "x"
    data = jpeg(scene(), exif=exif.tobytes())
    thumbnail = jpeg(scene(size=(48, 64)))
    comment = b"\xff\xfe" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    return data[:2] + comment + data[2:]


def split(stream: bytes, size: Callable[[], int]) -> tuple[list[bytes], int]:
    """Return the JPEGs of a stream that is read in blocks of these sizes, and how many are damaged."""
    source, damaged = io.BytesIO(stream), Counts()
    found = list(jpegs_in(lambda: source.read(size()), lambda: damaged.add("truncated")))
    return found, damaged["truncated"]


def test_jpegs_are_found_in_blocks_of_any_size() -> None:
    images = [
        jpeg(scene()),
        jpeg(scene((100, 50)), progressive=True),
        with_thumbnail(),
        jpeg(scene(noise=30), quality=95, restart_marker_blocks=4),
    ]
    for image in images:
        assert Image.open(io.BytesIO(image)).size == (320, 240)
    stream = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n".join([b"\xff\xd8", *images, b"\r\n"])
    generator = random.Random(5)
    for most in (1, 3, 100, 5000, len(stream)):
        assert split(stream, lambda most=most: generator.randint(1, most)) == (images, 0)  # type: ignore[misc]


def test_truncated_jpegs_are_counted_and_the_next_ones_found() -> None:
    whole = jpeg(scene())
    for length in (3, 20, 300, len(whole) // 2, len(whole) - 1):
        found, n_damaged = split(whole[:length] + whole + whole, lambda: 777)
        assert found[-1] == whole
        assert n_damaged >= 1


def test_streams_without_end_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.watch.jpegs.MOST_BYTES", 100_000)
    damaged, blocks = Counts(), iter([*[b"\0" * 50_000] * 50, jpeg(scene())[:500], *[b"\0" * 50_000] * 50, b""])
    assert list(jpegs_in(lambda: next(blocks), lambda: damaged.add("truncated"))) == []
    assert damaged["truncated"] >= 1
    noise = io.BytesIO(random.Random(1).randbytes(2_000_000))
    for found in jpegs_in(lambda: noise.read(4096), lambda: damaged.add("truncated")):
        assert len(found) < 100_000


# Snapshots


class Camera(http.server.ThreadingHTTPServer):
    """Answers with what `images` returns, at a path; None: 503."""

    def __init__(self, images: Callable[[str], bytes | None], port: int = 0) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = images(self.path)
                self.send_response(503 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def test_snapshots_come_at_an_interval_and_again_after_the_camera_was_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a camera is not on the web
    counts, data = Counts(), jpeg(scene())
    states: list[bool] = []
    with Camera(lambda path: data) as camera:
        port = camera.server_address[1]
        url = f"http://me:secret@127.0.0.1:{port}/snap.jpg?key=secret"
        source = source_of(url, SourceSettings(every=0.05, seconds=2))
        reader = Reader(source, counts, on_state=states.append, first_delay=0.05)
        assert take(reader).shot.open().height == 240
    try:
        wait_for(lambda: states == [False])
        time.sleep(0.2)
        before = counts["frames"]
        with Camera(lambda path: data, port):
            wait_for(lambda: states == [False, True])
            wait_for(lambda: counts["frames"] > before)
            reader.close()
    finally:
        reader.close()
    assert counts["reconnects"] == 1
    assert "secret" not in caplog.text
    assert "trying again" in caplog.text
    assert "gives frames again" in caplog.text


def test_a_camera_that_fails_is_asked_less_and_less_often() -> None:
    times: list[float] = []

    def read(stop: threading.Event) -> Iterator[Shot]:
        times.append(time.monotonic())
        raise SourceLost("away")
        yield

    with reading(Source(name="camera", read=read)):
        wait_for(lambda: len(times) == 4)
    gaps = np.diff(times)
    assert gaps[1] > 1.2 * gaps[0]
    assert gaps[2] > 1.2 * gaps[1]


# Streams


@contextmanager
def rtsp_server(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run GStreamer's server until the end of the block, and give its port."""
    script = Path(__file__).parent / "rtsp_server.py"
    command = [str(SYSTEM_PYTHON), str(script), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            if not line:
                pytest.skip(
                    "needs GStreamer: apt install python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good"
                )
            yield process, int(line[1])
        finally:
            process.kill()


@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs Debian's python3 with python3-gi")
def test_rtsp_of_a_server_that_is_killed_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    counts = Counts()
    states: list[bool] = []
    with rtsp_server() as (_, port):
        source = source_of(f"rtsp://127.0.0.1:{port}/live", SourceSettings(seconds=3, every=0.2))
        reader = Reader(source, counts, on_state=states.append, first_delay=0.1)
        try:
            pixels = take(reader).shot.open().pixels()
        except BaseException:
            reader.close()
            raise
    try:
        assert pixels.shape == (240, 320, 3)
        assert pixels.max() > 200  # the ball
        assert np.median(pixels) < 30
        wait_for(lambda: states == [False])
        with rtsp_server(port):
            wait_for(lambda: states == [False, True])
            take(reader)
            reader.close()
    finally:
        reader.close()
    assert counts["reconnects"] == 1
    assert counts["frames"] >= 2


def test_a_device_is_read_as_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's own test image stands for V4L2: the same calls with another demuxer."""
    source = source_of("/dev/null", SourceSettings())
    assert source.is_camera
    assert source.reopens
    opened, open_video = [], av.open

    def as_device(name: str, **options: Any) -> Any:
        opened.append((name, options["format"], options["options"]))
        return open_video("testsrc=size=160x120:rate=10", format="lavfi")

    monkeypatch.setattr(av, "open", as_device)
    settings = SourceSettings(options={"video_size": "160x120"}, every=0.01)
    with reading(source_of("/dev/null", settings)) as reader:
        assert take(reader).shot.open().pixels().shape == (120, 160, 3)
    assert opened[0] == ("/dev/null", "v4l2", {"video_size": "160x120"})


def test_late_frames_of_a_camera_are_dropped_and_counted() -> None:
    counts, done = Counts(), threading.Event()

    def read(stop: threading.Event) -> Iterator[Shot]:
        for _ in range(1000):
            yield Shot(open=lambda: (_ for _ in ()).throw(ImageError("never decoded")))
        done.set()
        stop.wait(5)

    with reading(Source(name="camera", read=read), counts, lookback=4) as reader:
        assert done.wait(10)
        frames = reader.take(1)
        assert [frame.number for frame in frames] == [997, 998, 999, 1000]
        assert counts["dropped"] == 996


def test_a_bug_in_a_source_is_reported() -> None:
    def read(stop: threading.Event) -> Iterator[Shot]:
        yield from ()
        raise ZeroDivisionError("here")

    with (
        reading(Source(name="camera", read=read)) as reader,
        pytest.raises(EdgeError, match="ZeroDivisionError: here"),
    ):
        wait_for(lambda: reader.take(0.1))


@pytest.mark.parametrize(
    "text",
    [
        *("", "missing.mp4", "/nowhere/at/all", "x" * 5000, "\0", "rtsp://", "rtsp:///live", "rtsp://h:port/x"),
        *(
            "ftp://host/x",
            "file:///etc/passwd",
            "concat:a|b",
            "http://",
            "http://[::1",
            "http://ho\nst/",
            "javascript:x",
        ),
    ],
)
def test_bad_sources(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        source_of(text, SourceSettings())
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_a_pipe_is_not_a_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe JPEGs into -"):
        source_of(str(tmp_path / "pipe"), SourceSettings())


def test_passwords_are_in_no_error(caplog: pytest.LogCaptureFixture) -> None:
    source = source_of("rtsp://me:secret@127.0.0.1:9/live", SourceSettings(seconds=1))
    with caplog.at_level(logging.DEBUG), reading(source):
        wait_for(lambda: "trying again" in caplog.text)
    assert "secret" not in caplog.text + source.name + repr(source)
    assert sys.exc_info() == (None, None, None)
