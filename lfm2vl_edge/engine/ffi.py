"""libllama through llama_cpp's bindings, with owners and checked codes, and the devices that it can compute on.

Every native object is owned by a context manager or freed by its owner's `close`; every return code goes through
`check` or `require`. No ctypes object leaves the engine package.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numpy.ctypeslib import as_array

from lfm2vl_edge.engine.library import LOG, bindings, libllama
from lfm2vl_edge.engine.states import of_caches, of_one_cache
from lfm2vl_edge.errors import EngineError, StateError, clip, shorten
from lfm2vl_edge.host import llama_folders, llama_libraries

llama: Final = bindings("llama_cpp")
"""llama_cpp's bindings of llama.h."""
FLASH_ATTENTION: Final = 1
"""llama.h's LLAMA_FLASH_ATTN_TYPE_ENABLED; "auto" costs a trial run."""
ABORTED: Final = 2
"""llama_decode's code after the abort callback returned true."""
NO_MEMORY_SLOT: Final = 1
"""llama_decode's code when the context is full."""
_GPU_TYPES: Final = frozenset((1, 2))
"""ggml-backend.h's GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU, which shares the processor's memory."""
_GPU_LIBRARY: Final = re.compile(r"libggml-(cann|cuda|hip|metal|musa|opencl|sycl|vulkan|webgpu)\..*")
"""Is there if llama.cpp was built for such GPUs, whether this machine has one or not."""
_PID: Final = os.getpid()
_FOLDERS: Final = (Path(llama._lib._name).absolute().parent, (llama_folders() or (Path(),))[-1])  # noqa: SLF001
"""From which libllama was loaded, and from which libmtmd is if it is needed."""


def check(function: str, code: int) -> None:
    """Raise an EngineError that names the function, unless its return code is 0."""
    if code != 0:
        raise EngineError(f"{function} failed with code {code}{LOG.reason()}")


def require(function: str, handle: Any, hint: str = "") -> Any:
    """Return a native pointer, or raise an EngineError that names the function which returned NULL."""
    if not handle:
        raise EngineError(f"{function} failed{hint}{LOG.reason()}")
    return handle


def compute(function: Any, *arguments: Any) -> Any:
    """Call a native function that computes with several threads, and return its result.

    A forked process has none of the threads that GNU's OpenMP keeps for the thread that forked, and would wait for
    them for ever. So in a fork of the process that loaded this module a new thread calls, for which OpenMP starts
    new threads; that takes 0.3 ms more (measured with two threads).
    """
    if os.getpid() == _PID:
        return function(*arguments)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    try:
        thread.join()
    except BaseException:  # Ctrl-C; what the call uses must not be freed meanwhile
        thread.join()
        raise
    return results[0]


