"""Encoder and language tower take turns in memory: what is mapped when, equal answers, and lives of such a model."""

from __future__ import annotations

import json
import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lfm2vl_edge import Chat, ConfigError, EngineError, Message, Model
from lfm2vl_edge.cache.memory import Caches, EmbeddingCache
from lfm2vl_edge.cli import build
from lfm2vl_edge.engine.encoder.vision import GraphEncoder
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.llama import LlamaEngine
from lfm2vl_edge.engine.low_memory import LowMemoryEngine
from lfm2vl_edge.host import drop_pages
from lfm2vl_edge.models.names import Pair, resolve_model
from lfm2vl_edge.opening import OpenOptions
from lfm2vl_edge.scheduler import Scheduler

EXAMPLES = Path(__file__).parents[2] / "examples"
HOPPER, LARGE, SHAPES = EXAMPLES / "hopper.jpg", EXAMPLES / "large.png", EXAMPLES / "shapes.png"
GREEDY: Any = {"temperature": 0.0, "max_tokens": 24}
MAPPINGS = Path("/proc/self/maps")
on_linux = pytest.mark.skipif(not MAPPINGS.exists(), reason="only Linux lists what is mapped")


@pytest.fixture
def own(tmp_path: Path) -> Pair:
    """Return the demonstration model's files under names of this test's own, which no other model has mapped."""
    found = resolve_model("tiny").fastest_pair({})
    copied = [Path(shutil.copy(path, tmp_path / path.name)) for path in (found.model, found.mmproj)]
    return Pair(model=copied[0], mmproj=copied[1])


@pytest.fixture
def short(own: Pair) -> Iterator[Model]:
    with Model.open(own, low_memory=True) as model:
        yield model


def engine_of(model: Model) -> LowMemoryEngine:
    assert isinstance(model.engine, LowMemoryEngine)
    return model.engine


def mapped(pair: Pair) -> tuple[bool, bool]:
    """Return whether the language file and the mmproj file are mapped into this process."""
    text = MAPPINGS.read_text()
    return str(pair.model.resolve()) in text, str(pair.mmproj.resolve()) in text


def resident(path: Path) -> int:
    """Return how many bytes of a mapped file are in this process's memory."""
    blocks = re.findall(
        rf"(?m)^\w+-\w+ .*{re.escape(str(path))}\n(?:[A-Z]\w+:.*\n)+", Path("/proc/self/smaps").read_text()
    )
    return sum(1024 * int(size) for block in blocks for size in re.findall(r"Rss: +(\d+) kB", block))


@on_linux
def test_encoder_and_language_tower_are_never_mapped_at_once(
    own: Pair, short: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[bool, bool]]] = {"encode": set(), "decode": set()}
    encode, decode = GraphEncoder.encode, LlamaEngine._decode

    def watched_encode(*arguments: Any) -> Any:
        seen["encode"].add(mapped(own))
        return encode(*arguments)

    def watched_decode(*arguments: Any) -> None:
        seen["decode"].add(mapped(own))
        decode(*arguments)

    monkeypatch.setattr(GraphEncoder, "encode", watched_encode)
    monkeypatch.setattr(LlamaEngine, "_decode", watched_decode)
    for image in (LARGE, HOPPER, LARGE):
        short.ask(image, "What is this?", **GREEDY)
        assert mapped(own) == (True, False)
    short.encode_image(SHAPES).ask("What is this?", **GREEDY)
    short.choose(HOPPER, "Where?", ["left", "right"])
    short.next_token_logits([{"role": "user", "content": "hi"}])
    assert seen == {"encode": {(False, True)}, "decode": {(True, False)}}
    short.embed_image(SHAPES)
    assert mapped(own) == (False, False)
    assert short.ask([], "What?", **GREEDY)
    short.close()
    assert mapped(own) == (False, False)


def test_answers_have_the_same_bits(own: Pair) -> None:
    messages: list[Message] = [
        {"role": "user", "content": [{"type": "image", "image": LARGE}, {"type": "text", "text": "What?"}]}
    ]
    found = []
    for low_memory in (False, True):
        with Model.open(own, low_memory=low_memory) as model:
            turn = model.turn(messages, **GREEDY, logprobs=3)
            found.append(
                (
                    turn.text,
                    [(one.piece, one.logprob) for one in turn.logprobs],
                    model.next_token_logits(messages).tobytes(),
                    model.embed_image(SHAPES).tobytes(),
                    model.choose([SHAPES, HOPPER], "Where?", ["left", "right", "center"]),
                    model.ask(SHAPES, "What?", regex="[a-z]{3,9}", seed=3),
                    model.detect(SHAPES),
                    model.token_ids(messages),
                    model.fingerprint(),
                )
            )
    assert found[0] == found[1]


