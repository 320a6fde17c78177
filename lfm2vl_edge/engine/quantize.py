"""Quantizing a GGUF file by llama.cpp itself, in a process of its own.

llama_model_quantize cannot be stopped and ends the process when a check of its own fails. A process can be stopped,
gives all memory back, and says with its exit code that it died.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import gguf
import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.host import available_cpus

QUANT_TYPES: Final = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0"),
    *("Q4_K_M", "Q4_K", "Q4_K_S", "Q4_0", "IQ4_NL", "Q3_K_M"),
)
"""What a file can be quantized to, in llama-quantize's spelling; Q4_K is its other name of Q4_K_M."""
_ALIASES: Final = {"Q4_K": "Q4_K_M"}
_BUFFER_BYTES: Final = 2**25
"""Rows that llama.cpp holds at once; its default, 8 GB, is whole matrices. The result is the same."""
_TENSOR_LINE: Final = re.compile(r"\[ *\d+/ *\d+\] \S+ +- \[([\d, ]+)\], type = +(\w+),")
_NOT_WRITTEN: Final = "iostream error"
"""The whole of what llama.cpp says when the disk is full."""
_FAST_BF16: Final = "AVX512_BF16"
"""How llama.cpp calls what makes products of bfloat16 faster than those of float16; processors with AMX have it too,
and of other ones it does not tell."""


_NOTE_BYTES: Final = 127
"""What fits into a text that llama.cpp is asked to note in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much the columns of matrices count."""

    weights: Mapping[str, Floats]
    """Matrix -> float32 `[columns]`: the mean square of what each column is multiplied with."""
    notes: Mapping[str, str | int]
    """Metadata for the quantized file; of long texts the first 127 bytes."""


def quantize_file(
    source: Path,
    target: Path,
    kind: str,
    overrides: Sequence[tuple[str, str]],
    advance: Callable[[int], None],
    *,
    requantize: bool = False,
    importance: Importance | None = None,
) -> None:
    """Write a quantized form of a GGUF file, byte for byte llama-quantize's.

    Args:
        source: language or mmproj file.
        target: the file to write; it is left behind, incomplete, when this fails.
        kind: one of `QUANT_TYPES`.
        overrides: pairs of a regular expression, searched in tensor names, and a tensor type such as Q6_K; the first
            that is found decides. llama.cpp honours them for block types only.
        advance: called with the bytes of each tensor of `source` that is done.
        requantize: whether tensors that are quantized already may be quantized again.
        importance: what errors are weighed with; without it each column counts alike.

    Raises:
        EngineError: llama.cpp refuses; the message has its reason.
    """
    job: dict[str, Any] = {"source": str(source), "target": str(target), "kind": kind, "requantize": requantize}
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.quantize import work; work()"
    job |= {"overrides": list(overrides), "weights": {}, "notes": {}}
    if importance is not None:
        job |= {"weights": {name: len(one) for name, one in importance.weights.items()}, "notes": {**importance.notes}}
    command = [sys.executable, "-c", code, json.dumps(job)]
    with subprocess.Popen(  # noqa: S603  # our own interpreter and code
        command,
        stdin=subprocess.PIPE,  # held open: its end tells the child that nobody waits any more
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the log arrives through stdout
        start_new_session=True,  # Ctrl-C goes to us, and we decide
    ) as child:
        try:
            if importance is not None:
                _send(child.stdin, importance)
            failure = _follow(child.stdout, advance)
            child.wait()
        except BaseException:
            child.kill()
            raise
    if not failure and child.returncode != 0:
        failure = f": its process ended with code {child.returncode}"
    if failure:
        raise EngineError(_explained(failure, source, target))


def _send(pipe: IO[bytes] | None, importance: Importance) -> None:
    """Give the child the weights, which are too many for its command line."""
    if pipe is not None:
        with suppress(BrokenPipeError):  # it ended already, and its exit code will say so
            for weights in importance.weights.values():
                pipe.write(np.ascontiguousarray(weights, np.float32).tobytes())
            pipe.flush()


def _follow(lines: IO[bytes] | None, advance: Callable[[int], None]) -> str:
    """Read what the child says until it ends; return what went wrong, or nothing."""
    failure = ""
    for line in lines or ():
        message = json.loads(line)
        if "bytes" in message:
            advance(message["bytes"])
        failure = message.get("failure", failure)
    return failure


