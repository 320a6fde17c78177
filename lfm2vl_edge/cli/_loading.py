"""What `pull`, `convert` and the offer of `run` share: the lines before a download and the bar during it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from lfm2vl_edge.cli._options import ImageOptions, ModelOptions
from lfm2vl_edge.cli._output import ENDS_WITH_COMMAND, bytes_bar, say, shows_progress, warnings_to_stderr
from lfm2vl_edge.errors import ConfigError, DownloadError, ModelNotPulled
from lfm2vl_edge.host import CACHE_VARIABLE, cache_folder, start_worker

if TYPE_CHECKING:
    from lfm2vl_edge.engine.language import LanguageFile
    from lfm2vl_edge.image.load import ImageInput, Pixels
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.models.download import Offer
    from lfm2vl_edge.models.manifest import ManifestEntry
    from lfm2vl_edge.models.names import ResolvedModel
    from lfm2vl_edge.models.registry import Reference
    from lfm2vl_edge.opening import OpenedModel

STDIN = "-"
_MOST_BYTES: Final = 1 << 20
"""Of a schema or a grammar."""


def find_model(options: ModelOptions) -> ResolvedModel:
    """Return the model that was asked for; on a terminal, one that is not here may be pulled now.

    Raises:
        ModelNotFound: there is none of that name, or it is not here.
        DownloadError: it could not be pulled.
    """
    from lfm2vl_edge.models.names import resolve_model

    try:
        return resolve_model(options.model, options.mmproj)
    except ModelNotPulled as error:
        if not _wants_it_now(error.name):
            raise
        from lfm2vl_edge.models.registry import reference_of

        pull_visibly(reference_of(error.name))
        return resolve_model(options.model, options.mmproj)


def chosen_model(options: ModelOptions) -> ResolvedModel:
    """Return the same, and say on stderr when nobody chose it."""
    from lfm2vl_edge.models.names import FALLBACK_NOTE

    located = find_model(options)
    if located.is_fallback:
        typer.echo(f"note: {FALLBACK_NOTE}", err=True)
    return located


def _wants_it_now(name: str) -> bool:
    """Ask whether a model is to be pulled; without a terminal nobody is asked, and nothing is pulled."""
    if not _is_terminal():
        return False
    try:
        return typer.confirm(f"{_with_size(name)} is not on this machine. Pull it now?", err=True)
    except typer.Abort:  # the terminal was closed
        return False


def _with_size(name: str) -> str:
    """Return a name with the size of its files, where the table has it; the hub is not asked for it."""
    from lfm2vl_edge.models.registry import reference_of

    reference = reference_of(name)
    size = reference.known.n_bytes(reference.quant) if reference.known else None
    return name if size is None else f"{name} ({megabytes(size)})"


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def open_model(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Model:
    """Open the model that was asked for, with its image settings changed as asked.

    A single answer has no use for the states of earlier prompts, so they are kept only to `remember`, or on disk for
    the next process. The cache on disk holds what can be seen in images, so it is used only where that was asked
    for, here or by LFM2VL_CACHE.
    """
    with _reading(options, verbose) as (located, language):
        return _model_of(_open_files(located, language, options, image), remember, _cache(cache))


@contextmanager
def opening(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Iterator[Callable[[], Model]]:
    """Let the model open in another thread, and give what waits for it; arguments as for `open_model`.

    Reading the files keeps one core busy; another one meanwhile imports the rest of the program and reads images.
    The model is closed with the block.
    """
    folder = _cache(cache)

    def opened() -> Model:
        import_module("lfm2vl_edge.model")  # while the files are still being read
        return _model_of(files.result(), remember, folder)

    with _reading(options, verbose) as (located, language):
        import_module("lfm2vl_edge.engine.llama")  # here, since two threads that import only wait for each other
        files = start_worker(_open_files, located, language, options, image)
        try:
            yield opened
        finally:
            if not ENDS_WITH_COMMAND.is_set() and files.exception() is None:
                files.result().engine.close()


@contextmanager
def _reading(options: ModelOptions, verbose: int) -> Iterator[tuple[ResolvedModel, LanguageFile | None]]:
    """Find the model, and let its language file be read before anything else is imported."""
    from lfm2vl_edge.engine.language import start_reading

    warnings_to_stderr()
    is_heard = verbose > 1
    if is_heard:
        from lfm2vl_edge.engine.ffi import LOG

        LOG.verbose = True
    located = chosen_model(options)
    language = start_reading(located.model, options.n_gpu_layers, options.device, is_heard=is_heard)
    try:
        yield located, language
    finally:
        if language is not None and not ENDS_WITH_COMMAND.is_set():
            language.close()


def _open_files(
    located: ResolvedModel, language: LanguageFile | None, options: ModelOptions, image: ImageOptions
) -> OpenedModel:
    from lfm2vl_edge.opening import OpenOptions, open_model

    options_ = OpenOptions(
        mmproj=located.mmproj,
        image_settings=image.changes(),
        **image.wishes(),
        **options.machine(),
    )
    return open_model(located, options_, language)


def _cache(wanted: bool | None) -> Path | None:
    """Return the folder of the cache on disk, if it is to be used."""
    is_on = bool(os.environ.get(CACHE_VARIABLE)) if wanted is None else wanted
    return cache_folder() if is_on else None


def _model_of(loaded: OpenedModel, remember: bool, folder: Path | None) -> Model:
    from lfm2vl_edge.cache.memory import STATE_BYTES
    from lfm2vl_edge.model import Model

    return Model.of(loaded, folder, STATE_BYTES if remember or folder is not None else 0)


def load_argument(argument: str, max_megapixels: float) -> Pixels:
    """Return the pixels of an image given as a path, an http(s) address, a data URL, or - for stdin."""
    from lfm2vl_edge.image.load import load_image

    source: ImageInput = sys.stdin.buffer.read() if argument == STDIN else argument
    return load_image(source, max_pixels=int(max_megapixels * 1_000_000))


def read_schema_file(argument: str) -> dict[str, Any]:
    """Return the JSON schema in a file, or of stdin if the argument is -.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    text = read_text(argument, "JSON schema")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema {argument} is no JSON: {error}; correct it") from error
    if not isinstance(schema, dict):
        raise ConfigError(f'the JSON schema {argument} must be an object, such as {{"type": "object", ...}}')
    return schema


