"""Downloads by name: which files are chosen, verified, entered into the manifest and removed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lfm2vl_edge import DownloadError, EdgeError, Model, ModelNotFound, ModelNotPulled
from lfm2vl_edge.cli._loading import checkpoint_files
from lfm2vl_edge.models import hub, registry
from lfm2vl_edge.models.download import Download, _choose, download_checkpoint, download_pair, remove
from lfm2vl_edge.models.hub import RemoteFile, Repository
from lfm2vl_edge.models.manifest import ManifestEntry, manifest_path, read_manifest
from lfm2vl_edge.models.names import resolve_model
from lfm2vl_edge.models.registry import KnownFile, KnownModel, reference_of
from tests.conftest import REFERENCE, HubHere, Pair
from tests.hub_server import COMMIT, Fault, Hub, git_digest, is_lfs, sha256

REPO = "owner/pair-GGUF"
CHECKPOINT = "owner/LFM2-VL-mine"


@pytest.fixture
def server(hub_here: HubHere, pair: Pair) -> Hub:
    """Serve a pair under the names of two types, and the checkpoint that it was converted from."""
    folder = pair("a", "BF16")
    model, mmproj = (folder / f"{kind}checkpoint-BF16.gguf" for kind in ("", "mmproj-"))
    hub_here.hub.repos[REPO] = {
        "README.md": b"---\nlicense: other\n---\n",
        **{f"pair-{quant}.gguf": model.read_bytes() for quant in ("BF16", "Q8_0")},
        **{f"mmproj-pair-{quant}.gguf": mmproj.read_bytes() for quant in ("BF16", "F16")},
    }
    files = {path.name: path.read_bytes() for path in (REFERENCE / "a" / "checkpoint").iterdir()}
    hub_here.hub.repos[CHECKPOINT] = files | {
        "training.log": b"x",
        "pytorch_model.bin": b"x",
        "onnx/config.json": b"x",
    }
    return hub_here.hub


def entry_of(file: dict[str, Any]) -> bytes:
    """Return a manifest in which a pair's files have these fields."""
    entry = {"repo": REPO, "quant": "BF16", "revision": "x", "files": [file] * 2}
    return json.dumps({"format": 1, "models": [entry]}).encode()


def names(entry: ManifestEntry) -> list[str]:
    return [file.path.name for file in entry.files]


def test_a_pair_is_downloaded_listed_and_opened_by_name(server: Hub) -> None:
    started: list[Download] = []
    progress: list[tuple[int, int]] = []
    entry = download_pair(f"{REPO}:BF16", on_start=started.append, progress=lambda *counts: progress.append(counts))
    assert names(entry) == ["pair-BF16.gguf", "mmproj-pair-F16.gguf"]
    assert entry.revision == COMMIT
    assert [sha256(file.path.read_bytes()) for file in entry.files] == [file.digest for file in entry.files]
    assert started[0].licence == "lfm1.0"
    assert started[0].n_bytes == entry.n_bytes
    assert progress[-1] == (entry.n_bytes, entry.n_bytes)
    assert read_manifest() == [entry]
    with Model.open(f"{REPO}:bf16") as model:
        assert model.config.image_source.endswith("mmproj-pair-F16.gguf")
    assert resolve_model().pair == resolve_model(REPO).pair == resolve_model(REPO.upper() + ":BF16").pair
    assert not resolve_model().is_fallback


def test_types_are_chosen(server: Hub) -> None:
    assert names(download_pair(REPO)) == ["pair-Q8_0.gguf", "mmproj-pair-F16.gguf"]
    assert names(download_pair(f"{REPO}:Q8_0", mmproj_quant="bf16")) == ["pair-Q8_0.gguf", "mmproj-pair-BF16.gguf"]
    assert not list(
        hub.hub_cache().glob("*/snapshots/*/*F16.gguf".replace("*F16", "*pair-F16"))
    )  # the F16 one was replaced
    with pytest.raises(DownloadError, match="has no file of type Q9_K; there are: BF16, Q8_0"):
        download_pair(f"{REPO}:q9_k")
    with pytest.raises(DownloadError, match="has no file of type Q9; there are: BF16, F16"):
        download_pair(REPO, mmproj_quant="Q9")
    server.repos[REPO].pop("mmproj-pair-F16.gguf")
    server.repos[REPO].pop("mmproj-pair-BF16.gguf")
    with pytest.raises(DownloadError, match="has no mmproj file, so its model cannot see images"):
        download_pair(f"{REPO}:BF16")
    with pytest.raises(DownloadError, match=f"no GGUF model but a checkpoint; .*lfm2vl-edge convert {CHECKPOINT}"):
        download_pair(CHECKPOINT)
    server.architecture = "llama"
    server.repos[REPO]["mmproj-x-F16.gguf"] = b"x"
    with pytest.raises(DownloadError, match="has a 'llama' model, not LFM2-VL"):
        download_pair(f"{REPO}:BF16")


