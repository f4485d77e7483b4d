"""Runners: requests in, chunks of answers out. Each is imported, with its backend's package, when it is first used.

The contract, and what is written once on top of it

base.py            the contract: `stream`, `tick`, `cancel`, prompts and their tokens
lifecycle.py       how a model is loaded, loaded again and closed
turns.py           whose turn it is: one call, or one open stream, at a time
driver.py          what the caller of a stream does at each of its steps
conveniences.py    requests, completions and text, over `stream`
openai_chat.py     OpenAI's chat API, over the same
openai_format.py   the dictionaries of that API
asynchronous.py    all of these for asyncio
stepper.py         calls from any thread, answered by one stream

Which runner

factory.py         configuration → a runner; the one place that knows the backends
targets.py         `backend._target_` → a class
echo.py            no model: answers with the prompt
llama_cpp/         GGUF files
transformers/      safetensors, and GGUF files that transformers can read
isolated.py        another runner, in a process of its own

What backends share

batching/          continuous batching
chat.py            messages → prompt text, by the model's template
templates/         the Jinja that templates run in, and its limits
rendering.py       a chat in the form that a model's template can take
control_tokens.py  control tokens of a template, told from text that spells them
encoding.py        a request → the tokens of its prompt
fitting.py         what a model can take: its context, its vocabulary
decoding.py        pieces of text → whole characters, cut at stop strings
facts.py           what decides the answers beside the options: versions, number formats, devices
preview.py         what is known of a model before its weights are loaded
threads.py         how many CPU threads compute
openmp.py          how those threads wait for each other

Files of models

weights.py         a model's name → its files
digests.py         files → a digest; whether they have changed since
hub.py             whether the model hub answers
trials.py          files that are new here are tried in a process of their own first

A runner in a process of its own

child.py           the process, as its parent sees it
service.py         the program that runs in it
triage.py          which rows go into the next process when one has died
deaths.py          how it died, and whether a row may be to blame
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmpipe.runners.base import BaseLLMRunner
    from llmpipe.runners.echo import EchoRunner
    from llmpipe.runners.factory import LLMRunnerFactory
    from llmpipe.runners.llama_cpp import LlamaCppRunner
    from llmpipe.runners.transformers import TransformersRunner

_HOME = {
    "BaseLLMRunner": "base",
    "EchoRunner": "echo",
    "LLMRunnerFactory": "factory",
    "LlamaCppRunner": "llama_cpp",
    "TransformersRunner": "transformers",
}

__all__ = ["BaseLLMRunner", "EchoRunner", "LLMRunnerFactory", "LlamaCppRunner", "TransformersRunner"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmpipe.runners' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmpipe.runners.{_HOME[name]}"), name)
