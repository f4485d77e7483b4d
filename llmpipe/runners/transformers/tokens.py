"""A tokenizer of transformers as `runners.encoding` sees it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import tokenizers

from llmpipe.exceptions import one_line
from llmpipe.runners.control_tokens import ControlTexts
from llmpipe.runners.encoding import Around


class Tokens:
    """Texts to tokens; see `Tokenizer` in `encoding`.

    Args:
        tokenizer: Any tokenizer of transformers.
        ends: Ids that end a generation, whatever the tokenizer says of them.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)

    def tokenize(self, text: str, literal: bool = False, inside: bool = False) -> list[int]:
        """Return the tokens of a text; see `Tokenizer.tokenize`.

        Raises:
            UnicodeEncodeError: `text` has a lone surrogate, which would end in a panic of the tokenizer.
            ValueError: the tokenizer fails on it.
        """
        text.encode("utf-8")
        try:
            if literal and inside and self._literal_inside is not None:
                return list(self._literal_inside.encode(text, add_special_tokens=False).ids)
            found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)
            return list(found["input_ids"])
        except BaseException as error:
            # What native code raises is no more than an Exception, or, from a panic, even less.
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer fails on this text: {one_line(error)}") from error

    @cached_property
    def control(self) -> ControlTexts:
        """The special tokens, and what ends a generation; see `Tokenizer.control`."""
        tokenizer, added = self._tokenizer, {}
        with suppress(NotImplementedError):  # mistral-common's, which reads no control tokens in texts
            added = tokenizer.added_tokens_decoder
        special = {id: token for id, token in added.items() if token.special or id in self._ends}
        ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        ids |= {token.content: id for id, token in special.items()}
        return ControlTexts(
            ids,
            left=[token.content for token in special.values() if token.lstrip],
            right=[token.content for token in special.values() if token.rstrip],
        )

    @cached_property
    def around(self) -> Around:
        """What the tokenizer puts around raw text; see `Tokenizer.around`."""
        whole = list(self._tokenizer("a", verbose=False)["input_ids"])
        return Around.between(self._tokenizer.bos_token_id, self.tokenize("a"), whole)

    @cached_property
    def _literal_inside(self) -> tokenizers.Tokenizer | None:
        """The tokenizer that puts no space before the first word, where it is one that otherwise does."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        before = "" if backend is None else backend.to_str()
        after = before.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        if after == before:
            return None
        found = tokenizers.Tokenizer.from_str(after)
        found.encode_special_tokens = True
        return found
