"""The model as people use it from Python: answers, streams, limits, cancelling, misuse."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm2vl_edge import ConfigError, EngineError, ImageError, Model, PromptError, Sampling, plan
from lfm2vl_edge.engine import Constraint, Engine
from lfm2vl_edge.host import available_cpus, physical_cores
from lfm2vl_edge.opening import OpenOptions
from tests.conftest import IMAGES, MAY_FORK, Pair, conversations

SMALL = IMAGES / "small.png"
WIDE = IMAGES / "wide.png"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


def question(text: str, *images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_the_five_lines_of_the_readme(pair: Pair) -> None:
    with Model.open(pair("a", "F16")) as model:
        answer = model.ask(SMALL, "What is this?", **GREEDY)
    assert isinstance(answer, str)
    assert answer


def test_every_form_of_an_image_gives_the_same_answer(model: Model) -> None:
    expected = model.ask(SMALL, "What is this?", **GREEDY)
    for form in (str(SMALL), SMALL.read_bytes(), Image.open(SMALL), np.asarray(Image.open(SMALL)), [SMALL]):
        assert model.ask(form, "What is this?", **GREEDY) == expected


def test_a_stream_joins_to_the_answer_and_ends_with_its_statistics(model: Model) -> None:
    fresh = Model(model.engine, model.config)  # it has not seen the image yet
    *pieces, last = fresh.stream(WIDE, "What is this?", **GREEDY)
    assert "".join(str(chunk) for chunk in (*pieces, last)) == model.ask(WIDE, "What is this?", **GREEDY)
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in pieces)
    assert last.finish_reason in ("stop", "length")
    stats = last.stats
    assert stats is not None
    assert (stats.images, stats.views) == (1, 4)
    assert stats.prompt_tokens == len(model.token_ids(question("What is this?", WIDE)))
    assert stats.image_tokens == len(model.embed_image(WIDE))
    assert 1 <= stats.completion_tokens <= 12
    assert min(stats.encode_seconds, stats.prefill_seconds, stats.preprocess_seconds) > 0
    assert stats.first_token_seconds >= stats.encode_seconds + stats.prefill_seconds


def greedy_by_hand(model: Model, messages: list[dict[str, Any]], n_tokens: int, penalty: float) -> list[int]:
    """transformers' rule, slowly: penalise what was there, take the most_likely; the prompt is decoded anew."""
    engine, sampled = model.engine, []
    seen = {token for token in model.token_ids(messages) if token != model.config.control_tokens["<image>"]}
    logits = model.next_token_logits(messages)
    for _ in range(n_tokens):
        scores = logits.astype(np.float64)
        for token in seen:
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        sampled.append(int(scores.argmax()))
        seen.add(sampled[-1])
        engine.decode_tokens(sampled[-1:])
        logits = engine.logits()
    return sampled


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_the_most_likely_after_the_penalty(model: Model, penalty: float) -> None:
    messages = question("what colours are there?", SMALL)
    expected = greedy_by_hand(model, messages, 8, penalty)
    ends = [index for index, token in enumerate(expected) if model.engine.is_end(token)]
    expected = expected[: ends[0]] if ends else expected
    text = b"".join(model.engine.piece(token) for token in expected).decode("utf-8", "replace")
    found = "".join(
        chunk.text
        for chunk in model.chat(messages, temperature=0.0, repetition_penalty=penalty, max_tokens=len(expected))
    )
    assert found == text


def test_a_seed_repeats_an_answer_and_others_differ(model: Model) -> None:
    hot: dict[str, Any] = {"temperature": 2.0, "min_p": 0.0, "max_tokens": 16}
    first = model.ask(SMALL, "go", seed=1, **hot)
    assert model.ask(SMALL, "go", seed=1, **hot) == first
    assert any(model.ask(SMALL, "go", seed=seed, **hot) != first for seed in range(2, 5))


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_that_leave_one_token_are_greedy(model: Model, narrow: dict[str, Any]) -> None:
    expected = model.ask(SMALL, "go", **GREEDY)
    assert model.ask(SMALL, "go", **{"temperature": 1.5, "min_p": 0.0, "max_tokens": 12, **narrow}) == expected


