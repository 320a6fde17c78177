"""libllama by itself, before Python's slower imports, and its log."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_FOLDER_VARIABLE: Final = "LLAMA_CPP_LIB_PATH"
"""llama_cpp's environment variable for another folder."""
_NAMES: Final = ("libllama.so", "libllama.dylib")
"""In the order in which llama_cpp looks for them."""
_PARAMETER_WORDS: Final = 64
"""More than llama.h's llama_model_params has: what is passed by value may be longer than what is read of it."""


class ModelParams(ctypes.Structure):
    """llama.h's llama_model_params, as it is returned and passed on unread; like that, aligned as pointers are."""

    _fields_ = (("unread", ctypes.c_void_p * _PARAMETER_WORDS),)


def bindings(name: str) -> Any:
    """Return a module of llama_cpp; nothing else in the package imports it.

    Args:
        name: `llama_cpp` or `mtmd_cpp`.

    Raises:
        ImportError: llama_cpp is not installed.
    """
    return import_module(f"llama_cpp.{name}")


@functools.cache
def libllama() -> Any:
    """Return libllama, the same copy that llama_cpp uses, with the types of the functions that read a model file.

    Raises:
        ImportError: llama_cpp is not installed.
    """
    path = _path() or bindings("llama_cpp")._lib._name  # noqa: SLF001
    library = ctypes.CDLL(str(path))  # an object of our own: the types below are not llama_cpp's
    library.llama_model_default_params.restype = ModelParams
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_free.argtypes = [ctypes.c_void_p]
    library.llama_supports_gpu_offload.restype = ctypes.c_bool
    library.llama_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


def _path() -> Path | None:
    """Return the file that llama_cpp will load; None where it has another name or place than is known here."""
    named = os.environ.get(_FOLDER_VARIABLE)
    package = find_spec("llama_cpp")  # which is not imported by this
    inside = package.submodule_search_locations if package else None
    folders = [Path(named)] if named else [Path(place) / "lib" for place in inside or ()]
    return next((path for folder in folders for name in _NAMES if (path := folder / name).is_file()), None)


class Log:
    """llama.cpp's log, of which there is one in a process: somebody hears it, or for a while nobody."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._silences = 0
        self._nobody = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)
        self._hearer: Any = self._nobody

    def let_hear(self, callback: Any) -> None:
        """Have every line told to a callback of C's types, which the caller keeps alive."""
        with self._lock:
            self._hearer = ctypes.cast(callback, ctypes.c_void_p)
            self._set()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Let nobody hear the log for now.

        Reading a model logs hundreds of lines, and a callback in Python waits for the interpreter at each of them: up
        to 5 ms where another thread is busy. Libc's `abs` instead takes the level and leaves the rest alone.
        """
        self._silence(1)
        try:
            yield
        finally:
            self._silence(-1)

    def _silence(self, more: int) -> None:
        with self._lock:
            self._silences += more
            self._set()

    def _set(self) -> None:
        libllama().llama_log_set(self._nobody if self._silences else self._hearer, None)


NATIVE_LOG: Final = Log()
