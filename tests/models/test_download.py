"""Pulling by name: what is taken, verified, remembered, removed."""

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
from lfm2vl_edge.models import hub, registry
from lfm2vl_edge.models.download import Offer, fetch_checkpoint, remove
from lfm2vl_edge.models.download import pull_reference as pull
from lfm2vl_edge.models.manifest import ManifestEntry, read_manifest, state_path
from lfm2vl_edge.models.names import resolve_model
from lfm2vl_edge.models.registry import KnownFile, KnownModel, Reference, parse_name
from tests.conftest import REFERENCE, HubHere, Pair
from tests.hub_server import COMMIT, Fault, Hub, git_digest, is_lfs, sha256

REPO = "owner/pair-GGUF"
CHECKPOINT = "owner/LFM2-VL-mine"


@pytest.fixture
def server(hub_here: HubHere, pair: Pair) -> Hub:
    """Serve a pair in two types that are called so, and the checkpoint that it was made of."""
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


def named(text: str) -> Reference:
    found = parse_name(text)
    assert found is not None
    return found


def names(pulled: ManifestEntry) -> list[str]:
    return [file.path.name for file in pulled.files]


def test_a_pair_is_pulled_remembered_and_opened_by_name(server: Hub) -> None:
    shown: list[Offer] = []
    told: list[tuple[int, int]] = []
    pulled = pull(named(f"{REPO}:BF16"), show=shown.append, progress=lambda *two: told.append(two))
    assert names(pulled) == ["pair-BF16.gguf", "mmproj-pair-F16.gguf"]
    assert pulled.revision == COMMIT
    assert [sha256(file.path.read_bytes()) for file in pulled.files] == [file.digest for file in pulled.files]
    assert shown[0].licence == "lfm1.0"
    assert shown[0].n_bytes == pulled.n_bytes
    assert told[-1] == (pulled.n_bytes, pulled.n_bytes)
    assert read_manifest() == [pulled]
    with Model.open(f"{REPO}:bf16") as model:
        assert model.config.image_source.endswith("mmproj-pair-F16.gguf")
    assert resolve_model().pair == resolve_model(REPO).pair == resolve_model(REPO.upper() + ":BF16").pair
    assert not resolve_model().is_fallback


def test_types_are_chosen(server: Hub) -> None:
    assert names(pull(named(REPO))) == ["pair-Q8_0.gguf", "mmproj-pair-F16.gguf"]
    assert names(pull(named(f"{REPO}:Q8_0"), mmproj_quant="bf16")) == ["pair-Q8_0.gguf", "mmproj-pair-BF16.gguf"]
    assert not list(hub.hub_cache().glob("*/snapshots/*/*F16.gguf".replace("*F16", "*pair-F16")))  # it was replaced
    with pytest.raises(DownloadError, match="has no file of type Q9_K; there are: BF16, Q8_0"):
        pull(named(f"{REPO}:q9_k"))
    with pytest.raises(DownloadError, match="has no file of type Q9; there are: BF16, F16"):
        pull(named(REPO), mmproj_quant="Q9")
    server.repos[REPO].pop("mmproj-pair-F16.gguf")
    server.repos[REPO].pop("mmproj-pair-BF16.gguf")
    with pytest.raises(DownloadError, match="holds no mmproj file, so its model would be blind"):
        pull(named(f"{REPO}:BF16"))
    with pytest.raises(DownloadError, match=f"no GGUF model but a checkpoint; .*lfm2vl-edge convert {CHECKPOINT}"):
        pull(named(CHECKPOINT))
    server.architecture = "llama"
    server.repos[REPO]["mmproj-x-F16.gguf"] = b"x"
    with pytest.raises(DownloadError, match="holds a 'llama' model, not LFM2-VL"):
        pull(named(f"{REPO}:BF16"))


def test_a_type_that_is_here_stays_and_a_file_may_have_none(server: Hub) -> None:
    pull(named(f"{REPO}:BF16"))
    assert names(pull(named(REPO), mmproj_quant="BF16")) == ["pair-BF16.gguf", "mmproj-pair-BF16.gguf"]
    remove(named(REPO))
    files = server.repos[REPO]
    server.repos[REPO] = {"model.gguf": files["pair-BF16.gguf"], "mmproj.gguf": files["mmproj-pair-F16.gguf"]}
    assert pull(named(REPO)).quant == "GGUF"
    assert pull(named(f"{REPO}:GGUF"), revision="main") == read_manifest()[0]
    assert resolve_model(f"{REPO}:GGUF").pair.model.name == "model.gguf"


