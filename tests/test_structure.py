"""The design, checked: who may import whom, how long files and functions are, what stays lazy, what is exported."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import lfm2vl_edge
import lfm2vl_edge.evaluate
from lfm2vl_edge import AskOptions, BudgetOptions, ImageBudget, Model, Options
from lfm2vl_edge.opening import LoadOptions, OpenOptions

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lfm2vl_edge"
CONVERTER = ROOT / "convert" / "lfm2vl_convert"
FILES = sorted([*PACKAGE.rglob("*.py"), *CONVERTER.rglob("*.py")])
ORDER = (
    ("errors", "config"),
    ("host",),
    ("planning",),
    ("image",),
    ("models",),
    ("engine",),
    ("cache",),
    ("prompt",),
    ("structured",),
    ("stats", "stream"),
    ("generate", "choose"),
    ("opening",),
    ("model", "chat"),
    ("scheduler",),
    ("server", "batch", "watch"),
    ("evaluate", "diagnose"),
    ("",),
    ("cli",),
    ("__main__",),
)
"""The rooms of the package, lowest first; "" is the package itself. A module imports from lower rows, its own room,
and other rooms of its row as long as there is no cycle."""
FROM_CONVERTER = {"errors", "config", "host", "models.gguf"}
"""What the converter may import of the runtime."""


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path, name: str, known: frozenset[str], top: str) -> Iterator[str]:
    """Yield the modules of a package that a file imports: anywhere in it, relative, lazy or for type checkers only."""
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [top, *base[: len(base) + 1 - node.level]] if node.level else []
            stem = ".".join(part for part in (*inside, node.module or "") if part)
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        for target in targets:
            if target != top and not target.startswith(f"{top}."):
                continue
            found = target.removeprefix(top).removeprefix(".")
            while found and found not in known:
                found = found.rpartition(".")[0]
            if found != name:
                yield found


def import_graph(package: Path, top: str) -> dict[str, set[str]]:
    """Return module -> modules of the same package that it imports."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    known = frozenset(files)
    return {name: set(imported(path, name, known, top)) for name, path in files.items()}


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of a cycle, in order; an empty list if there is no cycle."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def row_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    rows = [number for number, row in enumerate(ORDER) if room in row]
    assert rows, f"{module}: a new room needs a place in ORDER"
    return rows[0]


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the imports that point to a higher row."""
    return [
        f"{name or 'lfm2vl_edge'} imports {target or 'lfm2vl_edge'}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if row_of(target) > row_of(name)
    ]


def test_imports_point_one_way_and_form_no_cycle() -> None:
    graph = import_graph(PACKAGE, "lfm2vl_edge")
    assert len(graph) > 50
    assert upward(graph) == []
    assert cycle_in(graph) == []
    assert cycle_in(import_graph(CONVERTER, "lfm2vl_convert")) == []


PLANTED = {
    "cycle": {
        "image/load.py": "def f() -> None:\n    from lfm2vl_edge.image import draw\n",
        "image/draw.py": "import lfm2vl_edge.image.load\n",
    },
    "cycle of relative imports": {"engine/llama.py": "from . import ffi\n", "engine/ffi.py": "from .llama import x\n"},
    "cycle for type checkers": {
        "model.py": "from lfm2vl_edge import chat\n",
        "chat.py": "if TYPE_CHECKING:\n    from lfm2vl_edge.model import Model\n",
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cycle_is_found(tmp_path: Path, name: str) -> None:
    for path, text in PLANTED[name].items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    graph = import_graph(tmp_path, "lfm2vl_edge")
    assert sorted(cycle_in(graph)) == sorted(path.removesuffix(".py").replace("/", ".") for path in PLANTED[name])
    assert upward(graph) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("planning/geometry.py", "from lfm2vl_edge.engine import llama\n", "planning.geometry imports engine"),
        ("engine/llama.py", "def f() -> None:\n    from ..cli import run\n", "engine.llama imports cli"),
        ("image/load.py", "if TYPE_CHECKING:\n    import lfm2vl_edge.model\n", "image.load imports model"),
        ("generate.py", "from lfm2vl_edge import Model\n", "generate imports lfm2vl_edge"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    for name in ("__init__.py", "model.py", "engine/__init__.py", "cli/__init__.py", path):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / path).write_text(text)
    assert upward(import_graph(tmp_path, "lfm2vl_edge")) == [expected]


def names_imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_engine_reaches_llama_cpp() -> None:
    users = [path for path in FILES if "llama_cpp" in path.read_text(encoding="utf-8") and "engine" not in path.parts]
    direct = [path.name for path in FILES if any(name.split(".")[0] == "llama_cpp" for name in names_imported(path))]
    assert direct == []
    for path in users:  # they may name it in prose, and install it or skip half of it for a command, but not import it
        assert "bindings(" not in path.read_text(encoding="utf-8").replace("postpone_bindings(", ""), path


def test_the_converter_uses_little_of_the_runtime() -> None:
    graph = frozenset(import_graph(PACKAGE, "lfm2vl_edge"))
    for path in CONVERTER.rglob("*.py"):
        assert set(imported(path, "", graph, "lfm2vl_edge")) <= FROM_CONVERTER, path


def test_every_folder_says_what_it_is_for() -> None:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 14
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert [name for name, lines in functions(path) if lines > 60] == []
    asserted = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert asserted == [], "errors are raised, not asserted"


def test_most_functions_are_short() -> None:
    lengths = sorted(lines for path in FILES for _, lines in functions(path))
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] < 30


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
        "heavy = {'llama_cpp.llama_cpp', 'gguf', 'safetensors', 'lfm2vl_convert', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_help_needs_no_heavy_module() -> None:
    code = "import sys, lfm2vl_edge.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert set(loaded).isdisjoint({"numpy", "PIL", "jinja2", "gguf", "llama_cpp", "huggingface_hub", "asyncio"})


def test_public_names_are_found_in_their_modules() -> None:
    assert set(lfm2vl_edge.__all__) == set(lfm2vl_edge._PLACES)
    assert set(lfm2vl_edge.__all__) <= set(dir(lfm2vl_edge))
    for name in lfm2vl_edge.__all__:
        assert getattr(lfm2vl_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lfm2vl_edge.nothing


def public(kind: type) -> Iterator[typing.Any]:
    for name in lfm2vl_edge.__all__:
        value = getattr(lfm2vl_edge, name)
        if isinstance(value, kind):
            yield value


def test_public_records_list_their_fields() -> None:
    """So that `help(Options)` shows every field."""
    records = [one for one in public(type) if is_dataclass(one)]
    assert len(records) > 10
    for record in records:
        attributes = (inspect.getdoc(record) or "").partition("Attributes:")[2]
        for field in fields(record):
            assert f"    {field.name}: " in attributes, f"{record}.{field.name}"


def signature_names(value: typing.Any) -> Iterator[str]:
    """Yield the names in the annotations of a function, or of a class's public methods and fields."""
    members = [value]
    if isinstance(value, type):
        members = [member for name, member in vars(value).items() if not name.startswith("_")]
        for annotation in vars(value).get("__annotations__", {}).values():
            yield from annotated_names(annotation)
    for member in members:
        function = getattr(member, "__func__", getattr(member, "fget", member))
        for annotation in getattr(function, "__annotations__", {}).values():
            yield from annotated_names(annotation)


