"""The same batch on Ray: a local cluster of two workers, of which one is killed (make ray-tests)."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import DataError, EdgeError, Model
from lfm2vl_edge.batch import Progress, run_batch
from tests.batch.kills import answers, write_images
from tests.batch.test_inputs import lines
from tests.batch.test_run import Stop, options, stop_after

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets and files open
ray = pytest.importorskip("ray")

from lfm2vl_edge.batch import cluster  # noqa: E402
from lfm2vl_edge.batch.cluster import ClusterOptions, run_on_ray  # noqa: E402
from lfm2vl_edge.batch.run import prepare_inputs  # noqa: E402

ROWS = 400


@pytest.fixture(scope="module", autouse=True)
def local_cluster() -> Iterator[None]:
    """A cluster of this machine with two processors, whatever it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_images(folder, ROWS)
    return folder


def run(inputs: Any, out: Path, progress: Any = None, model: str = "tiny", **changes: Any) -> Progress:
    where = ClusterOptions(workers=2, cpus_per_worker=1, model=model)
    return run_on_ray(prepare_inputs([inputs], out), str(out), options(**changes), where, progress=progress)


def stored(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.jsonl")) for row in answers(file)]


def workers() -> list[int]:
    """Return the processes of the actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker"):
            found.append(int(path.name))
    return found


def test_a_killed_worker_loses_and_repeats_nothing(tiny: Model, many: Path, tmp_path: Path) -> None:
    run_batch(tiny, [many], tmp_path / "alone.jsonl", options(parallel=1))
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.done >= 60 and not killed:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    out = tmp_path / "out.jsonl"
    done = run(many, out, kill)
    assert len(killed) == 1
    assert (done.done, dict(done.errors)) == (ROWS, {})
    assert stored(out) == answers(tmp_path / "alone.jsonl")
    manifest = json.loads((out / "_done").read_text())
    assert (manifest["rows"], manifest["errors"]) == (ROWS, {})
    assert run(many, out).rows == 0


def test_an_ended_driver_resumes_by_id(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(Stop):
        run(images, out, stop_after(5))
    assert not (out / "_done").exists()
    done = run(images, out)
    assert (done.earlier, done.rows) == (5, 7)
    from pyarrow import dataset

    found = dataset.dataset(out, format="parquet").to_table(["id", "answer"]).to_pylist()
    assert sorted(row["id"] for row in found) == sorted(str(path) for path in images.iterdir())
    with pytest.raises(DataError, match="was made with prompt unset"):
        run(images, out, prompt="Why?")


def test_errors_are_rows_and_a_model_that_is_not_there_ends_the_batch(images: Path, tmp_path: Path) -> None:
    rows = [{"image": str(images / "image0.png"), "id": 1}, {"image": "missing.png", "id": 2}]
    path = lines(tmp_path / "rows.jsonl", *rows)
    done = run(path, tmp_path / "out.jsonl")
    assert done.errors == {"image": 1}
    assert [row["error"] and row["error"]["kind"] for row in stored(tmp_path / "out.jsonl")] == [None, "image"]
    assert run(path, tmp_path / "out.jsonl", retry_errors="image").rows == 1
    with pytest.raises(EdgeError, match="no model"):
        run(path, tmp_path / "other.jsonl", model="nothing-of-this-name")


def test_a_store_of_objects_gets_whole_files(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that this test has in a folder: pyarrow's filesystem of another kind, with the URLs of s3."""
    from pyarrow import fs

    from lfm2vl_edge.batch import storage

    here = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (tmp_path / "bucket" / "out.jsonl").mkdir(parents=True)
    monkeypatch.setattr(storage, "filesystem_of", lambda url: (here, url.partition("://")[2]))
    where = ClusterOptions(workers=1, cpus_per_worker=1, model="tiny")
    sources = prepare_inputs([images], "s3://bucket/out.jsonl", on_cluster=True)
    assert run_on_ray(sources, "s3://bucket/out.jsonl", options(), where).done == 12
    assert len(stored(tmp_path / "bucket" / "out.jsonl")) == 12
    assert not (tmp_path / "bucket" / "out.jsonl" / "_pending.jsonl").exists()
    assert run_on_ray(sources, "s3://bucket/out.jsonl", options(), where).rows == 0


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(EdgeError, match=f"Ray is not reached at {url}: .*; check --ray"):
        cluster._check_reached(url)
