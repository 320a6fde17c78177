"""The design, checked: who may import whom, how long files and functions may be, what stays lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lfm2vl_edge

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "lfm2vl_edge").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])
LAYERS = [
    {"errors", "files", "background"},
    {"config", "metadata", "web", "schema", "boxes"},
    {"published", "geometry", "image", "stats", "hardware", "stream", "registry", "pulled", "blobs"},
    {"toolschema"},
    {"costs", "hub", "pair"},
    {"budget", "device"},
    {"modelfile", "resample", "draw", "scenes"},
    {"tiling", "engine", "resolve_model", "download"},
    {"tools", "template", "fetch"},
    {"prompt", "cache", "shelf", "identity", "engine.spinning"},
    {"engine.bindings"},
    {"engine.library"},
    {"engine.ffi"},
    {"engine.ggml"},
    {"engine.graph", "engine.weights", "engine.squares", "engine.vocabulary"},
    {"engine.gelu"},
    {"engine.gpu", "engine.mtmd", "engine.vision", "engine.grammar", "engine.sampling", "engine.quantize"},
    {"engine.llama"},
    {"engine.observe", "prepare"},
    {"generate", "opening"},
    {"session", "answers"},
    {"model"},
    {"verify", "evaluate", "calibrate", "tune", "chat", "doctor"},
    {"bench"},
    {""},
    {"cli"},
    {"__main__"},
]
"""Imports point to an earlier line only; what is not listed stands where its parent does."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "lfm2vl_edge").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer(module: str) -> int:
    while not any(module in line for line in LAYERS):
        assert module, "every module has a place in the design"
        module = module.rpartition(".")[0]
        assert module, "a new top-level module needs a place in LAYERS"
    return next(index for index, line in enumerate(LAYERS) if module in line)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_native_library_is_reached_through_its_bindings_only() -> None:
    names = {path.name: set(imports(path)) for path in FILES}
    assert not [name for name, used in names.items() if any(one.split(".")[0] == "llama_cpp" for one in used)]
    users = [name for name, used in names.items() if "lfm2vl_edge.engine.library" in used]
    assert sorted(users) == ["ffi.py", "library.py", "mtmd.py"]


@pytest.mark.parametrize("path", [path for path in FILES if "lfm2vl_edge" in path.parts[-3:-1]], ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    own = layer(module_name(path))
    for name in imports(path):
        if name.startswith("lfm2vl_edge."):
            target = name.removeprefix("lfm2vl_edge.")
            file = ROOT / "lfm2vl_edge" / target.replace(".", "/")
            if file.with_suffix(".py").exists() or file.is_dir():
                same_room = module_name(path).split(".")[0] == target.split(".")[0]
                assert layer(target) < own or same_room, f"{module_name(path)} imports {target}"


def test_the_converter_knows_only_errors_and_config_of_the_runtime() -> None:
    for path in (ROOT / "convert").rglob("*.py"):
        used = {".".join(name.split(".")[:2]) for name in imports(path) if name.startswith("lfm2vl_edge")}
        assert used <= {"lfm2vl_edge.errors", "lfm2vl_edge.config"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, node.name
        assert not isinstance(node, ast.Assert), "errors are raised, not asserted"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("run", "chat", "eval", "pull")), ["--version"], ["models"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import os, sys; sys.argv = ['lfm2vl-edge', *sys.argv[1:]]\n"
        "from lfm2vl_edge.cli import main\n"
        "os._exit = lambda status: None\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "heavy = {'llama_cpp', 'gguf', 'safetensors', 'lfm2vl_convert', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_public_names_are_found_where_they_are_said_to_lie() -> None:
    assert set(lfm2vl_edge.__all__) == set(lfm2vl_edge._PLACES)
    assert set(lfm2vl_edge.__all__) <= set(dir(lfm2vl_edge))
    for name in lfm2vl_edge.__all__:
        assert getattr(lfm2vl_edge, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lfm2vl_edge.nothing


def test_help_needs_no_heavy_module() -> None:
    code = "import sys, lfm2vl_edge.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert set(loaded).isdisjoint({"numpy", "PIL", "jinja2", "gguf", "llama_cpp", "huggingface_hub", "asyncio"})