def annotated_names(annotation: typing.Any) -> Iterator[str]:
    text = getattr(annotation, "__forward_arg__", annotation)
    text = text if isinstance(text, str) else getattr(text, "__name__", str(text))
    yield from (node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name))


FOREIGN = {
    *("str", "int", "float", "bool", "bytes", "dict", "list", "tuple", "type", "object", "BaseException"),
    *("Any", "Mapping", "Sequence", "Iterable", "Iterator", "Generator", "Callable", "Literal", "Final", "Unpack"),
    "AbstractContextManager",
    *("Path", "os", "Image", "npt", "np", "TracebackType", "Self", "Future"),
}
"""Names of Python and numpy."""
ALIASES = {
    "Pixels": "uint8 [height, width, 3]",
    "Floats": "float32 array",
    "State": "uint8 [n_bytes]",
    "Key": "bytes",
    "Kind": "Literal",
    "TensorError": "a record of the converter, which exports it",
}
"""Aliases of plain types, explained at their use, and names of other packages."""


def test_everything_in_a_public_signature_is_exported() -> None:
    known = {*lfm2vl_edge.__all__, *lfm2vl_edge.evaluate.__all__, *FOREIGN, *ALIASES}
    missing = {
        f"{name}: {used}"
        for name in lfm2vl_edge.__all__
        for used in signature_names(getattr(lfm2vl_edge, name))
        if used not in known
    }
    assert missing == set()


def hints(record: type) -> dict[str, str]:
    """Return field -> annotation as text, None left out: a keyword may be typed more widely than its field."""
    return {name: str(kind) for name, kind in record.__annotations__.items()}


def test_keywords_are_the_fields_of_their_records() -> None:
    assert set(AskOptions.__annotations__) == set(hints(Options))
    assert set(LoadOptions.__annotations__) == set(hints(OpenOptions))
    assert set(BudgetOptions.__annotations__) == set(hints(ImageBudget)) - {"costs"}


@pytest.mark.parametrize("method", ["ask", "stream", "chat", "turn", "caption", "detect", "point", "extract", "open"])
def test_public_methods_have_typed_options(method: str) -> None:
    assert "Unpack[" in str(inspect.signature(getattr(Model, method)).parameters["options"].annotation)


SCRIPT = '''
"""What a user writes."""

from dataclasses import dataclass

from lfm2vl_edge import AskOptions, Box, Chat, Model, PreprocessedImage, pull


@dataclass
class Receipt:
    shop: str
    total: float


def main() -> None:
    greedy: AskOptions = {"temperature": 0.0, "max_tokens": 64}
    with Model.open(pull("lfm2.5-vl-450m"), n_threads=2, detail="fast", cache=True) as model:
        print(model.ask("photo.jpg", "What is this?", **greedy))
        for chunk in model.stream(["a.jpg", "b.jpg"], "What changed?", stop=["."], seed=1):
            print(chunk, end="", flush=True)
        image: PreprocessedImage = model.preprocess("photo.jpg", budget_tokens=800)
        encoded = model.encode_image(image)
        print(encoded.ask("Who?", top_k=40), model.last and model.last.finish_reason)
        boxes: list[Box] = model.detect("photo.jpg", "red car", free=True)
        receipt = model.extract("receipt.jpg", Receipt, max_tokens=200)
        found: dict[str, float] = model.choose("photo.jpg", "Who?", ["Anna", "Ben"], temperature=1.0)
        chat = Chat(model, system="Be brief.", **greedy)
        chat.add_image("photo.jpg")
        print("".join(map(str, chat.send("And now?"))), boxes, receipt, found)
        print(model.turn(chat.messages, tools=[len], max_tokens=8).tool_calls)


main()
'''


def mypy(path: Path, text: str) -> str:
    path.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file", "", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent).stdout


def test_a_type_checker_accepts_a_script_and_refuses_a_misspelt_option(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    assert "Success" in mypy(tmp_path / "script.py", SCRIPT)
    misspelt = SCRIPT.replace("seed=1", "sead=1")
    found = [line for line in mypy(tmp_path / "misspelt.py", misspelt).splitlines() if "error:" in line]
    assert len(found) == 1
    assert "sead" in found[0]
