"""`pull`, `models`, `rm`, and which model the other commands use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_edge import DownloadError, Model, ModelNotFound, pull
from lfm2vl_edge import Pair as Files
from lfm2vl_edge.cli import _loading as loading
from lfm2vl_edge.cli import app
from lfm2vl_edge.host import data_folder, total_memory
from lfm2vl_edge.models import names
from lfm2vl_edge.models.download import Download
from lfm2vl_edge.models.manifest import read_manifest
from lfm2vl_edge.models.names import FALLBACK_NOTE
from tests.conftest import IMAGES, REFERENCE, HubHere, Pair
from tests.hub_server import COMMIT, Hub

REPO = "owner/pair-GGUF"
CHECKPOINT = "owner/LFM2-VL-mine"
ASK = ("run", str(IMAGES / "small.png"), "Hi", "-n", "2", "--temperature", "0")
TRUNCATED = "note: the answer is truncated here; --max-tokens allows more\n"


@pytest.fixture
def server(hub_here: HubHere, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = pair("a", "BF16")
    files = {f"{kind}pair-BF16.gguf": folder / f"{kind}checkpoint-BF16.gguf" for kind in ("", "mmproj-")}
    hub_here.hub.repos[REPO] = {name: path.read_bytes() for name, path in files.items()}
    checkpoint = REFERENCE / "a" / "checkpoint"
    hub_here.hub.repos[CHECKPOINT] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(names, "TINY", tmp_path / "tiny")
    return hub_here.hub


def edge(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], input=answer)


def failed(result: Result, message: str) -> bool:
    """Check for one line on stderr that starts with error:, and nothing on stdout."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr, result.stderr
    return result.stderr.startswith("error: ")


def test_pull_shows_size_and_licence_first_and_prints_the_paths(server: Hub, hub_here: HubHere) -> None:
    result = edge("pull", REPO)
    assert result.exit_code == 0, result.output
    folder = hub_here.cache / "models--owner--pair-GGUF" / "snapshots" / COMMIT
    assert result.stdout.split() == [str(folder / "pair-BF16.gguf"), str(folder / "mmproj-pair-BF16.gguf")]
    first, model, mmproj, licence = result.stderr.splitlines()
    total = sum(map(len, server.repos[REPO].values()))
    assert first == f"{REPO}: {total / 1e6:.1f} MB, revision {COMMIT}"
    assert (model.split()[0], mmproj.split()[0]) == ("pair-BF16.gguf", "mmproj-pair-BF16.gguf")
    assert licence == "licence of the weights: lfm1.0"
    again = edge("pull", REPO, "--json")
    assert again.stderr == ""
    shown = json.loads(again.stdout)
    assert (shown["repo"], shown["quant"], shown["revision"]) == (REPO, "BF16", COMMIT)
    assert [file["path"] for file in shown["files"]] == result.stdout.split()
    assert edge("pull", REPO, "--revision", "main", "-q").stderr == ""


def test_models_lists_published_and_downloaded_models(server: Hub, tmp_path: Path, pair: Pair) -> None:
    shown = json.loads(edge("models", "--json").stdout)
    assert shown["memory"] == total_memory()
    row = next(one for one in shown["models"] if one["name"] == "lfm2.5-vl-450m:Q4_0")
    assert row["bytes"] == 219_311_264 + 189_126_080
    assert (row["here"], row["default"], row["files"]) == (False, False, [])
    assert row["fits"] is (row["bytes"] + 400_000_000 <= shown["memory"])
    assert next(one for one in shown["models"] if one["name"] == "lfm2-vl-3b:F16")["fits"] is None
    shutil.copytree(pair("a", "F32"), tmp_path / "tiny")
    assert edge("models").stdout.splitlines()[1].split()[:2] == ["*", "tiny"]
    edge("pull", REPO)
    lines = edge("models").stdout.splitlines()
    assert lines[1].split()[:2] == ["*", f"{REPO}:BF16"]
    assert lines[1].endswith("here")
    assert lines[2].split()[0] == "tiny"
    assert "lfm2vl-edge pull lfm2.5-vl-450m:Q4_0" in edge("models").stdout
    assert "450m:Q8_0" not in edge("models").stdout
    assert "450m:Q8_0" in edge("models", "--all").stdout