def test_max_tokens_and_stop_end_an_answer(model: Model) -> None:
    whole = model.ask(SMALL, "go", temperature=0.0, max_tokens=24)
    *_, last = model.stream(SMALL, "go", temperature=0.0, max_tokens=3)
    assert last.finish_reason == "length"
    assert last.stats is not None
    assert last.stats.completion_tokens == 3
    stop = whole[5:7]
    *pieces, last = model.stream(SMALL, "go", temperature=0.0, max_tokens=24, stop=[stop])
    assert "".join(chunk.text for chunk in (*pieces, last)) == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"


def test_text_without_an_image(model: Model) -> None:
    assert model.ask([], "what is this? 12345", **GREEDY)


def test_several_images_and_turns(model: Model) -> None:
    conversation = conversations("a")["two_images_two_turns"]
    *_, last = model.chat(conversation.messages, **GREEDY)
    assert last.stats is not None
    assert (last.stats.images, last.stats.prompt_tokens) == (2, len(conversation.input_ids))


def test_the_context_grows_for_a_prompt_and_answers_stay_the_same(pair: Pair) -> None:
    with Model.open(pair("a", "F32"), n_ctx=256) as small, Model.open(pair("a", "F32"), n_ctx=4096) as large:
        assert small.engine.info.n_ctx == 256
        for image in (SMALL, IMAGES / "photo.png", SMALL):
            assert small.ask(image, "what?", **GREEDY) == large.ask(image, "what?", **GREEDY)
        assert small.engine.info.n_ctx > 256
        assert large.engine.info.n_ctx == 4096