def test_the_downloaded_type_is_the_default_and_a_file_may_have_none(server: Hub) -> None:
    download_pair(f"{REPO}:BF16")
    assert names(download_pair(REPO, mmproj_quant="BF16")) == ["pair-BF16.gguf", "mmproj-pair-BF16.gguf"]
    remove(REPO)
    files = server.repos[REPO]
    server.repos[REPO] = {"model.gguf": files["pair-BF16.gguf"], "mmproj.gguf": files["mmproj-pair-F16.gguf"]}
    assert download_pair(REPO).quant == "GGUF"
    assert download_pair(f"{REPO}:GGUF", revision="main") == read_manifest()[0]
    assert resolve_model(f"{REPO}:GGUF").pair.model.name == "model.gguf"


def test_files_that_are_not_a_pair_are_not_listed(server: Hub) -> None:
    server.architecture = None
    server.repos[REPO]["pair-BF16.gguf"] = b"GGUF"
    with pytest.raises(EdgeError):
        download_pair(f"{REPO}:BF16")
    assert read_manifest() == []


def _blocked(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a network call")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _blocked)
        patch.setattr(socket, "getaddrinfo", _blocked)
        yield patch


def test_downloaded_models_work_without_a_network(server: Hub, request: pytest.FixtureRequest) -> None:
    first = download_pair(f"{REPO}:BF16")
    checkpoint = download_checkpoint(CHECKPOINT)
    n_requests = len(server.requests)
    request.getfixturevalue("no_network")
    assert download_pair(f"{REPO}:BF16") == first
    assert download_checkpoint(CHECKPOINT) == checkpoint
    with Model.open(REPO) as model, Model.open() as same:
        assert model.ask([], "Hi", temperature=0.0, max_tokens=2) == same.ask([], "Hi", temperature=0.0, max_tokens=2)
    with pytest.raises(
        ModelNotPulled, match=r"^lfm2-vl-3b:Q8_0 is not on this machine.*: lfm2vl-edge pull lfm2-vl-3b:Q8_0$"
    ):
        Model.open("LFM2-VL-3B:q8_0")
    assert len(server.requests) == n_requests


def test_a_damaged_file_is_detected_and_downloaded_again(server: Hub) -> None:
    entry = download_pair(f"{REPO}:BF16")
    data = entry.files[0].path.read_bytes()
    entry.files[0].path.resolve().write_bytes(data[:-1])
    with pytest.raises(ModelNotPulled):  # the size is wrong
        resolve_model(REPO)
    entry.files[0].path.resolve().write_bytes(data[:-1] + b"\xff")
    assert download_pair(f"{REPO}:BF16") == entry
    assert entry.files[0].path.read_bytes() == data
    entry.files[1].path.unlink()
    assert download_pair(f"{REPO}:BF16") == entry


def test_another_revision_replaces_the_first(server: Hub) -> None:
    first = download_pair(f"{REPO}:BF16")
    first.files[0].path.resolve().write_bytes(b"damaged")
    server.listing = lambda listed: listed | {"sha": COMMIT if COMMIT in server.requests[-1].path else "d1" * 20}
    assert download_pair(f"{REPO}:BF16") == first  # the same commit again, not the newest
    server.listing = lambda listed: listed
    server.commits[REPO] = "d1" * 20
    assert download_pair(f"{REPO}:BF16") == first
    second = download_pair(f"{REPO}:BF16", revision="main")
    assert second.revision == "d1" * 20
    assert read_manifest() == [second]
    assert not first.files[0].path.exists()
    assert second.exists
    with pytest.raises(DownloadError, match="no such revision"):
        download_pair(f"{REPO}:BF16", revision="../../v1")


def test_the_latest_is_last_and_can_be_removed(server: Hub) -> None:
    one, two = download_pair(f"{REPO}:BF16"), download_pair(f"{REPO}:Q8_0")
    assert read_manifest() == [one, two]
    download_pair(f"{REPO}:BF16")
    assert read_manifest() == [two, one]
    with pytest.raises(DownloadError, match=f"{REPO} may mean 2 models: {REPO}:Q8_0, {REPO}:BF16; give one of these"):
        remove(REPO)
    assert remove(f"{REPO}:BF16") == (f"{REPO}:BF16", 0)  # both types have the same bytes here
    assert two.exists
    assert resolve_model().pair.model == two.files[0].path
    assert remove(REPO) == (f"{REPO}:Q8_0", two.n_bytes)
    assert read_manifest() == []
    assert not [path for path in hub.hub_cache().rglob("*.gguf") if path.exists()]
    with pytest.raises(ModelNotPulled, match="is not on this machine"):
        remove(REPO)


def test_rm_also_removes_partial_files(server: Hub) -> None:
    server.fault = lambda one: (
        Fault(length=0 if one.start else 1000) if one.method == "GET" and "resolve" in one.path else None
    )
    with pytest.raises(DownloadError, match="broke off"):
        download_pair(REPO)
    assert remove(REPO) == (REPO, 1000)
    assert not list(hub.hub_cache().rglob("*.incomplete"))


@pytest.fixture
def published(server: Hub, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """Replace the registry by one model, whose files are those on the hub."""
    model, mmproj = (server.repos[REPO][name] for name in ("pair-Q8_0.gguf", "mmproj-pair-F16.gguf"))
    known = KnownModel(
        name="lfm2.5-vl-450m",
        repo=REPO,
        revision=COMMIT,
        quant="Q8_0",
        licence="LFM Open License v1.0",
        models=(KnownFile(file="pair-Q8_0.gguf", n_bytes=len(model), sha256=sha256(model)),),
        mmprojs=(KnownFile(file="mmproj-pair-F16.gguf", n_bytes=len(mmproj), sha256=None),),
    )
    monkeypatch.setattr(registry, "known_models", lambda: (known,))
    return known


def test_a_published_model_has_a_fixed_commit(
    server: Hub, published: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Download] = []
    entry = download_pair("LFM2.5-VL-450M", on_start=started.append)
    assert f"/revision/{COMMIT}" in server.requests[0].path
    assert (started[0].name, started[0].licence) == ("lfm2.5-vl-450m", "LFM Open License v1.0")
    assert (
        resolve_model("lfm2.5-vl-450m").pair == resolve_model(REPO).pair == resolve_model("lfm2.5-vl-450m:Q8_0").pair
    )
    other = replace(published, models=(replace(published.models[0], sha256="0" * 64),))
    monkeypatch.setattr(registry, "known_models", lambda: (other,))
    remove("lfm2.5-vl-450m")
    with pytest.raises(
        DownloadError, match="not the file that this program knows.*pull lfm2.5-vl-450m --revision main"
    ):
        download_pair("lfm2.5-vl-450m")
    assert download_pair("lfm2.5-vl-450m", revision="main").files == entry.files


def test_the_free_space_is_checked_first(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        DownloadError, match=r"MB are needed and 1 MB are free on the disk of .*; make room, or set HF_HOME"
    ):
        download_pair(REPO)
    assert server.file_requests() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "models": [3]}',
        b'{"format": 1, "models": [{"repo": 1, "quant": "Q4_0", "revision": "", "files": []}]}',
        b'{"format": 1, "models": [{"repo": "a/b", "quant": null, "revision": "x", "files": [{"path": 7}]}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        entry_of({"path": "/a\0b", "bytes": 1, "digest": "0" * 40}),
        entry_of({"path": "/\ud800", "bytes": 1, "digest": "0" * 40}),
        entry_of({"path": "/a", "bytes": 10**400, "digest": "0" * 40}),
        entry_of({"path": "/a", "bytes": True, "digest": "0" * 40}),
        entry_of({"path": "/a", "bytes": 1, "digest": ["0"]}),
        b" " * 20_000_000,
    ],
    ids=range(16),
)
def test_the_error_of_a_damaged_manifest_names_the_remedy(server: Hub, content: bytes) -> None:
    manifest_path().parent.mkdir(parents=True)
    manifest_path().write_bytes(content)
    for use in (resolve_model, lambda: download_pair(REPO), lambda: remove(REPO)):
        with pytest.raises(DownloadError, match=r"the manifest .*models.json is damaged; remove it and pull"):
            use()
    manifest_path().write_bytes(b'{"format": 2}')
    with pytest.raises(DownloadError, match="written by a newer version"):
        resolve_model()


