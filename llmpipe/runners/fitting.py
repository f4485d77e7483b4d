"""What a model can take of a request: as many tokens as its context, and no token that it does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from llmpipe.config import SamplingConfig


def check_tokens(sampling: SamplingConfig, n_vocab: int) -> None:
    """Refuse options that name a token that the model does not have.

    Raises:
        ValueError: names the token and the range there is.
    """
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(sampling, name):
            if not 0 <= token < n_vocab:
                raise ValueError(f"{name} names token {token}; the model has tokens 0 to {n_vocab - 1}")


def known_tokens(ids: Sequence[int], n_vocab: int) -> list[int]:
    """Return token ids as a list.

    Raises:
        ValueError: one of them is none of the model's.
    """
    for token in ids:
        if not (isinstance(token, SupportsIndex) and 0 <= token.__index__() < n_vocab):
            raise ValueError(f"{token!r} is not a token; the model has tokens 0 to {n_vocab - 1}")
    return [token.__index__() for token in ids]


def fit_prompt(tokens: list[int], context: int, truncate: bool) -> tuple[list[int], int]:
    """Return the prompt's tokens and how many were cut off on the left, leaving room for one token of an answer.

    Raises:
        ValueError: the prompt is empty, or exceeds the context and `truncate` is off.
    """
    if not tokens:
        raise ValueError("the prompt is empty: it has no tokens")
    excess = len(tokens) - (context - 1)
    if excess <= 0:
        return tokens, 0
    if not truncate:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, and the context of {context} leaves room for {context - 1}: "
            f"use a larger backend.context, or prompt.overflow=truncate"
        )
    return tokens[excess:], excess
