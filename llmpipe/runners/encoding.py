"""A request → the tokens of its prompt, and those that end its answers, on every backend that has tokens.

Knows no tokenizer by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from llmpipe.chats import parse_messages
from llmpipe.records import Request
from llmpipe.runners.control_tokens import ControlTexts, mark_for, unmarked


class Tokenizer(Protocol):
    """What a backend knows of tokens."""

    @property
    def control(self) -> ControlTexts:
        """The control tokens: they steer the model, and have no text in an answer."""

    @property
    def around(self) -> Around:
        """What stands around raw text."""

    def tokenize(self, text: str, literal: bool = False, inside: bool = False) -> list[int]:
        """Return the tokens of a text and nothing around them.

        Args:
            text: Any text that UTF-8 can hold.
            literal: Control tokens that it spells are text.
            inside: Something stands before it, where it is literal; else it begins with a control token if so.

        Raises:
            ValueError: it is no text, or cannot be read.
        """


@dataclass(frozen=True)
class Around:
    """The tokens that a model's files ask for around raw text."""

    bos: int | None = None
    """The token that begins a text, where the model has one."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def between(cls, bos: int | None, plain: list[int], whole: list[int]) -> Around:
        """Find what stands around a text's own tokens; it stands before a text that has none."""
        for at in range(len(whole) - len(plain), -1, -1):
            if whole[at : at + len(plain)] == plain:
                return cls(bos, tuple(whole[:at]), tuple(whole[at + len(plain) :]))
        return cls(bos)

    def put(self, tokens: list[int], raw: bool, add_bos: bool | None) -> list[int]:
        """Return a prompt's tokens with what belongs around them: raw text may have it already, a chat brings its own.

        Raises:
            ValueError: a BOS is asked for, and the model has none.
        """
        begun = tokens[: len(self.before)] == list(self.before) or (self.bos is not None and tokens[:1] == [self.bos])
        if raw and not begun and add_bos is not False:
            tokens = [*self.before, *tokens]
        if raw and self.after and tokens[-len(self.after) :] != list(self.after):
            tokens = [*tokens, *self.after]
        if add_bos and self.bos is None:
            raise ValueError("prompt.add_bos=true, but the model has no BOS token")
        if add_bos and tokens[:1] != [self.bos]:
            assert self.bos is not None
            tokens = [self.bos, *tokens]
        return tokens


def with_stop_tokens(requests: Iterable[Request | None], tokenizer: Tokenizer) -> Iterator[Request | None]:
    """Yield requests whose stop strings that are a control token stop at that token, which has no text."""
    for request in requests:
        if request is None:
            yield None
            continue
        sampling = request.sampling
        found = [tokenizer.control.ids[stop] for stop in sampling.stop if stop in tokenizer.control.ids]
        if found:
            stops = list(dict.fromkeys([*sampling.stop_token_ids, *found]))
            request = replace(request, sampling=sampling.replace({"stop_token_ids": stops}))
        yield request


def tokens_of(request: Request, text_of: Callable[[Request], str], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a request's prompt, before it is known whether they are too many.

    Args:
        request: The request.
        text_of: Gives a request's prompt text, rendered where it is a chat.
        tokenizer: The backend's.

    Raises:
        ValueError: the prompt is no text, or the template refuses it.
    """
    is_chat = request.messages is not None
    if is_chat and (chat := parse_messages(request.messages, any_role=True)) is not request.messages:
        request = replace(request, messages=chat)  # what was JSON or in parts is looked at as it is rendered
    text = text_of(request)
    words = request.messages, request.tools, request.template_kwargs
    if is_chat and request.literal and tokenizer.control.spelt_in(words):
        tokens = _literally(request, text, text_of, tokenizer)
    else:
        tokens = tokenizer.tokenize(text)
    return tokenizer.around.put(tokens, not is_chat, request.add_bos)


def _literally(request: Request, text: str, text_of: Callable[[Request], str], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a chat whose words spell control tokens, or may: those are text."""
    control = tokenizer.control
    mark = mark_for(text, request.messages, request.tools, request.template_kwargs)
    fields = ("messages", "tools", "template_kwargs")
    try:
        marks = {name: control.marked(getattr(request, name), mark) for name in fields}
    except RecursionError as error:
        raise ValueError("the chat is nested too deeply") from error
    marked = text_of(replace(request, **marks))
    if unmarked(marked, mark) != text:
        raise ValueError(
            "a message spells a control token, and the chat template looks into it: whose token it is cannot be told; "
            "use prompt.control_tokens=parse, if none of the messages can do harm"
        )
    ids = frozenset(control.ids.values())
    tokens: list[int] = []
    for piece in control.pieces(marked, mark):
        if not piece.marked:
            tokens += tokenizer.tokenize(piece.text)
            continue
        found = tokenizer.tokenize(unmarked(piece.text, mark), literal=True, inside=bool(tokens))
        if not ids.isdisjoint(found):  # a tokenizer that knows no such thing: the mark stays a border
            parts = piece.text.split(mark)
            found = [token for part in parts for token in tokenizer.tokenize(part, literal=True, inside=True)]
        tokens += found
    return tokens