def test_a_folder_that_cannot_be_written(server: Hub, hub_here: HubHere) -> None:
    hub_here.data.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot (read|write).*data.*; make"):
        download_pair(REPO)
    hub_here.data.unlink()
    (hub_here.data / "models.json").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"cannot read .*models.json: Is a directory; make it readable"):
        download_pair(REPO)


def test_files_outside_a_cache_are_never_removed(server: Hub, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    files = [{"path": str(mine), "bytes": 4, "digest": "0" * 40}] * 2
    entry = {"repo": REPO, "quant": "BF16", "revision": "x", "files": files}
    manifest_path().parent.mkdir(parents=True)
    manifest_path().write_text(json.dumps({"format": 1, "models": [entry]}))
    assert remove(REPO) == (f"{REPO}:BF16", 0)
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("machine", "types", "chosen"),
    [
        ("x86_64", ("BF16", "Q8_0"), "BF16"),
        ("aarch64", ("BF16", "Q8_0"), "Q8_0"),
        ("arm64", ("BF16", "F32"), "F32"),
        ("aarch64", ("BF16", "F16", "Q8_0"), "F16"),
        ("aarch64", ("BF16",), "BF16"),
    ],
)
def test_arm_gets_no_bf16_if_there_is_another(
    machine: str, types: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    names = ("m-Q4_0", *(f"mmproj-m-{kind}" for kind in types))
    files = tuple(RemoteFile(path=f"{name}.gguf", n_bytes=9, digest="0" * 40) for name in names)
    repository = Repository(repo=REPO, commit="0" * 40, files=files, licence=None, architecture=None)
    assert _choose(repository, reference_of(REPO), None)[1].path == f"mmproj-m-{chosen}.gguf"


def test_only_the_needed_files_of_a_checkpoint_are_downloaded(server: Hub) -> None:
    files = download_checkpoint(CHECKPOINT)
    assert {path.name for path in files} == {path.name for path in (REFERENCE / "a" / "checkpoint").iterdir()}
    for path in files:
        data = path.read_bytes()
        assert path.resolve().name == (sha256(data) if is_lfs(path.name) else git_digest(data))
    assert read_manifest()[0].quant is None
    with pytest.raises(ModelNotFound):
        resolve_model(CHECKPOINT)
    files[-1].unlink()
    assert download_checkpoint(CHECKPOINT) == files
    with pytest.raises(DownloadError, match="has no checkpoint in safetensors form"):
        download_checkpoint(REPO)
    freed = remove(CHECKPOINT)[1]
    assert freed == sum(path.stat().st_size for path in (REFERENCE / "a" / "checkpoint").iterdir())


def test_named_templates_are_downloaded_and_older_weights_are_not(server: Hub) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    server.repos[CHECKPOINT] |= {template: b"with tools", "model-00001-of-00002.safetensors": b"old"}
    files = download_checkpoint(CHECKPOINT)
    assert [path.name for path in files if path.suffix == ".safetensors"] == ["model.safetensors"]
    (found,) = (path for path in files if path.name == "tool_use.jinja")
    assert found.parent.name == "additional_chat_templates"
    assert found.read_bytes() == b"with tools"
    with checkpoint_files(CHECKPOINT, None, quiet=True) as folder:
        assert (folder / template).read_bytes() == b"with tools"
        assert (folder / "config.json").is_file()


def test_an_adapter_on_the_hub_is_named(server: Hub) -> None:
    server.repos["owner/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with pytest.raises(DownloadError, match="owner/adapter is a LoRA adapter, not a whole model; merge it"):
        download_checkpoint("owner/adapter")
