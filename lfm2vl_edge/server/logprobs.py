"""Probabilities of tokens in OpenAI's forms: what a request says about them, and how an answer shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lfm2vl_edge.config import MAX_LOGPROBS
from lfm2vl_edge.errors import shorten
from lfm2vl_edge.server.fields import flag, integer, typed
from lfm2vl_edge.server.refusals import Refusal
from lfm2vl_edge.stream import TokenLogprob

INCLUDED: Final = "message.output_text.logprobs"
"""What the field `include` of the responses API has for them."""


def logprob_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of a chat completion's `logprobs` and `top_logprobs`.

    Raises:
        Refusal: they have another form, or there are only the likeliest tokens.
    """
    count = _count(body)
    if not flag(body, "logprobs"):
        if count:
            raise Refusal(400, "top_logprobs needs logprobs: true; add it", "invalid_value", "top_logprobs")
        return {}
    return {"logprobs": count or 0}


def response_logprob_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of a response's `include` and `top_logprobs`, either of which is enough.

    Raises:
        Refusal: they have another form.
    """
    count = _count(body)
    if INCLUDED not in (typed(list, body, "include") or ()) and not count:
        return {}
    return {"logprobs": count or 0}


def _count(body: Mapping[str, Any]) -> int | None:
    count = integer(body, "top_logprobs")
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        message = f"top_logprobs is {shorten(count)}; it must be from 0 to {MAX_LOGPROBS}"
        raise Refusal(400, message, "invalid_value", "top_logprobs")
    return count


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return tokens in OpenAI's form; each of the likeliest ones has the same fields but `top_logprobs`."""
    return [_described(token) | {"top_logprobs": list(map(_described, token.top))} for token in tokens]


def _described(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.piece)}
