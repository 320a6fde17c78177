"""What a library may not do to its host: importing it and opening a model leave the process as it was."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import Model
from lfm2vl_edge.models import gguf
from lfm2vl_edge.models.names import find_pair
from tests.conftest import MAY_FORK, Pair

STATE = """
import os, signal, sys, threading
import numpy, PIL.Image, jinja2, logging  # what is used beside llama.cpp may start threads of its own

def state():
    threads = sorted(thread.name for thread in threading.enumerate())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    return dict(os.environ), threads, handlers, sys.excepthook, sys.path[:], os.getcwd(), logging.root.handlers[:]

def native_threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
"""
OPENING = """
def show(model):
    engine = model.engine
    image = numpy.arange(64 * 64 * 3, dtype=numpy.uint8).reshape(64, 64, 3)
    engine.reserve(100)
    engine.decode_tokens(engine.tokenize("what is this?"))
    engine.decode_embeddings(engine.encode(image, 4))
    return engine.logits()

def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        return
    code = 1
    try:
        signal.alarm(100)  # a child that hangs is a failure
        work()
        code = 0
    finally:
        os._exit(code)

def open_in_child():
    with Model.open(sys.argv[1], n_threads=2) as model:
        assert numpy.array_equal(show(model), numpy.load(sys.argv[2]))
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def run(code: str, *arguments: object) -> None:
    command = [*MAY_FORK, "-c", STATE + OPENING + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_changes_nothing_and_loads_no_llama_cpp() -> None:
    run(
        "before, native = state(), native_threads()\n"
        "import lfm2vl_edge\n"
        "from lfm2vl_edge import *\n"
        "assert state() == before\n"
        "assert native_threads() == native\n"
        "assert 'llama_cpp' not in sys.modules\n"
    )


def test_opening_changes_nothing_and_leaves_no_thread(pair: Pair) -> None:
    run(
        "before, native = state(), native_threads()\n"
        "from lfm2vl_edge import Model\n"
        "with Model.open(sys.argv[1], n_threads=2) as model:\n"
        "    assert state() == before\n"
        "    assert native_threads() == native\n"
        "assert state() == before\n",
        pair("a", "F16"),
    )


def changes_process(node: ast.AST) -> bool:
    """Whether a node of the syntax tree changes os.environ or sys.modules."""
    owners = {"os.environ", "sys.modules"}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        changing = {"setdefault", "update", "pop", "clear", "popitem", "__setitem__"}
        is_change = ast.unparse(node.func.value) in owners and node.func.attr in changing
        return is_change or ast.unparse(node.func) in {"os.putenv", "os.unsetenv", "os.register_at_fork"}
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return ast.unparse(node.value) in owners
    return False


def test_only_the_command_line_changes_the_process() -> None:
    package = Path(__file__).parent.parent / "lfm2vl_edge"
    trees = {path.relative_to(package): ast.parse(path.read_text()) for path in package.rglob("*.py")}
    assert {str(path) for path, tree in trees.items() if any(map(changes_process, ast.walk(tree)))} == {
        str(Path("cli", "_start.py")),
        str(Path("batch", "cluster.py")),  # before Ray is imported, which reads its settings there
        "host.py",  # `importing`: a fork waits for imports that run
    }


def test_opening_does_not_sleep(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError(seconds)

    monkeypatch.setattr("time.sleep", refuse)
    Model.open(pair("a", "F16")).close()


def test_llama_cpp_is_a_complete_package_after_opening(pair: Pair) -> None:
    run(
        "import importlib, types\n"
        "from lfm2vl_edge import Model\n"
        "Model.open(sys.argv[1]).close()\n"
        "package = sys.modules['llama_cpp']\n"
        "assert type(package) is types.ModuleType\n"
        "names = set(vars(package))\n"
        "assert {'Llama', 'llama_decode', '__version__'} <= names\n"
        "assert sys.modules['llama_cpp.llama'].Llama is package.Llama\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'llama_cpp']:\n"
        "    del sys.modules[name]\n"
        "assert set(vars(importlib.import_module('llama_cpp'))) <= names\n",  # an import without this library
        pair("a", "F16"),
    )


@pytest.fixture
def logits(pair: Pair, tmp_path: Path) -> Path:
    """The file with what an engine computes in a process that never forks."""
    path = tmp_path / "logits.npy"
    run(
        "from lfm2vl_edge import Model\n"
        "with Model.open(sys.argv[1], n_threads=2) as model: numpy.save(sys.argv[2], show(model))\n",
        pair("a", "F32"),
        path,
    )
    return path


@needs_fork
def test_a_process_may_fork_after_the_import_and_open_a_model(pair: Pair, logits: Path) -> None:
    run("from lfm2vl_edge import Model\nin_child(open_in_child)\nopen_in_child()\n", pair("a", "F32"), logits)


@needs_fork
@pytest.mark.parametrize("use", ["", "show(model)"], ids=["unused", "used"])
def test_a_process_may_fork_after_a_model_was_closed(pair: Pair, logits: Path, use: str) -> None:
    run(
        "from lfm2vl_edge import Model\n"
        "with Model.open(sys.argv[1], n_threads=2) as model:\n"
        f"    {use or 'pass'}\n"
        "in_child(open_in_child)\n"
        "in_child(lambda: in_child(open_in_child))\n"
        "open_in_child()\n",
        pair("a", "F32"),
        logits,
    )


@needs_fork
def test_an_open_model_can_be_used_by_a_forked_process(pair: Pair, logits: Path) -> None:
    run(
        "from lfm2vl_edge import Model\n"
        "def check():\n"
        "    assert numpy.array_equal(show(model), numpy.load(sys.argv[2]))\n"
        "with Model.open(sys.argv[1], n_threads=2) as model:\n"
        "    check()\n"
        "    in_child(check)\n"
        "    check()\n",
        pair("a", "F32"),
        logits,
    )


def test_opening_reads_the_header_of_each_file_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_pair(pair("a", "F16"))
    Model.open(files.model).close()  # so that every module is imported before the function is replaced
    original, counts = gguf.read_header, Counter[Path]()

    def read_header(path: Path) -> Any:
        counts[path] += 1
        return original(path)

    for name, module in list(sys.modules.items()):
        if name.startswith("lfm2vl_edge.") and getattr(module, "read_header", None) is original:
            monkeypatch.setattr(module, "read_header", read_header)
    with Model.open(files.model) as model:
        assert counts == {files.model: 1, files.mmproj: 1}
        model.engine.encode(np.zeros((32, 32, 3), np.uint8), 1)
    assert counts == {files.model: 1, files.mmproj: 1}
