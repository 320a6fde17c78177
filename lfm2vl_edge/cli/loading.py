"""From command-line words to a model and pictures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from lfm2vl_edge.background import begin
from lfm2vl_edge.cli.options import ImageOptions, ModelOptions
from lfm2vl_edge.cli.output import ENDS_WITH_COMMAND, warnings_to_stderr
from lfm2vl_edge.errors import ConfigError, ModelNotPulled
from lfm2vl_edge.files import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from lfm2vl_edge.engine.language import LanguageFile
    from lfm2vl_edge.image import ImageInput, Pixels
    from lfm2vl_edge.locate import Located
    from lfm2vl_edge.model import Model
    from lfm2vl_edge.opening import Loaded

STDIN = "-"
_MOST_BYTES: Final = 1 << 20
"""Of a schema or a grammar."""


def find_model(options: ModelOptions) -> Located:
    """Return the model that was asked for; on a terminal, one that is not here may be pulled now.

    Raises:
        ModelNotFound: there is none of that name, or it is not here.
        DownloadError: it could not be pulled.
    """
    from lfm2vl_edge.locate import locate

    try:
        return locate(options.model, options.mmproj)
    except ModelNotPulled as error:
        if not _wants_it_now(error.name):
            raise
        from lfm2vl_edge.cli.pulling import pull_visibly
        from lfm2vl_edge.registry import reference_of

        pull_visibly(reference_of(error.name))
        return locate(options.model, options.mmproj)


def chosen_model(options: ModelOptions) -> Located:
    """Return the same, and say on stderr when nobody chose it."""
    from lfm2vl_edge.locate import FALLBACK_NOTE

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
    from lfm2vl_edge.cli.pulling import megabytes
    from lfm2vl_edge.registry import reference_of

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
    the next process. The cache on disk holds what can be seen in pictures, so it is used only where that was asked
    for, here or by LFM2VL_CACHE.
    """
    with _reading(options, verbose) as (located, language):
        return _model_of(_open_files(located, language, options, image), remember, _cache(cache))


@contextmanager
def opening(
    options: ModelOptions, image: ImageOptions, verbose: int, *, remember: bool, cache: bool | None
) -> Iterator[Callable[[], Model]]:
    """Let the model open in another thread, and give what waits for it; arguments as for `open_model`.

    Reading the files keeps one core busy; another one meanwhile imports the rest of the program and reads pictures.
    The model is closed with the block.
    """
    folder = _cache(cache)

    def opened() -> Model:
        import_module("lfm2vl_edge.model")  # while the files are still being read
        return _model_of(files.result(), remember, folder)

    with _reading(options, verbose) as (located, language):
        import_module("lfm2vl_edge.engine.llama")  # here, since two threads that import only wait for each other
        files = begin(_open_files, located, language, options, image)
        try:
            yield opened
        finally:
            if not ENDS_WITH_COMMAND.is_set() and files.exception() is None:
                files.result().engine.close()


@contextmanager
def _reading(options: ModelOptions, verbose: int) -> Iterator[tuple[Located, LanguageFile | None]]:
    """Find the model, and let its language file be read before anything else is imported."""
    from lfm2vl_edge.engine.language import begin_reading
    from lfm2vl_edge.pair import find_model as find_language_file

    warnings_to_stderr()
    is_heard = verbose > 1
    if is_heard:
        from lfm2vl_edge.engine.ffi import LOG

        LOG.verbose = True
    located = chosen_model(options)
    file = find_language_file(located.model)
    language = begin_reading(file, options.gpu_layers, options.device, is_heard=is_heard)
    try:
        yield located, language
    finally:
        if language is not None and not ENDS_WITH_COMMAND.is_set():
            language.close()


def _open_files(located: Located, language: LanguageFile | None, options: ModelOptions, image: ImageOptions) -> Loaded:
    from lfm2vl_edge.opening import Wishes, open_pair

    wishes = Wishes(
        mmproj=located.mmproj,
        image_settings=image.changes(),
        **image.wishes(),
        **options.machine(),
    )
    return open_pair(located.model, wishes, language)


def _cache(wanted: bool | None) -> Path | None:
    """Return the folder of the cache on disk, if it is to be used."""
    is_on = bool(os.environ.get(CACHE_VARIABLE)) if wanted is None else wanted
    return cache_folder() if is_on else None


def _model_of(loaded: Loaded, remember: bool, folder: Path | None) -> Model:
    from lfm2vl_edge.cache import STATE_BYTES
    from lfm2vl_edge.model import Model

    return Model.of(loaded, folder, STATE_BYTES if remember or folder is not None else 0)


def load_picture(argument: str, max_megapixels: float) -> Pixels:
    """Return the pixels of a picture given as a path, an http(s) address, a data URL, or - for stdin."""
    from lfm2vl_edge.image import load_image

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