def test_a_pair_that_is_none_is_not_remembered(server: Hub) -> None:
    server.architecture = None
    server.repos[REPO]["pair-BF16.gguf"] = b"GGUF"
    with pytest.raises(EdgeError):
        pull(named(f"{REPO}:BF16"))
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


def test_without_a_network_what_is_here_works(server: Hub, request: pytest.FixtureRequest) -> None:
    first = pull(named(f"{REPO}:BF16"))
    checkpoint = fetch_checkpoint(CHECKPOINT)
    asked = len(server.requests)
    request.getfixturevalue("no_network")
    assert pull(named(f"{REPO}:BF16")) == first
    assert fetch_checkpoint(CHECKPOINT) == checkpoint
    with Model.open(REPO) as model, Model.open() as same:
        assert model.ask([], "Hi", temperature=0.0, max_tokens=2) == same.ask([], "Hi", temperature=0.0, max_tokens=2)
    with pytest.raises(
        ModelNotPulled, match=r"^lfm2-vl-3b:Q8_0 is not on this machine.*: lfm2vl-edge pull lfm2-vl-3b:Q8_0$"
    ):
        Model.open("LFM2-VL-3B:q8_0")
    assert len(server.requests) == asked


def test_a_damaged_file_is_noticed_and_fetched_again(server: Hub) -> None:
    pulled = pull(named(f"{REPO}:BF16"))
    data = pulled.files[0].path.read_bytes()
    pulled.files[0].path.resolve().write_bytes(data[:-1])
    with pytest.raises(ModelNotPulled):  # the size alone tells
        resolve_model(REPO)
    pulled.files[0].path.resolve().write_bytes(data[:-1] + b"\xff")
    assert pull(named(f"{REPO}:BF16")) == pulled
    assert pulled.files[0].path.read_bytes() == data
    pulled.files[1].path.unlink()
    assert pull(named(f"{REPO}:BF16")) == pulled


def test_another_revision_replaces_the_first(server: Hub) -> None:
    first = pull(named(f"{REPO}:BF16"))
    first.files[0].path.resolve().write_bytes(b"damaged")
    server.listing = lambda shown: shown | {"sha": COMMIT if COMMIT in server.requests[-1].path else "d1" * 20}
    assert pull(named(f"{REPO}:BF16")) == first  # the same commit again, not the newest
    server.listing = lambda shown: shown
    server.commits[REPO] = "d1" * 20
    assert pull(named(f"{REPO}:BF16")) == first
    second = pull(named(f"{REPO}:BF16"), revision="main")
    assert second.revision == "d1" * 20
    assert read_manifest() == [second]
    assert not first.files[0].path.exists()
    assert second.is_there
    with pytest.raises(DownloadError, match="no such revision"):
        pull(named(f"{REPO}:BF16"), revision="../../v1")


def test_the_latest_is_last_and_can_be_removed(server: Hub) -> None:
    one, two = pull(named(f"{REPO}:BF16")), pull(named(f"{REPO}:Q8_0"))
    assert read_manifest() == [one, two]
    pull(named(f"{REPO}:BF16"))
    assert read_manifest() == [two, one]
    with pytest.raises(DownloadError, match=f"2 models fit {REPO}: {REPO}:Q8_0, {REPO}:BF16; say which one"):
        remove(named(REPO))
    assert remove(named(f"{REPO}:BF16")) == (f"{REPO}:BF16", 0)  # both types are the same bytes here
    assert two.is_there
    assert resolve_model().pair.model == two.files[0].path
    assert remove(named(REPO)) == (f"{REPO}:Q8_0", two.n_bytes)
    assert read_manifest() == []
    assert not [path for path in hub.hub_cache().rglob("*.gguf") if path.exists()]
    with pytest.raises(ModelNotPulled, match="is not on this machine"):
        remove(named(REPO))


