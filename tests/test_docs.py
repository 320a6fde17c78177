"""The documents: their commands and Python examples are run, their links lead somewhere, their options exist.

Examples use placeholders (`photo.jpg`, `models/450m`), which here are the images of `examples/` and the demonstration
model. Commands that need a published model, a network, a GPU or minutes are only parsed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import typer
from typer.testing import CliRunner

import lfm2vl_edge
from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from lfm2vl_edge.cli import COMMANDS, build
from lfm2vl_edge.models.names import resolve_model
from tests.prompt.test_tools import START, STOP, Answering, config
from tests.test_structure import ORDER

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").rglob("*.md"), ROOT / "examples/README.md"]
)
NAME: Final = "lfm2vl-edge"
_FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED: Final = re.compile(r"(?:^(?: {4}.*)?\n)*^ {4}.*\n", re.MULTILINE)
_CODE: Final = re.compile(r"`([^`\n]+)`")
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")
_HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PATH: Final = re.compile(r"(?:lfm2vl_edge|convert|models|tests|benchmarks|docs|examples)/[\w./-]*")

CHECKPOINT: Final = ROOT / "models" / "tiny" / "lfm2vl-tiny"
IMAGES: Final = ("photo.jpg", "a.jpg", "b.jpg", "b.png", "another.jpg", "receipt.jpg")
PAIRS: Final = ("models/450m", "models/f16", "models/q4")
CHECKPOINTS: Final = ("path/to/LFM2-VL-450M", "LFM2-VL-450M", "my-model", "LiquidAI/LFM2.5-VL-450M")
"""A local folder wins over a repository of the hub, so a checkpoint of the hub can be a placeholder too."""
SCHEMA: Final = {"type": "integer"}
_ONLY_PARSED: Final = ("serve", "watch", "pull", "rm", "bench", "tune", "doctor")
"""They need a network, do not end, or measure the machine. Tests of their own run them."""
_ONLY_PARSED_OPTIONS: Final = (
    "--n-gpu-layers",
    "--device",
    "--budget-seconds",
    "--check",
    "--promote",
    "--fit",
    "--ray",
)
"""They need a GPU, a measured profile, a cluster, or many seconds."""
_SLOW: Final = ("convert", "quantize", "calibrate", "verify")
"""They take seconds: they are run on the pages about them and in transcripts, and parsed elsewhere."""
_SLOW_PAGES: Final = ("quantization.md", "fine-tune.md")
_FOREIGN: Final = (
    "--build",
    "--build-arg",
    "--platform",
    "--smoke",
    "--baseline-mmproj",
    "--install",
    "--temp",
    "--strict",
    "--only",
    "--keep",
    "--no-binary",
    "--without-transformers",
)
"""Options of other programs that the documents name."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code; `language` is empty for an indented one."""

    start: int
    language: str
    text: str


def without_fences(text: str) -> str:
    """Return a page with its fenced blocks blank, at the same offsets."""
    return _FENCE.sub(lambda match: "\n" * len(match[0]), text)


