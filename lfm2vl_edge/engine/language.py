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
from lfm2vl_edge.host import importing
from lfm2vl_edge.models.facts import read_checked
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE, stamp


def start_reading(path: Path, n_gpu_layers: int, device: str | None, *, verbose: bool = False) -> LanguageFile | None:
    """Start to read a language file in a worker thread; return None for another kind of file.

    Raises:
        ModelNotFound, ConfigError: the file is missing, or llama.cpp cannot read it without ending the process.
        EngineError: the installed llama.cpp has no such GPU.
    """
    before = stamp(path)
    metadata = read_checked(path)
    if metadata.get("general.architecture") != LANGUAGE_ARCHITECTURE:
        return None  # the error is raised when its settings are read
    language = LanguageFile(path, n_gpu_layers, device, verbose=verbose)
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

    Raises:
        ModelNotFound: the file is missing.
        EngineError: the installed llama.cpp has no such GPU.
    """

    def __init__(self, path: Path, n_gpu_layers: int, device: str | None, *, verbose: bool = False) -> None:
        libllama().llama_backend_init()
        self.path = path
        self.stamp = stamp(path)
        """The file's size and times before it is read."""
        self.metadata: Mapping[str, Any] | None = None
        """What `read_checked` returned of this file, if it was called."""
        self.n_gpu_layers = usable_layers(n_gpu_layers, device)
        """Layers that a GPU takes; 0 if there is no GPU for them here, and none was named."""
        self.gpu = _find_gpu(self.n_gpu_layers, device)
        """ggml's handle of the GPU that takes layers, if one was named."""
        self._model: int | None = None
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
            if libllama().llama_supports_gpu_offload() or has_wrong_products():
                return _load_with_gpu(name, self.n_gpu_layers, self.gpu)
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


def _load_with_gpu(name: bytes, n_gpu_layers: int, gpu: int | None) -> int | None:
    """Return the model from a llama.cpp that would use a GPU by default, or None if it refuses the file.

    Without layers for a GPU the list of devices is empty: llama.cpp would otherwise multiply the long batches of
    layers that are on the processor on the GPU, and keep memory there for them. Weights are not rearranged for kernels that compute wrongly.
    """
    with importing():
        from lfm2vl_edge.engine.ffi import llama

    params = llama.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    params.use_extra_bufts = not has_wrong_products()
    devices = (ctypes.c_void_p * 2)(gpu, None)
    if gpu or n_gpu_layers == 0:
        params.devices = ctypes.addressof(devices)  # ends with NULL; read only while loading
    model: int | None = llama.llama_model_load_from_file(name, params)
    return model
