"""libllama without llama_cpp's bindings, which are slower to import, and its log.

This is the only module that imports llama_cpp; it needs nothing else but the standard library.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import EngineError, clip
from lfm2vl_edge.host import ProcessLock, has_amx, llama_folders

_NAMES: Final = ("libllama.so", "libllama.dylib")
"""In the order in which llama_cpp searches for them."""
_PARAMETER_WORDS: Final = 64
"""More than llama.h's llama_model_params has: what is passed by value may be longer than what is read of it."""
_WARNING: Final = 3
_ERROR: Final = 4
_CONTINUATION: Final = 5
"""ggml.h's GGML_LOG_LEVEL_WARN, _ERROR and _CONT."""
_LogCallback: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
"""ggml.h's ggml_log_callback."""


class ModelParams(ctypes.Structure):
    """llama.h's llama_model_params, as opaque words: it is returned and passed on unread, aligned as pointers are."""

    _fields_ = (("opaque", ctypes.c_void_p * _PARAMETER_WORDS),)


def bindings(name: str) -> Any:
    """Return a module of llama_cpp; nothing else in the package imports it.

    Args:
        name: `llama_cpp` or `mtmd_cpp`.

    Raises:
        ImportError: llama_cpp is not installed.
        EngineError: its libraries do not load.
    """
    # Not in `importing`: modules call this while they are imported, and a thread that is in it may wait for them.
    with _loading():
        module = import_module(f"llama_cpp.{name}")
    LOG.attach()  # llama_cpp sets a callback of its own when it is imported
    return module


@functools.cache
def libllama() -> Any:
    """Return libllama, the same copy that llama_cpp uses, with types of some functions and its log attached to `LOG`.

    Raises:
        ImportError: llama_cpp is not installed.
        EngineError: its libraries do not load.
    """
    with _loading():
        path = _path() or import_module("llama_cpp.llama_cpp")._lib._name  # noqa: SLF001
        library = ctypes.CDLL(str(path))  # a separate object: the types below do not change llama_cpp's
        library.llama_model_default_params.restype = ModelParams
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
        library.llama_model_load_from_file.restype = ctypes.c_void_p
        library.llama_model_free.argtypes = [ctypes.c_void_p]
        library.llama_supports_gpu_offload.restype = ctypes.c_bool
        library.llama_print_system_info.restype = ctypes.c_char_p
        library.llama_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.llama_log_set(ctypes.cast(LOG.callback, ctypes.c_void_p), None)
    return library


@contextmanager
def _loading() -> Iterator[None]:
    """Explain why libraries do not load, such as those for CUDA where NVIDIA's driver is not installed."""
    try:
        yield
    except (OSError, AttributeError, RuntimeError) as error:  # RuntimeError: llama_cpp's, around an OSError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise EngineError(
            f"llama.cpp does not load: {clip(str(reason))}; install the library that is missing (libcuda.so.1 comes "
            "with NVIDIA's driver), or llama-cpp-python again"
        ) from error


@functools.cache
def has_wrong_products() -> bool:
    """Return whether llama.cpp would multiply by kernels that compute several sequences wrongly.

    Those for AMX add an offset of a matrix, in bytes, to a pointer to floats (ggml-cpu/amx/mmq.cpp, 0.3.36). The
    convolutions of LFM2 have one matrix for each sequence of a call: of two answers at the same time all but the first
    are nonsense, and memory of others is overwritten. Measured on such a processor: no answer of 12 was right.
    """
    return has_amx() and b"AMX_INT8 = 1" in libllama().llama_print_system_info()


def _path() -> Path | None:
    """Return the file that llama_cpp will load; None if it has a name or place that is unknown here."""
    folders = (llama_folders() or ())[:1]
    return next((path for folder in folders for name in _NAMES if (path := folder / name).is_file()), None)


class NativeLog:
    """Receives llama.cpp's log: keeps the reason of a failure, and prints the lines if `verbose`.

    llama.cpp has one log per process, so there is one of these, `LOG`.
    """

    def __init__(self) -> None:
        self.verbose = False
        self.listener: Callable[[str], None] | None = None
        """Called with every line, for what llama.cpp reports in no other way."""
        self.callback = _LogCallback(self._receive)
        """The C function that receives the log."""
        self._warning = self._error = ""
        self._level = 0
        self._lock = ProcessLock()
        self._silences = 0
        self._ignore = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)

    def attach(self) -> None:
        """Make llama.cpp send its log here, or nowhere while it is silenced."""
        with self._lock:
            receiver = self._ignore if self._silences else ctypes.cast(self.callback, ctypes.c_void_p)
            libllama().llama_log_set(receiver, None)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Discard the log inside the block, from all threads.

        Reading a model logs hundreds of lines, and a callback in Python waits for the interpreter at each of them: up
        to 5 ms if another thread is busy. Libc's `abs` instead takes the level and ignores the other arguments.
        """
        self._silence(1)
        try:
            yield
        finally:
            self._silence(-1)

    def forget(self) -> None:
        """Drop what was logged, so that `reason` is that of the next failure."""
        self._warning = self._error = ""

    def reason(self) -> str:
        """Return the first error, else the last warning, in parentheses to append to a message, or an empty string.

        The first, because later ones only report what failed in consequence.
        """
        line = self._error or self._warning
        return f" ({line})" if line else ""

    def _silence(self, change: int) -> None:
        with self._lock:
            self._silences += change
            self.attach()

    def _receive(self, level: int, text: bytes, _: int | None) -> None:
        self._level = self._level if level == _CONTINUATION else level
        line = text.decode("utf-8", "replace")
        if self.verbose:
            sys.stderr.write(line)
        if self.listener:
            self.listener(line)
        if self._level >= _ERROR and not self._error:
            self._error = line.strip()
        elif self._level == _WARNING and line.strip(" .\n"):
            self._warning = line.strip()


LOG: Final = NativeLog()
