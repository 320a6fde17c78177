"""Parquet output: the same rows as JSON lines, in files that are written whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import DataError, Model
from lfm2vl_edge.batch import run_batch, shards, table
from tests.batch.kills import answers
from tests.batch.test_inputs import lines
from tests.batch.test_run import Stop, options, stop_after

pytest.importorskip("pyarrow")
from pyarrow import dataset, parquet


@pytest.fixture(autouse=True)
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 5)


@pytest.fixture
def rows(images: Path, tmp_path: Path) -> Path:
    kinds: list[dict[str, Any]] = [{"n": 1, "x": 0.5, "flag": True}, {"n": None, "x": 2, "tags": ["a"], "n2": 2**70}]
    names = [{"image": str(images / f"image{n}.png"), "id": n, **kinds[n % 2]} for n in range(12)]
    return lines(tmp_path / "rows.jsonl", *names, {"image": "missing.png", "id": "missing", "flag": False})


def stored(folder: Path) -> list[dict[str, Any]]:
    """Return the rows as other programs read them: the folder is one table."""
    found: list[dict[str, Any]] = dataset.dataset(folder, format="parquet").to_table().to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def test_a_table_has_the_rows_of_json_lines(tiny: Model, rows: Path, tmp_path: Path) -> None:
    run_batch(tiny, [rows], tmp_path / "out.jsonl", options())
    run_batch(tiny, [rows], tmp_path / "out.parquet", options())
    assert sorted(path.name for path in (tmp_path / "out.parquet").glob("part-*")) == [
        f"part-00000{number}.parquet" for number in range(3)
    ]
    for row, expected in zip(stored(tmp_path / "out.parquet"), answers(tmp_path / "out.jsonl"), strict=True):
        assert row["id"] == str(expected["id"])
        for name in ("answer", "finish_reason", "key", "n", "x", "flag"):
            assert row[name] == expected.get(name)
        assert row["tags"] == (json.dumps(expected["tags"]) if "tags" in expected else None)
        assert row["n2"] == (str(2**70) if "n2" in expected else None)
        assert row["prompt_tokens"] == (expected["usage"] or {}).get("prompt_tokens")
        assert row["error_kind"] == (expected["error"] or {}).get("kind")
    assert run_batch(tiny, [rows], tmp_path / "out.parquet", options()).rows == 0


@pytest.mark.parametrize("count", [3, 7, 10])
def test_a_table_is_resumed_at_every_moment(tiny: Model, rows: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(Stop):
        run_batch(tiny, [rows], out, options(), progress=stop_after(count))
    assert run_batch(tiny, [rows], out, options()).earlier == count
    assert [row["id"] for row in stored(out)] == [*map(str, range(12)), "missing"]


def test_rows_that_are_in_a_file_and_still_pending_are_stored_once(tiny: Model, rows: Path, tmp_path: Path) -> None:
    """The process may end after a file was written, and before its rows were removed from the journal."""
    out = tmp_path / "out.parquet"
    with pytest.raises(Stop):
        run_batch(tiny, [rows], out, options(), progress=stop_after(4))
    pending = (out / "_pending.jsonl").read_bytes()
    with pytest.raises(Stop):
        run_batch(tiny, [rows], out, options(), progress=stop_after(2))
    later = (out / "_pending.jsonl").read_bytes()
    (out / "_pending.jsonl").write_bytes(pending + later + b'{"torn')
    run_batch(tiny, [rows], out, options())
    assert sorted(row["id"] for row in stored(out)) == sorted([*map(str, range(12)), "missing"])


def test_retry_removes_rows_from_files(tiny: Model, rows: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    run_batch(tiny, [rows], out, options())
    (tmp_path / "missing.png").symlink_to(images / "image3.png")
    assert run_batch(tiny, [rows], out, options(retry_errors="image")).rows == 1
    assert [row["id"] for row in stored(out) if row["error_kind"] is not None] == []
    assert len(stored(out)) == 13


def test_changed_columns_and_settings_are_refused(tiny: Model, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(Stop):
        run_batch(tiny, [rows], out, options(), progress=stop_after(2))
    with pytest.raises(DataError, match="was made with prompt unset, and it is 'Why"):
        run_batch(tiny, [rows], out, options(prompt="Why?"))
    rows.write_text(rows.read_text().replace('"n": 1', '"n": "one"'))
    with pytest.raises(DataError, match="was made with columns"):
        run_batch(tiny, [rows], out, options())
    run_batch(tiny, [rows], out, options(restart=True))
    assert stored(out)[0]["n"] == "one"


def test_foreign_and_damaged_tables_are_refused(tiny: Model, rows: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.parquet"
    foreign.write_bytes(rows.read_bytes())
    with pytest.raises(DataError, match="was not written by batch"):
        run_batch(tiny, [rows], foreign, options(restart=True))
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    (folder / "mine.txt").touch()
    with pytest.raises(DataError, match="was not written by batch"):
        run_batch(tiny, [rows], folder, options(restart=True))
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    out = tmp_path / "out.parquet"
    run_batch(tiny, [rows], out, options())
    (out / "part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="part-000001.parquet is damaged: .*; remove it"):
        run_batch(tiny, [rows], out, options())


def test_a_table_is_an_input_of_the_next_batch(tiny: Model, rows: Path, tmp_path: Path) -> None:
    run_batch(tiny, [rows], tmp_path / "out.parquet", options())
    done = run_batch(tiny, [tmp_path / "out.parquet"], tmp_path / "next.jsonl", options(prompt="Is it {answer}?"))
    assert done.done == 13
    assert answers(tmp_path / "next.jsonl")[0]["input_answer"] == stored(tmp_path / "out.parquet")[0]["answer"]


def test_text_that_is_not_unicode_is_stored(tmp_path: Path) -> None:
    schema = table.Tables({"note": {"str"}})
    record = {"id": "a", "image": "a", "error": None, "usage": None, "note": "\ud800"}
    (tmp_path / "a.parquet").write_bytes(schema.data([record]))
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]["note"] == "?"


def test_help_does_not_import_pyarrow() -> None:
    code = "import sys, lfm2vl_edge.batch; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
