"""What a type checker says of programs that use the library, and that the types say what is so."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from mypy import api
from openai.types import chat, completion_usage
from openai.types.chat import chat_completion, chat_completion_chunk

from llmpipe import BaseLLMRunner, SamplingConfig
from llmpipe.config import SamplingOptions
from llmpipe.runners import openai_format
from llmpipe.runners.conveniences import RequestOptions

ROOT = Path(__file__).parent.parent
HEAD = """
from collections.abc import AsyncIterator, Iterator
from llmpipe import LLMRunnerFactory, ChatCompletion, ChatCompletionChunk, SamplingOptions
runner = LLMRunnerFactory.create_runner({"backend": "echo"})
chat = [{"role": "user", "content": "hi"}]
"""
GOOD = {
    "options": """
text: str = runner.generate_text("hi", temperature=0.5, stop="x", logit_bias={5: -100.0}, prompt_format="raw")
runner.run(["hi", chat], max_tokens=5, stop=["a", "b"], seed=None, continue_final=False)
greedy: SamplingOptions = {"temperature": 0}
for piece in runner.generate_text_streaming(chat, **greedy):
    piece.upper()
""",
    "chats": """
def ask(stream: bool) -> ChatCompletion | Iterator[ChatCompletionChunk]:
    return runner.create_chat_completion(chat, stream=stream)
response = runner.create_chat_completion(chat, tools=[{"type": "function"}], max_completion_tokens=5)
content: str = response["choices"][0]["message"]["content"]
tokens: int = response["usage"]["total_tokens"]
runner.create_chat_completion([*chat, response["choices"][0]["message"]])
for chunk in runner.create_chat_completion(chat, stream=True, stream_options={"include_usage": True}):
    print(chunk["choices"][0]["delta"].get("content"))
""",
    "async": """
async def main() -> None:
    text: str = await runner.agenerate("hi", temperature=0.5)
    async for piece in runner.astream(chat, max_tokens=3):
        piece.upper()
    response = await runner.acreate_chat_completion(chat)
    content: str = response["choices"][0]["message"]["content"]
    async for chunk in await runner.acreate_chat_completion(chat, stream=True):
        chunk["choices"][0]["delta"]
""",
}
BAD = {
    'runner.generate_text("hi", temprature=1)': 'Unexpected keyword argument "temprature"',
    'runner.request("hi", temprature=1)': 'Unexpected keyword argument "temprature"',
    'runner.run(["hi"], temprature=1)': 'Unexpected keyword argument "temprature"',
    'runner.generate_text_streaming("hi", temprature=1)': 'Unexpected keyword argument "temprature"',
    "runner.create_chat_completion(chat, temprature=1)": "No overload variant",
    "runner.acreate_chat_completion(chat, temprature=1)": "No overload variant",
    'runner.agenerate("hi", temprature=1)': 'Unexpected keyword argument "temprature"',
    'runner.astream("hi", temprature=1)': 'Unexpected keyword argument "temprature"',
    'runner.generate_text("hi", temperature="hot")': 'incompatible type "str"; expected "float"',
    'runner.generate_text("hi", prompt_format="poem")': "incompatible type",
    'runner.create_chat_completion(chat)["choises"]': 'has no key "choises"',
    'runner.create_chat_completion(chat)["choices"][0]["delta"]': 'has no key "delta"',
    'next(runner.create_chat_completion(chat, stream=True))["choices"][0]["message"]': 'has no key "message"',
    "next(runner.create_chat_completion(chat))": 'No overload variant of "next"',
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy says of each program: one run for all, whose findings on llmpipe itself are kept for the next."""
    place = tmp_path_factory.mktemp("programs")
    programs = {**GOOD, **{code: code for code in BAD}}
    files = {f"program_{i}.py": code for i, code in enumerate(programs)}
    for name, code in files.items():
        (place / name).write_text(HEAD + programs[code])
    options = [
        "--strict",
        f"--config-file={ROOT / 'pyproject.toml'}",
        f"--cache-dir={ROOT / '.mypy_cache' / 'programs'}",
    ]
    out, errors, _ = api.run([*options, *(str(place / name) for name in files)])
    assert not errors, errors
    found: dict[str, list[str]] = {code: [] for code in programs}
    for line in out.splitlines():
        if at := re.match(r".*(program_\d+\.py):\d+: error: (.*)", line):
            found[files[at[1]]].append(at[2])
    return found


@pytest.mark.parametrize("program", GOOD)
def test_a_type_checker_accepts_what_runs(program: str, said: dict[str, list[str]]) -> None:
    assert said[program] == []


@pytest.mark.parametrize("code", BAD)
def test_a_type_checker_refuses_what_would_not(code: str, said: dict[str, list[str]]) -> None:
    assert [line for line in said[code] if BAD[code] in line], said[code]


def test_sampling_options_are_the_fields_of_the_configuration() -> None:
    assert list(get_type_hints(SamplingOptions)) == [f.name for f in fields(SamplingConfig)]
    hints, own = get_type_hints(SamplingOptions), get_type_hints(SamplingConfig)
    scalars = {name: hint for name, hint in own.items() if hint in (int, float, bool, int | None)}
    assert scalars.items() <= hints.items()


def test_request_options_are_the_parameters_of_request() -> None:
    parameters = dict(inspect.signature(BaseLLMRunner.request).parameters)
    named = set(parameters) - {"self", "prompt", "id", "sampling"}
    assert named | set(get_type_hints(SamplingOptions)) == set(get_type_hints(RequestOptions))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (openai_format.Usage, completion_usage.CompletionUsage),
        (openai_format.ChatMessage, chat.ChatCompletionMessage),
        (openai_format.Choice, chat_completion.Choice),
        (openai_format.ChatCompletion, chat.ChatCompletion),
        (openai_format.Delta, chat_completion_chunk.ChoiceDelta),
        (openai_format.ChunkChoice, chat_completion_chunk.Choice),
        (openai_format.ChatCompletionChunk, chat.ChatCompletionChunk),
    ],
)
def test_the_types_of_answers_are_openais(ours: Any, theirs: Any) -> None:
    required = {name for name, field in theirs.model_fields.items() if field.is_required()}
    assert required <= set(get_type_hints(ours)) <= set(theirs.model_fields)
