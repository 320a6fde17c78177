"""The language tower's file, read in a thread of its own: that takes long and needs nothing of Python."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lfm2vl_edge.engine.ffi import LOG, llama, require
from lfm2vl_edge.engine.gpu import Gpu, find_gpu


class LanguageFile:
    """Being read from the moment it is made; `close` frees what nobody took.

    Raises:
        EngineError: the installed llama.cpp has no such GPU.
    """

    def __init__(self, path: Path, gpu_layers: int, device: str | None) -> None:
        LOG.forget()
        llama.llama_backend_init()
        self.gpu = find_gpu(gpu_layers, device)
        """The GPU that takes layers, if one was named."""
        self._is_taken = False
        reader = ThreadPoolExecutor(1)
        self._reading = reader.submit(_load, path, gpu_layers, self.gpu)
        reader.shutdown(wait=False)

    def take(self) -> Any:
        """Wait for the file and return llama.cpp's model, which the caller frees.

        Raises:
            EngineError: llama.cpp refuses the file.
        """
        model = self._reading.result()
        self._is_taken = True
        return model

    def close(self) -> None:
        """Wait for the file and free it, unless it was taken; a second call does nothing."""
        if not self._is_taken and self._reading.exception() is None:
            llama.llama_model_free(self.take())


def _load(path: Path, gpu_layers: int, gpu: Gpu | None) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    devices = (ctypes.c_void_p * 2)(gpu.handle if gpu else None, None)
    if gpu:
        params.devices = ctypes.addressof(devices)  # ends with a null; read while loading only
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    return require("llama_model_load_from_file", model, f" on {path}")
