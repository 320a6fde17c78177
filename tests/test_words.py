"""The words of the project: none of those that the field does not use, and the check finds a planted one."""

from __future__ import annotations

import pytest

from tests.words import ROOT, files, found


def test_no_file_uses_a_word_that_the_field_does_not_use() -> None:
    names = files([])
    assert len(names) > 200
    assert [(name, *hit) for name in names for hit in found(name, (ROOT / name).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Return the " + "picture.", "image"),
        ("chat." + "say('x')", "send, add_image, pending images"),
        ("print(chunk." + "finish)", "finish_reason"),
        ("# a " + "whole number of tokens", "integer"),
        ("raise Error('it is " + "no image')", "is not a valid"),
        ("the file " + "lies in the cache", "stored in"),
        ("used " + "where there is one", "if"),
        ("as " + "the reference does", "transformers"),
    ],
)
def test_a_planted_word_is_found(line: str, expected: str) -> None:
    assert [(number, word) for number, _, word in found("x.py", f"\n{line}\n")] == [(2, expected)]


@pytest.mark.parametrize(
    "line", ["Return the image.", "run photo.jpg", "if value is None:", "a finish reason", "there is no network"]
)
def test_ordinary_words_are_accepted(line: str) -> None:
    assert list(found("x.py", line)) == []
