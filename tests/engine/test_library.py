"""The language file: read early, without log and bindings, freed once, and read again if it is replaced."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, EngineError, Model, ModelNotFound, opening
from lfm2vl_edge.cache.fingerprint import OpenedFiles
from lfm2vl_edge.engine import language as language_module
from lfm2vl_edge.engine import library
from lfm2vl_edge.engine.ffi import llama
from lfm2vl_edge.engine.language import LanguageFile, start_reading
from lfm2vl_edge.engine.library import LOG, libllama
from lfm2vl_edge.host import has_amx
from lfm2vl_edge.model import model_of
from lfm2vl_edge.models.names import find_model, find_pair
from lfm2vl_edge.opening import Opening, OpenOptions, open_model
from tests.conftest import Pair

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "shapes.png")


def test_it_is_read_before_anything_heavy_is_imported(pair: Pair) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lfm2vl_edge.engine.language import start_reading\n"
        "assert start_reading(Path(sys.argv[1]), 0, None).take()\n"
        "heavy = {'llama_cpp', 'numpy', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(find_model(pair("a", "F16")))], capture_output=True, check=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_the_library_is_the_one_that_llama_cpp_uses() -> None:
    ours, theirs = (ctypes.cast(lib.llama_decode, ctypes.c_void_p).value for lib in (libllama(), llama._lib))
    assert ours == theirs


def test_parameters_are_passed_on_as_llama_cpp_has_them() -> None:
    passed, known = library.ModelParams, llama.llama_model_params
    assert ctypes.alignment(passed) == ctypes.alignment(known)
    assert ctypes.sizeof(passed) > ctypes.sizeof(known)
    ours = known.from_buffer_copy(libllama().llama_model_default_params())
    theirs = llama.llama_model_default_params()
    for name, _ in known._fields_:
        left, right = getattr(ours, name), getattr(theirs, name)
        assert (bool(left), bool(right)) == (False, False) or left == right, name


def test_a_library_in_another_place_is_found_through_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert library._path() == Path(llama._lib._name)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert library._path() is None
    assert libllama.__wrapped__()._handle == llama._lib._handle


@pytest.mark.parametrize(
    "command",
    [
        ("run", EXAMPLE, "What is this?"),
        ("detect", EXAMPLE, "circle"),
        ("bench",),
        ("tune",),
        ("serve", "--port", "0"),
    ],
)
def test_a_library_that_needs_a_missing_one_is_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    """As libggml-cuda does where NVIDIA's driver is not installed."""
    path = Path(llama._lib._name)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path), "LFM2VL_MODEL": "tiny"}
    line = [sys.executable, "-m", "lfm2vl_edge", *command]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.stderr.splitlines()
    assert re.match(r"error: llama\.cpp does not load: .*libggml.*; install the library that is missing", error), error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("flags", "built", "expected"),
    [
        ("avx512f amx_bf16 amx_tile amx_int8", "AVX2 = 1 | AMX_INT8 = 1 | ", True),
        ("avx512f amx_bf16 amx_tile amx_int8", "AVX2 = 1 | ", False),  # a prebuilt package
        ("avx512f", "AVX2 = 1 | AMX_INT8 = 1 | ", False),
    ],
)
def test_products_are_wrong_where_processor_and_llama_cpp_have_amx(
    flags: str, built: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name : Xeon\nflags : fpu {flags}\n")
    monkeypatch.setattr(library, "has_amx", lambda: has_amx(cpuinfo))
    monkeypatch.setattr(library, "libllama", lambda: SimpleNamespace(llama_print_system_info=built.encode))
    assert library.has_wrong_products.__wrapped__() is expected


def test_weights_are_not_rearranged_for_wrong_products(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether answers at the same time are those of one alone, tests/scheduler shows on such a processor."""
    passed: list[bool] = []
    load = llama.llama_model_load_from_file

    def record(name: bytes, params: Any) -> Any:
        passed.append(params.use_extra_bufts)
        return load(name, params)

    monkeypatch.setattr(llama, "llama_model_load_from_file", record)
    monkeypatch.setattr(language_module, "has_wrong_products", lambda: True)
    with closing(LanguageFile(find_model(pair("a", "F16")), 0, None)) as language:
        llama.llama_model_free(language.take())
    assert passed == [False]


def test_the_log_of_reading_is_received_only_if_verbose(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(LOG, "listener", lines.append)
    path = find_model(pair("a", "F16"))
    for verbose in (False, True, False):
        lines.clear()
        with closing(LanguageFile(path, 0, None, verbose=verbose)) as language:
            libllama().llama_model_free(language.take())
        assert bool(lines) == verbose


def test_the_log_is_received_again_after_the_last_of_several_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(LOG, "listener", lines.append)

    def logs() -> bool:
        lines.clear()
        llama.llama_model_load_from_file(b"nothing.gguf", llama.llama_model_default_params())
        return bool(lines)

    with LOG.silence():
        with LOG.silence():
            assert not logs()
        assert not logs()
        LOG.attach()
        assert not logs()
    assert logs()


def test_the_error_names_a_refused_file_and_the_reason(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "short-F16.gguf"
    path.write_bytes(find_model(pair("a", "F16")).read_bytes()[:-4096])
    with (
        closing(LanguageFile(path, 0, None)) as language,
        pytest.raises(EngineError, match=r"llama_model_load_from_file failed on .*short-F16\.gguf \(.*tensor"),
    ):
        language.take()


def test_another_kind_of_file_is_not_read(pair: Pair) -> None:
    assert start_reading(find_pair(pair("a", "F16")).mmproj, 0, None) is None


def test_a_language_file_that_is_not_taken_is_freed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[Any] = []
    free = llama.llama_model_free

    def recorded(model: Any) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(llama, "llama_model_free", recorded)
    monkeypatch.setattr(libllama(), "llama_model_free", recorded)
    folder = pair("a", "F16")
    with pytest.raises(ConfigError, match="tile_size"):
        open_model(folder, OpenOptions(image_settings={"tile_size": -1}))
    assert len(freed) == 1
    unused = LanguageFile(find_model(folder), 0, None)
    unused.close()
    unused.close()
    assert len(freed) == 2
    with Model.open(folder):
        pass
    assert len(freed) == 3  # by the engine that took it, once


def test_a_file_that_is_replaced_while_it_is_opened_is_noticed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_pair(pair("a", "F16"))
    for path in (files.model, files.mmproj):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    decide = opening._decide

    def replace_meanwhile(found: OpenedFiles, *arguments: Any) -> Opening:
        (tmp_path / "new").write_bytes(found.pair.model.read_bytes())
        (tmp_path / "new").replace(found.pair.model)
        return decide(found, *arguments)

    monkeypatch.setattr(opening, "_decide", replace_meanwhile)
    loaded = open_model(tmp_path / files.model.name)
    with model_of(loaded, None, 0), pytest.raises(ModelNotFound, match="was replaced after the model was opened"):
        loaded.opening.files.digests(None)


def test_a_file_that_is_replaced_after_its_reading_began_is_read_anew(pair: Pair, tmp_path: Path) -> None:
    files, others = find_pair(pair("a", "F16")), find_pair(pair("b", "F16"))
    for path in (files.model, files.mmproj):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = tmp_path / files.model.name
    with closing(LanguageFile(model, 0, None)) as language:
        (tmp_path / "new").write_bytes(others.model.read_bytes())
        (tmp_path / "new").replace(model)
        loaded = open_model(model, OpenOptions(mmproj=others.mmproj), language)
        with model_of(loaded, None, 0) as opened, Model.open(others.model) as expected:
            assert opened.engine.info.n_embd == expected.engine.info.n_embd
            assert loaded.opening.config.name == expected.config.name


def test_a_postponed_llama_cpp_is_complete_at_first_use() -> None:
    code = (
        "import sys\n"
        "from lfm2vl_edge.cli._start import postpone_bindings; postpone_bindings()\n"
        "from lfm2vl_edge.engine.llama import LlamaEngine\n"
        "from lfm2vl_edge.engine.ffi import llama as ours\n"
        "assert 'llama_cpp.llama' not in sys.modules and 'llama_cpp.mtmd_cpp' not in sys.modules\n"
        "import llama_cpp, llama_cpp.llama_cpp\n"
        "from llama_cpp import Llama, mtmd_cpp\n"
        "assert llama_cpp.llama_cpp is ours and llama_cpp.__version__ and callable(Llama)\n"
        "from llama_cpp import *\n"
        "assert llama_decode is ours.llama_decode\n"
        "try: llama_cpp.nothing\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('llama_cpp has everything')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_llama_cpp_with_a_gpu_gets_the_number_of_its_layers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int | None]] = []
    load = llama.llama_model_load_from_file

    def recorded(name: bytes, params: Any) -> Any:
        counts.append((params.n_gpu_layers, ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))[0]))
        return load(name, params)

    monkeypatch.setattr(libllama(), "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama, "llama_model_load_from_file", recorded)
    with closing(LanguageFile(find_model(pair("a", "F16")), 0, None)) as language:
        libllama().llama_model_free(language.take())
    assert counts == [(0, None)]  # its own default would be all, and long batches on a GPU also without layers there
