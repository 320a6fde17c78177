"""The language file: read early, quietly and by libllama alone, freed once, and noticed when it is replaced."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, EngineError, Model, ModelNotFound, opening
from lfm2vl_edge.engine import library
from lfm2vl_edge.engine.ffi import LOG, llama
from lfm2vl_edge.engine.language import LanguageFile, start_reading
from lfm2vl_edge.engine.library import NATIVE_LOG, libllama
from lfm2vl_edge.models.names import find_model, find_pair
from lfm2vl_edge.opening import Opening, OpenOptions, decide, open_model
from tests.conftest import Pair


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
    ours, theirs = (ctypes.cast(one.llama_decode, ctypes.c_void_p).value for one in (libllama(), llama._lib))
    assert ours == theirs


def test_parameters_are_passed_on_as_llama_cpp_has_them() -> None:
    passed, known = library.ModelParams, llama.llama_model_params
    assert ctypes.alignment(passed) == ctypes.alignment(known)
    assert ctypes.sizeof(passed) > ctypes.sizeof(known)
    ours = known.from_buffer_copy(libllama().llama_model_default_params())
    theirs = llama.llama_model_default_params()
    for name, _ in known._fields_:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (bool(one), bool(other)) == (False, False) or one == other, name


def test_a_library_in_another_place_is_found_through_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert library._path() == Path(llama._lib._name)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert library._path() is None
    assert libllama.__wrapped__()._handle == llama._lib._handle


def test_nobody_hears_the_log_of_a_reading_unless_asked_to(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(LOG, "listener", heard.append)
    path = find_model(pair("a", "F16"))
    for is_heard in (False, True, False):
        heard.clear()
        with closing(LanguageFile(path, 0, None, is_heard=is_heard)) as language:
            libllama().llama_model_free(language.take())
        assert bool(heard) == is_heard


def test_the_log_is_heard_again_after_the_last_of_several_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(LOG, "listener", heard.append)

    def speak() -> bool:
        heard.clear()
        llama.llama_model_load_from_file(b"nothing.gguf", llama.llama_model_default_params())
        return bool(heard)

    with NATIVE_LOG.silence():
        with NATIVE_LOG.silence():
            assert not speak()
        assert not speak()
        NATIVE_LOG.let_hear(LOG.callback)
        assert not speak()
    assert speak()


def test_a_refused_file_is_named_with_the_reason(pair: Pair, tmp_path: Path) -> None:
    cut = tmp_path / "cut-F16.gguf"
    cut.write_bytes(find_model(pair("a", "F16")).read_bytes()[:-4096])
    with (
        closing(LanguageFile(cut, 0, None)) as language,
        pytest.raises(EngineError, match=r"llama_model_load_from_file failed on .*cut-F16\.gguf \(.*tensor"),
    ):
        language.take()


def test_another_kind_of_file_is_not_read(pair: Pair) -> None:
    assert start_reading(find_pair(pair("a", "F16")).mmproj, 0, None) is None


def test_a_language_file_that_nobody_takes_is_freed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[Any] = []
    free = llama.llama_model_free

    def noted(model: Any) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(llama, "llama_model_free", noted)
    monkeypatch.setattr(libllama(), "llama_model_free", noted)
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

    def replaced_meanwhile(path: Path, wishes: OpenOptions) -> Opening:
        found = decide(path, wishes)
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
        return found

    monkeypatch.setattr(opening, "decide", replaced_meanwhile)
    loaded = open_model(tmp_path / files.model.name, OpenOptions())
    with Model.of(loaded, None, 0), pytest.raises(ModelNotFound, match="was replaced after the model was opened"):
        loaded.source.digests(None)


def test_a_file_that_is_replaced_after_its_reading_began_is_read_anew(pair: Pair, tmp_path: Path) -> None:
    files, others = find_pair(pair("a", "F16")), find_pair(pair("b", "F16"))
    for path in (files.model, files.mmproj):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = tmp_path / files.model.name
    with closing(LanguageFile(model, 0, None)) as language:
        (tmp_path / "new").write_bytes(others.model.read_bytes())
        (tmp_path / "new").replace(model)
        loaded = open_model(model, OpenOptions(mmproj=others.mmproj), language)
        with Model.of(loaded, None, 0) as opened, Model.open(others.model) as expected:
            assert opened.engine.info.n_embd == expected.engine.info.n_embd
            assert loaded.config.name == expected.config.name


def test_the_rest_of_llama_cpp_is_imported_for_those_who_ask_for_it() -> None:
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


def test_a_llama_cpp_with_a_gpu_is_told_how_many_layers_it_may_take(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    load = llama.llama_model_load_from_file

    def noted(name: bytes, params: Any) -> Any:
        told.append(params.n_gpu_layers)
        return load(name, params)

    monkeypatch.setattr(libllama(), "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama, "llama_model_load_from_file", noted)
    with closing(LanguageFile(find_model(pair("a", "F16")), 0, None)) as language:
        libllama().llama_model_free(language.take())
    assert told == [0]  # its own default would be all
