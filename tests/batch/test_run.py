"""Batches of the demonstration model: answers, errors, resuming, order, shards and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import ConfigError, DataError, Model
from lfm2vl_edge.batch import BatchOptions, Progress, run_batch
from lfm2vl_edge.batch.worker import Worker
from lfm2vl_edge.config import GREEDY, AskOptions
from tests.batch.kills import answers, command, compare
from tests.batch.test_inputs import lines

BRIEF: dict[str, Any] = {"max_tokens": 12}


def options(**changes: Any) -> BatchOptions:
    return BatchOptions(**{"answer": BRIEF, **changes})


def asked(model: Model, image: object, prompt: str, **changes: Any) -> str:
    """Return the answer of one question alone."""
    how: AskOptions = {**GREEDY, **BRIEF, **changes}  # type: ignore[typeddict-item]
    return model.ask(image, prompt, **how)  # type: ignore[arg-type]


class Stop(Exception):
    pass


def stop_after(count: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done >= count:
            raise Stop

    return report


def test_answers_are_those_of_single_questions_in_the_order_of_the_input(
    tiny: Model, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "out.jsonl"
    done = run_batch(tiny, [images], out, options(prompt="Where is the shape?"))
    rows = answers(out)
    paths = [str(images / f"image{number}.png") for number in range(12)]
    assert [row["id"] for row in rows] == paths
    assert [row["answer"] for row in rows] == [asked(tiny, path, "Where is the shape?") for path in paths]
    assert (done.rows, done.done, done.earlier, dict(done.errors)) == (12, 12, 0, {})
    assert done.completion_tokens == sum(row["usage"]["completion_tokens"] for row in rows)
    assert done.truncated == sum(row["finish_reason"] == "length" for row in rows)
    assert done.forecast_error is not None
    assert tiny.ask(paths[0], "Again?", max_tokens=2)  # the model is free again


def test_the_same_call_asks_nothing_twice(
    tiny: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Stop):
        run_batch(tiny, [images], out, options(), progress=stop_after(5))
    assert len(answers(out)) == 5
    seen: list[str] = []
    answer = Worker.answer

    def noted(self: Worker, row: Any) -> Any:
        seen.append(str(row.id))
        return answer(self, row)

    monkeypatch.setattr(Worker, "answer", noted)
    done = run_batch(tiny, [images], out, options())
    assert (done.rows, done.done, done.earlier) == (7, 7, 5)
    assert seen == [str(images / f"image{number}.png") for number in range(5, 12)]
    before = out.read_bytes()
    again = run_batch(tiny, [images], out, options())
    assert (again.rows, again.earlier, out.read_bytes()) == (0, 12, before)


@pytest.mark.parametrize("left", [1, 2, 40, 200])
def test_a_torn_last_line_is_removed(tiny: Model, images: Path, tmp_path: Path, left: int) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(tiny, [images], out, options())
    expected, data = answers(out), out.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    out.write_bytes(data[: min(start + left, len(data) - 1)])
    assert run_batch(tiny, [images], out, options()).rows == 1
    assert answers(out) == expected


def test_kill_9_loses_and_repeats_nothing(tmp_path: Path) -> None:
    found, expected, hits = compare(tmp_path, rows=60, kills=3)
    assert hits == 3
    assert len(expected) == 60
    assert found == expected


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prompt": "Why?"}, "prompt"),
        ({"system": "Be brief."}, "system"),
        ({"answer": {"max_tokens": 13}}, "max_tokens"),
        ({"answer": {**BRIEF, "temperature": 0.5}}, "temperature"),
        ({"detect": "cup"}, "detect"),
        ({"choose": ("a", "b")}, "choose"),
        ({"max_pixels": 1000}, "max_pixels"),
        ({"shard": (1, 2)}, "shard"),
    ],
)
def test_a_changed_option_is_refused_by_name_and_restart_starts_over(
    tiny: Model, images: Path, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Stop):
        run_batch(tiny, [images], out, options(prompt="What?"), progress=stop_after(2))
    before = out.read_bytes()
    changed = options(**{"prompt": "What?", **change})
    with pytest.raises(DataError, match=f"was made with {name} .*, and it is .* now.*--restart"):
        run_batch(tiny, [images], out, changed)
    assert out.read_bytes() == before
    with pytest.raises(Stop):
        run_batch(tiny, [images], out, dataclasses.replace(changed, restart=True), progress=stop_after(1))
    assert len(answers(out)) == 1


def test_another_model_or_detail_is_refused(tiny: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(tiny, [images / "image0.png"], out, options())
    with Model.open("tiny", detail="fast") as other, pytest.raises(DataError, match="was made with image settings"):
        run_batch(other, [images / "image0.png"], out, options())


def test_a_changed_row_is_refused_and_a_new_one_is_asked_in_its_place(
    tiny: Model, images: Path, tmp_path: Path
) -> None:
    image, out = str(images / "image0.png"), tmp_path / "out.jsonl"
    first, last = {"image": image, "id": "a", "prompt": "What?"}, {"image": image, "id": "c", "prompt": "Where?"}
    path = lines(tmp_path / "rows.jsonl", first, last)
    run_batch(tiny, [path], out, options())
    lines(path, first, {"image": image, "id": "b"}, last)
    assert run_batch(tiny, [path], out, options()).rows == 1
    assert [row["id"] for row in answers(out)] == ["a", "b", "c"]
    lines(path, {**first, "prompt": "Why?"})
    with pytest.raises(DataError, match="row 1 of the input was changed since out.jsonl was written"):
        run_batch(tiny, [path], out, options())


@pytest.fixture
def mixed(images: Path, tmp_path: Path) -> Path:
    """Rows of which some cannot be answered."""
    (tmp_path / "broken.png").write_bytes((images / "image0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(_png_header(60_000, 60_000))
    good = str(images / "image0.png")
    return lines(
        tmp_path / "rows.jsonl",
        {"image": good, "id": "good", "note": "ü"},
        {"image": "broken.png", "id": "broken"},
        {"image": "text.png", "id": "text"},
        {"image": "missing.png", "id": "missing"},
        {"image": "bomb.png", "id": "bomb"},
        {"image": "data:image/png;base64,AAAA", "id": "data"},
        {"file": good, "id": "column"},
        {"image": good, "id": "option", "max_tokens": -1},
        {"image": good, "id": "schema", "json_schema": "{"},
        {"image": good, "id": "level", "detail": "most"},
        {"image": good, "id": "prompt", "prompt": "a " * 40_000},
        {"image": good, "id": "truncated", "json_schema": {"type": "string", "minLength": 500}, "max_tokens": 2},
        {"image": good, "id": "own", "max_tokens": 2},
        "{",
        {"image": [good, good], "id": "two"},
        {"image": [], "id": "none", "prompt": "Hello?"},
    )


KINDS = {
    **dict.fromkeys(("broken", "text", "missing", "bomb", "data"), "image"),
    **dict.fromkeys(("column", "schema"), "row"),
    **dict.fromkeys(("option", "level"), "option"),
    "prompt": "context",
    "truncated": "truncated",
}


def _png_header(height: int, width: int) -> bytes:
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_row_that_cannot_be_answered_is_a_row_with_an_error(
    tiny: Model, mixed: Path, tmp_path: Path, ordered: bool
) -> None:
    out = tmp_path / "out.jsonl"
    done = run_batch(tiny, [mixed], out, options(ordered=ordered))
    rows = {str(row["id"]): row for row in answers(out)}
    assert len(rows) == 16
    for name, row in rows.items():
        kind = KINDS.get(name, "row" if name.endswith(":14") else None)
        assert (row["error"] and row["error"]["kind"]) == kind, row
        assert (row["answer"] is None) == (kind is not None)
        assert len((row["error"] or {"message": ""})["message"]) < 500
    assert done.errors == {"image": 5, "row": 3, "option": 2, "context": 1, "truncated": 1}
    assert rows["good"]["note"] == "ü"
    assert rows["own"]["usage"]["completion_tokens"] == 2
    assert rows["own"]["max_tokens"] == 2
    assert rows["two"]["usage"]["image_tokens"] == 2 * rows["good"]["usage"]["image_tokens"]
    assert rows["none"]["usage"]["image_tokens"] == 0
    if ordered:
        assert [row["id"] for row in answers(out)][:4] == ["good", "broken", "text", "missing"]


def test_retry_asks_only_failed_rows_of_a_kind_again_and_keeps_the_order(
    tiny: Model, images: Path, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(tiny, [mixed], out, options())
    before = answers(out)
    shutil.copy(images / "image1.png", tmp_path / "missing.png")
    assert run_batch(tiny, [mixed], out, options()).rows == 0
    done = run_batch(tiny, [mixed], out, options(retry_errors="context"))
    assert (done.rows, done.errors["context"], answers(out)) == (1, 1, before)
    done = run_batch(tiny, [mixed], out, options(retry_errors="image"))
    assert (done.rows, done.errors["image"], done.errors["row"]) == (5, 4, 3)
    after = answers(out)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [row["error"] is None for row in after].count(True) == 5
    with pytest.raises(Stop):
        run_batch(tiny, [mixed], out, options(retry_errors="all"), progress=stop_after(2))
    assert run_batch(tiny, [mixed], out, options()).rows == 9
    assert answers(out) == after


def test_fail_fast_ends_at_the_first_error_which_is_stored(tiny: Model, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="row 'broken': .* is a corrupt image"):
        run_batch(tiny, [mixed], out, options(fail_fast=True))
    assert [row["id"] for row in answers(out)] == ["good", "broken"]


def test_shards_are_disjoint_and_complete(tiny: Model, images: Path, tmp_path: Path) -> None:
    run_batch(tiny, [images], tmp_path / "all.jsonl", options())
    parts = []
    for part in (1, 2, 3):
        out = tmp_path / f"{part}.jsonl"
        run_batch(tiny, [images], out, options(shard=(part, 3)))
        parts.append(answers(out) if out.exists() else [])
    assert sorted((row for part in parts for row in part), key=str) == sorted(answers(tmp_path / "all.jsonl"), key=str)
    assert all(parts)


def test_typed_answers_choices_and_boxes(tiny: Model, images: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    path = str(images / "image0.png")
    run_batch(tiny, [path], tmp_path / "schema.jsonl", options(answer={"schema": schema, "max_tokens": 40}))
    (row,) = answers(tmp_path / "schema.jsonl")
    assert row["answer"] == tiny.extract(path, schema, "Describe this image.", max_tokens=40)
    names = ("A red circle", "A blue square")
    run_batch(tiny, [path], tmp_path / "choose.jsonl", options(choose=names, prompt="What?"))
    (row,) = answers(tmp_path / "choose.jsonl")
    expected = tiny.choose(path, "What?", names)
    assert (row["answer"], row["probabilities"]) == (expected.best, pytest.approx(dict(expected)))
    run_batch(tiny, [path], tmp_path / "detect.jsonl", options(detect="circle", answer={"max_tokens": 200}))
    (row,) = answers(tmp_path / "detect.jsonl")
    boxes = tiny.detect(path, "circle", max_tokens=200)
    assert [(box["left"], box["top"], box["label"]) for box in row["answer"]] == [
        (box.left, box.top, box.label) for box in boxes
    ]
    assert boxes


def test_equal_images_are_encoded_once(images: Path, tmp_path: Path) -> None:
    for number in range(6):
        shutil.copy(images / f"image{number % 2}.png", tmp_path / f"copy{number}.png")
    with Model.open("tiny") as model:
        n_encoded, encode = [0], model.engine.encode

        def counted(pixels: Any, n_tokens: int) -> Any:
            n_encoded[0] += 1
            return encode(pixels, n_tokens)

        model.engine.encode = counted  # type: ignore[method-assign]
        run_batch(model, [tmp_path], tmp_path / "out.jsonl", options())
    assert n_encoded == [2]


@pytest.mark.parametrize("parallel", [1, 4])
def test_images_are_loaded_while_the_model_answers(
    tiny: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    """As many rows as answers run at a time are taken up, and two more."""
    running, most, lock = [0], [0], threading.Lock()
    answer = Worker.answer

    def counted(self: Worker, row: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return answer(self, row)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(Worker, "answer", counted)
    run_batch(tiny, [images], tmp_path / "out.jsonl", options(parallel=parallel))
    assert most[0] == parallel + 2


def test_a_foreign_file_is_never_touched(tiny: Model, images: Path, tmp_path: Path) -> None:
    for content in ("my notes\n", '{"id": 1, "key": "0", "error": null}\n'):
        out = tmp_path / "out.jsonl"
        out.write_text(content)
        for restart in (False, True):
            with pytest.raises(DataError, match="exists, and was not written by batch"):
                run_batch(tiny, [images], out, options(restart=restart))
            assert out.read_text() == content
            assert not (tmp_path / "out.jsonl.batch").exists()


def test_a_line_that_somebody_changed_is_refused(tiny: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(tiny, [images / "image0.png"], out, options())
    for line in ("\n", "{}\n", '{"id": 1, "key": "xyz", "error": null}\n', '{"id": [], "key": "0", "error": null}\n'):
        out.write_text(line)
        with pytest.raises(DataError, match="line 1 is not an answer of batch; remove that line"):
            run_batch(tiny, [images], out, options())


def test_a_second_process_is_refused_while_one_writes(tiny: Model, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def second(progress: Progress) -> None:
        if progress.done == 1:
            with pytest.raises(DataError, match="another process writes"):
                run_batch(tiny, [images], out, options())
            raise Stop

    with pytest.raises(Stop):
        run_batch(tiny, [images], out, options(), progress=second)
    assert run_batch(tiny, [images], out, options()).earlier == 1


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limit the size of files that this process writes: what exceeds it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_batch_and_tears_no_line(
    tiny: Model, images: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="cannot write .*make room"):
        run_batch(tiny, [images], out, options(), progress=lambda _: small_files(2000))
    small_files(resource.RLIM_INFINITY)
    assert 0 < out.stat().st_size <= 2000
    assert out.read_bytes().endswith(b"\n")
    assert len(answers(out)) < 12
    run_batch(tiny, [images], out, options())
    assert len({row["id"] for row in answers(out)}) == len(answers(out)) == 12


@pytest.mark.parametrize("out", ["file/out.jsonl", "folder.jsonl"])
def test_an_output_that_cannot_be_written_is_refused(tiny: Model, images: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot write|was not written by batch"):
        run_batch(tiny, [images], tmp_path / out, options())


def test_rows_of_any_columns_and_ids_come_out_as_they_went_in(tiny: Model, images: Path, tmp_path: Path) -> None:
    image = str(images / "image0.png")
    hostile = {"__proto__": 1, "a\nb": {"c": [1, None]}, "": "x", "\x00": "\x7f", "{id}": 2**70, "answer": "mine"}
    names = ["a\nb", "../../etc/passwd", "{}", "ü" * 5000, "\x1b[31m", -1, 2**70]
    path = lines(tmp_path / "rows.jsonl", *({"image": image, "id": name, **hostile} for name in names))
    run_batch(tiny, [path], tmp_path / "out.jsonl", options())
    rows = answers(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == names
    for row in rows:
        assert {name: row[name] for name in hostile if name != "answer"} == {
            name: value for name, value in hostile.items() if name != "answer"
        }
        assert row["input_answer"] == "mine"
    assert run_batch(tiny, [path], tmp_path / "out.jsonl", options()).earlier == len(names)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": 0},
        {"parallel": 65},
        {"shard": (0, 2)},
        {"shard": (3, 2)},
        {"choose": ("a",)},
        {"choose": ("a", "b"), "detect": "cup"},
        {"detect": "cup", "answer": {"regex": "a"}},
        {"answer": {"max_tokens": 0}},
        {"answer": {"unknown": 0}},
        {"restart": True, "retry_errors": "all"},
    ],
)
def test_options_that_are_not_valid_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BatchOptions(**wrong)


def run(*arguments: object, cwd: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments)[:-1], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == check, done.stderr
    assert done.stdout == ""
    return done


def test_the_command_stores_answers_and_writes_a_table(images: Path, mixed: Path, tmp_path: Path) -> None:
    done = run(mixed, "-o", "out.jsonl", "--prompt", "What is {id}?", cwd=tmp_path, check=1)
    assert "rows       16 of 16" in done.stderr
    assert "errors     12, 5 image, 3 row, 2 option" in done.stderr
    assert len(answers(tmp_path / "out.jsonl")) == 16
    refused = run(mixed, "-o", "out.jsonl", cwd=tmp_path, check=1)
    assert refused.stderr.startswith("error: out.jsonl was made with prompt 'What is {id}?', and it is unset now")
    refused = run(mixed, "-o", "out.jsonl", "--retry-errors", "disk", cwd=tmp_path, check=1)
    assert "known are all, row, option, image" in refused.stderr
    given = subprocess.run(
        command("-", "-o", "paths.jsonl"),
        input="".join(f"{path}\n" for path in sorted(images.iterdir())[:2]).encode(),
        cwd=tmp_path,
        capture_output=True,
    )
    assert (given.returncode, given.stdout, given.stderr) == (0, b"", b"")
    assert len(answers(tmp_path / "paths.jsonl")) == 2


def test_ctrl_c_can_be_resumed(images: Path, tmp_path: Path) -> None:
    import signal
    import time

    out = tmp_path / "out.jsonl"
    arguments = [*command(images, "-o", out), "--parallel", "1"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    count = len(answers(out))
    assert process.returncode == 130
    assert f"interrupted after {count} of 12 rows; the same command resumes there" in errors
    subprocess.run(arguments, check=True)
    assert len(answers(out)) == 12


def test_what_is_not_installed_is_named(images: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['pyarrow'] = None; from lfm2vl_edge.cli import main; main()"
    arguments = [sys.executable, "-c", code, "batch", str(images), "-o", str(tmp_path / "o.parquet"), "-m", "tiny"]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 1
    assert "pip install 'lfm2vl-edge[batch]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"


def test_caches_of_a_long_batch_do_not_grow_with_small_views() -> None:
    from lfm2vl_edge.cache.memory import LruCache

    cache = LruCache(1 << 20)
    for number in range(1000):
        cache.put(number.to_bytes(4, "big"), np.zeros(1, np.uint8))
    assert (len(cache), cache.n_bytes) == (256, 256)
    assert cache.get((999).to_bytes(4, "big")) is not None
    assert cache.get((1).to_bytes(4, "big")) is None