def test_files_are_read_again_only_for_another_image(short: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tower, encoder = LanguageFile.read_sparingly, GraphEncoder.__init__

    def read_tower(file: LanguageFile) -> int:
        read.append("language")
        return tower(file)

    def read_encoder(*arguments: Any, **more: Any) -> None:
        read.append("encoder")
        encoder(*arguments, **more)

    monkeypatch.setattr(LanguageFile, "read_sparingly", read_tower)
    monkeypatch.setattr(GraphEncoder, "__init__", read_encoder)
    for image, expected in (
        (HOPPER, ["language"]),  # the encoder was opened with the model
        (HOPPER, []),
        ([], []),
        (SHAPES, ["encoder", "language"]),
        ([HOPPER, SHAPES], []),
    ):
        short.ask(image, "What is this?", **GREEDY)
        assert read == expected
        read.clear()


def test_no_state_is_kept_unless_it_is_wanted(own: Pair, tmp_path: Path) -> None:
    for more, restored in ({}, False), ({"state_bytes": 10**7}, True), ({"cache": tmp_path / "c"}, False):
        with Model.open(own, low_memory=True, **more) as model:
            for number in range(2):
                model.ask(HOPPER, "What is this?", **GREEDY)
                assert model.last is not None
                assert model.last.stats is not None
                assert (model.last.stats.restored_tokens > 0) == (restored and number == 1)
                assert (model.last.stats.encoded_views > 0) == (number == 0)
    with Model.open(own, low_memory=True, cache=tmp_path / "c") as model:  # embeddings are kept on disk
        model.ask(HOPPER, "What is this?", **GREEDY)
        assert model.last is not None
        assert model.last.stats is not None
        assert model.last.stats.encoded_views == 0


def test_more_views_than_the_cache_keeps_are_encoded_once_each(own: Pair) -> None:
    with Model.open(own) as usual, Model.open(own, low_memory=True) as short:
        wanted = usual.ask(LARGE, "What?", **GREEDY)
        view = short.preprocess(LARGE).tiles[0].n_tokens * short.config.n_embd * 4
        for budget in (0, view, 3 * view + 1):
            object.__setattr__(short.runtime, "caches", Caches(embeddings=EmbeddingCache(budget)))
            assert short.ask(LARGE, "What?", **GREEDY) == wanted
            assert short.last is not None
            assert short.last.stats is not None
            assert short.last.stats.encoded_views == short.last.stats.views > 3


def test_a_conversation_and_an_encoded_image(own: Pair, tmp_path: Path) -> None:
    answers = []
    for low_memory in (False, True):
        with Model.open(own, low_memory=low_memory) as model:
            chat = Chat(model, **GREEDY)
            chat.add_image(SHAPES)
            said = ["".join(map(str, chat.send(question))) for question in ("What is this?", "Where?")]
            chat.add_image(HOPPER)
            said += map(str, chat.send("And this?"))
            encoded = model.encode_image(SHAPES)
            said.append(encoded.ask("What?", **GREEDY))
            encoded.save(tmp_path / f"{low_memory}.lfm")
            said.append(model.load_encoded_image(tmp_path / f"{low_memory}.lfm").ask("Where?", **GREEDY))
            answers.append(said)
    assert answers[0] == answers[1]
    with Model.open(own) as usual:  # a state of the one is a state of the other
        assert usual.load_encoded_image(tmp_path / "True.lfm").ask("What?", **GREEDY) == answers[0][-2]


def test_cancelled_and_closed(own: Pair) -> None:
    with Model.open(own, low_memory=True) as model:
        wanted = model.ask(HOPPER, "What is this?", **GREEDY)
        stream = model.stream(SHAPES, "What is this?", temperature=2.0, min_p=0.0, max_tokens=500)
        next(stream)
        model.cancel()
        with pytest.raises(EngineError, match="cancelled"):
            list(stream)
        assert model.ask(HOPPER, "What is this?", **GREEDY) == wanted
        stream = model.stream(SHAPES, "What is this?", **GREEDY)
        next(stream)
        model.close()
        with pytest.raises(EngineError, match="closed"):
            list(stream)
        with pytest.raises(EngineError, match="closed"):
            model.ask(HOPPER, "What is this?")
        with pytest.raises(EngineError, match="closed"):
            model.engine.encode(np.zeros((32, 32, 3), np.uint8), 1)


def test_a_model_that_is_closed_inside_of_encoding_frees_everything(own: Pair) -> None:
    model = Model.open(own, low_memory=True)
    encoding = model.engine.encoding()
    assert encoding is not None
    with encoding:
        model.close()
        with pytest.raises(EngineError, match="closed"):
            model.engine.encode(np.zeros((32, 32, 3), np.uint8), 1)
    if MAPPINGS.exists():
        assert mapped(own) == (False, False)


FORK = """
import os, sys
from pathlib import Path
from lfm2vl_edge import Model
from lfm2vl_edge.models.names import Pair

def ask():
    return model.ask(sys.argv[3], "What is this?", temperature=0.0, max_tokens=24)

model = Model.open(Pair(model=Path(sys.argv[1]), mmproj=Path(sys.argv[2])), low_memory=True, n_threads=2)
for _ in range(2):
    child = os.fork()
    if not child:
        Path(sys.argv[4]).open("a").write(ask() + "\\n")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    Path(sys.argv[4]).open("a").write(ask() + "\\n")  # the second child has a language tower
"""


def test_forked_processes_have_a_model_of_their_own(own: Pair, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    command = [sys.executable, "-c", FORK, str(own.model), str(own.mmproj), str(HOPPER), str(out)]
    subprocess.run(command, check=True, timeout=300)
    with Model.open(own) as usual:
        assert out.read_text().splitlines() == 4 * [usual.ask(HOPPER, "What is this?", **GREEDY)]


def test_native_calls_without_a_sequence_are_refused(short: Model) -> None:
    engine = engine_of(short)
    assert engine.info.n_ctx == 0
    for call in (
        engine.logits,
        engine.snapshot,
        lambda: engine.decode_tokens([1]),
        lambda: engine.decode_embeddings(np.zeros((1, short.config.n_embd), np.float32)),
        lambda: engine.restore(np.zeros(9, np.uint8), 1),
    ):
        with pytest.raises(EngineError, match="there is no context to decode in; call reserve first"):
            call()
    engine.reserve(0)
    engine.decode_tokens(engine.tokenize("what"))
    assert engine.logits().shape == (engine.info.n_vocab,)


def test_the_context_is_as_long_as_needed(short: Model) -> None:
    engine = engine_of(short)
    for n_tokens, n_ctx in ((10, 256), (200, 256), (300, 512), (520, 768), (10, 768)):
        engine.reserve(n_tokens)
        assert engine.info.n_ctx == n_ctx


def test_libmtmd_keeps_the_language_tower(own: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.engine.llama.graph_failure", lambda: "a trial")
    answers = []
    for low_memory in (False, True):
        with Model.open(own, low_memory=low_memory) as model:
            answers.append([model.ask(image, "What is this?", **GREEDY) for image in (HOPPER, SHAPES)])
    assert answers[0] == answers[1]


def test_a_language_file_that_was_replaced_is_noticed(own: Pair, short: Model) -> None:
    Path(shutil.copy(own.model, own.model.with_name("other"))).replace(own.model)
    with pytest.raises(EngineError, match=r"was replaced since it was opened; open the model again$"):
        short.ask(HOPPER, "What is this?")


def test_a_language_file_that_became_unreadable_is_named(own: Pair) -> None:
    with closing(LanguageFile(own.model, 0, None, only_vocabulary=True)) as language:
        own.model.write_bytes(own.model.read_bytes()[:-1000])
        language.stamp = language.stamp[0] - 1000, own.model.stat().st_mtime_ns, language.stamp[2]
        with pytest.raises(EngineError, match=f"llama_model_load_from_file failed on {re.escape(str(own.model))}"):
            language.read_sparingly()


def test_several_requests_at_once_are_refused(short: Model) -> None:
    with pytest.raises(EngineError, match="low_memory answers one request at a time; for several, open the model"):
        Scheduler(short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_memory": "yes"}, "low_memory is 'yes'; it must be True or False"),
        ({"low_memory": 1}, "low_memory is 1; it must be True or False"),
        ({"low_memory": True, "n_gpu_layers": -1}, "low_memory is for the processor; leave it out, or the GPU layers"),
        (
            {"low_memory": True, "n_ctx": 500},
            "n_ctx has no effect with low_memory, whose context is as long as needed",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenOptions.of(**options)
    with pytest.raises(ConfigError, match=message):
        Model.open("tiny", **options)


def test_the_command_gives_the_same_answers_and_plan_the_smaller_memory(own: Pair) -> None:
    outputs = []
    for more in ([], ["--low-memory"]):
        words = ["run", str(SHAPES), "-a", "What?", "-a", "Where?", "-m", str(own.model), "--temperature", "0", *more]
        done = CliRunner().invoke(build(["run"]), words)
        assert done.exit_code == 0, done.output
        planned = CliRunner().invoke(build(["plan"]), ["plan", "512x512", "-m", str(own.model), "--json", *more])
        outputs.append((done.stdout, json.loads(planned.stdout)))
    (usual, plan), (short, shorter) = outputs
    assert usual == short
    saved = plan.pop("memory_bytes") - shorter.pop("memory_bytes")
    assert saved >= min(own.model.stat().st_size, own.mmproj.stat().st_size)
    assert plan == shorter


def test_commands_for_many_requests_do_not_have_it() -> None:
    for name in ("serve", "batch", "watch", "eval"):
        done = CliRunner().invoke(build([name]), [name, "--help"])
        assert "--low-memory" not in done.output


@on_linux
def test_pages_of_a_mapped_file_leave_memory_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a file [of] (some) size"
    path.write_bytes(np.arange(1 << 18, dtype="<u4").tobytes())
    with path.open("rb") as file:
        shared = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    expected = path.read_bytes()
    assert shared[:] == expected
    private[:8] = b"changed!"
    before = resident(path)
    drop_pages(path)
    assert resident(path) <= before - len(expected)
    assert private[:8] == b"changed!"  # what only this process has is not lost
    assert shared[:] == expected
    drop_pages(path, tmp_path / "no such list")
    assert resident(path) >= len(expected)
    shared.close()
    private.close()
