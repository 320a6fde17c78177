"""libllama through llama_cpp's bindings, with owners and checked codes.

Every native object is handed out by a context manager or freed by its owner's `close`; every return code goes through
`check` or `require`. Nothing of ctypes leaves the engine package.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lfm2vl_edge.engine.library import NATIVE_LOG, bindings
from lfm2vl_edge.errors import EngineError

__all__ = [
    "ABORTED",
    "FLASH_ATTENTION",
    "LOG",
    "NO_MEMORY_SLOT",
    "AbortFlag",
    "check",
    "floats",
    "libraries",
    "llama",
    "native_function",
    "require",
    "sequence_bytes",
    "set_sequence_bytes",
]

llama: Final = bindings("llama_cpp")
"""llama.h, by llama_cpp."""
FLASH_ATTENTION: Final = 1
"""llama.h's LLAMA_FLASH_ATTN_TYPE_ENABLED; "auto" costs a trial run."""
ABORTED: Final = 2
"""llama_decode's code after the abort callback said yes."""
NO_MEMORY_SLOT: Final = 1
"""llama_decode's code when the context is full."""
_WARNING: Final = 3
_ERROR: Final = 4
_CONTINUATION: Final = 5
"""ggml.h's GGML_LOG_LEVEL_WARN, _ERROR and _CONT."""
_NATIVE: Final = re.compile(r"\.(so|dylib|dll)(\.|$)")


class NativeLog:
    """Keeps what llama.cpp's log says of a failure, and prints the log when asked to.

    llama.cpp has one log for the process, so there is one of these, made when the library is loaded.
    """

    def __init__(self) -> None:
        self.verbose = False
        self.listener: Callable[[str], None] | None = None
        """Called with every line, for what llama.cpp tells in no other way."""
        self._warning = self._error = ""
        self._level = 0
        self.callback = llama.llama_log_callback(self._take)
        """What hears the log, as C calls it."""
        NATIVE_LOG.let_hear(self.callback)

    def _take(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
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

    def forget(self) -> None:
        """Drop what was logged, so that the next error tells its own reason."""
        self._warning = self._error = ""

    def reason(self) -> str:
        """Return the first error, else the last warning, as an addition to a message, or nothing.

        The first, because those that follow only say that what needed it failed too.
        """
        said = self._error or self._warning
        return f" ({said})" if said else ""


LOG: Final = NativeLog()


def check(function: str, code: int) -> None:
    """Raise an EngineError that names the function, unless its return code is 0."""
    if code != 0:
        raise EngineError(f"{function} failed with code {code}{LOG.reason()}")


def require(function: str, handle: Any, hint: str = "") -> Any:
    """Return a native pointer, or raise an EngineError that names the function which gave none."""
    if not handle:
        raise EngineError(f"{function} failed{hint}{LOG.reason()}")
    return handle


def floats(pointer: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a copy of native floats; the native memory may be reused at once."""
    return np.ctypeslib.as_array(pointer, shape).astype(np.float32, copy=True)


def libraries() -> tuple[Path, ...]:
    """Return the files of native code that llama_cpp brings, sorted, each once however many names it has."""
    folder = Path(llama.__file__).parent / "lib"
    found = (path.resolve() for path in folder.iterdir() if path.is_file() and _NATIVE.search(path.name))
    return tuple(sorted(set(found)))


def native_function(name: str, prototype: Any) -> Any:
    """Return a function of llama.cpp's libraries that llama_cpp has no binding for.

    Args:
        name: of the function.
        prototype: its types, made by `ctypes.CFUNCTYPE`.

    Raises:
        EngineError: there is none.
    """
    loaded = llama._lib  # noqa: SLF001  # by its path another copy of the library could be loaded
    library = next((one for one in (loaded, *_other_libraries()) if hasattr(one, name)), None)
    if library is None:
        raise EngineError(f"the installed llama.cpp has no function {name}; install llama-cpp-python 0.3.36")
    return prototype((name, library))


@functools.cache
def _other_libraries() -> tuple[Any, ...]:
    """Return what must be searched beside libllama. Elsewhere its dependencies are searched with it."""
    return tuple(ctypes.CDLL(str(path)) for path in libraries() if sys.platform == "win32" and "ggml" in path.name)


def sequence_bytes(context: Any) -> npt.NDArray[np.uint8]:
    """Return a copy of the sequence of a llama context, uint8 `[n_bytes]`.

    Raises:
        EngineError: llama.cpp wrote another number of bytes than it announced.
    """
    size = llama.llama_state_seq_get_size(context, 0)
    state = np.empty(size, np.uint8)
    written = llama.llama_state_seq_get_data(context, _bytes_at(state), size, 0)
    if not size or written != size:
        raise EngineError(f"llama_state_seq_get_data wrote {written} of {size} bytes{LOG.reason()}")
    return state


def set_sequence_bytes(context: Any, state: npt.NDArray[np.uint8]) -> None:
    """Replace the sequence of a llama context by uint8 `[n_bytes]` of `sequence_bytes`.

    Raises:
        EngineError: llama.cpp does not take the bytes; the sequence is empty then.
    """
    memory = llama.llama_get_memory(context)
    llama.llama_memory_clear(memory, False)
    whole = np.ascontiguousarray(state, np.uint8)
    read = llama.llama_state_seq_set_data(context, _bytes_at(whole), whole.size, 0)
    if not whole.size or read != whole.size:
        llama.llama_memory_clear(memory, False)
        raise EngineError(f"llama_state_seq_set_data read {read} of {whole.size} bytes{LOG.reason()}")


def _bytes_at(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class AbortFlag:
    """Stops a running llama_decode from any thread.

    llama.cpp asks its abort callback at every node of the graph, thousands of times a second, so the callback is no
    Python function but libc's `atoi` on a one-letter string: "0" goes on, "1" stops.
    """

    def __init__(self) -> None:
        self._letter = ctypes.create_string_buffer(b"0")
        atoi = ctypes.CDLL(None).atoi
        self._callback = llama.ggml_abort_callback(ctypes.cast(atoi, ctypes.c_void_p).value or 0)

    def attach(self, context: Any) -> None:
        """Let this flag stop the decodes of a llama context."""
        llama.llama_set_abort_callback(context, self._callback, ctypes.cast(self._letter, ctypes.c_void_p))

    def raise_(self) -> None:
        """Stop the decode that runs now, or the next one."""
        self._letter.value = b"1"

    def lower(self) -> None:
        """Allow decodes again."""
        self._letter.value = b"0"
