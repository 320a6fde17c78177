"""The encoder's graph: equal to mtmd's, the same bits in any order, and an error for every wrong file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lfm2vl_edge import Model
from lfm2vl_edge.cli._answers import statistics
from lfm2vl_edge.diagnose import doctor, facts
from lfm2vl_edge.engine import Floats, ffi
from lfm2vl_edge.engine.encoder import ggml
from lfm2vl_edge.engine.encoder.mtmd import MtmdEncoder
from lfm2vl_edge.engine.encoder.vision import GraphEncoder, read_tower
from lfm2vl_edge.engine.language import LanguageFile
from lfm2vl_edge.engine.quantize import quantize_file
from lfm2vl_edge.errors import EngineError
from lfm2vl_edge.image.tiles import resize_grid
from lfm2vl_edge.models.gguf import read_metadata
from lfm2vl_edge.models.names import TINY, find_pair
from tests.conftest import Pair
from tests.test_reference import relative_error

VIEWS = [(8, 8), (3, 7), (7, 3), (1, 1), (16, 16), (2, 5)]
"""Rows and columns of image tokens."""
TOLERANCE = {"F32": 2e-3, "F16": 2e-3, "BF16": 1.5e-2}
"""mtmd rounds keys, values and, as here, what is multiplied with the matrices; its projector's GELU is tanh's."""


def view(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows * 32, columns * 32, 3), dtype=np.uint8)


@pytest.fixture
def mmproj(pair: Pair) -> Callable[[str, str], Path]:
    return lambda name, kind: find_pair(pair(name, kind)).mmproj


def open_encoder(path: Path, n_threads: int) -> GraphEncoder:
    return GraphEncoder(path, n_threads, read_metadata(path))


@pytest.fixture
def encoder(mmproj: Callable[[str, str], Path]) -> Iterator[GraphEncoder]:
    with closing(open_encoder(mmproj("a", "F32"), 2)) as opened:
        yield opened


def from_mtmd(folder: Path, n_embd: int) -> list[Floats]:
    files = find_pair(folder)
    model = LanguageFile(files.model, 0, None).take()
    try:
        with closing(MtmdEncoder(files.mmproj, model, n_threads=2, view_tokens=256)) as encoder:
            return [encoder.encode(view(rows, columns), rows * columns, n_embd) for rows, columns in VIEWS]
    finally:
        ffi.llama.llama_model_free(model)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("name", "n_embd"), [("a", 128), ("b", 192), ("c", 128)])
def test_embeddings_agree_with_mtmd(pair: Pair, name: str, n_embd: int, kind: str) -> None:
    folder = pair(name, kind)
    with closing(open_encoder(find_pair(folder).mmproj, 2)) as encoder:
        for (rows, columns), expected in zip(VIEWS, from_mtmd(folder, n_embd), strict=True):
            found = encoder.encode(view(rows, columns), rows * columns, n_embd)
            assert relative_error(expected, found) <= TOLERANCE[kind], (rows, columns)


def test_a_view_has_the_same_bits_after_other_views(encoder: GraphEncoder, mmproj: Any) -> None:
    expected = encoder.encode(view(8, 8), 64, 128)
    for rows, columns, seed in ((8, 8, 1), (16, 16, 2), (8, 8, 3), (1, 1, 4)):
        encoder.encode(view(rows, columns, seed), rows * columns, 128)
        np.testing.assert_array_equal(encoder.encode(view(8, 8), 64, 128), expected)
        np.testing.assert_array_equal(encoder.encode(view(8, 8), 64, 128), expected)
    with closing(open_encoder(mmproj("a", "F32"), 1)) as alone:
        np.testing.assert_array_equal(alone.encode(view(8, 8), 64, 128), expected)


def test_positions_distinguish_equal_patches(encoder: GraphEncoder) -> None:
    flat = np.full((256, 256, 3), 90, np.uint8)
    tokens = encoder.encode(flat, 64, 128)
    assert len(np.unique(tokens.round(5), axis=0)) == 64


@pytest.mark.parametrize(("height", "width"), [(32, 32), (5, 40), (16, 16), (2, 3), (20, 61)])
def test_positions_are_resized_like_pillow(height: int, width: int) -> None:
    grid = np.random.default_rng(height).standard_normal((16, 16, 3)).astype(np.float32)
    channels = (Image.fromarray(np.ascontiguousarray(grid[..., index])) for index in range(3))
    expected = [np.asarray(one.resize((width, height), Image.Resampling.BILINEAR)) for one in channels]
    np.testing.assert_allclose(resize_grid(grid, height, width), np.stack(expected, axis=-1), atol=2e-5)


def test_work_memory_starts_on_a_cache_line(encoder: GraphEncoder) -> None:
    encoder.encode(view(2, 2), 4, 128)
    assert encoder._view is not None
    assert encoder._view._graph._plan.work_data % 64 == 0


def test_the_wrong_number_or_width_of_tokens_is_an_error(encoder: GraphEncoder) -> None:
    for pixels, planned in ((view(2, 2), 5), (view(2, 2)[:-1], 4), (view(2, 2)[:, :40], 2)):
        with pytest.raises(EngineError, match=f"was planned with {planned}"):
            encoder.encode(np.ascontiguousarray(pixels), planned, 128)
    with pytest.raises(EngineError, match="embeddings of width 128; the language tower has 64"):
        encoder.encode(view(1, 1), 1, 64)


def rewritten(source: Path, path: Path, change: Callable[[str, Any], Any], **stated: Any) -> Path:
    """Copy a GGUF file with changed tensors: `change` gets a name and an array and returns an array or None.

    Metadata of the vision encoder are replaced by `stated`.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "clip")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            value = stated.get(field.name.rpartition(".")[2], field.contents())
            writer.add_key_value(field.name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        kept = change(tensor.name, np.array(tensor.data))
        if kept is not None:
            writer.add_tensor(tensor.name, kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(wrong: str, by: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, data: by(data) if name == wrong else data


def test_a_rewritten_file_gives_the_same_bits(mmproj: Callable[[str, str], Path], tmp_path: Path) -> None:
    path = rewritten(mmproj("a", "F32"), tmp_path / "mmproj.gguf", changed("", lambda data: data))
    with closing(open_encoder(path, 1)) as copy, closing(open_encoder(mmproj("a", "F32"), 1)) as original:
        np.testing.assert_array_equal(copy.encode(view(1, 2), 2, 128), original.encode(view(1, 2), 2, 128))


def rearranged_types() -> list[str]:
    """Types of a matrix that ggml's source (ggml-cpu/repack.cpp) rearranges on this processor, of those tried here."""
    features = set(ffi.llama.llama_print_system_info().decode().replace(" ", "").split("|"))
    if features & {"DOTPROD=1", "MATMUL_INT8=1"}:
        return ["Q8_0", "Q4_0"]
    return ["Q4_0"] if "AVX2=1" in features else []


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rearranged_weights_are_as_exact(kind: str, tmp_path: Path) -> None:
    """Both orders are compared with float32 products of the same rounded weights: each rounds what it multiplies."""
    source, exact = tmp_path / "mmproj.gguf", tmp_path / "exact.gguf"
    quantize_file(TINY / "mmproj-lfm2vl-tiny-F16.gguf", source, kind, (), lambda _: None)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(source).tensors}
    rewritten(source, exact, lambda name, data: gguf.quants.dequantize(data, types[name]))
    n_embd = read_metadata(source)["clip.vision.projection_dim"]

    def embeddings(path: Path, **options: bool) -> tuple[list[Floats], int]:
        with closing(GraphEncoder(path, 2, read_metadata(path), **options)) as encoder:
            found = [encoder.encode(view(rows, columns), rows * columns, n_embd) for rows, columns in VIEWS]
            return found, encoder._weights.repacked_bytes

    (mapped, none), (repacked, n_bytes), (expected, _) = (
        *(embeddings(source, repack=repack) for repack in (False, True)),
        embeddings(exact),
    )
    matrices = sum(tensor.n_bytes for tensor in gguf.GGUFReader(source).tensors if tensor.tensor_type.name == kind)
    assert (none, n_bytes) == (0, pytest.approx(matrices, rel=0.01) if kind in rearranged_types() else 0)
    for one, other, right in zip(mapped, repacked, expected, strict=True):
        assert relative_error(right, other) <= 1.5 * relative_error(right, one) <= 0.05


def test_a_llama_cpp_without_rearranged_weights_maps_all(
    mmproj: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ggml._REPACK, "ggml_backend_of_the_future", (None, []))
    for function in (ggml.ggml_repack, ggml.repack_type):
        function.cache_clear()
    try:
        path = mmproj("a", "F16")
        with closing(GraphEncoder(path, 1, read_metadata(path), repack=True)) as encoder:
            assert encoder._weights.repacked_bytes == 0
            assert ggml.repack_type() is None
            encoder.encode(view(1, 2), 2, 128)
    finally:
        monkeypatch.undo()
        for function in (ggml.ggml_repack, ggml.repack_type):
            function.cache_clear()


def test_every_wrong_tensor_is_refused_before_ggml_sees_it(mmproj: Callable[[str, str], Path], tmp_path: Path) -> None:
    source, path = mmproj("a", "F32"), tmp_path / "mmproj.gguf"
    for tensor in gguf.GGUFReader(source).tensors:
        name = tensor.name
        if name != "mm.input_norm.weight":  # newer models have none
            rewritten(source, path, changed(name, lambda _: None))
            with pytest.raises(EngineError, match=f"has no tensor {name}; it is incomplete"):
                open_encoder(path, 1)
        rewritten(source, path, changed(name, lambda data: np.repeat(data, 2, axis=-1)))
        with pytest.raises(EngineError, match=r"has the shape \[[\d, ]+\], not \["):
            open_encoder(path, 1)
        if len(tensor.shape) == 1:
            rewritten(source, path, changed(name, lambda data: data.astype(np.float16)))
            with pytest.raises(EngineError, match=f"the tensor {name} cannot be of type f16"):
                open_encoder(path, 1)


def test_integer_weights_are_refused(mmproj: Callable[[str, str], Path], tmp_path: Path) -> None:
    name = "v.blk.0.ffn_up.weight"
    path = rewritten(mmproj("a", "F32"), tmp_path / "mmproj.gguf", changed(name, lambda data: data.astype(np.int32)))
    with pytest.raises(EngineError, match=f"the tensor {name} cannot be of type i32"):
        open_encoder(path, 1)


@pytest.mark.parametrize("keep", [0, 3, 100, 1000, 5000, 0.3, 0.9, 0.999999])
def test_a_truncated_file_is_refused(mmproj: Callable[[str, str], Path], tmp_path: Path, keep: float) -> None:
    source, path = mmproj("a", "F16"), tmp_path / "mmproj.gguf"
    data = source.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(EngineError, match=str(path)):
        GraphEncoder(path, 1, read_metadata(source))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_length", 0),
        ("attention.head_count", 5),
        ("patch_size", -16),
        ("block_count", "three"),
        ("image_std", [0.5, 0.5]),
        ("image_mean", None),
        ("image_std", [0.5, 0.0, 0.5]),
    ],
)
def test_an_impossible_tower_is_refused(key: str, value: Any) -> None:
    sizes = {"embedding_length": 96, "attention.head_count": 3, "block_count": 1, "patch_size": 16}
    more = {"attention.layer_norm_epsilon": 1e-6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    values = {**sizes, **more, key: value}
    stated = {f"clip.vision.{name}": known for name, known in values.items() if known is not None}
    with pytest.raises(EngineError, match=r"not valid sizes of a vision encoder|does not describe its encoder"):
        read_tower(Path("x.gguf"), stated)


@contextmanager
def other_llama_cpp() -> Iterator[None]:
    """Simulate a llama.cpp without a function of ggml that the encoder's graph needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ggml._CPU, "ggml_graph_plan_of_the_future", (None, []))
        for function in (ggml.ggml_cpu, ggml.graph_failure):
            function.cache_clear()
        yield
    for function in (ggml.ggml_cpu, ggml.graph_failure):
        function.cache_clear()


REASON = "the installed llama.cpp has no function ggml_graph_plan_of_the_future; install llama-cpp-python 0.3.36"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_another_llama_cpp_encodes_with_mtmd(
    pair: Pair, opened: Callable[[str, str], Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = view(3, 3)
    expected = opened(name, "F32").embed_image(image)
    monkeypatch.setattr(ffi.llama, "llama_model_load_from_file", None)  # the markers come from the opened model
    with other_llama_cpp(), Model.open(pair(name, "F32")) as model:
        assert model.engine.info.encoder_settings == "flash=1 gpu=False"
        assert relative_error(expected, model.embed_image(image)) <= TOLERANCE["F32"]
        wide = model.engine.encode(view(16, 24), 384)  # more than it was opened for
        assert wide.shape == (384, model.engine.info.n_embd)


def test_the_fallback_to_mtmd_is_logged_once_and_shown(
    pair: Pair, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_llama_cpp():
        for _ in range(2):
            with Model.open(pair("a", "F32")) as model:
                model.ask(view(1, 1), max_tokens=1)
                assert model.last is not None
                shown = list(statistics(model.last, model))
        facts.print_engine()
    warning = f"images are encoded by libmtmd, which is slower: {REASON}"
    assert [record.getMessage() for record in caplog.records] == [warning]
    assert f"encoder    libmtmd ({REASON})" in shown
    engine = facts.parse_engine(0, capsys.readouterr().out.encode(), b"")
    assert engine.encoder_failure == REASON
    notes = [finding for finding in doctor._engine(engine) if finding.topic == "engine"]
    assert [(note.level, note.problem) for note in notes] == [("note", warning)]


def test_the_graph_is_shown_and_not_warned_about(
    model: Model, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    ggml.graph_failure.cache_clear()
    model.ask(view(1, 1), max_tokens=1)
    assert model.last is not None
    assert "encoder    ggml graph" in statistics(model.last, model)
    facts.print_engine()
    engine = facts.parse_engine(0, capsys.readouterr().out.encode(), b"")
    assert engine.encoder_failure is None
    assert not list(doctor._engine(engine))
    assert not caplog.records


@pytest.mark.parametrize("size", [1, 3, 64, 2**20, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("key", ["embedding_length", "head_count", "block_count", "patch_size", "scale_factor"])
def test_sizes_that_the_tensors_contradict_are_refused(
    mmproj: Callable[[str, str], Path], tmp_path: Path, key: str, size: int
) -> None:
    path = rewritten(mmproj("a", "F32"), tmp_path / "mmproj.gguf", lambda _, data: data, **{key: size})
    if (key, size) in {("head_count", 1), ("head_count", 3), ("block_count", 1), ("block_count", 3)}:
        open_encoder(path, 1).close()  # those fit, though the answers are others
        return
    with pytest.raises(EngineError, match=r"has the shape|has no tensor|not valid sizes of a vision encoder"):
        open_encoder(path, 1)


def test_the_encoder_stays_usable_after_a_view_without_memory(
    encoder: GraphEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder.encode(view(3, 3), 9, 128)
    with monkeypatch.context() as patch:
        patch.setattr(ggml.ggml(), "ggml_gallocr_alloc_graph", lambda *_: False)
        for _ in range(2):
            with pytest.raises(EngineError, match="not enough memory to encode a view"):
                encoder.encode(view(4, 4), 16, 128)
    assert encoder.encode(view(4, 4), 16, 128).shape == (16, 128)
    np.testing.assert_array_equal(encoder.encode(view(3, 3), 9, 128), expected)


def test_an_unknown_layout_of_tensors_is_a_failure_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise EngineError("unknown")

    monkeypatch.setattr(ggml, "product_op", refuse)
    ggml.graph_failure.cache_clear()
    assert ggml.graph_failure() == "unknown"
    ggml.graph_failure.cache_clear()