def test_rm_also_removes_what_was_begun(server: Hub) -> None:
    server.fault = lambda one: (
        Fault(cut=0 if one.start else 1000) if one.method == "GET" and "resolve" in one.path else None
    )
    with pytest.raises(DownloadError, match="broke off"):
        pull(named(REPO))
    assert remove(named(REPO)) == (REPO, 1000)
    assert not list(hub.hub_cache().rglob("*.incomplete"))


@pytest.fixture
def published(server: Hub, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A table of one model, whose files are those on the hub here."""
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


def test_a_name_of_the_table_is_pinned(server: Hub, published: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Offer] = []
    pulled = pull(named("LFM2.5-VL-450M"), show=shown.append)
    assert f"/revision/{COMMIT}" in server.requests[0].path
    assert (shown[0].name, shown[0].licence) == ("lfm2.5-vl-450m", "LFM Open License v1.0")
    assert (
        resolve_model("lfm2.5-vl-450m").pair == resolve_model(REPO).pair == resolve_model("lfm2.5-vl-450m:Q8_0").pair
    )
    other = replace(published, models=(replace(published.models[0], sha256="0" * 64),))
    monkeypatch.setattr(registry, "known_models", lambda: (other,))
    remove(named("lfm2.5-vl-450m"))
    with pytest.raises(
        DownloadError, match="not the file that this program knows.*pull lfm2.5-vl-450m --revision main"
    ):
        pull(named("lfm2.5-vl-450m"))
    assert pull(named("lfm2.5-vl-450m"), revision="main").files == pulled.files


def test_the_disk_is_looked_at_before(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        DownloadError, match=r"MB are needed and 1 MB are free on the disk of .*; make room, or set HF_HOME"
    ):
        pull(named(REPO))
    assert server.asked() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "pulled": [3]}',
        b'{"format": 1, "pulled": [{"repo": 1, "quant": "Q4_0", "revision": "", "files": []}]}',
        b'{"format": 1, "pulled": [{"repo": "a/b", "quant": null, "revision": "x", "files": [{"path": 7}]}]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_list_says_what_to_do(server: Hub, content: bytes) -> None:
    state_path().parent.mkdir(parents=True)
    state_path().write_bytes(content)
    for use in (resolve_model, lambda: pull(named(REPO)), lambda: remove(named(REPO))):
        with pytest.raises(
            DownloadError, match=r"models.json, the list of pulled models, is damaged; remove it and pull"
        ):
            use()
    state_path().write_bytes(b'{"format": 2}')
    with pytest.raises(DownloadError, match="written by a newer version"):
        resolve_model()


def test_a_folder_that_cannot_be_written(server: Hub, hub_here: HubHere) -> None:
    hub_here.data.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot (read|write).*data.*; make"):
        pull(named(REPO))
    hub_here.data.unlink()
    (hub_here.data / "models.json").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"cannot read .*models.json: Is a directory; make it readable"):
        pull(named(REPO))


def test_files_outside_a_cache_are_never_removed(server: Hub, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    files = [{"path": str(mine), "bytes": 4, "digest": "0" * 40}] * 2
    entry = {"repo": REPO, "quant": "BF16", "revision": "x", "files": files}
    state_path().parent.mkdir(parents=True)
    state_path().write_text(json.dumps({"format": 1, "pulled": [entry]}))
    assert remove(named(REPO)) == (f"{REPO}:BF16", 0)
    assert mine.read_bytes() == b"mine"


def test_a_checkpoint_is_fetched_without_what_is_not_needed(server: Hub) -> None:
    files = fetch_checkpoint(CHECKPOINT)
    assert {path.name for path in files} == {path.name for path in (REFERENCE / "a" / "checkpoint").iterdir()}
    for path in files:
        data = path.read_bytes()
        assert path.resolve().name == (sha256(data) if is_lfs(path.name) else git_digest(data))
    assert read_manifest()[0].quant is None
    with pytest.raises(ModelNotFound):
        resolve_model(CHECKPOINT)
    files[-1].unlink()
    assert fetch_checkpoint(CHECKPOINT) == files
    with pytest.raises(DownloadError, match="holds no checkpoint in safetensors form"):
        fetch_checkpoint(REPO)
    freed = remove(named(CHECKPOINT))[1]
    assert freed == sum(path.stat().st_size for path in (REFERENCE / "a" / "checkpoint").iterdir())
