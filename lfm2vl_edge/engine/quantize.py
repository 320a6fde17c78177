"""Quantizing a GGUF file with llama.cpp, in a process of its own.

llama_model_quantize cannot be stopped and ends the process if one of its checks fails. A process can be stopped, frees
all memory, and its exit code reports a crash.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

import gguf
import numpy as np

from lfm2vl_edge.engine import Floats
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.host import available_cpus

_ALIASES: Final = {"Q4_K": "Q4_K_M"}
"""llama-quantize's second name of a type."""
_BUFFER_BYTES: Final = 2**25
"""Memory for the rows that llama.cpp quantizes at once; its default, 8 GB, holds whole matrices. Same result."""
_TENSOR_LINE: Final = re.compile(r"\[ *\d+/ *\d+\] \S+ +- \[([\d, ]+)\], type = +(\w+),")
_NOT_WRITTEN: Final = "iostream error"
"""llama.cpp's message if the disk is full."""
_FAST_BF16: Final = "AVX512_BF16"
"""llama.cpp's name of the feature that makes products of bfloat16 faster than those of float16; processors with AMX
have it too, and llama.cpp reports no such feature of ARM processors."""
_NOTE_BYTES: Final = 127
"""Longest text that llama.h's llama_model_kv_override can hold."""
_NO_WEIGHTS: Final[Mapping[str, Floats]] = {}
_NO_NOTES: Final[Mapping[str, str | int]] = {}


def quantize_file(
    source: Path,
    target: Path,
    kind: str,
    overrides: Sequence[tuple[str, str]],
    advance: Callable[[int], None],
    *,
    requantize: bool = False,
    weights: Mapping[str, Floats] = _NO_WEIGHTS,
    notes: Mapping[str, str | int] = _NO_NOTES,
) -> None:
    """Write a quantized copy of a GGUF file, with the same bytes as llama-quantize.

    Args:
        source: language or mmproj file.
        target: the file to write; if this fails, an incomplete file remains.
        kind: one of `LANGUAGE_TYPES` or `ENCODER_TYPES` of config.py.
        overrides: pairs of a regular expression, searched in tensor names, and a tensor type such as Q6_K; the first
            match decides. llama.cpp honours them for block types only.
        advance: called with the size in `source`, bytes, of each tensor that is done.
        requantize: whether quantized tensors may be quantized again.
        weights: of the quantization error: matrix -> float32 `[columns]`, the mean square of each column's inputs;
            the columns of other matrices have the same weight.
        notes: metadata for the quantized file; texts are truncated to 127 bytes.

    Raises:
        EngineError: llama.cpp refuses; the message has its reason.
    """
    job = {
        "source": str(source),
        "target": str(target),
        "kind": kind,
        "requantize": requantize,
        "overrides": list(overrides),
        "weights": {name: len(values) for name, values in weights.items()},
        "notes": dict(notes),
    }
    failure = _run_job(job, weights.values(), advance)
    if failure:
        raise EngineError(_explained(failure, source, target))


def _run_job(job: Mapping[str, Any], weights: Iterable[Floats], advance: Callable[[int], None]) -> str:
    """Run a job in another process; return the reason of a failure, or an empty string."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from lfm2vl_edge.engine.quantize import work; work()"
    with subprocess.Popen(  # noqa: S603  # this interpreter and package
        [sys.executable, "-c", code, json.dumps(job)],
        stdin=subprocess.PIPE,  # stays open: the child ends when it is closed
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the log arrives through stdout
        start_new_session=True,  # Ctrl-C reaches only this process, which kills the child
    ) as child:
        try:
            _send(child.stdin, weights)
            failure = _follow(child.stdout, advance)
            child.wait()
        except BaseException:
            child.kill()
            raise
    return failure or (f": its process ended with code {child.returncode}" if child.returncode else "")


def _send(pipe: IO[bytes] | None, weights: Iterable[Floats]) -> None:
    """Send the weights to the child; they are too large for its command line."""
    if pipe is not None:
        with suppress(BrokenPipeError):  # it has ended, and its exit code is read later
            for values in weights:
                pipe.write(np.ascontiguousarray(values, np.float32).tobytes())
            pipe.flush()


def _follow(lines: IO[bytes] | None, advance: Callable[[int], None]) -> str:
    """Read the child's messages until it ends; return the reason of a failure, or an empty string."""
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
        return f"{source} is quantized already; quantize the original, or accept a further loss with --requantize"
    return f"llama_model_quantize failed on {source}{failure}"


def fast_encoder_type(system: str) -> str:
    """Return the fastest mmproj type on this machine of those with an error below 1 %.

    Args:
        system: llama.cpp's description of the machine, from `system_info`.
    """
    return "BF16" if re.search(rf"\b{_FAST_BF16} = 1\b", system) else "F16"


def system_info() -> str:
    """Return llama.cpp's description of the machine, which lists the processor's features that it uses."""
    from lfm2vl_edge.engine.ffi import llama

    return str(llama.llama_print_system_info().decode("utf-8", "replace"))


def work() -> None:
    """Run the job in the first argument, with messages on stdout: the child's side of `quantize_file`."""
    job = json.loads(sys.argv[1])
    weights = {name: _receive(size) for name, size in job["weights"].items()}
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    current = 0  # bytes of the tensor that is being quantized

    def listen(line: str) -> None:  # llama.cpp reports its progress only in its log
        nonlocal current
        if found := _TENSOR_LINE.match(line):
            _report_bytes(current)
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[found[2].upper()]]
            current = math.prod(int(side) for side in found[1].split(",")) // block * size

    failure = _quantize(job, weights, listen)
    _report_bytes(current)
    if failure:
        _send_message(failure=failure)
    sys.stdout.flush()
    os._exit(1 if failure else 0)  # the thread that watches the parent cannot be joined


def _receive(size: int) -> Floats:
    """Return the next weights from stdin, float32 `[size]`."""
    raw = sys.stdin.buffer.read(4 * size)
    if len(raw) != 4 * size:  # the parent has ended
        os._exit(1)
    return np.frombuffer(raw, np.float32)


def _exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _report_bytes(n_bytes: int) -> None:
    if n_bytes:
        _send_message(bytes=n_bytes)


def _send_message(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _quantize(job: dict[str, Any], weights: Mapping[str, Floats], listen: Callable[[str], None]) -> str:
    """Return the reason of a failure, or an empty string."""
    from lfm2vl_edge.engine.ffi import llama
    from lfm2vl_edge.engine.library import LOG

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
    """Return llama.cpp's array of overrides, which ends with an empty one; ctypes keeps it as long as `params`."""
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
    """Return llama.cpp's array of weights, which ends with an entry without a name; `weights` must outlive it."""
    from lfm2vl_edge.engine.ffi import llama

    array = (llama.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(array, weights.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(values)
    return array


def _native_notes(notes: Mapping[str, str | int]) -> Any:
    """Return llama.cpp's array of metadata, which ends with an entry without a key."""
    from lfm2vl_edge.engine.ffi import llama

    array = (llama.llama_model_kv_override * (len(notes) + 1))()
    for entry, (key, value) in zip(array, notes.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            text = value.encode("utf-8", "replace")[:_NOTE_BYTES].decode("utf-8", "ignore")  # no partial character
            entry.tag, entry.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, text.encode()
    return array