def floats(pointer: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a copy of native memory, float32 of this shape."""
    return as_array(pointer, shape).astype(np.float32, copy=True)


def parts(whole: Any, size: int) -> Iterator[tuple[Any, bool]]:
    """Yield slices of at most `size`, each with whether it is the last one."""
    for start in range(0, len(whole), size):
        yield whole[start : start + size], start + size >= len(whole)


def libraries() -> tuple[Path, ...]:
    """Return the shared libraries of the llama.cpp that was loaded, sorted, each once even if links name it."""
    return llama_libraries(*_FOLDERS)


def native_function(name: str, prototype: Any) -> Any:
    """Return a function of llama.cpp's libraries that llama_cpp has no binding for.

    Args:
        name: its name in C.
        prototype: its types, from `ctypes.CFUNCTYPE`.

    Raises:
        EngineError: the libraries do not have it.
    """
    library = llama._lib  # noqa: SLF001  # its dependencies are searched too
    if not hasattr(library, name):
        raise EngineError(f"the installed llama.cpp has no function {name}; install llama-cpp-python 0.3.36")
    return prototype((name, library))


def sequence_bytes(context: Any, sequence: int = 0) -> npt.NDArray[np.uint8]:
    """Return a copy of a sequence of a llama context, uint8 `[n_bytes]`, as that of a context with one cache.

    Raises:
        EngineError: llama.cpp wrote a different number of bytes than it announced.
    """
    size = llama.llama_state_seq_get_size(context, sequence)
    state = np.empty(size, np.uint8)
    written = llama.llama_state_seq_get_data(context, _bytes_at(state), size, sequence)
    if not size or written != size:
        raise EngineError(f"llama_state_seq_get_data wrote {written} of {size} bytes{LOG.reason()}")
    return of_one_cache(state)


def set_sequence_bytes(
    context: Any, state: npt.NDArray[np.uint8], n_tokens: int, sequence: int = 0, *, n_caches: int = 1
) -> None:
    """Replace a sequence of a llama context by uint8 `[n_bytes]` from `sequence_bytes`, after `n_tokens` tokens.

    Args:
        context: the native context.
        state: the bytes.
        n_tokens: tokens that they hold.
        sequence: its number.
        n_caches: caches of the context: 1, or one for each sequence.

    Raises:
        StateError: llama.cpp rejects the bytes, or finds another number of tokens in them; the sequence is empty then.
    """
    memory = llama.llama_get_memory(context)
    llama.llama_memory_seq_rm(memory, sequence, -1, -1)
    whole = of_caches(np.ascontiguousarray(state, np.uint8), n_caches)
    read = llama.llama_state_seq_set_data(context, _bytes_at(whole), whole.size, sequence)
    if not whole.size or read != whole.size:
        llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        raise StateError(f"llama_state_seq_set_data read {read} of {whole.size} bytes{LOG.reason()}")
    found = llama.llama_memory_seq_pos_max(memory, sequence) + 1
    if found != n_tokens:
        llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        raise StateError(f"the state is one of {found} tokens, not of {n_tokens}")


def _bytes_at(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class AbortFlag:
    """Stops a running llama_decode from any thread.

    llama.cpp calls its abort callback at every node of the graph, thousands of times a second, so the callback is not
    a Python function but libc's `atoi` on a one-character string: "0" continues, "1" stops.
    """

    def __init__(self) -> None:
        self._character = ctypes.create_string_buffer(b"0")
        atoi = ctypes.CDLL(None).atoi
        self._callback = llama.ggml_abort_callback(ctypes.cast(atoi, ctypes.c_void_p).value or 0)

    def attach(self, context: Any) -> None:
        """Make this flag stop the decodes of a llama context."""
        llama.llama_set_abort_callback(context, self._callback, ctypes.cast(self._character, ctypes.c_void_p))

    def raise_(self) -> None:
        """Stop the running or the next decode."""
        self._character.value = b"1"

    def lower(self) -> None:
        """Allow decodes again."""
        self._character.value = b"0"


def find_gpu(n_layers: int, name: str | None) -> int | None:
    """Return ggml's handle of a GPU, which is never freed; None leaves the choice to llama.cpp, or needs no GPU.

    Raises:
        EngineError: the installed llama.cpp can use no GPU, or none of that name.
    """
    if n_layers == 0:
        return None
    if not llama.llama_supports_gpu_offload() and not gpu_kinds():
        raise EngineError(
            "the installed llama-cpp-python uses no GPU; leave out the GPU layers, or build it for one: "
            "CMAKE_ARGS=-DGGML_CUDA=on (or -DGGML_VULKAN=on, -DGGML_METAL=on) "
            "pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps llama-cpp-python"
        )
    if name is not None:
        known = gpus()
        if name not in known:
            raise EngineError(f"no GPU {shorten(name)}; this machine has {', '.join(gpu_names().values()) or 'none'}")
        return known[name]
    if missing := missing_gpu():
        raise EngineError(f"{missing}; leave out the GPU layers, or install its driver")
    return None


def missing_gpu() -> str | None:
    """Return that the installed llama.cpp was built for a GPU which is not here, as a phrase; None if it is here."""
    kinds = gpu_kinds()
    if not kinds or llama.llama_supports_gpu_offload():
        return None
    return f"llama.cpp was built for {' and '.join(kinds)}, and finds no GPU for it here"


def gpu_kinds() -> list[str]:
    """Return what GPUs the installed llama.cpp was built for, such as cuda or vulkan."""
    return sorted({found[1] for path in libraries() if (found := _GPU_LIBRARY.fullmatch(path.name))})


def gpus() -> dict[str, int]:
    """Return the GPUs that the installed llama.cpp finds: name, such as CUDA0 -> ggml's handle."""
    library = _ggml()
    handles = [library.ggml_backend_dev_get(index) for index in range(library.ggml_backend_dev_count())]
    return {
        library.ggml_backend_dev_name(handle).decode("utf-8", "replace"): handle
        for handle in handles
        if library.ggml_backend_dev_type(handle) in _GPU_TYPES
    }


def gpu_names() -> dict[str, str]:
    """Return the GPUs for people: name -> name and model, such as Vulkan0 (AMD Radeon 780M)."""
    library = _ggml()
    models = {name: library.ggml_backend_dev_description(handle) or b"" for name, handle in gpus().items()}
    return {name: f"{name} ({clip(model.decode('utf-8', 'replace'))})" for name, model in models.items()}


def device_key(n_gpu_layers: int, device: str | None) -> str:
    """Return which GPUs may compute, for the settings that decide the bits of a result; their models, too."""
    if n_gpu_layers == 0:
        return ""
    names = gpu_names()
    chosen = names if device is None else {device: names[device]}
    return f" device={', '.join(chosen.values())}"


def backends() -> list[str]:
    """Return the names of what the installed llama.cpp can compute on: CPU, and such as CUDA, Vulkan, Metal."""
    library = _ggml()
    handles = [library.ggml_backend_reg_get(index) for index in range(library.ggml_backend_reg_count())]
    return [library.ggml_backend_reg_name(handle).decode("utf-8", "replace") for handle in handles]


def build() -> str | None:
    """Return version and commit of the installed ggml; None for one from before July 2025, which has neither."""
    library = _ggml()
    functions = [getattr(library, name, None) for name in ("ggml_version", "ggml_commit")]
    for function in functions:
        if function is None:
            return None
        function.argtypes, function.restype = [], ctypes.c_char_p
    version, commit = ((function() or b"?").decode("utf-8", "replace") for function in functions if function)
    return f"ggml {version} ({commit})"


def _ggml() -> Any:
    """Return ggml's registry of devices, for which llama_cpp has no functions.

    It is found through libllama, whose dependencies are searched too: another path could load a second copy.
    """
    library = libllama()
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_name.restype = ctypes.c_char_p
    library.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_description.restype = ctypes.c_char_p
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_reg_count.restype = ctypes.c_size_t
    library.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_reg_get.restype = ctypes.c_void_p
    library.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_reg_name.restype = ctypes.c_char_p
    return library
