"""From the text that names a source to its frames: a folder, a video, a camera, a URL of images, JPEGs on stdin."""

from __future__ import annotations

import os
import stat
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm2vl_edge.config import require
from lfm2vl_edge.errors import ConfigError, EdgeError, ImageError, clip, shorten
from lfm2vl_edge.image.load import MAX_PIXELS, OpenedImage, Pixels, open_image
from lfm2vl_edge.image.web import Limits, display_url, error_text, fetch, is_url
from lfm2vl_edge.watch.frames import Shot
from lfm2vl_edge.watch.jpegs import jpegs_in
from lfm2vl_edge.watch.reader import Source, SourceLost

if TYPE_CHECKING:
    import av

STDIN: Final = "-"
_STREAMS: Final = ("rtsp", "rtsps", "rtmp", "rtmps", "udp", "srt")
"""Schemes that are given to FFmpeg."""
_IMAGES: Final = ("http", "https")
_OPEN_SECONDS: Final = 10.0
"""Longest time until a stream is opened, and without a packet of it."""
_SNAPSHOT_BYTES: Final = 50_000_000
_BLOCK_BYTES: Final = 1 << 16
FOLDER_BACKLOG: Final = 1000
"""Files that wait at most; they are not read before their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """How a source is read.

    Attributes:
        every: seconds between two frames that are taken, in the time of the video; 0 takes each.
        max_pixels: largest frame that is decoded, height x width.
        options: of FFmpeg's demuxer: `rtsp_transport`, `video_size` and so on.
        seconds: longest time until a stream is opened, and without a packet of it.
        on_skip: called for each frame that `every` leaves out.
        on_damage: called for each damaged part of a stream.
    """

    every: float = 0.0
    max_pixels: int = MAX_PIXELS
    options: Mapping[str, str] = field(default_factory=dict)
    seconds: float = _OPEN_SECONDS
    on_skip: Callable[[], object] = lambda: None
    on_damage: Callable[[], object] = lambda: None


def source_of(text: str, settings: SourceSettings) -> Source:
    """Return the source that a text names; it is not opened.

    Raises:
        ConfigError: there is no such source.
        EdgeError: the package that reads it is not installed.
    """
    if text == STDIN:
        read = partial(_stdin, settings=settings)
        return Source(name="stdin", read=read, reopens=False)
    if is_url(text):
        return _source_of_url(text, settings)
    try:
        mode = os.stat(text).st_mode  # noqa: PTH116  # of Path, an empty text is this folder
    except (OSError, ValueError):
        raise ConfigError(
            f"no source at {shorten(text)}; give a folder, a video, rtsp://..., /dev/video0, the http(s) URL of an "
            "image, or - for JPEGs on stdin"
        ) from None
    if stat.S_ISDIR(mode):
        _require_package("watchfiles", "folders need watchfiles")
        from lfm2vl_edge.watch.folder import files_in

        read = partial(files_in, Path(text), max_pixels=settings.max_pixels)
        return Source(name=clip(text), read=read, is_camera=False, reopens=False, backlog=FOLDER_BACKLOG)
    if stat.S_ISCHR(mode):
        _require_video()
        read = partial(_video, text, settings, form="v4l2", is_live=True)
        return Source(name=clip(text), read=read)
    require(stat.S_ISREG(mode), f"{shorten(text)} is not a folder, a video or a camera; pipe JPEGs into - instead")
    _require_video()
    read = partial(_video, text, settings, form=None, is_live=False)
    return Source(name=clip(text), read=read, is_camera=False, reopens=False, backlog=None)


def _source_of_url(url: str, settings: SourceSettings) -> Source:
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the URL of the source is not valid; its form is rtsp://host/path") from None
    scheme = parts.scheme.lower()
    if scheme not in (*_STREAMS, *_IMAGES) or not host or not url.isprintable():
        raise ConfigError(
            f"{display_url(url)} is not a source; the form is rtsp://host/path, or http://host/path for an image"
        )
    if scheme in _IMAGES:
        return Source(name=display_url(url), read=partial(_snapshots, url, settings))
    _require_video()
    read = partial(_video, url, settings, form=None, is_live=True)
    return Source(name=display_url(url), read=read)


def _require_video() -> None:
    _require_package("av", "videos and cameras need PyAV")


def _require_package(name: str, need: str) -> None:
    """Check that a package is there before a model is opened for it; it is imported when it is used."""
    if find_spec(name) is None:
        raise EdgeError(f"{need}; install it: pip install 'lfm2vl-edge[watch]'")


def _encoded(data: bytes, max_pixels: int) -> Shot:
    return Shot(open=lambda: open_image(data, max_pixels=max_pixels))


def _snapshots(url: str, settings: SourceSettings, stop: Event) -> Iterator[Shot]:
    """Yield what a URL returns, again and again."""
    limits = Limits(n_bytes=_SNAPSHOT_BYTES, seconds=settings.seconds, is_camera=True)
    while not stop.is_set():
        start = time.monotonic()
        try:
            data = fetch(url, limits)
        except ImageError as error:
            raise SourceLost(str(error)) from error
        yield _encoded(data, settings.max_pixels)
        stop.wait(max(0.0, settings.every - (time.monotonic() - start)))


def _stdin(stop: Event, settings: SourceSettings) -> Iterator[Shot]:
    """Yield the JPEGs on stdin; reads its descriptor, as a thread inside of a buffered read would delay the end."""
    number = sys.stdin.fileno()
    found, next_time = False, 0.0
    for data in jpegs_in(partial(os.read, number, _BLOCK_BYTES), settings.on_damage):
        found = True
        if time.monotonic() < next_time:
            settings.on_skip()
            continue
        next_time = max(next_time + settings.every, time.monotonic())
        yield _encoded(data, settings.max_pixels)
        if stop.is_set():
            return
    if not found:
        raise EdgeError("stdin holds no JPEG; pipe one after the other into it, as ffmpeg -f image2pipe does")


def _video(url: str, settings: SourceSettings, stop: Event, *, form: str | None, is_live: bool) -> Iterator[Shot]:
    """Yield the frames of what FFmpeg reads: a file, a stream or a device."""
    import av

    name = display_url(url) if is_url(url) else clip(url)
    options = ({"rtsp_transport": "tcp"} if url[:4].lower() == "rtsp" else {}) | dict(settings.options)
    timeout = (settings.seconds, settings.seconds) if is_live else None
    try:
        with av.open(url, format=form, options=options, timeout=timeout) as container:
            if not container.streams.video:
                raise SourceLost(f"{name} has no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from _taken(_decoded(container, stream, settings), settings, stop, is_live=is_live)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise SourceLost(f"{name} cannot be read: {_reason(error, url)}") from error


def _reason(error: Exception, url: str) -> str:
    """Return the reason of an error of FFmpeg, without the URL, which may hold a password."""
    text = getattr(error, "strerror", None) or error_text(error)
    return clip(str(text).replace(url, "it"))


def _decoded(container: Any, stream: Any, settings: SourceSettings) -> Iterator[av.VideoFrame]:
    """Yield all frames of a stream but those that are damaged."""
    import av

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            settings.on_damage()
            continue
        for frame in frames:
            if frame.is_corrupt:
                settings.on_damage()
            else:
                yield frame


def _taken(frames: Iterator[av.VideoFrame], settings: SourceSettings, stop: Event, *, is_live: bool) -> Iterator[Shot]:
    """Yield the frames that are due; the others are not converted to RGB.

    Raises:
        ValueError: a file has no frame at all, as FFmpeg finds of an empty one now and then.
    """
    next_time, first, found = 0.0, None, False
    for frame in frames:
        found = True
        if stop.is_set():
            return
        position = None if is_live or frame.time is None else float(frame.time)
        if position is not None:
            first = position if first is None else first
        now = time.monotonic() if position is None or first is None else position - first
        if settings.every and now < next_time - 1e-6:
            settings.on_skip()
            continue
        next_time = max(next_time, now - settings.every) + settings.every
        yield Shot(open=partial(_opened, frame, settings.max_pixels), position=position)
    if not found and not is_live:
        raise ValueError("it has no frames")


def _opened(frame: av.VideoFrame, max_pixels: int) -> OpenedImage:
    """Return the size of a frame, upright, and a way to its pixels."""
    turns = round(frame.rotation / 90) % 4
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    if height * width > max_pixels:
        raise ImageError(f"the frame is {width}x{height} pixels; choose a smaller stream or raise --max-megapixels")

    def pixels() -> Pixels:
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    return OpenedImage(height, width, pixels)
