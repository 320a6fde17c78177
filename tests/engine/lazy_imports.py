"""Print the modules that a thread imports, while it answers, without keeping other threads from forking."""

from __future__ import annotations

import io
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
from PIL import Image

import lfm2vl_edge
from lfm2vl_edge import Model, Scheduler, host
from lfm2vl_edge.prompt.messages import user_message

FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "jpeg2000", "ppm")
unguarded: list[str] = []


def observe(event: str, arguments: tuple[object, ...]) -> None:
    if (
        event == "import"
        and threading.current_thread() is not threading.main_thread()
        and not host._imports._is_owned()  # type: ignore[attr-defined]
    ):
        where = [frame for frame in traceback.extract_stack() if "lfm2vl_edge" in frame.filename]
        unguarded.append(f"{arguments[0]} in {where[-1].name if where else '?'}")


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def answer(folder: Path, images: list[bytes]) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [2, 4], "multipleOf": 2}}}
    with Model.open("tiny") as model:
        for image in images:
            model.ask(image, "what?", max_tokens=2)
        model.detect(images[0], "circle")
        model.point(images[0], "circle")
        model.choose(images[0], "is it?", ["yes", "no"])
        model.extract(images[0], schema, max_tokens=200)
        model.ask([], "x", grammar='root ::= "a"')
        model.ask([], "x", regex="[ab]")
        model.encode_image(images[0]).save(folder / "image")
        model.load_encoded_image(folder / "image").ask("what?", max_tokens=2)
        with Scheduler(model, parallel=2) as scheduler:
            list(scheduler.submit([user_message(images[0], "what?")], max_tokens=2))


def main(folder: Path) -> None:
    images = [encoded(form) for form in FORMATS]
    for name in [name for name in sys.modules if name.startswith("PIL.") and name.endswith("Plugin")]:
        del sys.modules[name]
    assert lfm2vl_edge.__version__
    sys.addaudithook(observe)
    thread = threading.Thread(target=answer, args=(folder, images))
    thread.start()
    thread.join()
    print("\n".join(unguarded) or "all guarded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