def read_text(argument: str, kind: str) -> str:
    """Return the text of a file, or of stdin if the argument is -; `kind` says what it should be.

    Raises:
        ConfigError: it cannot be read, is empty or too large, or is no text in UTF-8.
    """
    try:
        if argument == STDIN:
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(argument).open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"the {kind} {argument} has more than {_MOST_BYTES} bytes; simplify it")
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} {argument}: {error.strerror or error}; check the path") from error
    except ValueError as error:  # a zero byte in the name, or no UTF-8
        raise ConfigError(f"the {kind} {argument} is no text in UTF-8: {error}; correct it") from error
    if not text.strip():
        raise ConfigError(f"the {kind} {argument} is empty; write it, or name another file")
    return text


def refuse_stdin_twice(arguments: Sequence[str | None]) -> None:
    """Raise a ConfigError if stdin is asked for more than once.

    Raises:
        ConfigError: it is.
    """
    if list(arguments).count(STDIN) > 1:
        raise ConfigError(f"stdin ({STDIN}) can be read for one thing only; give files for the others")


def pull_visibly(
    reference: Reference, *, mmproj_quant: str | None = None, revision: str | None = None, quiet: bool = False
) -> ManifestEntry:
    """Pull a pair; what is fetched and how far it got goes to stderr.

    Raises:
        EdgeError: see `download.pull`.
    """
    from lfm2vl_edge.models.download import pull_reference

    warnings_to_stderr()
    with bytes_bar("pulling", shows_progress(quiet)) as progress:
        return pull_reference(
            reference,
            mmproj_quant=mmproj_quant,
            revision=revision,
            show=None if quiet else show_offer,
            progress=progress,
        )


@contextmanager
def checkpoint_files(name: str, revision: str | None, *, quiet: bool) -> Iterator[Path]:
    """Give the folder of a checkpoint: a local one, or one called like the repository with links to fetched files.

    The cache calls its folders by commit; the converter calls its files as the folder is called.

    Raises:
        EdgeError: see `download.fetch_checkpoint`.
    """
    from lfm2vl_edge.models.registry import is_hub_id

    if not is_hub_id(name) or Path(name).exists() or Path(name).parent.is_dir():
        if revision is not None:
            raise DownloadError(f"--revision is for checkpoints of the hub; {name!r} is a local path")
        yield Path(name)
        return
    from lfm2vl_edge.models.download import fetch_checkpoint

    warnings_to_stderr()
    with bytes_bar("fetching", shows_progress(quiet)) as progress:
        files = fetch_checkpoint(name, revision=revision, show=None if quiet else show_offer, progress=progress)
    with tempfile.TemporaryDirectory(prefix="lfm2vl-checkpoint-") as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(file)
        yield folder


def show_offer(offer: Offer) -> None:
    """Say what is about to be fetched, and under which licence."""
    missing = offer.missing_bytes
    rest = "" if missing == offer.n_bytes else f", {megabytes(missing)} of it not here yet"
    lines = [f"{offer.name}: {megabytes(offer.n_bytes)}{rest}, revision {offer.repository.commit}"]
    big = [file for file in offer.files if file.path.endswith((".gguf", ".safetensors"))]
    lines += [f"  {file.path}  {megabytes(file.n_bytes)}" for file in big]
    say("\n".join([*lines, f"licence of the weights: {offer.licence}"]))


def megabytes(n_bytes: int | None) -> str:
    """Return a size as people say it, `?` if it is not known."""
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