def test_the_model_downloaded_last_is_the_default(server: Hub, tmp_path: Path, pair: Pair) -> None:
    assert failed(edge(*ASK), "the built-in model is missing")
    assert failed(edge(*ASK, "-m", "tiny"), "lfm2vl-edge pull lfm2.5-vl-450m")
    with pytest.raises(ModelNotFound, match="built-in model is missing"):
        Model.open()
    assert "(no model given)" in edge("plan", "9x9").stdout
    shutil.copytree(pair("a", "F32"), tmp_path / "tiny")
    result = edge(*ASK)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"note: {FALLBACK_NOTE}\n{TRUNCATED}"
    assert "lfm2vl-edge pull lfm2.5-vl-450m" in FALLBACK_NOTE
    assert edge(*ASK, "-m", "tiny").stderr == TRUNCATED
    assert "(no model given)" in edge("plan", "9x9").stdout
    edge("pull", REPO)
    shown = json.loads(edge(*ASK, "--json").stdout)
    assert edge(*ASK, "--json").stderr == ""
    with Model.open() as model:
        assert shown["answer"] == model.ask(IMAGES / "small.png", "Hi", temperature=0.0, max_tokens=2)
    assert "mmproj-pair-BF16.gguf" in edge("plan", "9x9").stdout
    assert (
        edge("rm", REPO).stdout == f"{REPO}:BF16: {sum(map(len, server.repos[REPO].values())) / 1e6:.1f} MB removed\n"
    )
    assert failed(edge("rm", REPO), f"{REPO} is not on this machine; lfm2vl-edge models lists those that are")


def test_the_precedence_of_models(server: Hub, tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    edge("pull", REPO, "-q")
    given = pair("a", "F16")
    assert names.resolve_model().pair.model.name == "pair-BF16.gguf"
    monkeypatch.setenv("LFM2VL_MODEL", str(given))
    assert names.resolve_model().pair.model.parent == given
    assert names.resolve_model(REPO).pair.model.name == "pair-BF16.gguf"
    shutil.copytree(given, Path("lfm2-vl-3b"))  # a local folder wins
    assert names.resolve_model("lfm2-vl-3b").pair.model.parent == Path("lfm2-vl-3b")
    other = pair("a", "F32") / "mmproj-checkpoint-F32.gguf"
    assert names.resolve_model(REPO, other).pair.mmproj == other
    monkeypatch.setenv("LFM2VL_MODEL", "")
    assert names.resolve_model().pair.model.name == "pair-BF16.gguf"


def test_on_a_terminal_a_missing_model_can_be_downloaded(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = f"{REPO} is not on this machine; to download it: lfm2vl-edge pull {REPO}"
    assert failed(edge(*ASK, "-m", REPO, answer="y\n"), missing)
    monkeypatch.setattr(loading, "_is_terminal", lambda: True)
    for answer in ("\n", "n\n", ""):
        result = edge(*ASK, "-m", REPO, answer=answer)
        assert result.exit_code == 1
        assert f"{REPO} is not on this machine. Download it now? [y/N]:" in result.stderr
        assert result.stderr.rstrip().endswith(missing)
        assert read_manifest() == []
    shown = edge(*ASK, "-m", "lfm2.5-vl-1.6b:Q8_0", answer="n\n").stderr
    assert "lfm2.5-vl-1.6b:Q8_0 (2.10 GB) is not on this machine. Download it now? [y/N]:" in shown
    assert "lfm2-vl-3b is not on this machine. Download it now?" in edge(*ASK, "-m", "lfm2-vl-3b", answer="n\n").stderr
    result = edge(*ASK, "-m", REPO, answer="y\n")
    assert result.exit_code == 0, result.output
    assert "licence of the weights" in result.stderr
    assert edge(*ASK, "-m", REPO).stderr == TRUNCATED


@pytest.mark.parametrize("command", ["pull", "rm", "run"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "known: lfm2.5-vl-450m"),
        ("../owner/x", "../owner/x"),
        ("", "''"),
        ("owner/repo:../x", "'../x' in 'owner/repo:../x' is not a valid type"),
        ("lfm2-vl-3b:Q4 0", "is not a valid type"),
        ("owner/x\0y", "owner/x"),
    ],
)
def test_the_error_of_an_invalid_name_is_one_line(server: Hub, command: str, name: str, message: str) -> None:
    if command == "run":
        assert failed(edge(*ASK, "-m", name), message.removeprefix("known: "))
    else:
        assert failed(edge(command, name), message)
    assert server.requests == []


def test_a_missing_path_is_not_a_hub_id(server: Hub) -> None:
    Path("models").mkdir()
    assert failed(edge(*ASK, "-m", "models/450m"), "no model 'models/450m': there is no such file or folder")
    assert failed(edge("convert", "models/450m"), "no checkpoint at 'models/450m'")
    assert failed(edge("pull", "tiny"), "tiny is built in")
    assert failed(edge("pull", "owner/nothing"), "no repository owner/nothing at http://127.0.0.1")
    assert failed(edge("pull", REPO, "--mmproj-quant", "Q0"), "has no file of type Q0; there are: BF16")
    assert failed(edge("convert", "models", "--revision", "main"), "--revision is for checkpoints of the hub")


def test_the_function_pull_does_what_the_command_does(server: Hub, hub_here: HubHere) -> None:
    started: list[Download] = []
    progress: list[tuple[int, int]] = []
    found = pull(REPO, on_start=started.append, progress=lambda done, total: progress.append((done, total)))
    folder = hub_here.cache / "models--owner--pair-GGUF" / "snapshots" / COMMIT
    assert found == Files(model=folder / "pair-BF16.gguf", mmproj=folder / "mmproj-pair-BF16.gguf")
    total = sum(map(len, server.repos[REPO].values()))
    assert [(one.n_bytes, one.licence) for one in started] == [(total, "lfm1.0")]
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)
    n_requests = len(server.requests)
    assert pull(f"{REPO}:bf16") == found
    assert len(server.requests) == n_requests
    assert edge("pull", REPO).stdout.split() == [str(found.model), str(found.mmproj)]
    with Model.open(REPO) as model:
        assert model.config.name
    with pytest.raises(DownloadError, match="has no file of type Q0"):
        pull(f"{REPO}:Q0")
    with pytest.raises(ModelNotFound, match="known: lfm2.5-vl-450m"):
        pull("nothing")
    with pytest.raises(ModelNotFound, match="tiny is built in"):
        pull("tiny")


