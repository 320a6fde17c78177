"""From arguments to rows: order, columns, templates, and what is not valid."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge.batch.inputs import Lines, all_rows, natural, open_inputs, scan
from lfm2vl_edge.batch.rows import Row, carried_name, row_of
from lfm2vl_edge.batch.run import prepare_inputs
from lfm2vl_edge.batch.storage import Place
from lfm2vl_edge.errors import DataError


def rows_of(*arguments: object, stdin: bytes = b"") -> list[Row]:
    return list(all_rows(open_inputs([str(one) for one in arguments], lambda: stdin)))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_is_read_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    names = ["page1.png", "page2.JPG", "page10.png", "sub2/a.webp", "sub10/a.webp", "sub10/b10.tif"]
    files(tmp_path, *reversed(names), ".hidden.png", ".git/x.png", "notes.txt", "rows.jsonl")
    assert [row.id for row in rows_of(tmp_path)] == [str(tmp_path / name) for name in names]


def test_natural_order_is_that_of_numbers_in_names() -> None:
    names = ["a2/1", "a10/1", "b", "b1", "b01", "b1a", "b²", "1", "02", "10"]
    assert sorted(names, key=natural)[:3] == ["1", "02", "10"]
    assert sorted(["img12.png", "img9.png", "img100.png"], key=natural) == ["img9.png", "img12.png", "img100.png"]


def test_globs_stdin_urls_and_files_keep_their_order_and_come_once(tmp_path: Path) -> None:
    files(tmp_path, "b.png", "a10.png", "a9.png", "deep/er/c.png")
    names = [str(tmp_path / "a9.png"), str(tmp_path / "a10.png")]
    assert [row.id for row in rows_of(tmp_path / "a*.png")] == names
    assert [row.id for row in rows_of(str(tmp_path / "**" / "c.png"))] == [str(tmp_path / "deep/er/c.png")]
    given = rows_of("https://example.com/a.png", "-", tmp_path / "b.png", names[0], stdin=f"{names[0]}\r\n\n".encode())
    assert [row.images[0] for row in given] == ["https://example.com/a.png", names[0], str(tmp_path / "b.png")]
    assert all(row.columns == {} for row in given)


def test_a_line_has_an_image_a_prompt_options_and_other_columns(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {"image": "a.png", "prompt": "Why?", "id": "x", "max_tokens": 3, "sku": 7, "answer": "no"},
        "",
        {"image": ["/b.png", "data:image/png;base64,AA", "http://h/c.png"], "seed": None},
        {"image": [], "id": 9},
    )
    first, second, third = rows_of(path)
    assert (first.id, first.images, first.prompt) == ("x", (f"{tmp_path}/a.png",), "Why?")
    assert first.overrides == {"max_tokens": 3}
    assert dict(first.carried())["sku"] == 7
    assert dict(first.carried())["input_answer"] == "no"
    assert (second.id, second.images) == (f"{path}:3", ("/b.png", "data:image/png;base64,AA", "http://h/c.png"))
    assert second.overrides == {}
    assert (third.id, third.images) == (9, ())


def test_a_parquet_file_has_the_same_rows_as_its_json_lines(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": f"r{n}", "image": [f"{n}.png"], "prompt": None if n % 2 else "Why?", "n": n} for n in range(200)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=30)
    lines(tmp_path / "rows.jsonl", *rows)
    assert rows_of(tmp_path / "rows.parquet") == rows_of(tmp_path / "rows.jsonl")


def test_images_stored_in_a_parquet_file_are_bytes_and_are_not_repeated(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": {"bytes": b"abc", "path": None}, "when": None}, {"image": {"bytes": None, "path": "a.png"}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = rows_of(tmp_path / "rows.parquet")
    assert first.images == (b"abc",)
    assert first.shown_image.startswith("3 bytes, sha256 ba7816bf")
    assert second.images == (f"{tmp_path}/a.png",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object"),
        ("\x00", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ({"file": "a.png"}, "no column 'image'; it has file"),
        ({}, "it has no columns"),
        ({"image": None}, "'image' is None"),
        ({"image": 7}, "'image' is 7"),
        ({"image": ["a.png", ""]}, "'image' is ''"),
        ({"image": "a.png", "prompt": 7}, "'prompt' is 7"),
        ({"image": "a.png", "prompt": " "}, "'prompt' is ' '"),
        ({"image": "a.png", "id": ""}, "'id' is ''"),
        ({"image": "a.png", "id": [1]}, r"'id' is \[1\]"),
        ('{"image": "\\ud800"}', "surrogate"),
        ('{"image": "a.png", "id": "\\ud800"}', "surrogate"),
    ],
)
def test_a_broken_row_is_a_row_with_an_error(tmp_path: Path, row: Any, message: str) -> None:
    good = {"image": "a.png"}
    first, broken, last = rows_of(lines(tmp_path / "rows.jsonl", good, row, good))
    assert first.error is None
    assert last.error is None
    assert broken.error is not None
    assert re.search(message, broken.error)
    assert len(broken.error) < 400
    assert broken.id == f"{tmp_path}/rows.jsonl:2"


def test_a_huge_line_is_an_error_of_its_row_and_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2vl_edge.batch.inputs._MAX_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"image": "a.png"}\n')
    tracemalloc.start()
    huge, good = Lines(Place(str(path))).rows()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "the line has more than" in (huge.error or "")
    assert good.error is None
    assert peak < 8 << 20


def test_a_template_is_filled_with_columns() -> None:
    row = row_of({"image": "a.png", "sku": 7, "name": "cup", "tags": ["ü"], "none": None}, "line:1", "")
    assert row.filled('Is this {name} number {sku}? {tags} {{sku}} {"a": 1} {}') == (
        'Is this cup number 7? ["ü"] {sku} {"a": 1} {}'
    )
    with pytest.raises(DataError, match="needs the column 'none'"):
        row.filled("{none}")
    for hostile in ("{name.__class__}", "{name!r}", "{0}", "{name:>999999999}"):
        is_name = hostile in ("{name.__class__}", "{0}")
        with pytest.raises(DataError, match="needs the column") if is_name else nullcontext():
            assert row.filled(hostile) == hostile
    assert row_of({"image": "a", "prompt": "Mine?"}, "1", "").filled("All?") == "Mine?"
    assert row_of({"image": "a", "prompt": "Mine?"}, "1", "").filled("{prompt} Be brief.") == "Mine? Be brief."


def test_a_carried_column_never_replaces_one_of_the_output() -> None:
    columns = {"image": "a", "answer": 1, "input_answer": 2, "key": 3, "error": 4, "usage": 5, "ok": 6}
    names = [name for name, _ in row_of(columns, "1", "").carried()]
    assert len(set(names)) == len(columns) - 1
    assert set(names).isdisjoint({"answer", "key", "error", "usage", "id", "image"})
    assert carried_name("ok", columns) == "ok"


def test_a_key_is_that_of_what_is_asked() -> None:
    row = row_of({"image": "a.png", "sku": 1, "other": 1}, "1", "")
    same = row_of({"image": "a.png", "sku": 1, "other": 2}, "1", "")
    assert row.key("{sku}?") == same.key("{sku}?")
    changes: list[dict[str, Any]] = [{"image": "b.png"}, {"sku": 2}, {"max_tokens": 3}, {"prompt": "x"}]
    for change in changes:
        assert row_of({"image": "a.png", "sku": 1, **change}, "1", "").key("{sku}?") != row.key("{sku}?")


def test_rows_with_one_id_are_refused_with_their_numbers(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", *({"image": "a.png", "id": name} for name in ("a", "b", 7, "c", "7")))
    with pytest.raises(DataError, match="rows 3 and 5 have the same id 7; give each row its own"):
        scan(open_inputs([str(path)]))


def test_a_column_that_no_row_has_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"image": "a.png", "name": "cup"})
    with pytest.raises(DataError, match="no row has the column 'nmae'.*there are id, image, name"):
        scan(open_inputs([str(path)]), "Is this {nmae}?")
    scan(open_inputs([str(path)]), "Is this {name}, {id}, {image}?")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "there is no file at"),
        ("empty", "there are no images in"),
        ("*.gif", "no file matches"),
        ("a\0b", "there is no file at"),
        ("x" * 5000, "is not a path"),
        ("broken.parquet", "is not a readable Parquet file"),
        ("empty.jsonl", "have no rows"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not one PAR1")
    with pytest.raises(DataError, match=message) as caught:
        scan(open_inputs([str(tmp_path / name)]))
    assert len(str(caught.value)) < 400


def test_stdin_without_paths_is_refused() -> None:
    with pytest.raises(DataError, match="there are no inputs"):
        open_inputs(["-"], lambda: b"\n\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="cannot read the folder"):
        open_inputs([str(tmp_path)])


@pytest.mark.parametrize("out", ["out.json", "out", ".jsonl"])
def test_an_output_of_another_kind_is_refused(tmp_path: Path, out: str) -> None:
    files(tmp_path, "a.png")
    with pytest.raises(DataError, match="must end with .jsonl or .parquet"):
        prepare_inputs([tmp_path / "a.png"], tmp_path / out)


@pytest.mark.parametrize("on_cluster", [False, True])
@pytest.mark.parametrize(
    "out", ["s3://b/out.jsonl", "gs://b/out.parquet", "http://u:secret@h/out.jsonl", "file:/out.jsonl"]
)
def test_an_output_under_a_url_is_not_a_folder_of_that_name(tmp_path: Path, out: str, on_cluster: bool) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    if on_cluster and out.startswith(("s3", "gs")):
        assert prepare_inputs([tmp_path / "a.png"], out, on_cluster=True)
        return
    with pytest.raises(DataError, match="^the output .* cannot be written; name ") as error:
        prepare_inputs([tmp_path / "a.png"], out, on_cluster=on_cluster)
    assert "secret" not in str(error.value)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"image": "a.png"})
    (tmp_path / "link.jsonl").symlink_to(path)
    for name in ("rows.jsonl", "link.jsonl", "sub/../rows.jsonl"):
        with pytest.raises(DataError, match="is the input and the output"):
            prepare_inputs([path], tmp_path / name)


def test_a_file_name_that_is_not_text_is_an_error_of_its_row(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).touch()
    (row,) = rows_of(tmp_path)
    assert "not UTF-8" in (row.error or "")
    assert str(row.id).endswith("\\xff.png")
