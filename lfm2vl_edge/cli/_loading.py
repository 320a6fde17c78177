"""From arguments to models and images; and downloads, announced before they start and with a progress bar."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from lfm2vl_edge.cli._options import STDIN, AskedModelOptions, ImageOptions, ModelOptions, read_stdin
from lfm2vl_edge.cli._output import progress_bar, warnings_to_stderr, write_line
from lfm2vl_edge.errors import DownloadError, ModelNotPulled
from lfm2vl_edge.host import CACHE_VARIABLE, cache_folder, start_worker

if TYPE_CHECKING:
    from lfm2vl_edge.image.load import ImageInput, OpenedImage
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.models.download import Download
    from lfm2vl_edge.models.manifest import ManifestEntry
    from lfm2vl_edge.models.names import ResolvedModel
    from lfm2vl_edge.opening import OpenedModel


_EARLY_PIXELS: Final = 16_000_000
"""Images up to this size are decoded while the model is still being opened."""


def find_model(name: str | None, mmproj: Path | None = None) -> ResolvedModel:
    """Return the model of a name or path; on a terminal, the user may download a missing one now.

    Raises:
        ModelNotFound: there is no model of that name, or it is not on this machine.
        DownloadError: it could not be downloaded.
    """
    from lfm2vl_edge.models.names import resolve_model

    try:
        return resolve_model(name, mmproj)
    except ModelNotPulled as error:
        if not _confirm_download(error.name):
            raise
        pull_visibly(error.name)
        return resolve_model(name, mmproj)


def chosen_model(options: ModelOptions) -> ResolvedModel:
    """Return the same model, with a note on stderr if it is the demonstration model by default."""
    from lfm2vl_edge.models.names import FALLBACK_NOTE

    located = find_model(options.model, options.mmproj)
    if located.is_fallback:
        write_line(f"note: {FALLBACK_NOTE}")
    return located


def _confirm_download(name: str) -> bool:
    """Ask the user whether to download a model; without a terminal the answer is no."""
    from lfm2vl_edge.models.registry import reference_of

    if not _is_terminal():
        return False
    reference = reference_of(name)
    size = reference.known.n_bytes(reference.quant) if reference.known else None
    shown = name if size is None else f"{name} ({megabytes(size)})"
    try:
        return typer.confirm(f"{shown} is not on this machine. Download it now?", err=True)
    except typer.Abort:  # the terminal was closed
        return False


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


@contextmanager
def opening(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Iterator[Callable[[], Model]]:
    """Open a model in a worker thread, and give a function that waits for it.

    Reading the language file keeps one core busy; it starts before numpy, Pillow and jinja2 are imported, and another
    core meanwhile imports the rest of the program and loads images. The model is closed with the block.

    Args:
        options: which model.
        image: its image settings and budget.
        verbose: from 2 on, the native log is shown.
        remember: whether later answers of this process need the states of earlier prompts; a single answer does not.
            With --low-memory none are kept.
        cache: whether the disk cache is used, which holds what can be seen in images; None: if LFM2VL_CACHE is set.
    """
    from lfm2vl_edge.engine.language import start_reading

    warnings_to_stderr()
    if verbose > 1:
        from lfm2vl_edge.engine.library import LOG

        LOG.verbose = True
    located = chosen_model(options)
    owned = ExitStack()
    low_memory = isinstance(options, AskedModelOptions) and options.low_memory
    try:
        language = start_reading(
            located.model,
            options.n_gpu_layers,
            options.device,
            verbose=verbose > 1,
            only_vocabulary=low_memory,
        )
        if language is not None:
            owned.callback(language.close)
        import_module(
            f"lfm2vl_edge.engine.{'low_memory' if low_memory else 'llama'}"
        )  # before the worker: two threads that import wait for each other
        from lfm2vl_edge.opening import open_model

        files = start_worker(open_model, located, options.open_options(located.mmproj, image), language)
        owned.callback(_close, files)
        yield lambda: _model_of(files, remember, cache, low_memory=low_memory)
    finally:
        if options.context.obj is not True:  # else the system frees it all, without waiting for a thread
            owned.close()


def _close(files: Future[OpenedModel]) -> None:
    if files.exception() is None:
        files.result().engine.close()


def _model_of(files: Future[OpenedModel], remember: bool, cache: bool | None, *, low_memory: bool) -> Model:
    from lfm2vl_edge.cache.memory import STATE_BYTES
    from lfm2vl_edge.model import model_of  # while the files are still being read

    folder = _disk_cache(cache)
    keeps_states = (remember or folder is not None) and not low_memory
    return model_of(files.result(), folder, STATE_BYTES if keeps_states else 0)


def _disk_cache(cache: bool | None) -> Path | None:
    is_used = bool(os.environ.get(CACHE_VARIABLE)) if cache is None else cache
    return cache_folder() if is_used else None


def load_argument(argument: str, max_pixels: int, cache: bool | None, most: float = math.inf) -> OpenedImage:
    """Return an image with its pixels in memory, unless the disk cache has an entry of it, with whatever settings.

    Args:
        argument: a path, an http(s) URL, a data URL, or - for stdin.
        max_pixels: the largest image that is decoded, pixels.
        cache: as for `opening`.
        most: a larger image is not decoded yet, pixels.
    """
    is_known = _known_images(cache)
    opened = open_argument(argument, max_pixels, is_known)
    if opened.height * opened.width > most or (is_known and opened.content and is_known(opened.content())):
        return opened
    pixels = opened.pixels()
    return replace(opened, pixels=lambda: pixels)


def load_early(argument: str, max_pixels: int, cache: bool | None) -> OpenedImage:
    """Return an image as `load_argument`, not decoded if it is so large that its plan shall be checked first."""
    return load_argument(argument, max_pixels, cache, _EARLY_PIXELS)


def _known_images(cache: bool | None) -> Callable[[bytes], bool] | None:
    """Return what says whether the disk cache has an entry of an image, by its content; None if there is no cache."""
    folder = _disk_cache(cache)
    if folder is None:
        return None
    from lfm2vl_edge.cache.disk import CACHE_BYTES, CacheFolder
    from lfm2vl_edge.cache.memory import KeyCache

    return KeyCache.on_disk(CacheFolder(folder, CACHE_BYTES)).has


def open_argument(argument: str, max_pixels: int, is_known: Callable[[bytes], bool] | None = None) -> OpenedImage:
    """Return the upright size of an image and a way to its pixels, which are not decoded; see `open_image`."""
    from lfm2vl_edge.image.load import open_image

    source: ImageInput = read_stdin() if argument == STDIN else argument
    return open_image(source, max_pixels=max_pixels, is_known=is_known)


def pull_visibly(
    name: str, *, mmproj_quant: str | None = None, revision: str | None = None, quiet: bool = False
) -> ManifestEntry:
    """Download a pair; its files, sizes and progress go to stderr.

    Raises:
        EdgeError: see `download.pull`.
    """
    from lfm2vl_edge.models.download import download_pair

    warnings_to_stderr()
    with progress_bar("downloading", quiet=quiet) as progress:
        return download_pair(
            name,
            mmproj_quant=mmproj_quant,
            revision=revision,
            on_start=None if quiet else show_download,
            progress=progress,
        )


@contextmanager
def checkpoint_files(name: str, revision: str | None, *, quiet: bool) -> Iterator[Path]:
    """Give the folder of a checkpoint: a local one, or one named like the repository with links to downloaded files.

    The hub cache names its folders by commit; the converter names its files like the folder.

    Raises:
        EdgeError: see `download.download_checkpoint`.
    """
    from lfm2vl_edge.models.registry import is_hub_id

    if not is_hub_id(name) or Path(name).exists() or Path(name).parent.is_dir():
        if revision is not None:
            raise DownloadError(f"--revision is for checkpoints of the hub; {name!r} is a local path")
        yield Path(name)
        return
    from lfm2vl_edge.models.download import CHAT_TEMPLATES, download_checkpoint

    warnings_to_stderr()
    with progress_bar("downloading", quiet=quiet) as progress:
        on_start = None if quiet else show_download
        files = download_checkpoint(name, revision=revision, on_start=on_start, progress=progress)
    with tempfile.TemporaryDirectory(prefix="lfm2vl-checkpoint-") as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        folder.mkdir()
        for file in files:
            link = folder / file.parent.name / file.name if file.match(CHAT_TEMPLATES) else folder / file.name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file)
        yield folder


def show_download(download: Download) -> None:
    """Write what is about to be downloaded, and under which licence, to stderr."""
    missing = download.missing_bytes
    rest = "" if missing == download.n_bytes else f", {megabytes(missing)} of it not here yet"
    lines = [f"{download.name}: {megabytes(download.n_bytes)}{rest}, revision {download.commit}"]
    big = [file for file in download.files if file.path.endswith((".gguf", ".safetensors"))]
    lines += [f"  {file.path}  {megabytes(file.n_bytes)}" for file in big]
    write_line("\n".join([*lines, f"licence of the weights: {download.licence}"]))


def megabytes(n_bytes: int | None) -> str:
    """Return a size in MB or GB, `?` if it is not known."""
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
