"""Loading beside other threads: what is Pillow's stays as it is, and a forked process can load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from lfm2vl_edge import load_image
from tests.image.test_load import PIXELS, PNG, encoded


def test_threads_leave_pillow_and_warnings_as_they_are() -> None:
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    sources = [encoded(Image.fromarray(PIXELS), pnginfo=text), encoded(Image.fromarray(PIXELS), "TIFF"), PNG]
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(load_image, sources * 20):
            np.testing.assert_array_equal(found, PIXELS)
    assert limits == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    assert filters == list(warnings.filters)


def test_an_image_above_the_limit_of_pillow_and_below_ours_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for form in ("PNG", "TIFF", "WEBP", "GIF"):
        assert load_image(encoded(Image.fromarray(PIXELS), form)).shape == (6, 9, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_forked_while_another_thread_decodes_can_decode() -> None:
    large, small = encoded(Image.new("RGB", (3000, 3000))), encoded(Image.new("RGB", (2, 2)))
    ended = threading.Event()

    def decode() -> None:
        while not ended.wait(0.01):
            load_image(large)

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.alarm(20)
                load_image(small)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        thread.join()


WHILE_PILLOW_IS_IMPORTED = """
import sys
from lfm2vl_edge import ImageError, load_image

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "PIL.ExifTags":  # PIL.Image imports it before it has its class
            assert not hasattr(sys.modules["PIL.Image"], "Image")
            try:
                load_image("missing.png")
            except ImageError as error:
                print(error)

sys.meta_path.insert(0, Finder())
import PIL.Image
"""


def test_an_image_is_opened_while_pillow_is_being_imported() -> None:
    """As a thread meets it if another one imports Pillow for the first image."""
    command = [sys.executable, "-c", WHILE_PILLOW_IS_IMPORTED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "missing.png" in result.stdout
