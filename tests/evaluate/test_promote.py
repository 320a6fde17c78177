"""`convert --check` and `--promote`: the verdict is that of verify, and the worst matrices get better types."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_convert.promote import NEXT, Promotion, promotions, with_promotions
from lfm2vl_convert.recipes import TENSOR_TYPES
from lfm2vl_convert.verify import TensorError
from lfm2vl_edge.cli import app
from lfm2vl_edge.evaluate import verify
from lfm2vl_edge.evaluate.verify import Comparison, TokenDifference, ViewDifference
from lfm2vl_edge.models.gguf import read_tensors
from tests.conftest import REFERENCE
from tests.evaluate.test_verify import small_images

__all__ = ["small_images"]
CHECKPOINT = REFERENCE / "a" / "checkpoint"
TINY = Path(__file__).parents[2] / "models" / "tiny" / "lfm2vl-tiny"


def errors_of(**found: tuple[str, float]) -> list[TensorError]:
    return [TensorError(name=f"blk.0.{name}.weight", type=kind, error=error) for name, (kind, error) in found.items()]


def test_the_worst_matrices_are_promoted() -> None:
    given = errors_of(
        **{f"ffn_{part}": ("Q4_0", error) for part, error in zip("abcdefgh", (5, 1, 9, 2, 9, 3, 4, 6), strict=True)},
        attn_q=("F32", 7.0),
        attn_k=("Q6_K", 0.0),
        attn_norm=("F16", 8.0),
        attn_v=("BF16", 7.0),
    )
    found = promotions(given)
    assert [(one.name, one.old, one.new) for one in found] == [
        ("blk.0.ffn_c.weight", "Q4_0", "Q5_0"),
        ("blk.0.ffn_e.weight", "Q4_0", "Q5_0"),
    ]
    assert found == promotions(given[::-1])
    assert str(found[0]) == "promoted blk.0.ffn_c.weight from Q4_0 (error 9.0e+00) to Q5_0"
    assert promotions(errors_of(attn_q=("F32", 7.0), attn_k=("Q6_K", 0.0))) == []


def test_repeated_promotions_end_at_full_precision() -> None:
    assert set(TENSOR_TYPES) == {*NEXT, "F32"}
    for kind in NEXT:
        path = [kind]
        while path[-1] in NEXT:
            path.append(NEXT[path[-1]])
            assert len(path) < 9
        assert path[-1] == "F32"


def test_promotions_precede_earlier_overrides() -> None:
    one = Promotion(name="blk.0.ffn_up.weight", old="Q4_0", new="Q5_0", error=0.1)
    first = with_promotions([("ffn_up", "Q4_0")], [one])
    assert first == [(r"^blk\.0\.ffn_up\.weight$", "Q5_0"), ("ffn_up", "Q4_0")]
    again = with_promotions(first, [Promotion(name=one.name, old="Q5_0", new="Q8_0", error=0.1)])
    assert again == [(first[0][0], "Q8_0"), first[1]]


def converted(folder: Path, *more: object, checkpoint: Path = CHECKPOINT) -> Result:
    return CliRunner().invoke(app, ["convert", str(checkpoint), "-o", str(folder), *map(str, more)])


@pytest.mark.parametrize(("limit", "code", "verdict"), [("0.1", 0, "good: lowest"), ("0", 1, "bad: mean divergence")])
def test_check_prints_the_verdict_of_verify(
    limit: str, code: int, verdict: str, small_images: None, tmp_path: Path
) -> None:
    types = ("--quant", "F16", "--mmproj-quant", "F16")
    result = converted(tmp_path, *types, "--check", "--max-kl", limit, "-q")
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1].startswith(verdict)
    assert len(list(tmp_path.iterdir())) == 2


def behaviour(cosine: float, kl: float) -> Comparison:
    return Comparison(
        views=(ViewDifference(image="x", number=0, cosine=cosine, error=0.0),),
        conversations=(TokenDifference(image=None, question="x", kl=kl, agrees=True),),
    )


def promoted_types(result: Result) -> dict[str, str]:
    """Return matrix -> its last type, in the order of the first promotions."""
    lines = [line.split() for line in result.stderr.splitlines() if line.startswith("promoted")]
    return {words[1]: words[-1] for words in lines}


def test_promote_continues_until_it_is_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The comparisons are scripted: first the encoder is too far, then the language tower, then both are good."""
    script = [behaviour(0.5, 9.0), behaviour(0.995, 9.0), behaviour(0.995, 0.05)]
    monkeypatch.setattr(verify, "compare", lambda *_: script.pop(0))
    result = converted(tmp_path, "--quant", "Q4_0", "--mmproj-quant", "Q8_0", "--promote")
    assert (result.exit_code, script) == (0, [])
    assert result.stdout.splitlines()[-1].startswith("good: lowest cosine 0.995000, mean divergence 0.05 nats")
    found = promoted_types(result)
    files = [read_tensors(tmp_path / name) for name in ("checkpoint-Q4_0.gguf", "mmproj-checkpoint-Q8_0.gguf")]
    types = {name: tensor.type for tensors in files for name, tensor in tensors.items()}
    assert {name: types[name] for name in found} == found
    encoder = [name for name in found if name.startswith(("v.", "mm."))]
    assert list(found)[: len(encoder)] == encoder
    assert {found[name] for name in encoder} == {"BF16"}
    assert {kind for name, kind in found.items() if name not in encoder} == {"Q5_0"}


def test_promote_ends_if_no_better_type_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "compare", lambda *_: behaviour(float("nan"), 9.0))
    result = converted(tmp_path, "--quant", "F32", "--mmproj-quant", "F32", "--promote")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("bad: mean divergence 9 nats is above --max-kl 0.1")
    assert "promoted" not in result.stderr


def test_a_low_type_of_the_demonstration_model_is_promoted_until_it_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is scripted: in Q3_K_M the divergence is 0.051 nats, after one round 0.046, after two 0.004."""
    monkeypatch.setattr(verify, "_IMAGES", {"small": (128, 128)})
    monkeypatch.setattr(
        verify, "_CONVERSATIONS", (("small", "What colour is the circle?"), (None, "Count from one to five."))
    )
    types = ("--quant", "Q3_K_M", "--mmproj-quant", "F16", "--max-kl", "0.015")
    low = converted(tmp_path / "low", *types, "--check", "-q", checkpoint=TINY)
    assert low.exit_code == 1
    assert low.stdout.splitlines()[-1].startswith("bad: mean divergence 0.0")
    result = converted(tmp_path / "high", *types, "--promote", checkpoint=TINY)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("good: lowest cosine")
    before, after = (read_tensors(tmp_path / name / "lfm2vl-tiny-Q3_K_M.gguf") for name in ("low", "high"))
    changed = {name: tensor.type for name, tensor in after.items() if tensor.type != before[name].type}
    assert changed == promoted_types(result)
    assert 0 < len(changed) < len(before) / 4
    checked = verify.verify(tmp_path / "high", TINY, max_kl=0.015)
    assert checked.verdict == result.stdout.splitlines()[-1]
