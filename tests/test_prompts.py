"""Row → request: which rows can be run, what they become, and what their options and seeds are."""

from __future__ import annotations

from typing import Any

import pytest

from llmpipe.chats import parse_messages
from llmpipe.config import ColumnsConfig, Overflow, PromptConfig, SamplingConfig
from llmpipe.exceptions import LLMConfigError
from llmpipe.prompts import PromptBuilder, fill, template_columns
from llmpipe.records import Request, Row


def build(
    values: dict[str, Any] | None = None,
    *,
    chat: bool = False,
    index: int = 0,
    error: str | None = None,
    seed: int = 0,
    n: int = 1,
    done: frozenset[int] = frozenset(),
    run_seed: int | None = None,
    **prompt: Any,
) -> Request | None:
    sampling = SamplingConfig(temperature=0.5, n=n, seed=run_seed)
    builder = PromptBuilder(PromptConfig(**prompt), ColumnsConfig(), sampling, seed, chat)
    return builder.build(Row("f", index + 1, values or {}, error=error, index=index), done)


def request(*args: Any, **options: Any) -> Request:
    found = build(*args, **options)
    assert found is not None
    return found


# --- rows that cannot be run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "no prompt: 'prompt' and 'messages' are both missing or null"),
        ({"prompt": None}, "both missing or null"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "the prompt is a number, not text"),
        ({"prompt": True}, "the prompt is a boolean, not text"),
        ({"prompt": ["a"]}, "the prompt is a list, not text"),
        ({"prompt": {"a": 1}}, "the prompt is an object, not text"),
        ({"prompt": b"a"}, "the prompt is a bytes, not text"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"messages": []}, "messages are an empty list"),
        ({"messages": {}}, "messages are an object, not a list"),
        ({"messages": 1}, "messages are a number, not a list"),
        ({"messages": "{bad"}, "messages is text, and not valid JSON"),
        ({"messages": "[" * 5000}, "messages is text, and not valid JSON"),
        ({"messages": ["hi"]}, "message 1 is text, not an object"),
        ({"messages": [None]}, "message 1 is null, not an object"),
        ({"messages": [{"content": "x"}]}, "message 1 has the role None; there are system"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 has the role 'bot'; there are system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}, "message 2 has null as content"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has a number as content, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1 has a content part of type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "message 1 holds a lone surrogate"),
        ({"messages": [{"role": "user", "content": "x", "name": ["\ud800"]}]}, "message 1 holds a lone surrogate"),
    ],
)
def test_a_row_without_a_usable_prompt_says_why(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(values)
    assert reason in str(caught.value)


def test_an_unreadable_row_keeps_its_reason() -> None:
    with pytest.raises(ValueError, match="not valid JSON: oops"):
        build(error="not valid JSON: oops")


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": -1}, r"temperature=-1 is not allowed; it must be a number in \[0, 100\]"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 10**400}, "sampling"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"n": 0}, "n=0"),
        ({"stop": 5}, "stop|iterable"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 10**400}}, "sampling"),
        ({"temprature": 1}, "unknown sampling option 'temprature'; did you mean 'temperature'"),
        ([1], "sampling is a list, not an object"),
        (0.7, "sampling is a number, not an object"),
        ("{bad", "sampling is text, and not valid JSON"),
        ("5", "sampling is a number, not an object"),
    ],
)
def test_a_row_with_bad_sampling_says_why(sampling: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build({"prompt": "p", "sampling": sampling})


# --- what a row becomes -----------------------------------------------------------------------------------------------


def test_a_prompt_goes_in_as_it_is_or_as_a_user_message() -> None:
    text = " {not a field} \u2028\0<|im_end|>{{x}} "
    assert (request({"prompt": text}).prompt, request({"prompt": text}).messages) == (text, None)
    assert request({"prompt": text}, chat=True).messages == ({"role": "user", "content": text},)


def test_messages_are_used_before_the_prompt_and_keep_their_further_keys() -> None:
    messages = [{"role": "user", "content": "hi", "name": "Ann", "tool_calls": None}]
    found = request({"prompt": "no", "messages": messages})
    assert found.messages == ({"role": "user", "content": "hi", "name": "Ann"},)
    assert request({"prompt": "yes", "messages": None}).prompt == "yes"


def test_messages_may_be_json_text_or_have_text_parts_or_only_tool_calls() -> None:
    assert parse_messages('[{"role": "user", "content": "hi"}]') == ({"role": "user", "content": "hi"},)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}]) == ({"role": "user", "content": "ab"},)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert parse_messages([calls]) == ({**calls, "content": ""},)


