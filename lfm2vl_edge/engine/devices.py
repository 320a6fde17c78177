"""What the installed llama.cpp can compute on: backends and GPUs, and the GPU that a name means."""

from __future__ import annotations

import ctypes
import re
from typing import Any, Final

from lfm2vl_edge.engine.ffi import libraries, llama
from lfm2vl_edge.errors import EngineError

_LIBRARY: Final = re.compile(r"libggml[.\d]*\.(so|dylib)[.\d]*")
"""Has ggml's registry of devices, for which llama-cpp-python has no functions."""
_GPU_TYPES: Final = frozenset((1, 2))
"""ggml-backend.h's GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU, which shares the processor's memory."""


def find_gpu(n_layers: int, name: str | None) -> int | None:
    """Return ggml's handle of a GPU, which is never freed; None leaves the choice to llama.cpp, or needs no GPU.

    Raises:
        EngineError: the installed llama.cpp can use no GPU, or none of that name.
    """
    if n_layers == 0:
        return None
    if not llama.llama_supports_gpu_offload():
        raise EngineError(
            "the installed llama-cpp-python uses no GPU; leave out the GPU layers, or build it for one: "
            "CMAKE_ARGS=-DGGML_CUDA=on (or -DGGML_VULKAN=on, -DGGML_METAL=on) "
            "pip install --force-reinstall --no-binary :all: --no-deps llama-cpp-python"
        )
    if name is None:
        return None
    known = gpus()
    if name not in known:
        raise EngineError(f"no GPU {name!r}; this machine has {', '.join(known) or 'none'}")
    return known[name]


def gpus() -> dict[str, int]:
    """Return the GPUs that the installed llama.cpp finds: name, such as CUDA0 -> ggml's handle."""
    library = _library()
    handles = [library.ggml_backend_dev_get(index) for index in range(library.ggml_backend_dev_count())]
    return {
        library.ggml_backend_dev_name(handle).decode("utf-8", "replace"): handle
        for handle in handles
        if library.ggml_backend_dev_type(handle) in _GPU_TYPES
    }


def backends() -> list[str]:
    """Return the names of what the installed llama.cpp can compute on: CPU, and such as CUDA, Vulkan, Metal."""
    library = _library()
    handles = [library.ggml_backend_reg_get(index) for index in range(library.ggml_backend_reg_count())]
    return [library.ggml_backend_reg_name(handle).decode("utf-8", "replace") for handle in handles]


def build() -> str | None:
    """Return version and commit of the installed ggml; None for one from before July 2025, which has neither."""
    library = _library()
    functions = [getattr(library, name, None) for name in ("ggml_version", "ggml_commit")]
    for function in functions:
        if function is None:
            return None
        function.argtypes, function.restype = [], ctypes.c_char_p
    version, commit = ((function() or b"?").decode("utf-8", "replace") for function in functions if function)
    return f"ggml {version} ({commit})"


def _library() -> Any:
    path = next((path for path in libraries() if _LIBRARY.fullmatch(path.name)), None)
    if path is None:
        raise EngineError("the installed llama-cpp-python has no ggml library, so a GPU cannot be chosen by name")
    library = ctypes.CDLL(str(path))
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_name.restype = ctypes.c_char_p
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_reg_count.restype = ctypes.c_size_t
    library.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_reg_get.restype = ctypes.c_void_p
    library.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_reg_name.restype = ctypes.c_char_p
    return library
