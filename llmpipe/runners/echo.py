"""A runner without a model: it answers each request with its own prompt, word by word.

For trying out a dataset and a configuration in a second, and for tests of everything that is not a backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from llmpipe.chats import ChatInput
from llmpipe.config import EchoConfig
from llmpipe.records import Chunk, Request, error_chunks
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.decoding import StopStrings


class EchoRunner(BaseLLMRunner):
    """Echoes prompts; a token is a word. A chat is answered with its last message."""

    config_type = EchoConfig
    # Each next word is certain, and certain it stays however a distribution is scaled, shifted or cut. Words have no
    # ids at which to stop, though, and after the last word there is nothing to go on with.
    honours = frozenset({"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature"})
    honours |= {"top_k", "top_p", "min_p", "typical_p", "max_tokens", "stop", "n", "seed"}

    def _initialize_model(self) -> None:
        """Nothing to load."""

    def info(self) -> dict[str, Any]:
        """Say that there is no model."""
        return {"model": "none", "model_type": "echo", "device": "cpu"}

    def _render(self, chat: ChatInput) -> str:
        """Return the last message."""
        return str(chat.messages[-1]["content"])

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a number for each word of the prompt.

        Raises:
            ValueError: the request cannot be run.
        """
        self.check_sampling(request.sampling)
        return list(range(len(self.prompt_text(request).split(" ")))), 0

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer each request with its prompt's words, up to max_tokens and the stop strings."""
        for request in requests:
            try:
                self.check_sampling(request.sampling)
                words = self.prompt_text(request).split(" ")
            except ValueError as error:
                yield from error_chunks(request, str(error))
                continue
            limit = request.sampling.max_tokens
            for sample in request.samples:
                stops = StopStrings(request.sampling.stop)
                shown = stops.push(" ".join(words[:limit]))
                if not stops.stopped:
                    shown += stops.flush()
                yield Chunk(
                    request.id,
                    sample,
                    shown,
                    "length" if len(words) > limit and not stops.stopped else "stop",
                    prompt_tokens=len(words),
                    cached_prompt_tokens=0,
                    completion_tokens=min(len(words), limit),
                    started_at=time.perf_counter(),
                )