def test_verify_and_quantize_accept_names(server: Hub, hub_here: HubHere) -> None:
    missing = f"{REPO} is not on this machine; to download it: lfm2vl-edge pull {REPO}"
    types = ("--quant", "Q8_0", "--mmproj-quant", "Q8_0", "-q")
    assert failed(edge("verify", REPO), missing)
    assert failed(edge("quantize", REPO, *types), missing)
    found = pull(REPO)
    before = sorted(hub_here.cache.rglob("*"))
    result = edge("verify", REPO)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("good: every tensor is there")
    assert failed(edge("verify", "nothing"), "no model 'nothing'")
    outputs = ["pair-Q8_0.gguf", "mmproj-pair-Q8_0.gguf"]
    inside = edge("quantize", REPO, *types, "-o", found.model.parent / "new")
    assert failed(inside, "is in the cache of huggingface_hub; give another folder with -o")
    assert edge("quantize", REPO, *types).stdout.split() == outputs
    assert sorted(path.name for path in Path().iterdir()) == sorted(outputs)
    assert sorted(hub_here.cache.rglob("*")) == before
    compared = edge("verify", outputs[0], "--against", REPO, "--json", "-q", "-t", "1")
    assert json.loads(compared.stdout)["behaviour"]["min_cosine"] > 0.9


def test_convert_downloads_a_checkpoint_once(server: Hub) -> None:
    options = ("--quant", "BF16", "--mmproj-quant", "BF16")
    result = edge("convert", CHECKPOINT, "-o", "out", *options)
    assert result.exit_code == 0, result.output
    outputs = ["out/LFM2-VL-mine-BF16.gguf", "out/mmproj-LFM2-VL-mine-BF16.gguf"]
    assert result.stdout.split() == outputs
    assert result.stderr.startswith(f"{CHECKPOINT}: ")
    n_requests = len(server.requests)
    assert edge("convert", CHECKPOINT, "-o", "out", *options, "--force", "-q").stderr == ""
    assert len(server.requests) == n_requests
    shutil.copytree(REFERENCE / "a" / "checkpoint", CHECKPOINT)  # a local folder wins
    (Path(CHECKPOINT) / "config.json").write_text("{}")
    assert failed(edge("convert", CHECKPOINT, "-o", "out", *options, "--force"), f"{CHECKPOINT}/config.json")
    assert edge("rm", CHECKPOINT).exit_code == 0
    assert read_manifest() == []


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"LFM2VL_DATA": "/x"}, "linux", "/x"),
        ({"XDG_DATA_HOME": "/d"}, "linux", "/d/lfm2vl-edge"),
        ({"XDG_DATA_HOME": "rel"}, "linux", "~/.local/share/lfm2vl-edge"),
        ({}, "darwin", "~/Library/Application Support/lfm2vl-edge"),
    ],
)
def test_the_data_folder(environment: dict[str, str], platform: str, expected: str) -> None:
    assert data_folder(environment, platform) == Path(expected).expanduser()


def test_the_limit_of_the_container_counts(tmp_path: Path) -> None:
    installed = total_memory(tmp_path / "nothing")
    assert installed is not None
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    assert total_memory(limit) == installed
    limit.write_text("1000000\n")
    assert total_memory(limit) == 1_000_000
