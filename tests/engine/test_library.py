"""The language file: read early, without log and bindings, freed once, and read again if it is replaced."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
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
from lfm2vl_edge.host import has_amx, llama_libraries
from lfm2vl_edge.model import model_of
from lfm2vl_edge.models.names import find_model, find_pair
from lfm2vl_edge.opening import Opening, OpenOptions, open_model
from lfm2vl_edge.planning.device import profile_key
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


def own_libraries(folder: Path) -> dict[str, str]:
    """Copy libllama and ggml into a folder, and return an environment in which llama_cpp loads them from there."""
    for path in Path(llama._lib._name).parent.glob("lib*"):
        if not path.name.startswith("libmtmd"):
            shutil.copy(path, folder / path.name)
    return {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}


def run(
    script: str, *arguments: str | Path, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a script in a process of its own, which is ended if it hangs, and return its stdout."""
    code = f"import faulthandler, sys; faulthandler.dump_traceback_later(60, exit=True)\n{script}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environ = {**(environment or os.environ), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("is_relative", [False, True])
def test_the_libraries_in_another_place_are_those_that_were_loaded(tmp_path: Path, is_relative: bool) -> None:
    """Linux says which files are mapped."""
    environment = own_libraries(tmp_path)
    if is_relative:
        environment["LLAMA_CPP_LIB_PATH"] = tmp_path.name
    loaded = run(
        "import json, os\n"
        "from lfm2vl_edge.engine import encoder, ffi\n"
        "from lfm2vl_edge.engine.encoder import mtmd\n"
        "os.chdir('/')\n"
        "assert ffi.backends() == ['CPU'] and ffi.gpu_names() == {} and ffi.build()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "mapped = {line.split()[5] for line in lines if 'r-xp' in line and '.so' in line}\n"
        "print(json.dumps([sorted(mapped), [str(path) for path in ffi.libraries()]]))\n",
        environment=environment,
        cwd=tmp_path.parent,
    )
    mapped, named = json.loads(loaded)
    native = [path for path in mapped if re.search(r"/lib(ggml|llama|mtmd)[^/]*$", path)]
    assert {Path(path).name.partition(".")[0] for path in native} == {
        "libggml", "libggml-base", "libggml-cpu", "libllama", "libmtmd"
    }  # fmt: skip
    assert set(native) <= set(named)
    assert {str(Path(path).parent) for path in named if "libmtmd" not in path} == {str(tmp_path)}


def test_a_profile_belongs_to_the_libraries_in_another_place(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_model(pair("a", "F16"))
    usual = profile_key(model).engine
    for name, value in own_libraries(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert profile_key(model).engine == usual
    for path in tmp_path.glob("libggml-cpu*"):
        path.write_bytes(path.read_bytes() + b"another build")
    assert profile_key(model).engine != usual


@pytest.mark.parametrize("folder", ["", "nothing", "file"])
def test_a_place_without_libraries_is_one_line(
    folder: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", folder)
    model = find_model(pair("a", "F16"))
    assert re.fullmatch(r"(libmtmd\S*( |$))+", profile_key(model).engine)
    assert library._path() is None
    done = subprocess.run(
        [sys.executable, "-m", "lfm2vl_edge", "run", EXAMPLE, "What?", "-m", str(model)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: llama.cpp does not load: Shared library with base name 'llama' not found; ")


def test_a_library_of_another_version_is_one_line(tmp_path: Path) -> None:
    path = Path(llama._lib._name)
    shutil.copy(path.with_name(path.name.replace("llama", "ggml-base")), tmp_path / path.name)
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path), "LFM2VL_MODEL": "tiny"}
    command = [sys.executable, "-m", "lfm2vl_edge", "run", EXAMPLE, "What?"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.stderr.splitlines()
    assert re.match(r"error: llama\.cpp does not load: .*llama_\w+; install the library", error), error


def test_libraries_are_found_beside_the_file_that_a_link_names(tmp_path: Path) -> None:
    build, links, package = (tmp_path / name for name in ("build", "links", "package"))
    for folder in (build, links, package):
        folder.mkdir()
    for name in ("libllama.so.0.5", "libggml.so", "libggml-cuda.so.0", "libm.so.6", "libggml.txt"):
        (build / name).write_bytes(b"")
    (build / "libllama.so").symlink_to("libllama.so.0.5")
    (links / "libllama.so").symlink_to(build / "libllama.so")
    for name in ("libmtmd.0.dylib", "libllama.dylib"):
        (package / name).write_bytes(b"")
    expected = ["libggml-cuda.so.0", "libggml.so", "libllama.so.0.5", "libmtmd.0.dylib"]
    for folder in (links, build):
        assert [path.name for path in llama_libraries(folder, package)] == expected


IMPORT_AT_ONCE = """
import threading
from pathlib import Path
from lfm2vl_edge import host
from lfm2vl_edge.engine import language

begun = threading.Event()

def meet(event, arguments):
    # The main thread goes on with the module, whose lock it has, when the other thread is going to wait for it too.
    is_main = threading.current_thread() is threading.main_thread()
    if event == "exec" and arguments[0].co_filename.endswith("ffi.py") and is_main:
        begun.set()
        while threading.active_count() > 1 and host._imports.acquire(blocking=False):
            host._imports.release()
    if event == "import" and arguments[0] == "lfm2vl_edge.engine.ffi" and not is_main:
        begun.wait()

sys.addaudithook(meet)
"""


@pytest.mark.parametrize("reason", ["only_vocabulary", "amx"])
def test_a_language_file_is_read_while_the_bindings_are_imported(pair: Pair, reason: str) -> None:
    """Each of two threads had a lock that the other one waited for."""
    run(
        f"{IMPORT_AT_ONCE}\n"
        "language.has_wrong_products = lambda: sys.argv[2] == 'amx'\n"
        "options = {} if sys.argv[2] == 'amx' else {sys.argv[2]: True}\n"
        "file = language.LanguageFile(Path(sys.argv[1]), 0, None, **options)\n"
        "import lfm2vl_edge.engine.llama\n"
        "assert file.take()\n",
        find_model(pair("a", "F16")),
        reason,
    )


def test_the_bindings_are_imported_at_once_by_an_answer_and_a_program() -> None:
    """The program imports them as any module, the answer so that no fork happens meanwhile."""
    run(
        f"{IMPORT_AT_ONCE}\n"
        "thread = threading.Thread(target=language._import_bindings)\n"
        "thread.start()\n"
        "import lfm2vl_edge.engine.llama\n"
        "thread.join()\n",
    )


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


def test_the_tests_leave_no_file_open() -> None:
    """llama_cpp opens two when it is imported; Python prints at its end that they are open."""
    name = (
        f"{Path(__file__).relative_to(Path(__file__).parents[2])}::test_parameters_are_passed_on_as_llama_cpp_has_them"
    )
    command = [sys.executable, "-X", "dev", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout
    assert "unclosed file" not in done.stdout + done.stderr
