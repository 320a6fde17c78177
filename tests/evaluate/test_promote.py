"""`convert --check` and `--promote`: the verdict is verify's, and the worst matrices get better types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lfm2vl_convert.promote import NEXT, Promotion, promotions, with_promotions
from lfm2vl_convert.recipes import TENSOR_TYPES
from lfm2vl_convert.verify import TensorError
from lfm2vl_edge.cli import _checking as checking
from lfm2vl_edge.cli import app
from lfm2vl_edge.evaluate.verify import Comparison, Conversation, View
from lfm2vl_edge.models.gguf import read_tensors
from tests.conftest import REFERENCE
from tests.evaluate.test_verify import small_pictures

__all__ = ["small_pictures"]
CHECKPOINT = REFERENCE / "a" / "checkpoint"


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


def test_every_way_up_ends_at_full_precision() -> None:
    assert set(TENSOR_TYPES) == {*NEXT, "F32"}
    for kind in NEXT:
        path = [kind]
        while path[-1] in NEXT:
            path.append(NEXT[path[-1]])
            assert len(path) < 9
        assert path[-1] == "F32"


def test_promotions_come_before_what_was_asked_for() -> None:
    one = Promotion(name="blk.0.ffn_up.weight", old="Q4_0", new="Q5_0", error=0.1)
    first = with_promotions([("ffn_up", "Q4_0")], [one])
    assert first == [(r"^blk\.0\.ffn_up\.weight$", "Q5_0"), ("ffn_up", "Q4_0")]
    again = with_promotions(first, [Promotion(name=one.name, old="Q5_0", new="Q8_0", error=0.1)])
    assert again == [(first[0][0], "Q8_0"), first[1]]


def converted(folder: Path, *more: object) -> Result:
    return CliRunner().invoke(app, ["convert", str(CHECKPOINT), "-o", str(folder), *map(str, more)])


@pytest.mark.parametrize(("limit", "code", "verdict"), [("0.1", 0, "good: lowest"), ("0", 1, "bad: mean divergence")])
def test_check_has_verifys_verdict(limit: str, code: int, verdict: str, small_pictures: None, tmp_path: Path) -> None:
    types = ("--quant", "F16", "--mmproj-quant", "F16")
    result = converted(tmp_path, *types, "--check", "--max-kl", limit, "-q")
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1].startswith(verdict)
    assert len(list(tmp_path.iterdir())) == 2


def behaviour(cosine: float, kl: float) -> Comparison:
    return Comparison(
        views=(View(picture="x", number=0, cosine=cosine, error=0.0),),
        conversations=(Conversation(picture=None, question="x", kl=kl, agrees=True),),
    )


def test_promote_goes_on_until_it_is_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the models answer is scripted: first the encoder is too far, then the language tower, then all is well."""
    script = [behaviour(0.5, 9.0), behaviour(0.995, 9.0), behaviour(0.995, 0.05)]
    verified: list[dict[str, Any]] = []
    monkeypatch.setattr(checking, "_behaviour", lambda *_: script.pop(0))
    monkeypatch.setattr(checking, "verify", lambda model, **more: verified.append(more))
    result = converted(tmp_path, "--quant", "Q4_0", "--mmproj-quant", "Q8_0", "--promote")
    assert (result.exit_code, script) == (0, [])
    assert [(one["max_kl"], one["min_cosine"], one["against"]) for one in verified] == [(0.1, 0.99, str(CHECKPOINT))]
    said = [line.split() for line in result.stderr.splitlines() if line.startswith("promoted")]
    made = [read_tensors(tmp_path / name) for name in ("checkpoint-Q4_0.gguf", "mmproj-checkpoint-Q8_0.gguf")]
    types = {name: tensor.type for tensors in made for name, tensor in tensors.items()}
    assert {words[1]: types[words[1]] for words in said} == {words[1]: words[-1] for words in said}
    encoder = [words[1] for words in said if words[1].startswith(("v.", "mm."))]
    assert [words[1] for words in said][: len(encoder)] == encoder
    assert {words[-1] for words in said[: len(encoder)]} == {"BF16"}
    assert {words[-1] for words in said[len(encoder) :]} == {"Q5_0"}


def test_promote_ends_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checking, "_behaviour", lambda *_: behaviour(float("nan"), 9.0))
    monkeypatch.setattr(checking, "verify", lambda model, **more: None)
    result = converted(tmp_path, "--quant", "F32", "--mmproj-quant", "F32", "--promote")
    assert result.exit_code == 0
    assert "promoted" not in result.stderr
