"""The language tower's file, read in a worker thread: that takes long and needs no Python."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lfm2vl_edge.engine.library import LOG, has_wrong_products, libllama
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.host import drop_pages, importing
from lfm2vl_edge.models.facts import read_checked
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE, stamp


def start_reading(
    path: Path,
    n_gpu_layers: int,
    device: str | None,
    *,
    verbose: bool = False,
    only_vocabulary: bool = False,
) -> LanguageFile | None:
    """Start to read a language file in a worker thread; return None for another kind of file.

    Raises:
        ModelNotFound, ConfigError: the file is missing, or llama.cpp cannot read it without ending the process.
        EngineError: the installed llama.cpp has no such GPU.
    """
    before = stamp(path)
    metadata = read_checked(path)
    if metadata.get("general.architecture") != LANGUAGE_ARCHITECTURE:
        return None  # the error is raised when its settings are read
    language = LanguageFile(path, n_gpu_layers, device, verbose=verbose, only_vocabulary=only_vocabulary)
    if language.stamp == before:
        language.metadata = metadata
    return language


class LanguageFile:
    """A language file that a worker thread reads from construction on; `close` frees it unless `take` was called.

    Args:
        path: the file.
        n_gpu_layers: layers that a GPU takes; -1 means all.
        device: name of that GPU; None leaves the choice to llama.cpp.
        verbose: whether llama.cpp's log is received meanwhile, which is slower.
        only_vocabulary: whether the weights are left out; `read_sparingly` reads them later.

    Raises:
        ModelNotFound: the file is missing.
        EngineError: the installed llama.cpp has no such GPU.
    """

    def __init__(
        self,
        path: Path,
        n_gpu_layers: int,
        device: str | None,
        *,
        verbose: bool = False,
        only_vocabulary: bool = False,
    ) -> None:
        libllama().llama_backend_init()
        self.path = path
        self.only_vocabulary = only_vocabulary
        self.stamp = stamp(path)
        """The file's size and times before it is read."""
        self.metadata: Mapping[str, Any] | None = None
        """What `read_checked` returned of this file, if it was called."""
        self.n_gpu_layers = usable_layers(n_gpu_layers, device)
        """Layers that a GPU takes; 0 if there is no GPU for them here, and none was named."""
        self.gpu = _find_gpu(self.n_gpu_layers, device)
        """ggml's handle of the GPU that takes layers, if one was named."""
        self._model: int | None = None
        has_gpu = libllama().llama_supports_gpu_offload()
        self._needs_params = only_vocabulary or has_gpu or has_wrong_products()
        if self._needs_params:
            _import_bindings()  # not in the worker: two threads that import wait for each other
        self._worker = threading.Thread(target=self._read, args=(verbose,), daemon=True)
        self._worker.start()

    def take(self) -> int:
        """Wait for the file and return llama.cpp's model, which the caller frees.

        Raises:
            EngineError: llama.cpp refuses the file.
        """
        self._worker.join()
        model, self._model = self._model or self._retry(), None
        return model

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was read.

        Raises:
            EngineError: it was replaced.
        """
        if stamp(self.path) != self.stamp:
            raise EngineError(f"{self.path} was replaced since it was opened; open the model again")

    def read_sparingly(self) -> int:
        """Return llama.cpp's model of the whole file, which the caller frees; no weight is in memory twice.

        llama.cpp maps the file, and copies the weights of some types into another order for its kernels. What was
        copied is no longer needed from the file: these pages leave memory after each tensor.

        Raises:
            EngineError: the file was replaced, or llama.cpp refuses it.
        """
        from lfm2vl_edge.engine.ffi import require

        def drop(_progress: float, _: int | None) -> bool:
            drop_pages(self.path)
            return True

        self.check_unchanged()
        LOG.forget()
        callback = _import_bindings().llama_progress_callback(drop)
        model = _load(os.fsencode(self.path), 0, None, progress_callback=callback)
        drop_pages(self.path)
        return int(require("llama_model_load_from_file", model, f" on {self.path}"))

    def close(self) -> None:
        """Wait for the file and free it, unless it was taken; a second call does nothing."""
        self._worker.join()
        if self._model:
            libllama().llama_model_free(self._model)
        self._model = None

    def _read(self, verbose: bool) -> None:
        self._model = self._load(verbose)

    def _retry(self) -> int:
        """Load the file again, and receive the log this time.

        Raises:
            EngineError: llama.cpp refuses the file, for the reason that it logs.
        """
        with importing():
            from lfm2vl_edge.engine.ffi import require

        LOG.forget()
        return int(require("llama_model_load_from_file", self._load(verbose=True), f" on {self.path}"))

    def _load(self, verbose: bool) -> int | None:
        """Return llama.cpp's model, or None if it refuses the file."""
        name = os.fsencode(self.path)
        with nullcontext() if verbose else LOG.silence():
            if self._needs_params:
                return _load(name, self.n_gpu_layers, self.gpu, vocab_only=self.only_vocabulary)
            model: int | None = libllama().llama_model_load_from_file(name, libllama().llama_model_default_params())
            return model


def usable_layers(n_gpu_layers: int, device: str | None) -> int:
    """Return the layers that a GPU takes: 0 if llama.cpp was built for GPUs, finds none here, and none was named."""
    if n_gpu_layers == 0 or device is not None:
        return n_gpu_layers
    with importing():
        from lfm2vl_edge.engine.ffi import missing_gpu

    return 0 if missing_gpu() else n_gpu_layers


def _find_gpu(n_gpu_layers: int, device: str | None) -> int | None:
    if n_gpu_layers == 0:
        return None
    with importing():
        from lfm2vl_edge.engine.ffi import find_gpu

    return find_gpu(n_gpu_layers, device)


def _import_bindings() -> Any:
    with importing():
        from lfm2vl_edge.engine.ffi import llama

    return llama


def _load(name: bytes, n_gpu_layers: int, gpu: int | None, **more: Any) -> int | None:
    """Return the model from a llama.cpp that may use a GPU by default, or None if it refuses the file.

    `more` are other fields of llama.h's llama_model_params. Without layers for a GPU the list of devices is empty:
    llama.cpp would otherwise multiply the long batches of layers that are on the processor on the GPU, and keep memory
    there for them. Weights are not rearranged for kernels that compute wrongly.
    """
    llama = _import_bindings()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    params.use_extra_bufts = not has_wrong_products()
    for field, value in more.items():
        setattr(params, field, value)
    devices = (ctypes.c_void_p * 2)(gpu, None)
    if gpu or n_gpu_layers == 0:
        params.devices = ctypes.addressof(devices)  # ends with NULL; read only while loading
    model: int | None = llama.llama_model_load_from_file(name, params)
    return model
