"""Completions and chunks → the dictionaries of OpenAI's chat API. Knows nothing of models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmpipe.records import Chunk, Completion


def chat_completion(model: str, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the `chat.completion` of one request, a choice for each of its samples."""
    choices = [
        {
            "index": completion.sample,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        for completion in completions
    ]
    completion_tokens = sum(completion.completion_tokens or 0 for completion in completions)
    usage = _usage(completions[0].prompt_tokens, completion_tokens)
    return {**_head(model, "chat.completion"), "choices": choices, "usage": usage}


def chat_chunks(model: str, chunks: Iterable[Chunk], include_usage: bool) -> Iterator[dict[str, Any]]:
    """Yield the `chat.completion.chunk` dictionaries of one request.

    As in OpenAI's streams, a choice's first delta names the role, its reason to end comes in a chunk of its own after
    the last text, and the usage, where it is asked for, in a chunk without choices at the very end.
    """
    head = _head(model, "chat.completion.chunk")
    prompt_tokens, completion_tokens = 0, 0
    begun: set[int] = set()
    for chunk in chunks:
        prompt_tokens = chunk.prompt_tokens or prompt_tokens
        completion_tokens += chunk.completion_tokens or 0
        if chunk.sample not in begun:
            begun.add(chunk.sample)
            yield {**head, "choices": [_choice(chunk.sample, {"role": "assistant", "content": chunk.text}, None)]}
        elif chunk.text:
            yield {**head, "choices": [_choice(chunk.sample, {"content": chunk.text}, None)]}
        if chunk.finish_reason is not None:
            yield {**head, "choices": [_choice(chunk.sample, {}, chunk.finish_reason)]}
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(prompt_tokens, completion_tokens)}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _choice(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _usage(prompt_tokens: int | None, completion_tokens: int) -> dict[str, int]:
    prompt = prompt_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }
