"""`make published` against a hub on 127.0.0.1, and its comparison against what transformers computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.cache.memory import Caches
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.errors import ConfigError, DownloadError
from lfm2vl_edge.models.hub import RemoteFile, Repository, read_repository
from models.published import __main__ as program
from models.published import compare, refresh
from models.published import theirs as theirs_program
from tests.conftest import IMAGES, REFERENCE, HubHere, conversations
from tests.hub_server import Fault, sha256

ROOT = Path(__file__).parents[2]
REPO = "LiquidAI/LFM2.5-VL-450M"
NAMES = ("lfm2.5-vl-450m", "lfm2-vl-450m")
ALTERED = "blk.1.ffn_up.weight"


@pytest.fixture
def official(hub_here: HubHere, tmp_path: Path) -> dict[str, bytes]:
    """Publish a checkpoint and its pair, one of whose tensors has another last byte; the second model is missing."""
    import gguf

    checkpoint = REFERENCE / "a" / "checkpoint"
    made = convert_checkpoint(
        checkpoint, tmp_path / "pair", quant="Q4_0", mmproj_quant="Q8_0", pad=False, quantizer=quantize_file
    )
    tensor = next(one for one in gguf.GGUFReader(made.model).tensors if one.name == ALTERED)
    with made.model.open("r+b") as file:
        file.seek(tensor.data_offset + tensor.n_bytes - 1)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    files = {"LFM2.5-VL-450M-Q4_0.gguf": made.model, "mmproj-LFM2.5-VL-450m-Q8_0.gguf": made.mmproj}
    pair = {name: path.read_bytes() for name, path in files.items()}
    hub_here.hub.repos[f"{REPO}-GGUF"] = pair
    hub_here.hub.repos[REPO] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    return pair


def run(folder: Path, here: HubHere, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the program with a registry and a work folder of its own."""
    places = ["--registry", str(folder / "registry.json"), "--work", str(folder / "work")]
    command = [sys.executable, "-m", "models.published", *places, *more]
    environment = os.environ | here.environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_a_model_is_compared_and_a_missing_one_is_a_row(
    official: dict[str, bytes], hub_here: HubHere, tmp_path: Path
) -> None:
    shutil.copy(program.REGISTRY, tmp_path)
    done = run(tmp_path, hub_here, *NAMES, "--without-transformers")
    assert done.returncode == 1, done.stderr
    good, failed = done.stdout.split("\n\n### ")
    assert good.startswith(
        "### LFM2.5-VL-450M\n\n| | |\n|---|---|\n| files | LiquidAI/LFM2.5-VL-450M-GGUF @ c0c0c0c0: "
    )
    assert f"| language tensors that `convert` writes alike | 55 of 56; {ALTERED}: other bytes |" in good
    assert "| mmproj tensors that `convert` writes alike | 59 of 59 |" in good
    assert "| transformers | not compared |" in good
    for question in compare.QUESTIONS:
        assert f"\n| {question} | " in good
    assert "lfm2-vl-450m\n" in failed
    assert "| error | no repository LiquidAI/LFM2-VL-450M-GGUF" in failed

    rows = {row["name"]: row for row in refresh.read_rows(tmp_path / "registry.json")}
    listed = {one["file"]: one for kind in refresh.KINDS for one in rows[NAMES[0]][kind]}
    for name, data in official.items():
        assert listed[name] == {"file": name, "bytes": len(data), "sha256": sha256(data)}
    assert listed["LFM2.5-VL-450M-Q8_0.gguf"] == {"file": "LFM2.5-VL-450M-Q8_0.gguf", "bytes": None, "sha256": None}
    before = {row["name"]: row for row in refresh.read_rows(program.REGISTRY)}
    assert {name: rows[name] for name in rows if name != NAMES[0]} == {
        name: before[name] for name in rows if name != NAMES[0]
    }
    assert [path for path in (tmp_path / "work").rglob("*") if path.suffix in (".gguf", ".safetensors")] == []
    assert not (tmp_path / "work" / "files").exists()

    n_requests = len(hub_here.hub.file_requests())
    again = run(tmp_path, hub_here, NAMES[0], "--without-transformers")
    assert (again.returncode, again.stdout) == (0, f"{good}\n".removesuffix("\n\n") + "\n")
    assert len(hub_here.hub.file_requests()) == n_requests


def test_a_broken_download_is_a_row_and_goes_on(official: dict[str, bytes], hub_here: HubHere, tmp_path: Path) -> None:
    """The hub refuses a file of the checkpoint: nothing is examined, and what was received before is kept."""
    row = next(one for one in refresh.read_rows(program.REGISTRY) if one["name"] == NAMES[0])
    row = refresh.refreshed(row, read_repository(row["repo"], None))
    hub_here.hub.fault = lambda one: Fault(status=403) if "model.safetensors" in one.path else None
    with pytest.raises(DownloadError):
        compare.examine(row, tmp_path / "work", transformers=False, keep=False)
    hub_here.hub.fault = lambda one: None
    received = [one.path for one in hub_here.hub.file_requests() if one.path.endswith(".gguf")]
    found = compare.examine(row, tmp_path / "work", transformers=False, keep=True)
    assert [one.path for one in hub_here.hub.file_requests() if one.path.endswith(".gguf")] == received
    assert found["checkpoint"]["revision"] == hub_here.hub.commit(REPO)
    assert list(compare.complaints(found)) == []
    assert list(hub_here.cache.rglob("*.gguf"))


def test_a_crash_is_a_row(tmp_path: Path) -> None:
    shutil.copy(program.REGISTRY, tmp_path)
    found = program.examine({"name": "nothing"}, tmp_path / "registry.json", tmp_path, transformers=False, keep=False)
    assert found == {"error": "the process ended with exit code 1; see its messages"}
    assert program.table("nothing", found).endswith(f"| error | {found['error']} |\n")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_here: HubHere) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: None if name.startswith("torch") else name)
    with pytest.raises(ConfigError, match="^not installed: torch, torchvision; `make published` installs them"):
        program.check_packages(transformers=True)
    program.check_packages(transformers=False)


def test_unknown_names_and_damaged_registries_are_refused(tmp_path: Path, hub_here: HubHere) -> None:
    done = run(tmp_path, hub_here, "--without-transformers")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for text in ("", "[", "[]", "null", '{"models": []}', '{"licence": "", "models": [{"name": 1}]}', '{"models": 1}'):
        (tmp_path / "registry.json").write_text(text)
        with pytest.raises(ConfigError, match=r"is not a registry\.json"):
            refresh.read_rows(tmp_path / "registry.json")
    with pytest.raises(ConfigError, match="^unknown model 'other'; known: a$"):
        program.chosen(["other"], ["a"])


@pytest.mark.parametrize("stored", ["", "[]", "{}", '"x"', '{"revision": "a"}', '{"revision": "b", "compared": true}'])
def test_results_that_cannot_be_used_are_ignored(stored: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(stored)
    assert program.stored(tmp_path, {"name": "m", "revision": "a"}, transformers=False) is None


def test_a_result_without_transformers_is_not_one_with_them(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"revision": "a", "compared": false}')
    assert program.stored(tmp_path, {"name": "m", "revision": "a"}, transformers=False)
    assert program.stored(tmp_path, {"name": "m", "revision": "a"}, transformers=True) is None


def test_the_registry_is_written_as_it_was() -> None:
    text = program.REGISTRY.read_text(encoding="utf-8")
    assert refresh.as_text(json.loads(text)) == text


def repository(*files: RemoteFile) -> Repository:
    return Repository(repo="o/r", commit="d" * 40, files=files, licence=None, architecture=None)


def test_what_the_hub_does_not_state_is_null() -> None:
    names = {"models": ["a-Q8_0.gguf", "a-Q4_0.gguf"], "mmprojs": ["mmproj-a-F16.gguf"]}
    row: dict[str, Any] = {"name": "a", "repo": "o/r", "revision": None, "quant": "Q4_0"}
    row |= {kind: [{"file": one, "bytes": 9, "sha256": "c" * 64} for one in files] for kind, files in names.items()}
    small = RemoteFile(path="a-Q4_0.gguf", n_bytes=5, digest="e" * 40)
    encoder = RemoteFile(path="mmproj-a-F16.gguf", n_bytes=7, digest="f" * 64)
    new = refresh.refreshed(row, repository(small, encoder))
    assert new["revision"] == "d" * 40
    assert [(one["bytes"], one["sha256"]) for one in new["models"]] == [(None, None), (5, None)]
    assert new["mmprojs"][0] == {"file": "mmproj-a-F16.gguf", "bytes": 7, "sha256": "f" * 64}
    assert refresh.smallest_pair(new) == ("Q4_0", "F16")
    changes = list(refresh.differences(row, new))
    assert changes[1] == "a: the hub has no a-Q8_0.gguf"
    assert changes[2].endswith(f"5 bytes, SHA-256 None; it replaces one of 9 bytes, {'c' * 64}")
    with pytest.raises(DownloadError, match="none of the mmprojs"):
        refresh.refreshed(row, repository(small))
    with pytest.raises(DownloadError, match="no size of a pair of a"):
        refresh.smallest_pair({**new, "mmprojs": [{"file": "mmproj-a-F16.gguf", "bytes": None, "sha256": None}]})


@pytest.fixture
def stored_values() -> tuple[list[dict[str, str]], dict[str, Any]]:
    """A prompt, and what transformers computed for it: 1500x500 pixels are three tiles and a thumbnail."""
    case = conversations("a")["wide"]
    (message,) = case.messages
    question = message["content"][1]["text"]
    assert case.embeddings is not None
    values = {"ids.0": np.array(case.input_ids), "views.0": np.array([[32, 32]] * 3 + [[18, 54]])}
    values |= {"embeddings.0": case.embeddings, "logits.0": case.logits, "version": np.array("5")}
    return [{"image": str(IMAGES / "wide.png"), "question": question}], values


def found_for(model: Model, prompts: list[dict[str, str]], theirs: dict[str, Any]) -> dict[str, Any]:
    compared = compare.compare_model(model, prompts, theirs)
    return {"tensors": {}, "settings": [], "transformers": compared}


def test_values_equal_those_of_transformers(
    model: Model, stored_values: tuple[list[dict[str, str]], dict[str, Any]]
) -> None:
    prompts, theirs = stored_values
    found = found_for(model, prompts, theirs)
    assert list(compare.complaints(found)) == []
    assert found["transformers"]["n_views"] == 4
    assert found["transformers"]["n_ids"] == len(theirs["ids.0"])
    assert found["transformers"]["embedding_error"] <= 5e-6
    assert found["transformers"]["float"]["most"] <= 1e-5


def test_views_are_encoded_once_whatever_the_number_of_questions(
    model: Model, stored_values: tuple[list[dict[str, str]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, theirs = stored_values
    theirs |= {f"{name}.1": theirs[f"{name}.0"] for name in ("ids", "views", "logits")}
    encode, encoded = model.engine.encode, list[int]()

    def counted(pixels: Any, n_tokens: int) -> Any:
        encoded.append(n_tokens)
        return encode(pixels, n_tokens)

    monkeypatch.setattr(model.engine, "encode", counted)
    monkeypatch.setattr(model, "runtime", replace(model.runtime, caches=Caches()))
    assert compare.compare_model(model, prompts * 2, theirs)["equal_ids"] == 2
    assert len(encoded) == 4


def test_transformers_encodes_an_image_once() -> None:
    given, known = list[Any](), dict[str, Any]()

    def encode(*views: Any, **options: Any) -> Any:
        given.append((views, options))
        return object()

    first = theirs_program.encoded_once(encode, known, "a.png")(1, spatial_shapes=2)
    assert theirs_program.encoded_once(encode, known, "a.png")(1, spatial_shapes=2) is first
    assert theirs_program.encoded_once(encode, known, "b.png")(3) is not first
    assert given == [((1,), {"spatial_shapes": 2}), ((3,), {})]
    assert known["a.png"] is first


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("ids.0", lambda ids: np.append(ids, 1), "ids differ in 1 of 1 prompts"),
        ("views.0", lambda views: views[:, ::-1], "views differ in 1 of 1 prompts"),
        ("embeddings.0", lambda values: values * 1.001, "error of embeddings 1.0e-03 is above 1e-05"),
        ("embeddings.0", lambda values: values[1:], "error of embeddings inf is above 1e-05"),
        ("embeddings.0", lambda values: values * np.nan, "error of embeddings nan is above 1e-05"),
        ("logits.0", lambda logits: logits[::-1], "divergence "),
    ],
)
def test_what_differs_is_a_complaint(
    name: str,
    change: Callable[[Any], Any],
    complaint: str,
    model: Model,
    stored_values: tuple[list[dict[str, str]], dict[str, Any]],
) -> None:
    prompts, theirs = stored_values
    (found,) = compare.complaints(found_for(model, prompts, theirs | {name: change(theirs[name])}))
    assert found.startswith(complaint)


def test_tensors_with_other_bytes_alone_are_no_complaint() -> None:
    same = ["Q4_0", [2, 32], "a"]
    assert compare.difference(same, same) == ""
    assert compare.difference(same, ["Q4_0", [2, 32], "b"]) == "other bytes"
    assert compare.difference(same, ["F16", [2, 32], "b"]) == "type F16, ours Q4_0"
    assert compare.difference(None, same) == "not in ours"
    tensors = {"language": {"count": 2, "different": ["x: other bytes", "y: not in ours"]}}
    assert list(compare.complaints({"tensors": tensors, "settings": []})) == ["language: y: not in ours"]


def test_settings_that_differ_are_named(pair: Callable[[str, str], Path]) -> None:
    """Checkpoints b and c have other settings than a, and another vocabulary."""
    from lfm2vl_edge.models.names import find_pair

    a, c = find_pair(pair("a", "F16")), find_pair(pair("c", "F16"))
    assert list(compare.different_settings(a, a)) == []
    assert list(compare.different_settings(a, c))


def test_cells_stay_within_their_row() -> None:
    assert program.cell("a|b\n| c\x1b[2J\t d") == "a\\|b \\| c?[2J d"


def test_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "total_memory", lambda: 8_000_000_000)
    compare.check_memory(450_000_000)
    with pytest.raises(ConfigError, match="takes 16 GB of memory, this machine has 8; .*--without-transformers"):
        compare.check_memory(3_000_000_000)
