"""Bytes of tokens to text: complete characters only, no stop strings, and nothing lost."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lfm2vl_edge.stream import TextStream


def split(data: bytes, ends: list[int]) -> list[bytes]:
    bounds = sorted({min(end, len(data)) for end in ends} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(bounds)]


def joined(pieces: list[bytes], stop: tuple[str, ...]) -> str:
    stream = TextStream(stop)
    return "".join(stream.push(piece) for piece in pieces) + stream.flush()


@given(st.text(), st.lists(st.integers(0, 40)))
def test_pieces_join_to_the_text_however_the_bytes_are_split(text: str, ends: list[int]) -> None:
    assert joined(split(text.encode(), ends), ()) == text


@given(
    st.text(alphabet="ab\n🙂", max_size=30),
    st.lists(st.text(alphabet="ab\n🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 60)),
)
def test_the_first_stop_string_and_the_rest_are_never_returned(text: str, stop: list[str], splits: list[int]) -> None:
    """Byte by byte, the stop string that ends first ends the text; in larger pieces, the one that starts first."""
    whole = joined([bytes([byte]) for byte in text.encode()], tuple(stop))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    if ends:
        longest = max((one for one in stop if text[: ends[0]].endswith(one)), key=len)
        assert whole == text[: ends[0] - len(longest)]
    else:
        assert whole == text
    assert not any(one in joined(split(text.encode(), splits), tuple(stop)) for one in stop)


def test_text_is_returned_as_soon_as_it_is_certain() -> None:
    stream = TextStream(("STOP",))
    assert stream.push("ab 🙂".encode()[:-1]) == "ab "
    assert stream.push("🙂".encode()[-1:]) == "🙂"
    assert stream.push(b"xST") == "x"
    assert stream.push(b"ART") == "START"
    assert stream.push(b"STOP and on") == ""
    assert stream.stopped
    assert stream.push(b"more") == stream.flush() == ""


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.flush() == "\ufffd"
