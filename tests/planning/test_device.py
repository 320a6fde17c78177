"""The device profile: saved, loaded, refused if it belongs to another device; and what it decides."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2vl_edge import AskOptions, ConfigError, EngineError, Model, ModelNotFound, StateError
from lfm2vl_edge.diagnose.bench import bench
from lfm2vl_edge.diagnose.tune import Timer, tune
from lfm2vl_edge.engine import ffi
from lfm2vl_edge.engine.ffi import find_gpu, gpus
from lfm2vl_edge.host import (
    available_cpus,
    big_cores,
    cpu_name,
    has_avx512,
    has_dot_products,
    has_fast_bf16,
    physical_cores,
    thread_counts,
)
from lfm2vl_edge.models.names import find_pair
from lfm2vl_edge.opening import OpenOptions, decide, load
from lfm2vl_edge.planning import device as device_module
from lfm2vl_edge.planning.device import Profile, ProfileKey, keep_temperature, load_profile, profile_key, save_profile
from tests.conftest import IMAGES, Pair

PROFILE = Profile(
    threads=1,
    mmproj="F16",
    encode={"F16": {64: 0.1, 256: 0.4}, "Q8_0": {64: 0.05, 256: 0.3}},
    prefill_speed=500.0,
    decode_speed=20.0,
    memory_bytes=10**8,
    measured="2026-11-20T10:00:00+00:00",
)


@pytest.fixture
def folder(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair with two mmproj types; the cache folder is empty."""
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(pair("a", "F16"), model)
    shutil.copy(pair("a", "BF16") / "mmproj-checkpoint-BF16.gguf", model / "mmproj-checkpoint-Q8_0.gguf")
    return model


def key_of(folder: Path) -> ProfileKey:
    return profile_key(folder / "checkpoint-F16.gguf")


def test_a_saved_profile_is_loaded(folder: Path) -> None:
    assert load_profile(key_of(folder)) is None
    path = save_profile(PROFILE, key_of(folder))
    assert path.parent.parent.name == "cache"
    assert load_profile(key_of(folder)) == PROFILE


def test_a_profile_belongs_to_model_gpu_and_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(PROFILE, key_of(folder))
    model = folder / "checkpoint-F16.gguf"
    assert load_profile(profile_key(model, -1, "CUDA0")) is None
    with monkeypatch.context() as other:
        other.setattr(device_module, "cpu_name", lambda: "another processor")
        assert load_profile(key_of(folder)) is None
    with monkeypatch.context() as other:
        other.setattr(device_module, "llama_folders", lambda: None)
        assert load_profile(key_of(folder)) is None
    with model.open("ab") as file:
        file.write(b"x")
    assert load_profile(key_of(folder)) is None
    with pytest.raises(ModelNotFound, match="nothing.gguf"):
        profile_key(folder / "nothing.gguf")