def test_the_system_message_is_added_only_where_a_chat_has_none() -> None:
    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    system = {"role": "system", "content": "be brief"}
    assert request({"prompt": "hi"}, chat=True, system="be brief").messages == (system, user)
    assert request({"messages": [user]}, system="be brief").messages == (system, user)
    assert request({"messages": [own, user]}, system="be brief").messages == (own, user)
    assert request({"prompt": "hi"}, system="be brief").prompt == "hi"


def test_a_template_is_filled_with_columns_and_never_reads_fields_from_them() -> None:
    values = {"q": "{a} {{b}} {q}", "a": 5, "list": [1, "é"], "flag": True, "x y": "spaced"}
    assert request(values, template="{q}|{a}|{list}|{flag}|{x y}|{{q}}").prompt == (
        '{a} {{b}} {q}|5|[1, "é"]|true|spaced|{q}'
    )


def test_a_template_column_that_a_row_lacks_is_an_error_of_that_row() -> None:
    with pytest.raises(ValueError, match="names the column 'a', which is missing or null"):
        build({"a": None, "prompt": "p"}, template="{a}")
    with pytest.raises(ValueError, match="the prompt is empty"):
        build({"a": ""}, template="{a}")
    with pytest.raises(ValueError, match="lone surrogate"):
        build({"a": "\ud800"}, template="{a}")


def test_the_columns_of_a_template_are_known_before_the_run() -> None:
    assert template_columns("{a} {{no}} {b} {a}") == ["a", "b", "a"]
    assert fill("{{{a}}}", {"a": 1}) == "{1}"
    for bad in ("{a", "a}", "{a{b}}"):
        with pytest.raises(LLMConfigError, match="brace that stands alone"):
            template_columns(bad)


# --- options and seeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 1.5, "stop": None}, '{"temperature": 1.5}'])
def test_a_row_overrides_the_sampling_of_the_run(sampling: Any) -> None:
    found = request({"prompt": "p", "sampling": sampling})
    assert found.sampling == SamplingConfig(temperature=1.5)
    assert request({"prompt": "p", "sampling": None}).sampling == SamplingConfig(temperature=0.5)


def test_only_the_samples_that_are_not_done_are_asked_for() -> None:
    assert request({"prompt": "p"}, n=3).samples == (0, 1, 2)
    assert request({"prompt": "p"}, n=3, done=frozenset({0, 2})).samples == (1,)
    assert build({"prompt": "p"}, n=3, done=frozenset({0, 1, 2})) is None
    assert request({"prompt": "p", "sampling": {"n": 2}}).samples == (0, 1)


def test_the_seed_follows_from_the_runs_seed_and_the_rows_id_not_from_its_place() -> None:
    seed = request({"prompt": "p", "id": "a"}).seed
    assert request({"prompt": "other", "id": "a"}, index=7).seed == seed
    assert request({"prompt": "p", "id": "b"}).seed != seed
    assert request({"prompt": "p", "id": "a"}, seed=1).seed != seed
    assert request({"prompt": "p", "id": "\ud800"}).seed >= 0


def test_a_seed_that_is_given_is_taken() -> None:
    assert request({"prompt": "p"}, run_seed=5).seed == 5
    assert request({"prompt": "p", "sampling": {"seed": 6}}, run_seed=5).seed == 6


def test_overflow_reaches_the_runner() -> None:
    assert request({"prompt": "p"}, overflow=Overflow.truncate).truncate
    assert not request({"prompt": "p"}).truncate
