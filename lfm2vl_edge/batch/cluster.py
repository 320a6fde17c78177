"""The same batch on a cluster: Ray Data gives rows to actors, each of which has a model of its own.

The driver reads the rows, and stores the answers as they come: so each row is in the output once, whatever happens to
an actor, and the same command resumes. Ray starts an actor that ended again, and gives its rows to another one.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lfm2vl_edge.batch.forecast import Forecast, Planner
from lfm2vl_edge.batch.inputs import Source, scan
from lfm2vl_edge.batch.rows import Row, digest
from lfm2vl_edge.batch.run import OnProgress, Progress, pending_rows, rows_to_ask, store
from lfm2vl_edge.batch.settings import BatchOptions, image_settings, question_settings
from lfm2vl_edge.batch.shards import Form, JsonLines, ShardsOutput
from lfm2vl_edge.batch.storage import arrow
from lfm2vl_edge.batch.table import Tables
from lfm2vl_edge.batch.worker import OnEnd, Outcome, Worker, answer_rows
from lfm2vl_edge.errors import EdgeError, EngineError, ModelNotPulled, clip
from lfm2vl_edge.host import available_cpus
from lfm2vl_edge.opening import OpenOptions, check_count, decide

if TYPE_CHECKING:
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.opening import Opening

LOCAL: Final = "local"
"""Stands for a cluster of this machine, which is started for the batch."""
_MOST_ROWS: Final = 64
"""Rows that an actor takes at a time, at most; those that it had are asked again if it ends."""
_CONNECT_SECONDS: Final = 10.0
_BLOCKS_EACH: Final = 8
"""Blocks for each worker, at least, so that all end at about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where a batch runs.

    Attributes:
        ray: `local` starts Ray on this machine for the batch; `auto` or `ray://HOST:10001` joins a cluster.
        workers: actors, each with a model.
        cpus_per_worker: processors of each, which are its threads too; None: those of this machine, divided.
        gpus_per_worker: GPUs of each; may be a fraction.
        model: name or path of the model, as each worker finds it; a name that it does not have is downloaded.
        opening: how each worker opens it.

    Raises:
        ConfigError: a number is out of range.
    """

    ray: str = LOCAL
    workers: int = 1
    cpus_per_worker: int | None = None
    gpus_per_worker: float = 0.0
    model: str | None = None
    opening: OpenOptions = field(default_factory=OpenOptions)

    def __post_init__(self) -> None:
        check_count("workers", self.workers, most=100_000)
        if self.cpus_per_worker is not None:
            check_count("cpus_per_worker", self.cpus_per_worker, most=4096)

    @property
    def cpus(self) -> int:
        """Processors of each worker."""
        return self.cpus_per_worker or max(1, len(available_cpus()) // self.workers)


class Actor:
    """What Ray starts on each worker: a model that answers the rows of tables."""

    def __init__(self, name: str | None, opening: OpenOptions, options: BatchOptions, folder: str) -> None:
        """Open the model; it is downloaded if this machine does not have it.

        Args:
            name: which model.
            opening: how it is opened.
            options: what is asked.
            folder: the working directory of the driver, to which paths are relative.
        """
        with suppress(OSError):  # a cluster without a shared folder has paths from the root, or URLs
            os.chdir(folder)
        self._name, self._opening, self._options = name, opening, options
        self._open()

    def _open(self) -> None:
        self._model = _opened(self._name, self._opening)
        self._worker = Worker(self._model, self._options)

    def __call__(self, table: Any) -> Any:
        """Return the pickled outcomes of the pickled rows of a `pyarrow.Table`."""
        rows = [(index.as_py(), pickle.loads(row.as_py())) for index, row in zip(*table.columns, strict=True)]  # noqa: S301
        try:
            found = self._answers(rows)
        except EngineError:  # once more, with the model opened again
            self._worker.close()
            self._model.close()
            self._open()
            found = self._answers(rows)
        pa = arrow()
        return pa.table({"index": [one[0] for one in found], "outcome": [pickle.dumps(one[1]) for one in found]})

    def _answers(self, rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Outcome]]:
        return [one for one in answer_rows(self._worker, rows, ordered=True) if one is not None]


def _opened(name: str | None, opening: OpenOptions) -> Model:
    from lfm2vl_edge.model import model_of
    from lfm2vl_edge.models.download import pull
    from lfm2vl_edge.opening import open_model

    try:
        files = open_model(name, opening)
    except ModelNotPulled as error:
        files = open_model(pull(error.name), opening)
    return model_of(files, None)


def run_on_ray(
    sources: Sequence[Source],
    out: str,
    options: BatchOptions,
    cluster: ClusterOptions,
    *,
    progress: OnProgress | None = None,
) -> Progress:
    """Ask every row of some inputs on a cluster, and store the answers in a folder.

    Args:
        sources: see `prepare_inputs`; images must be where the workers find them by the same path or URL.
        out: path or URL (s3://, gs://) of a folder: `OUT.jsonl` has files of JSON lines, `OUT.parquet` Parquet files.
        options: what is asked, and how.
        cluster: where.
        progress: is called after each row.

    Raises:
        DataError: the inputs or the output cannot be used, or the output was made with other settings.
        EdgeError: Ray is not installed or not reached, or the model cannot be opened.
    """
    ray = _ray()
    report = progress or (lambda _: None)
    known = scan(sources, options.prompt, lambda _: report(Progress(rows=0)))
    decided = _decided(cluster)
    form: Form = Tables(known.types) if out.lower().rstrip("/").endswith(".parquet") else JsonLines()
    settings = _settings(cluster, decided) | question_settings(options)
    output = ShardsOutput(out, form, settings, known, restart=options.restart, retry=options.retry_errors)
    with closing(output):
        pending = pending_rows(output.known, known, options)
        state = Progress(rows=sum(pending), earlier=sum(output.known.done), errors=Counter(output.known.errors))
        if state.rows:
            rows = rows_to_ask(sources, known, pending)
            parallel = cluster.workers * options.at_once
            with closing(_forecast(decided, sources, pending, parallel)) as forecast, _started(ray, cluster):
                answered = _answered(ray, list(rows), options, cluster, forecast.add)
                store(answered, output, state, forecast, report, fail_fast=options.fail_fast)
        output.end(ordered=options.ordered)
    return state


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        import ray
        import ray.data
    except ImportError:
        raise EdgeError("--ray needs Ray Data; pip install 'lfm2vl-edge[ray]'") from None
    return ray


def _decided(cluster: ClusterOptions) -> Opening | None:
    """Return what the files of the model say; None if only the workers have it."""
    try:
        return decide(cluster.model, cluster.opening)
    except ModelNotPulled:
        return None


def _settings(cluster: ClusterOptions, decided: Opening | None) -> dict[str, str]:
    if decided is None:
        return {"model": str(cluster.model)}
    name = f"{decided.config.name} ({digest(decided.files.digests(None))})"
    return {"model": name, "image settings": image_settings(decided)}


def _forecast(decided: Opening | None, sources: Sequence[Source], pending: bytes, parallel: int) -> Forecast:
    planner = None
    if decided is not None:
        planner = Planner(config=decided.config.image, budget=decided.budget, costs=decided.costs)
    return Forecast(planner, sources, pending, parallel)


def _check_reached(url: str) -> None:
    """Connect to a cluster: Ray itself tries for minutes.

    Raises:
        EdgeError: nothing answers at HOST:PORT or ray://HOST:PORT.
    """
    host, colon, port = url.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EdgeError(f"Ray is not reached at {clip(url)}: {error}; check --ray") from None


@contextmanager
def _started(ray: Any, cluster: ClusterOptions) -> Iterator[None]:
    """Join Ray, or start it on this machine, for the block."""
    if ray.is_initialized():  # by the caller
        yield
        return
    how: dict[str, Any] = {"address": cluster.ray, "log_to_driver": False, "logging_level": "error"}  # quote
    _check_reached(cluster.ray)
    if cluster.ray == LOCAL:
        cpus = max(len(available_cpus()), cluster.workers * cluster.cpus)
        how |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**how)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = clip(" ".join(str(error).split()))
        raise EdgeError(f"Ray is not reached at {clip(cluster.ray)}: {why}; check --ray") from None
    try:
        yield
    finally:
        ray.shutdown()


def _answered(
    ray: Any, rows: Sequence[tuple[int, Row]], options: BatchOptions, cluster: ClusterOptions, on_end: OnEnd
) -> Iterator[tuple[int, Outcome]]:
    """Yield index and outcome of each row, as the actors return them."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = options.ordered
    size = max(1, min(_MOST_ROWS, len(rows) // (_BLOCKS_EACH * cluster.workers)))
    blocks = [_block(rows[start : start + size]) for start in range(0, len(rows), size)]
    opening = _with_threads(cluster)
    answered = ray.data.from_arrow(blocks).map_batches(
        Actor,
        fn_constructor_args=(cluster.model, opening, options, str(Path.cwd())),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=cluster.workers),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus_per_worker,
    )
    for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        for index, outcome in zip(*table.columns, strict=True):
            found = index.as_py(), pickle.loads(outcome.as_py())  # noqa: S301  # of our own actors
            on_end(*found)
            yield found


def _block(rows: Iterable[tuple[int, Row]]) -> Any:
    listed = list(rows)
    return arrow().table({"index": [one[0] for one in listed], "row": [pickle.dumps(one[1]) for one in listed]})


def _with_threads(cluster: ClusterOptions) -> OpenOptions:
    return cluster.opening if cluster.opening.n_threads else replace(cluster.opening, n_threads=cluster.cpus)