def _explained(failure: str, source: Path, target: Path) -> str:
    if _NOT_WRITTEN in failure:
        return f"cannot write all of {target}: the disk is full; make room or give another folder"
    if "requantizing" in failure:
        return f"{source} is quantized already, and again makes it worse; quantize the original, or allow --requantize"
    return f"llama_model_quantize failed on {source}{failure}"


def fast_encoder_type(system: str) -> str:
    """Return the mmproj type that is fastest on this machine among those that are exact enough (error below 1 %).

    Args:
        system: llama.cpp's description of the machine.
    """
    return "BF16" if re.search(rf"\b{_FAST_BF16} = 1\b", system) else "F16"


def system_info() -> str:
    """Return llama.cpp's description of the machine: the processor's features that it uses."""
    from lfm2vl_edge.engine.ffi import llama

    return str(llama.llama_print_system_info().decode("utf-8", "replace"))


def work() -> None:
    """Quantize what the first argument says, and tell how it goes on stdout: the child's side of `quantize_file`."""
    job = json.loads(sys.argv[1])
    weights = {name: _receive(size) for name, size in job["weights"].items()}
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    progress = _Progress()
    failure = _quantize(job, weights, progress.listen)
    progress.finish()
    if failure:
        _say(failure=failure)
    sys.stdout.flush()
    os._exit(1 if failure else 0)  # the thread that watches the parent cannot be joined


def _receive(size: int) -> Floats:
    """Return the next weights from the parent, float32 `[size]`."""
    raw = sys.stdin.buffer.read(4 * size)
    if len(raw) != 4 * size:  # nobody waits any more
        os._exit(1)
    return np.frombuffer(raw, np.float32)


def _leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _Progress:
    """Finds out from llama.cpp's log which tensor is being worked on: there is no other way."""

    def __init__(self) -> None:
        self._current = 0

    def listen(self, line: str) -> None:
        if found := _TENSOR_LINE.match(line):
            self.finish()
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[found[2].upper()]]
            self._current = math.prod(int(side) for side in found[1].split(",")) // block * size

    def finish(self) -> None:
        if self._current:
            _say(bytes=self._current)
        self._current = 0


def _quantize(job: dict[str, Any], weights: Mapping[str, Floats], listen: Callable[[str], None]) -> str:
    """Return what went wrong, or nothing."""
    from lfm2vl_edge.engine.ffi import LOG, llama

    kind = _ALIASES.get(job["kind"], job["kind"])
    params = llama.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    params.nthread = len(available_cpus())
    params.allow_requantize = job["requantize"]
    params.max_buf_size = _BUFFER_BYTES
    params.tt_overrides = _native_overrides(job["overrides"])
    if weights:
        params.imatrix = _native_weights(weights)
        params.kv_overrides = _native_notes(job["notes"])
    LOG.listener = listen
    LOG.forget()
    code = llama.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["target"]), ctypes.byref(params))
    return LOG.reason() or f" with code {code}" if code else ""


def _native_overrides(overrides: Sequence[tuple[str, str]]) -> Any:
    """Return llama.cpp's array of overrides, which ends with an empty one; ctypes keeps it while `params` lives."""
    from lfm2vl_edge.engine.ffi import llama

    if not overrides:
        return None
    array = (llama.llama_model_tensor_override * (len(overrides) + 1))()
    for entry, (pattern, kind) in zip(array, overrides, strict=False):
        entry.pattern = pattern.encode()
        entry.type = int(gguf.GGMLQuantizationType[kind])
    array[len(overrides)].type = 2**31 - 1
    return array


def _native_weights(weights: Mapping[str, Floats]) -> Any:
    """Return llama.cpp's array of weights, which ends with a nameless entry; the values must outlive its use."""
    from lfm2vl_edge.engine.ffi import llama

    array = (llama.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(array, weights.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(values)
    return array


def _native_notes(notes: Mapping[str, str | int]) -> Any:
    """Return llama.cpp's array of metadata to write, which ends with an entry without a key."""
    from lfm2vl_edge.engine.ffi import llama

    array = (llama.llama_model_kv_override * (len(notes) + 1))()
    for entry, (key, value) in zip(array, notes.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            text = value.encode("utf-8", "replace")[:_NOTE_BYTES].decode("utf-8", "ignore")  # no half characters
            entry.tag, entry.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, text.encode()
    return array
