"""The language tower's file, read in a worker thread: that takes long and needs nothing of Python."""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2vl_edge.engine.library import NATIVE_LOG, libllama
from lfm2vl_edge.host import start_worker
from lfm2vl_edge.models.gguf import read_architecture
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE, stamp

if TYPE_CHECKING:
    from lfm2vl_edge.engine.devices import Gpu


def start_reading(path: Path, n_gpu_layers: int, device: str | None, *, is_heard: bool = False) -> LanguageFile | None:
    """Let a language file be read while other things are done; nothing, if it is another kind of file.

    Raises:
        ModelNotFound, ConfigError: there is no such file, or it is no GGUF file.
        EngineError: the installed llama.cpp has no such GPU.
    """
    if read_architecture(path) != LANGUAGE_ARCHITECTURE:
        return None  # whoever reads its settings says why not
    return LanguageFile(path, n_gpu_layers, device, is_heard=is_heard)


class LanguageFile:
    """Being read from the moment it is made; `close` frees what nobody took.

    Args:
        path: of the file.
        n_gpu_layers: layers that a GPU takes; -1 means all.
        device: name of that GPU; None leaves the choice to llama.cpp.
        is_heard: whether what llama.cpp logs meanwhile is wanted, which makes it slower.

    Raises:
        ModelNotFound: there is no such file.
        EngineError: the installed llama.cpp has no such GPU.
    """

    def __init__(self, path: Path, n_gpu_layers: int, device: str | None, *, is_heard: bool = False) -> None:
        libllama().llama_backend_init()
        self._path, self._gpu_layers = path, n_gpu_layers
        self.stamp = stamp(path)
        """What the file system says of the file, before it is read."""
        self.gpu = _find_gpu(n_gpu_layers, device)
        """The GPU that takes layers, if one was named."""
        self._is_taken = False
        self._reading = start_worker(self._load, is_heard)

    def take(self) -> Any:
        """Wait for the file and return llama.cpp's model, which the caller frees.

        Raises:
            EngineError: llama.cpp refuses the file.
        """
        model = self._reading.result() or self._load_or_say_why()
        self._is_taken = True
        return model

    def close(self) -> None:
        """Wait for the file and free it, unless it was taken; a second call does nothing."""
        if not self._is_taken and self._reading.exception() is None and self._reading.result():
            libllama().llama_model_free(self.take())

    def _load_or_say_why(self) -> Any:
        """Try again, and this time hear the log."""
        from lfm2vl_edge.engine.ffi import LOG, require

        LOG.forget()
        return require("llama_model_load_from_file", self._load(is_heard=True), f" on {self._path}")

    def _load(self, is_heard: bool) -> int | None:
        """Return llama.cpp's model, or None where it refuses the file."""
        name = os.fsencode(self._path)
        with nullcontext() if is_heard else NATIVE_LOG.silence():
            if libllama().llama_supports_gpu_offload():
                return _load_with_gpu(name, self._gpu_layers, self.gpu)
            found: int | None = libllama().llama_model_load_from_file(name, libllama().llama_model_default_params())
            return found


def _find_gpu(n_gpu_layers: int, device: str | None) -> Gpu | None:
    if n_gpu_layers == 0:
        return None
    from lfm2vl_edge.engine.devices import find_gpu

    return find_gpu(n_gpu_layers, device)


def _load_with_gpu(name: bytes, n_gpu_layers: int, gpu: Gpu | None) -> int | None:
    """Return the same from a llama.cpp that would use a GPU of its own accord."""
    from lfm2vl_edge.engine.ffi import llama

    params = llama.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    devices = (ctypes.c_void_p * 2)(gpu.handle if gpu else None, None)
    if gpu:
        params.devices = ctypes.addressof(devices)  # ends with a null; read while loading only
    found: int | None = llama.llama_model_load_from_file(name, params)
    return found
