"""Which GPU llama.cpp shall use, asked for by name; a clear answer where it was built without any; what it can use."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any, Final

from lfm2vl_edge.engine.ffi import libraries, llama
from lfm2vl_edge.errors import EngineError

_LIBRARY: Final = re.compile(r"(lib)?ggml[.\d]*\.(so|dylib|dll)[.\d]*")
"""ggml's registry of devices; llama-cpp-python has no functions for it."""
_GPU_TYPES: Final = frozenset((1, 2))
"""ggml's codes of a GPU and of one that shares the processor's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device that llama.cpp can put layers on."""

    name: str
    """As `--device` takes it, such as CUDA0."""
    handle: int
    """ggml's own; it is never freed."""


def find_gpu(n_layers: int, name: str | None) -> Gpu | None:
    """Return the GPU that was asked for; None leaves the choice to llama.cpp, or means that there is no work for one.

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
    for gpu in known:
        if gpu.name == name:
            return gpu
    raise EngineError(f"no GPU {name!r}; this machine has {', '.join(gpu.name for gpu in known) or 'none'}")


def gpus() -> list[Gpu]:
    """Return the GPUs that the installed llama.cpp finds."""
    library = _library()
    handles = [library.ggml_backend_dev_get(index) for index in range(library.ggml_backend_dev_count())]
    return [
        Gpu(name=library.ggml_backend_dev_name(handle).decode("utf-8", "replace"), handle=handle)
        for handle in handles
        if library.ggml_backend_dev_type(handle) in _GPU_TYPES
    ]


def backends() -> list[str]:
    """Return the names of what the installed llama.cpp can compute on: CPU, and such as CUDA, Vulkan, Metal."""
    library = _library()
    handles = [library.ggml_backend_reg_get(index) for index in range(library.ggml_backend_reg_count())]
    return [library.ggml_backend_reg_name(handle).decode("utf-8", "replace") for handle in handles]


def build() -> str | None:
    """Return version and commit of the installed ggml, None if it does not tell them."""
    library = _library()
    told = [getattr(library, name, None) for name in ("ggml_version", "ggml_commit")]
    for function in told:
        if function is None:  # before July 2025
            return None
        function.argtypes, function.restype = [], ctypes.c_char_p
    version, commit = ((function() or b"?").decode("utf-8", "replace") for function in told if function)
    return f"ggml {version} ({commit})"


def _library() -> Any:
    path = next((path for path in libraries() if _LIBRARY.fullmatch(path.name)), None)
    if path is None:
        raise EngineError("the installed llama-cpp-python has no ggml library, so a GPU cannot be asked for by name")
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