def changed(content: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(content | {"profile": content["profile"] | changes}).encode()


BAD: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "not JSON": lambda _: b"\xff\x00 nonsense",
    "truncated": lambda content: json.dumps(content).encode()[:200],
    "empty": lambda _: b"",
    "a list": lambda _: b"[1, 2]",
    "deep": lambda _: b"[" * 100_000,
    "no profile": lambda content: json.dumps({**content, "profile": None}).encode(),
    "version 0": lambda content: json.dumps({**content, "version": 0}).encode(),
    "another processor": lambda content: json.dumps({**content, "place": {**content["place"], "cpu": "Z80"}}).encode(),
    "no threads": lambda content: changed(content, threads=0),
    "absurd threads": lambda content: changed(content, threads=10**9),
    "threads as text": lambda content: changed(content, threads="2"),
    "speed 0": lambda content: changed(content, prefill_speed=0),
    "speed not finite": lambda content: changed(content, decode_speed=float("inf")),
    "speed beyond a float": lambda content: changed(content, decode_speed=10**400),
    "unknown field": lambda content: changed(content, colour="red"),
    "encode as list": lambda content: changed(content, encode=[1]),
    "encode without views": lambda content: changed(content, encode={"F16": {}}),
    "encode by words": lambda content: changed(content, encode={"F16": {"many": 1.0}}),
    "encode below 0": lambda content: changed(content, encode={"F16": {"256": -1.0}}),
    "views of no tokens": lambda content: changed(content, encode={"F16": {"0": 1.0}}),
    "fastest not measured": lambda content: changed(content, mmproj="F32"),
    "no date": lambda content: changed(content, measured=5),
    "temperature 0": lambda content: changed(content, choice_temperature=0),
    "temperature below 0": lambda content: changed(content, choice_temperature=-1.5),
    "temperature not finite": lambda content: changed(content, choice_temperature=float("nan")),
    "temperature as text": lambda content: changed(content, choice_temperature="1"),
    "rearranged as text": lambda content: changed(content, repacked="F16"),
    "rearranged numbers": lambda content: changed(content, repacked=[1]),
    "rearranged lists": lambda content: changed(content, repacked=[["F16"]]),
    "rearranged, not measured": lambda content: changed(content, repacked=["F32"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_invalid_profile_is_a_warning_and_not_used(
    kind: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_profile(PROFILE, key_of(folder))
    path.write_bytes(BAD[kind](json.loads(path.read_bytes())))
    with caplog.at_level(logging.WARNING):
        opening = decide(folder, OpenOptions())
    assert opening.profile is None
    assert not opening.costs.is_measured
    (line,) = caplog.messages
    assert str(path) in line
    assert "run `lfm2vl-edge tune` again" in line


def test_the_temperature_of_choose_is_kept_and_used(folder: Path) -> None:
    key = key_of(folder)
    assert keep_temperature(PROFILE, key) == PROFILE
    fitted = replace(PROFILE, choice_temperature=1.75)
    path = save_profile(fitted, key)
    assert load_profile(key) == fitted
    tuned_again = replace(PROFILE, decode_speed=21.0)
    assert keep_temperature(tuned_again, key) == replace(tuned_again, choice_temperature=1.75)
    with Model.open(folder, n_threads=1) as model:
        assert model.choice_temperature == 1.75
        assert model.choose([], "Who?", ["a", "b"]).temperature == 1.75
    content = json.loads(path.read_bytes())
    del content["profile"]["choice_temperature"]  # a file of an earlier version
    path.write_text(json.dumps(content))
    assert load_profile(key) == PROFILE
    with Model.open(folder, n_threads=1) as model:
        assert model.choice_temperature == 1
    path.write_text("damaged")
    assert keep_temperature(PROFILE, key) == PROFILE


def test_a_profile_that_cannot_be_read_or_written_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key_of(folder).path.mkdir(parents=True)
    assert load_profile(key_of(folder)) is None
    assert "is not used" in caplog.text
    (tmp_path / "file").touch()
    monkeypatch.setenv("LFM2VL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot write to .*LFM2VL_CACHE"):
        save_profile(PROFILE, key_of(folder))


def test_a_profile_decides_threads_and_mmproj_unless_an_option_does(folder: Path) -> None:
    before = decide(folder, OpenOptions())
    assert before.n_threads == big_cores()
    assert not before.costs.is_measured
    save_profile(PROFILE, key_of(folder))
    opening = decide(folder, OpenOptions())
    assert (opening.n_threads, opening.pair.mmproj.name) == (1, "mmproj-checkpoint-Q8_0.gguf")
    assert opening.costs.is_measured
    assert "measured here, 2026-11-20" in opening.costs.source
    assert decide(folder, OpenOptions(n_threads=3)).n_threads == 3
    named = decide(folder, OpenOptions(mmproj=folder / "mmproj-checkpoint-F16.gguf"))
    assert named.pair.mmproj.name == "mmproj-checkpoint-F16.gguf"
    tile = 256 * named.costs.token_seconds + named.costs.view_seconds
    assert tile == pytest.approx(0.4)
    save_profile(replace(PROFILE, encode={"F32": {256: 1.0}}, mmproj="F32"), key_of(folder))
    assert not decide(folder, OpenOptions()).costs.is_measured  # the installed type was not measured


@pytest.mark.parametrize(
    ("bf16", "installed", "seconds", "chosen"),
    [
        (False, ("F16", "BF16", "Q8_0", "Q4_0"), {}, "F16"),
        (True, ("F16", "BF16", "Q8_0", "Q4_0"), {}, "BF16"),
        (True, ("F16", "Q8_0"), {}, "F16"),
        (False, ("BF16", "Q4_0"), {}, "BF16"),
        (False, ("Q4_0",), {}, "Q4_0"),
        (True, ("F16", "BF16", "Q8_0"), {"F16": 2.0, "Q8_0": 1.0}, "Q8_0"),
        (True, ("F16", "Q4_0"), {"F16": 2.0, "Q4_0": 1.0}, "F16"),
        (False, ("F16", "Q8_0", "F32"), {"F32": 9.0}, "F32"),
    ],
)
def test_the_fastest_exact_mmproj_type_is_chosen(
    bf16: bool,
    installed: tuple[str, ...],
    seconds: dict[str, float],
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lfm2vl_edge.models.names.has_fast_bf16", lambda: bf16)
    for name in ("x-Q4_0", *(f"mmproj-x-{kind}" for kind in installed)):
        (tmp_path / f"{name}.gguf").touch()
    assert find_pair(tmp_path, seconds=seconds).mmproj.name == f"mmproj-x-{chosen}.gguf"


def test_features_of_the_processor_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2vl_edge.host.sys.platform", "linux")
    info = tmp_path / "cpuinfo"
    for text, fast in (
        ("model name\t: Big CPU\nflags\t\t: fpu avx512_bf16 sse\n", True),
        ("model name\t: Big CPU\nflags\t\t: fpu avx512f sse\n", False),
        ("Features\t: fp asimd asimddp bf16\nModel\t\t: Raspberry Pi 7\n", False),  # llama.cpp has no kernel
        ("Features\t: fp asimd i8mm\nModel\t\t: Raspberry Pi 7\n", False),
        ("nothing", False),
    ):
        info.write_text(text)
        assert has_fast_bf16(info) == fast
        assert has_avx512(info) == ("avx512f" in text)
        assert has_dot_products(info) == ("asimddp" in text or "i8mm" in text)
    assert not has_fast_bf16(tmp_path / "none")
    info.write_text("Features\t: fp\nModel\t\t: Raspberry Pi 7\n")
    assert cpu_name(info).startswith("Raspberry Pi 7 (")
    assert "processors)" in cpu_name(tmp_path / "none")


def test_small_cores_do_not_count(tmp_path: Path) -> None:
    cpus = sorted(available_cpus())
    assert big_cores(tmp_path / "nothing") == physical_cores(tmp_path / "nothing") == len(cpus)
    for index, cpu in enumerate(cpus):
        (tmp_path / f"cpu{cpu}").mkdir()
        (tmp_path / f"cpu{cpu}" / "cpu_capacity").write_text("1024\n" if index == 0 else "400\n")
    assert big_cores(tmp_path) == 1
    assert thread_counts()[0] == 1
    assert thread_counts()[-1] == len(cpus)


def test_a_missing_gpu_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2vl_edge.engine.ffi import llama

    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(EngineError, match="uses no GPU; leave out the GPU layers, or build it for one"):
        Model.open(folder, n_gpu_layers=-1)
    with pytest.raises(ConfigError, match="device 'CUDA0' has no effect without n_gpu_layers"):
        Model.open(folder, device="CUDA0")
    with pytest.raises(ConfigError, match="n_gpu_layers is -2"):
        Model.open(folder, n_gpu_layers=-2)
    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: True)
    with pytest.raises(EngineError, match="no GPU 'Voodoo2'; this machine has "):
        find_gpu(3, "Voodoo2")
    assert find_gpu(3, None) is None
    assert all(find_gpu(-1, name) == handle for name, handle in gpus().items())


def test_a_missing_gpu_that_was_not_named_leaves_the_work_to_the_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Model.open(folder) as model:
        expected, settings = model.embed_image(IMAGES / "photo.png"), model.fingerprint().settings
    built = [*ffi.libraries(), Path("libggml-vulkan.so.0.9.8"), Path("libggml-cuda.so"), Path("libggml-rpc.so")]
    monkeypatch.setattr(ffi, "libraries", lambda: built)
    monkeypatch.setattr(ffi.llama, "llama_supports_gpu_offload", lambda: False)
    assert ffi.gpu_kinds() == ["cuda", "vulkan"]
    with Model.open(folder, n_gpu_layers=-1) as model:
        assert np.array_equal(model.embed_image(IMAGES / "photo.png"), expected)
        assert model.fingerprint().settings == settings
    reason = "llama.cpp was built for cuda and vulkan, and finds no GPU for it here"
    assert caplog.messages == [f"{reason}: the processor computes"]
    with pytest.raises(EngineError, match="^no GPU 'CUDA0'; this machine has none$"):
        Model.open(folder, n_gpu_layers=-1, device="CUDA0")
    options = OpenOptions(n_gpu_layers=-1)
    with pytest.raises(EngineError, match=reason):
        tune(folder, options, Timer())
    with pytest.raises(EngineError, match=reason):
        bench(decide(folder, options), options, 1)


def test_image_budgets_work_in_python(folder: Path) -> None:
    image = IMAGES / "photo.png"
    with Model.open(folder, detail="fast", n_threads=1) as model:
        assert len(model.preprocess(image).tiles) == 1
        assert len(model.preprocess(image, detail="full").tiles) > 1
        assert model.preprocess(image, budget_tokens=40).plan.n_image_tokens <= 40
        assert len(model.embed_image(image)) <= 64
        with pytest.raises(ConfigError, match="unknown option 'tokens'"):
            model.encode_image(image, tokens=3)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match="within the budget of 1 tokens"):
            model.preprocess(image, budget_tokens=1)
    with pytest.raises(ConfigError, match="detail 'fast' decides max_tiles"):
        Model.open(folder, detail="fast", image_settings={"max_tiles": 3})
    with pytest.raises(ConfigError, match="budget_tokens is 0"):
        Model.open(folder, budget_tokens=0)


def test_an_image_within_a_budget_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.image"
    greedy: AskOptions = {"temperature": 0.0, "max_tokens": 6}
    with Model.open(folder, n_threads=1, budget_tokens=900) as model:
        encoded = model.encode_image(IMAGES / "photo.png", budget_tokens=800)
        assert encoded.image.settings != model.config.image
        answer = encoded.ask("What?", **greedy)
        encoded.save(path)
    with Model.open(folder, n_threads=1, budget_tokens=900) as model:
        loaded = model.load_encoded_image(path)
        assert loaded.image.plan == encoded.image.plan
        assert loaded.ask("What?", **greedy) == answer
    with Model.open(folder, n_threads=1) as model, pytest.raises(StateError, match="saved with other settings"):
        model.load_encoded_image(path)


def test_the_profile_has_the_documented_fields() -> None:
    assert set(asdict(PROFILE)) == {
        *("threads", "mmproj", "encode", "prefill_speed", "decode_speed"),
        *("memory_bytes", "measured", "choice_temperature", "repacked"),
    }


def test_rearranged_weights_are_used_for_the_types_that_tune_found_faster_so(folder: Path) -> None:
    key = key_of(folder)
    profile = replace(PROFILE, repacked=("Q8_0",))
    path = save_profile(profile, key)
    assert load_profile(key) == profile
    assert decide(folder, OpenOptions()).repack
    assert not decide(folder, OpenOptions(), use_profile=False).repack
    assert not decide(folder, OpenOptions(low_memory=True)).repack
    save_profile(replace(PROFILE, repacked=("F16",)), key)  # Q8_0 is faster, and there
    assert not decide(folder, OpenOptions()).repack
    content = json.loads(path.read_bytes())
    del content["profile"]["repacked"]  # a file of an earlier version
    path.write_text(json.dumps(content))
    assert load_profile(key) == PROFILE


def test_embeddings_of_rearranged_weights_have_a_key_of_their_own(folder: Path) -> None:
    opening = decide(folder, OpenOptions(n_threads=1))
    infos = []
    for repack in (False, True):
        with closing(load(replace(opening, repack=repack), OpenOptions(n_threads=1))) as engine:
            infos.append(engine.info)
    assert infos[0].encoder_settings != infos[1].encoder_settings
    assert infos[0].language_settings == infos[1].language_settings