def test_a_context_that_cannot_be_had_leaves_the_model_usable(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.engine.ffi import llama

    with Model.open(pair("a", "F32"), n_ctx=256) as small:
        expected = small.ask([], "x", **GREEDY)
        with monkeypatch.context() as broken:
            broken.setattr(llama, "llama_init_from_model", lambda *_: None)
            with pytest.raises(EngineError, match="llama_init_from_model failed: no memory for a context"):
                small.ask(SMALL, "x", **{**GREEDY, "max_tokens": 2000})
        assert small.ask([], "x", **GREEDY) == expected


def test_a_prompt_beyond_the_model_is_refused_before_it_is_paid_for(model: Model) -> None:
    with pytest.raises(PromptError, match=r"the prompt has \d+ tokens \(0 of them of images\).*context is 32768"):
        model.ask([], "word " * 40_000)


def test_views_larger_than_usual_reopen_the_encoder(model: Model) -> None:
    thin = np.random.default_rng(0).integers(0, 256, (1, 9000, 3), dtype=np.uint8)
    before = model.embed_image(SMALL)
    n_tokens = plan(1, 9000, model.config.image).n_image_tokens
    assert n_tokens > model.config.image.max_image_tokens
    assert model.embed_image(thin).shape == (n_tokens, 128)
    np.testing.assert_array_equal(model.embed_image(SMALL), before)


def test_image_settings_can_be_changed(pair: Pair) -> None:
    with Model.open(pair("a", "F16"), image_settings={"do_image_splitting": False, "max_image_tokens": 64}) as model:
        assert len(model.embed_image(IMAGES / "photo.png")) <= 64
        assert model.config.image_source.endswith("changed: do_image_splitting, max_image_tokens")
    with pytest.raises(ConfigError, match="unknown image setting 'tiles'"):
        Model.open(pair("a", "F16"), image_settings={"tiles": 3})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": 2**32}, "seed"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"temprature": 0.5}, "unknown option 'temprature'; known: temperature"),
    ],
)
def test_wrong_options_are_named_at_the_call(model: Model, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        model.stream(SMALL, "x", **options)


def test_a_wrong_image_leaves_the_model_usable(model: Model) -> None:
    with pytest.raises(ImageError):
        model.ask(b"not an image", "x")
    assert model.ask(SMALL, "x", **GREEDY)


@pytest.mark.parametrize("settings", [{"n_ctx": 0}, {"n_ctx": "4096"}, {"n_threads": 0}, {"n_threads": True}])
def test_wrong_settings_are_named(pair: Pair, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Model.open(pair("a", "F16"), **settings)


def test_a_second_stream_at_the_same_time_is_refused(model: Model) -> None:
    first = model.stream(SMALL, "x", **GREEDY)
    next(first)
    with pytest.raises(EngineError, match="answering already"):
        model.ask(SMALL, "y", **GREEDY)
    first.close()
    assert model.ask(SMALL, "y", **GREEDY)


def test_an_answer_left_early_leaves_nothing_behind(model: Model) -> None:
    expected = model.ask(WIDE, "y", **GREEDY)
    for _ in model.stream(SMALL, "x", **GREEDY):
        break
    assert model.ask(WIDE, "y", **GREEDY) == expected


def test_cancel_from_another_thread_ends_a_stream_and_leaves_the_model_usable(model: Model) -> None:
    expected = model.ask(SMALL, "x", **GREEDY)
    stream = model.stream(SMALL, "x", temperature=0.0, max_tokens=20_000)
    next(stream)
    canceller = threading.Thread(target=model.cancel)
    canceller.start()
    canceller.join()
    with pytest.raises(EngineError, match="cancelled"):
        list(stream)
    assert model.ask(SMALL, "x", **GREEDY) == expected


def test_ctrl_c_between_tokens_leaves_the_model_usable(model: Model) -> None:
    expected = model.ask(SMALL, "x", **GREEDY)

    def interrupted() -> None:
        for _ in model.stream(SMALL, "x", **GREEDY):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.ask(SMALL, "x", **GREEDY) == expected


def test_close_may_be_called_twice(pair: Pair) -> None:
    model = Model.open(pair("a", "F16"))
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.ask(SMALL, "x")


def test_embeddings_of_the_wrong_width_are_refused(model: Model) -> None:
    with pytest.raises(EngineError, match="do not fit the model's width 128"):
        model.engine.decode_embeddings(np.zeros((3, 5), np.float32))
    with pytest.raises(EngineError, match="planned with 7"):
        model.engine.encode(np.zeros((64, 64, 3), np.uint8), 7)


def test_tokens_and_pieces_are_inverse(opened: Callable[[str, str], Model]) -> None:
    engine = opened("a", "F32").engine
    for text in ("", " two  spaces\n\n", "1234567", "naïve 日本語 🙂", "<|im_end|>", "a\0b"):
        assert b"".join(engine.piece(token) for token in engine.tokenize(text)).decode() == text


def test_physical_cores_are_counted_once(tmp_path: Any) -> None:
    cpus = sorted(available_cpus())
    for index, cpu in enumerate(cpus):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{index // 2}\n")
    assert physical_cores(tmp_path) == (len(cpus) + 1) // 2
    assert physical_cores(tmp_path / "nothing") == len(cpus)


@pytest.fixture
def own_model(pair: Pair) -> Iterator[Model]:
    """A model that a test may close or damage."""
    with Model.open(pair("a", "F16"), n_threads=1) as model:
        yield model


USES: dict[str, Callable[[Engine], Any]] = {
    "tokenize": lambda engine: engine.tokenize("x"),
    "piece": lambda engine: engine.piece(1),
    "is_end": lambda engine: engine.is_end(1),
    "encode": lambda engine: engine.encode(np.zeros((64, 64, 3), np.uint8), 4),
    "reserve": lambda engine: engine.reserve(1),
    "decode_tokens": lambda engine: engine.decode_tokens([1]),
    "decode_embeddings": lambda engine: engine.decode_embeddings(np.zeros((1, 128), np.float32)),
    "logits": lambda engine: engine.logits(),
    "snapshot": lambda engine: engine.snapshot(),
    "restore": lambda engine: engine.restore(np.zeros(9, np.uint8), 1),
    "check_grammar": lambda engine: engine.check_grammar('start: "a"'),
    "sample": lambda engine: next(engine.sample(Sampling(), 0, [1])),
    "constrained sample": lambda engine: next(engine.sample(Sampling(), 0, [1], Constraint(grammar='start: "a"'))),
}


def test_every_method_of_a_closed_engine_raises(own_model: Model) -> None:
    own_model.close()
    for use in USES.values():
        with pytest.raises(EngineError, match="the model is closed; open it again"):
            use(own_model.engine)
    own_model.cancel()
    assert "closed" in repr(own_model)


def test_a_stream_of_a_model_that_is_closed_meanwhile_raises(own_model: Model) -> None:
    stream = own_model.stream(SMALL, "x", **GREEDY)
    next(stream)
    own_model.close()
    with pytest.raises(EngineError, match="the model is closed"):
        list(stream)


def test_close_from_another_thread_ends_an_answer(own_model: Model) -> None:
    stream = own_model.stream(SMALL, "x", temperature=0.0, max_tokens=20_000)
    next(stream)
    closer = threading.Timer(0.05, own_model.close)
    closer.start()
    with pytest.raises(EngineError, match="the model is closed"):
        list(stream)
    closer.join()


def test_the_last_user_frees_the_memory(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.engine.ffi import llama

    freed: list[Any] = []
    decode, free = llama.llama_decode, llama.llama_free

    def closing_decode(*arguments: Any) -> Any:
        own_model.close()
        assert not freed
        return decode(*arguments)

    def counted(context: Any) -> None:
        freed.append(context)
        free(context)

    monkeypatch.setattr(llama, "llama_decode", closing_decode)
    monkeypatch.setattr(llama, "llama_free", counted)
    own_model.engine.reserve(10)
    with pytest.raises(EngineError, match="the model is closed"):
        own_model.engine.decode_tokens([1, 2, 3])
    own_model.close()
    assert len(freed) == 1


def test_a_model_that_is_dropped_is_freed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.engine.ffi import llama

    freed: list[Any] = []
    free = llama.llama_model_free

    def counted(model: Any) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(llama, "llama_model_free", counted)
    model = Model.open(pair("a", "F16"))
    stream = model.stream(SMALL, "x", **GREEDY)
    next(stream)
    del model
    gc.collect()
    assert not freed
    del stream
    gc.collect()
    assert len(freed) == 1


FORKED_IN_USE = """
import os, sys, threading
from lfm2vl_edge import EngineError, Model
from lfm2vl_edge.engine.ffi import llama
model, decode = Model.open(sys.argv[1], n_threads=1), llama.llama_decode
computes, forked = threading.Event(), threading.Event()
def waiting_decode(*arguments):
    computes.set()
    forked.wait()
    return decode(*arguments)
llama.llama_decode = waiting_decode
model.engine.reserve(10)
thread = threading.Thread(target=lambda: model.engine.decode_tokens([1, 2, 3]))
thread.start()
computes.wait()
child = os.fork()
if not child:
    llama.llama_decode = decode
    try:
        model.engine.tokenize("x")
    except EngineError as error:
        assert "was computing in another thread when this process forked" in str(error)
        model.close()  # frees nothing
        Model.open(sys.argv[1], n_threads=1).ask([], "x", max_tokens=2)
        sys.exit(3)
    sys.exit(1)
forked.set()
thread.join()
assert len(model.engine.logits())
model.close()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_computes_may_not_use_the_model(pair: Pair) -> None:
    command = [*MAY_FORK, "-c", FORKED_IN_USE, str(pair("a", "F16"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_was_truncated_while_open_is_an_error(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair("a", "F16"), tmp_path / "pair")
    for path in sorted((tmp_path / "pair").glob("*.gguf")):
        with Model.open(tmp_path / "pair", n_threads=1) as model:
            expected = model.ask(SMALL, "x", **GREEDY)
            data = path.read_bytes()
            path.unlink()  # what is mapped is still there
            assert model.ask(SMALL, "x", **GREEDY) == expected
            path.write_bytes(data)
        with Model.open(tmp_path / "pair", n_threads=1) as model:
            os.truncate(path, 5000)
            with pytest.raises(EngineError, match=rf"{path.name} was truncated from {len(data)} to 5000 bytes"):
                model.ask(SMALL, "x", **GREEDY)
        path.write_bytes(data)


@pytest.mark.parametrize("value", [513, 2**31, 2**32 + 1, 10**400])
def test_more_threads_than_llama_cpp_allows_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match="n_threads is .*; it must be an integer, from 1 to 512"):
        OpenOptions(n_threads=value)
    with pytest.raises(ConfigError, match="n_gpu_layers is .*; it must be an integer, from -1 to"):
        OpenOptions(n_gpu_layers=value * 2**31)