def blocks(text: str) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    fenced = [Block(start=one.start(), language=one[1], text=one[2]) for one in _FENCE.finditer(text)]
    indented = [
        Block(start=one.start(), language="", text=re.sub(r"^ {4}", "", one[0], flags=re.MULTILINE))
        for one in _INDENTED.finditer(without_fences(text))
    ]
    return sorted([*fenced, *indented], key=lambda block: block.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line of the program."""

    arguments: tuple[str, ...]
    stdin: tuple[str, ...] = ()
    """What a pipe runs before it."""
    output: tuple[str, ...] | None = None
    """Lines that the page shows below it, if it is a transcript."""


def commands(text: str) -> Iterator[Command]:
    """Yield the commands of a page that call this program, in order."""
    for block in blocks(text):
        lines = block.text.splitlines() if block.language in ("", "sh") else []
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        for number, line in enumerate(lines):
            parts = re.split(rf"(?:^|(?<=\s))(?:\.venv/bin/)?{NAME} ", line.removeprefix("$ "), maxsplit=1)
            source = parts[0].strip().removesuffix("|")
            if len(parts) < 2 or (starts and number not in starts):
                continue
            end = next((one for one in (*starts, len(lines)) if one > number), len(lines))
            yield Command(
                arguments=tuple(shlex.split(parts[1], comments=True)),
                stdin=() if source.startswith("env") else tuple(shlex.split(source)),
                output=tuple("\n".join(lines[number + 1 : end]).strip().splitlines()) if starts else None,
            )


@pytest.fixture(scope="session")
def float_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model, not quantized."""
    folder = tmp_path_factory.mktemp("float")
    convert_checkpoint(CHECKPOINT, folder, quant="F16", mmproj_quant="F16")
    return folder


@pytest.fixture
def here(tmp_path: Path, float_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder in which the names of the documents exist, with caches and data elsewhere."""
    folder = tmp_path / "here"
    (folder / "scratch").mkdir(parents=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in IMAGES:
        shutil.copy(ROOT / "examples" / "shapes.png", folder / name)
    (folder / "scans").mkdir()
    shutil.copy(ROOT / "examples" / "shapes.png", folder / "scans")
    for name in PAIRS:
        (folder / name).mkdir(parents=True)
        source = float_pair if name.endswith("f16") else resolve_model("tiny").pair.model.parent
        for path in source.glob("*.gguf"):
            (folder / name / path.name).symlink_to(path)
    (folder / "models" / "tiny").mkdir()
    for name in (*CHECKPOINTS, "models/tiny/lfm2vl-tiny"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(CHECKPOINT)
    for name in ("receipt.json", "n.json"):
        (folder / name).write_text(json.dumps(SCHEMA))
    (folder / "yes-no.gbnf").write_text('root ::= "Yes" | "No"')
    rows = [{"image": "photo.jpg", "question": "How many objects are there?", "answer": "3"}] * 2
    for name in ("data.jsonl", "mine.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    for variable, value in {"LFM2VL_DATA": "data", "XDG_CACHE_HOME": "cache", "HF_HOME": "hub"}.items():
        monkeypatch.setenv(variable, str(tmp_path / value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    for variable in ("LFM2VL_MODEL", "LFM2VL_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@cache
def command_of(name: str) -> Any:
    """Return a command as typer builds it."""
    group: Any = typer.main.get_command(build([name]))
    return group.commands[name]


def options_of(command: Any) -> set[str]:
    """Return the spellings of a command's options, those of its own commands included."""
    found = {spelling for one in command.params for spelling in (*one.opts, *one.secondary_opts)}
    return found.union(*(options_of(one) for one in getattr(command, "commands", {}).values()))


def runnable(arguments: tuple[str, ...]) -> list[str]:
    """Return arguments with models and URLs that are here, and with leave to overwrite files."""
    words = [re.sub(r"^https://host/", "", word) for word in arguments]
    words = [re.sub(r"^(?:lfm2(?:\.5)?-vl-[\w.:-]+|owner/repo:\w+)$", "tiny", word) for word in words]
    if "--force" in options_of(command_of(words[0])) and "--force" not in words:
        words.append("--force")
    if "-o" in words and (folder := words[words.index("-o") + 1]) in PAIRS:
        shutil.rmtree(folder)
    return words


def stdin_of(words: tuple[str, ...]) -> bytes:
    """Return what `cat`, `echo` or `printf` writes."""
    if not words:
        return b""
    assert words[0] in ("cat", "echo", "printf"), words
    if words[0] == "cat":
        return Path(words[1]).read_bytes()
    return words[1].replace("\\n", "\n").encode() + (b"\n" if words[0] == "echo" else b"")


def settled(lines: Sequence[str]) -> list[str]:
    """Return output without what differs between runs and machines: seconds, speeds, bytes, divergences."""
    return [
        re.sub(
            r"\d+\.\d+|\d+(?= [MG]B)|(?<=seconds )\d+|(?<=encode )\d+|(?<=prefill )\d+|\d+(?= s$)", "N", line.rstrip()
        )
        for line in lines
    ]


def is_only_parsed(command: Command, page: Path) -> bool:
    name = command.arguments[0]
    return command.output is None and (
        name in _ONLY_PARSED
        or (name in _SLOW and page.name not in _SLOW_PAGES)
        or any(option in command.arguments for option in _ONLY_PARSED_OPTIONS)
    )


def parse(arguments: Sequence[str]) -> None:
    """Check that the command line accepts arguments; it raises an error of usage otherwise."""
    command_of(arguments[0]).make_context(arguments[0], list(arguments[1:]))


def check(command: Command) -> None:
    """Run a command, and compare what it prints with what the page shows."""
    words = runnable(command.arguments) if command.output is None else list(command.arguments)
    done = CliRunner().invoke(build([words[0]]), words, input=stdin_of(command.stdin))
    output = command.output or ()
    assert done.exit_code == (1 if "[exit code 1]" in output else 0), (words, done.output)
    if command.output is not None and words[0] != "models":  # which lists what fits into this machine
        assert settled(done.output.rstrip().splitlines()) == settled(
            [one for one in output if one[:10] != "[exit code"]
        )


def with_any(kind: str) -> list[Any]:
    """Return the pages that have blocks of Python, or commands."""
    pages = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = [one for one in blocks(text) if one.language == "python"] if kind == "python" else list(commands(text))
        if kind == "python" and page.name in ("server.md", "clients.md", "fine-tune.md"):
            continue  # they need a server, see tests/server/test_clients.py; or torch and peft
        pages += [pytest.param(page, id=name_of(page))] if found else []
    return pages


def test_the_documents_show_every_command() -> None:
    shown = {one.arguments[0] for page in PAGES for one in commands(page.read_text(encoding="utf-8"))}
    assert shown == set(COMMANDS)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", with_any("commands"))
def test_the_commands_of_a_page_work(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        if is_only_parsed(command, page):
            parse(command.arguments)
        else:
            check(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_text_are_accepted(page: Path) -> None:
    for code in _CODE.findall(without_fences(page.read_text(encoding="utf-8"))):
        words = shlex.split(code)[1:] if code.startswith(f"{NAME} ") and not code.endswith("--help") else []
        assert not words or words[0] in COMMANDS, code
        if len(words) > 1:
            parse(words)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", with_any("python"))
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm2vl_edge, "pull", lambda name, *, progress: resolve_model("tiny").pair)
    module = ModuleType("example")  # dataclasses search their module for annotations
    monkeypatch.setitem(sys.modules, "example", module)
    namespace = vars(module)
    calling = page.name == "tools.md"  # the demonstration model was not trained on tools
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        answer = (START, '[weather(place="Bergen")]', STOP)
        with Model(Answering(answer), config()) if calling else Model.open("tiny") as model:
            namespace["model"] = model
            exec(compile(block.text, name_of(page), "exec", dont_inherit=True), namespace)  # noqa: S102
            namespace["model"].close()
    if calling:
        assert namespace["messages"][-1]["role"] == "tool"
        assert json.loads(namespace["messages"][-1]["content"]) == {"rain": True, "days": 1}


@pytest.mark.usefixtures("here")
def test_the_one_liner_of_the_quick_start_prints_what_it_shows() -> None:
    lines = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("    $ python -c "))
    code = shlex.split(lines[number])[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == lines[number + 1].strip()


def test_the_python_of_the_fine_tune_is_valid() -> None:
    """It needs torch, transformers and peft, and a published model."""
    (code,) = [one.text for one in blocks((ROOT / "docs" / "fine-tune.md").read_text()) if one.language == "python"]
    compile(code, "fine-tune.md", "exec", dont_inherit=True)


def test_the_architecture_has_every_room_in_its_order() -> None:
    """The order of imports, which `tests/test_structure.py` enforces; the rows of both name the same rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Rooms")[1].split("## ")[0]
    rows = [tuple(_CODE.findall(line.split("|")[1])) for line in section.splitlines() if line.startswith("| `")]
    rooms = [room for row in ORDER for room in row if room not in ("", "__main__")]
    assert [room for row in rows for room in row] == rooms


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return set(map(anchor, _HEADING.findall(page.read_text(encoding="utf-8"))))


def broken_links(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead nowhere in the project."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in _LINK.finditer(text):
        target = match[1] or match[2]
        if target.startswith(("https://", "http://")):
            continue
        path, _, name = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (name and name not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](other.md) ![d](page.md)\n```\n[e](other.md)\n```\n")
    assert list(broken_links(page)) == ["page.md#two", "other.md"]


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def documents() -> list[Path]:
    """Return the pages that describe the present; the changelog may name what is gone."""
    return [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", documents(), ids=name_of)
def test_what_is_named_exists(page: Path) -> None:
    known = set[str]().union(*(options_of(command_of(name)) for name in COMMANDS), ("--help", *_FOREIGN))
    for code in _CODE.findall(without_fences(page.read_text(encoding="utf-8"))):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known, f"there is no option {option}"
        if _PATH.fullmatch(code) and code not in (*PAIRS, *CHECKPOINTS):
            folders = (ROOT, ROOT / "lfm2vl_edge", page.parent)
            assert any((folder / code).exists() for folder in folders), f"there is no {code}"
        for attribute in re.findall(r"^model\.(?!py\b)(\w+)", code):
            assert hasattr(Model, attribute) or attribute == "last", f"there is no Model.{attribute}"
        for attribute in re.findall(r"^lfm2vl_edge\.(\w+)", code):
            assert hasattr(lfm2vl_edge, attribute) or (ROOT / "lfm2vl_edge" / attribute).exists(), attribute


def test_the_makefile_has_the_targets_of_the_documents() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in documents():
        for target in re.findall(
            r"^ {4}make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert f"\n{target[0] or target[1]}:" in makefile, f"{name_of(page)}: make {target}"


def test_programs_of_the_documents_exist() -> None:
    """`python -m NAME` of the project: each such module is there and shows its help."""
    named = {
        name for page in documents() for name in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))
    }
    assert named > {"lmms_eval"}
    for name in sorted(named - {"lmms_eval"}):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
