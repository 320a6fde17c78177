"""What conversions write over, and what they read of a checkpoint that was made on purpose."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import gguf
import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_convert.imatrix import write_imatrix
from lfm2vl_edge.errors import ConvertError

NAMES = ["checkpoint-F16.gguf", "mmproj-checkpoint-F16.gguf"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoint(reference_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(reference_dir / "a" / "checkpoint", folder, copy_function=shutil.copyfile)
    return folder


def test_a_link_stays_and_its_file_is_written(checkpoint: Path, tmp_path: Path) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir()
    disk.mkdir()
    (out / NAMES[0]).symlink_to(disk / "model.gguf")
    convert_checkpoint(checkpoint, out, force=True)
    assert (out / NAMES[0]).is_symlink()
    assert (disk / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert names(disk) == ["model.gguf"]


def test_devices_are_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / NAMES[1])
    with pytest.raises(ConvertError, match="is not a regular file"):
        convert_checkpoint(checkpoint, out, force=True)
    assert names(out) == [NAMES[1]]
    (tmp_path / "null").symlink_to("/dev/null")
    write_imatrix(tmp_path / "null", {"blk.0.ffn_up.weight": np.ones(4)}, {"blk.0.ffn_up.weight": 1}, ["x"])
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_a_kill_between_two_renames_leaves_no_mixed_pair(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment are files of two runs in the folder."""
    out = tmp_path / "out"
    out.mkdir()
    for name in NAMES:
        (out / name).write_bytes(b"old")
    seen: list[list[bool]] = []

    def record() -> None:
        seen.append([path.read_bytes() == b"old" for path in sorted(out.glob("[!.]*.gguf"))])

    replace, unlink = Path.replace, Path.unlink

    def replace_and_record(self: Path, target: Path) -> Path:
        record()
        found = replace(self, target)
        record()
        return found

    def unlink_and_record(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        record()

    monkeypatch.setattr(Path, "replace", replace_and_record)
    monkeypatch.setattr(Path, "unlink", unlink_and_record)
    convert_checkpoint(checkpoint, out, force=True)
    assert len(seen) > 4
    assert all(len(set(state)) <= 1 for state in seen), seen
    assert seen[-1] == [False, False]


def test_cards_with_aliases_or_long_headers_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    (checkpoint / "README.md").write_text(f"---\n{bomb}license_name: *a8\n---\nText")
    with pytest.raises(ConvertError, match=r"README.md has YAML aliases"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    (checkpoint / "README.md").write_text("---\n" + "tags: [a]\n" * 10_000 + "---\nText")
    with pytest.raises(ConvertError, match="header of .* has 99999 characters"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    (checkpoint / "README.md").write_text("---\nlicense: other # 2 * 3\n---\n" + "*Text* &c.\n" * 10_000)
    convert_checkpoint(checkpoint, tmp_path / "out")


def test_a_template_outside_of_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    secret, template = tmp_path / "secret", checkpoint / "chat_template.jinja"
    secret.write_text("a private key")
    text = template.read_text()
    template.unlink()
    template.symlink_to(secret)
    with pytest.raises(ConvertError, match=r"chat_template.jinja is a link to .*secret, outside"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    template.unlink()
    (checkpoint / "more").mkdir()
    (checkpoint / "more" / "template").write_text(text)
    template.symlink_to("more/template")
    convert_checkpoint(checkpoint, tmp_path / "out")


def test_links_of_the_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()  # quote
    for path in checkpoint.iterdir():
        shutil.copyfile(path, repository / "blobs" / f"stored-{path.name}")  # quote
        (snapshot / path.name).symlink_to(f"../../blobs/stored-{path.name}")  # quote
    result = convert_checkpoint(snapshot, tmp_path / "out")
    field = gguf.GGUFReader(result.model).fields["tokenizer.chat_template"]
    assert field.contents() == (checkpoint / "chat_template.jinja").read_text()
