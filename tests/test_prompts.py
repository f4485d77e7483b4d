"""Row → request: which rows can be run, what they become, and what their options and seeds are."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import compose
from llmpipe.chats import parse_messages
from llmpipe.config import ColumnsConfig, Overflow, PromptConfig, SamplingConfig, describe
from llmpipe.exceptions import LLMConfigError
from llmpipe.prompts import PromptBuilder, fill, settle_prompt, template_columns, unread_columns
from llmpipe.records import Request, Row

HI = {"role": "user", "content": "hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}
TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def build(
    values: dict[str, Any] | None = None,
    *,
    chat: bool = False,
    index: int = 0,
    error: str | None = None,
    seed: int = 0,
    n: int = 1,
    done: frozenset[int] = frozenset(),
    columns: dict[str, str | None] | None = None,
    arrow: bool = False,
    **prompt: Any,
) -> Request | None:
    sampling = SamplingConfig(temperature=0.5, n=n)
    builder = PromptBuilder(PromptConfig(**prompt), ColumnsConfig(**(columns or {})), sampling, seed, chat)
    batch = (pa.RecordBatch.from_pydict({}), 0) if arrow else None
    return builder.build(Row("f", index + 1, values or {}, error=error, index=index, batch=batch), done)


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
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a content part of type 'image_url'"),
        (
            {"messages": [HI, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}]},
            "message 2 has a content part of type 'file', and only text can be run",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, "of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "of type 'text' with null as its text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "with a number as its text"),
        ({"messages": [{"role": "user", "content": [None]}]}, "has null as a part of its content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "has null as content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"a": "\udfff"}]}]}, "holds a lone surrogate"),
        ({"messages": [HI], "tools": 5}, "tools are a number, not a list"),
        ({"messages": [HI], "tools": "none"}, "tools is text, and not valid JSON"),
        ({"messages": [HI], "tools": [WEATHER, "x"]}, "tool 2 is text, not an object"),
        ({"messages": [HI], "tools": [{"name": "\ud800"}]}, "tools hold a lone surrogate"),
        ({"messages": [HI], "chat_template_kwargs": [1]}, "chat_template_kwargs are a list, not an object"),
        ({"messages": [HI], "chat_template_kwargs": "x"}, "chat_template_kwargs is text, and not valid JSON"),
        ({"messages": [HI], "chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs hold a lone surrogate"),
        *(
            ({"messages": [HI], "chat_template_kwargs": {name: 1}}, f"cannot have the name '{name}'")
            for name in ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception")
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
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"max_tokens": 8.5}, "max_tokens=8.5 is not allowed; it must be an integer"),
        ({"seed": float("inf")}, "seed=inf is not allowed; it must be an integer"),
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


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
        [{"type": "input_text", "text": "a "}, {"type": "output_text", "text": "b", "annotations": []}],
        [{"type": "text", "text": "a ", "image_url": None}, {"text": "b"}],
        ["a ", "b"],
    ],
)
def test_the_text_parts_of_a_message_are_its_text(parts: list[Any]) -> None:
    assert parse_messages([{"role": "user", "content": parts}]) == ({"role": "user", "content": "a b"},)


def called(arguments: Any) -> Any:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    (message,) = parse_messages([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert calls[0]["function"]["arguments"] is arguments  # the caller's own are as they were
    return message["tool_calls"][0]["function"]["arguments"]


@given(arguments=st.dictionaries(TEXT, JSON, max_size=4))
def test_arguments_of_tool_calls_that_are_an_objects_json_text_become_the_object(arguments: dict[str, Any]) -> None:
    assert called(json.dumps(arguments)) == called(f"\n {json.dumps(arguments, indent=1)}") == arguments
    assert called(arguments) == arguments


@pytest.mark.parametrize("text", ["", "Lyon", "{Lyon}", "[1]", "5", '"{}"', "null", '{"a":' * 10**5])
def test_arguments_that_are_no_objects_text_stay_as_they_are(text: str) -> None:
    assert called(text) == text


def test_arguments_keep_integers_of_any_size() -> None:
    assert called(f'{{"n": {10**30}}}') == {"n": 10**30}


def test_tool_calls_and_messages_may_be_json_text_in_a_list() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"town": "Lyon"}}}
    message = {"role": "assistant", "content": None, "tool_calls": [json.dumps(call)]}
    expected = ({"role": "assistant", "content": "", "tool_calls": [call]},)
    assert parse_messages([message]) == parse_messages([json.dumps(message)]) == expected


def test_a_chat_that_was_looked_at_is_not_looked_at_again() -> None:
    chat = parse_messages([HI])
    assert parse_messages(chat) is chat
    assert parse_messages([{**HI, "role": "bot"}], any_role=True) == ({**HI, "role": "bot"},)


# --- what the template is told besides --------------------------------------------------------------------------------


def test_tools_and_arguments_of_a_row_stand_above_those_of_the_run() -> None:
    run: dict[str, Any] = {"tools": [WEATHER], "chat_template_kwargs": {"a": 1, "b": 1, "c": None}}
    for row in (
        {"messages": [HI]},
        {"prompt": "hi"},
        {"prompt": "hi", "tools": None, "chat_template_kwargs": math.nan},
    ):
        found = request(row, chat=True, **run)
        assert (found.tools, found.template_kwargs) == ((WEATHER,), {"a": 1, "b": 1})
    own = {"messages": [HI], "tools": [{"name": "g"}], "chat_template_kwargs": {"b": 2, "d": None}}
    texts = {name: json.dumps(value) for name, value in own.items()}
    in_lists = {**own, "tools": [json.dumps({"name": "g"})]}
    for row in (own, texts, in_lists):
        found = request(row, **run)
        assert (found.tools, found.template_kwargs) == (({"name": "g"},), {"a": 1, "b": 2})
    assert request({"messages": [HI], "tools": []}, **run).tools is None
    assert request({"messages": [HI]}).tools is request({"messages": [HI]}).template_kwargs is None


def test_raw_prompts_have_no_tools_and_columns_may_have_other_names_or_none() -> None:
    row = {"prompt": "hi", "tools": [WEATHER], "chat_template_kwargs": {"a": 1}, "other": [{"name": "g"}]}
    assert request(row).tools is request(row).template_kwargs is None
    assert request(row, chat=True, columns={"tools": "other"}).tools == ({"name": "g"},)
    assert request({**row, "tools": "hammer"}, chat=True, columns={"tools": None}).tools is None


def test_nulls_that_arrow_adds_to_objects_are_not_there() -> None:
    call = {"function": {"name": "f", "arguments": {"town": "Lyon", "days": None}}, "id": None}
    messages = [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}]
    tools = [{"name": "f", "parameters": {"properties": {"town": {"type": "string"}, "days": None}}}]
    row = {"messages": messages, "tools": tools, "chat_template_kwargs": [("a", {"b": None, "c": [None]})]}
    found = request(row, arrow=True)
    assert found.messages is not None
    assert found.messages[0]["tool_calls"] == [{"function": {"name": "f", "arguments": {"town": "Lyon"}}}]
    assert found.tools == ({"name": "f", "parameters": {"properties": {"town": {"type": "string"}}}},)
    assert found.template_kwargs == {"a": {"c": [None]}}
    assert request({"messages": [HI], "tools": json.dumps([WEATHER])}, arrow=True).tools == (WEATHER,)
    assert request({"messages": [HI], "tools": [WEATHER]}).tools == (WEATHER,)


def test_tools_of_the_run_are_a_list_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([WEATHER], indent=2), encoding="utf-8-sig")
    for tools in (str(file), file, [WEATHER], json.dumps([WEATHER])):
        assert settle_prompt(PromptConfig(tools=tools)).tools == [WEATHER]
    file.write_text('{"name": "f"}')
    for wrong, reason in (
        (str(tmp_path), "cannot be read: Is a directory"),
        ("tools.json", "cannot be read: No such file or directory"),
        ("a\0b", "is not allowed"),
        (str(file), "tools.json' is not allowed: tools are an object, not a list"),
        ("[1", "prompt.tools is not allowed: tools is text, and not valid JSON"),
        ([1], "prompt.tools is not allowed: tool 1 is a number"),
        (5, "prompt.tools is not allowed: tools are a number"),
    ):
        with pytest.raises(LLMConfigError, match=re.escape(reason)):
            settle_prompt(PromptConfig(tools=wrong))
    with pytest.raises(LLMConfigError, match="prompt.chat_template_kwargs is not allowed: .* the name 'messages'"):
        settle_prompt(PromptConfig(chat_template_kwargs={"messages": []}))


ANSWER = {"role": "assistant", "content": "It is"}


@pytest.mark.parametrize(
    ("last", "how", "continued"),
    [
        (ANSWER, "auto", True),
        ({**ANSWER, "content": [{"type": "text", "text": "It is"}]}, "auto", True),
        ({**ANSWER, "tool_calls": [{"id": "1"}]}, "auto", False),
        (HI, "auto", False),
        ({"role": "tool", "content": "5"}, "auto", False),
        (ANSWER, True, True),
        (ANSWER, False, False),
        (HI, True, True),  # which no template is asked for: the runner refuses the row
    ],
)
def test_the_answer_continues_a_last_message_of_the_assistants(last: Any, how: Any, continued: bool) -> None:
    assert request({"messages": [HI, last]}, continue_final=how).continue_final is continued


@pytest.mark.parametrize("text", ["true", "false", "auto"])
def test_what_is_continued_is_chosen_on_the_command_line(text: str) -> None:
    expected = {"true": True, "false": False}.get(text, text)
    assert compose([f"prompt.continue_final={text}"]).prompt.continue_final == expected
    with pytest.raises(LLMConfigError, match="prompt.continue_final='maybe' is not allowed; it must be auto, true or"):
        compose(["prompt.continue_final=maybe"])


def test_tools_and_arguments_are_given_on_the_command_line() -> None:
    composed = compose(
        [
            "prompt.tools=[{type:function,function:{name:f}}]",
            "prompt.chat_template_kwargs={enable_thinking:false}",
            "prompt.chat_template_kwargs.more=[1,a]",
        ]
    ).prompt
    assert composed.tools == [{"type": "function", "function": {"name": "f"}}]
    assert composed.chat_template_kwargs == {"enable_thinking": False, "more": [1, "a"]}


@pytest.mark.parametrize(
    ("found", "columns", "prompt", "chat", "unread"),
    [
        (["messages", "tools", "chat_template_kwargs"], {}, {}, True, []),
        (["messages", "tools"], {}, {}, False, []),
        (["prompt", "tools"], {}, {}, True, []),
        (["prompt", "tools"], {}, {}, False, ["tools"]),
        (["prompt", "tools"], {"tools": None}, {}, False, []),
        (["messages", "tools", "mine"], {"tools": "mine"}, {}, True, ["tools"]),
        (["messages", "mine"], {"messages": "mine"}, {}, True, ["messages"]),
        (["messages", "q", "tools"], {}, {"template": "{q}"}, True, ["messages"]),
        (["messages", "q", "tools"], {}, {"template": "{q}"}, False, ["messages", "tools"]),
        (["q", "tools"], {}, {"template": "{q}{tools}"}, False, []),
        (["prompt", "functions", "system"], {}, {}, True, ["functions", "system"]),
        (["prompt", "functions"], {"tools": "functions"}, {}, True, []),
        (["prompt", "system"], {}, {"template": "{system}{prompt}"}, True, []),
    ],
)
def test_columns_that_look_meant_and_that_nothing_reads_are_known(
    found: list[str], columns: dict[str, Any], prompt: dict[str, Any], chat: bool, unread: list[str]
) -> None:
    assert sorted(unread_columns(PromptConfig(**prompt), ColumnsConfig(**columns), found, chat)) == unread


def test_the_system_message_is_added_only_where_a_chat_has_none() -> None:
    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    system = {"role": "system", "content": "be brief"}
    assert request({"prompt": "hi"}, chat=True, system="be brief").messages == (system, user)
    assert request({"messages": [user]}, system="be brief").messages == (system, user)
    assert request({"messages": [own, user]}, system="be brief").messages == (own, user)
    developer = {"role": "developer", "content": "own"}
    assert request({"messages": [developer, user]}, system="be brief").messages == (developer, user)
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


@pytest.mark.parametrize("kind", [float, np.float64, np.int64, Decimal])
def test_whole_numbers_of_a_data_frame_are_integers(kind: Any) -> None:
    values = {"max_tokens": 8, "top_k": 40, "n": 2, "seed": 1}
    found = request({"prompt": "p", "sampling": {name: kind(value) for name, value in values.items()}}).sampling
    assert found == SamplingConfig(temperature=0.5, **values)
    assert all(type(getattr(found, name)) is int for name in values)


@pytest.mark.parametrize("nothing", [None, math.nan, np.float32("nan")])
def test_what_a_data_frame_leaves_open_is_as_the_run_has_it(nothing: Any) -> None:
    options = {"temperature": 1.5, "max_tokens": nothing, "stop": nothing, "logit_bias": {"5": -1, "7": nothing}}
    for sampling in (options, list(options.items())):  # a struct, and a map as Arrow gives it
        found = request({"prompt": "p", "messages": nothing, "sampling": sampling})
        assert found.sampling == SamplingConfig(temperature=1.5, logit_bias={5: -1})
    assert request({"prompt": "p", "sampling": nothing}).sampling == SamplingConfig(temperature=0.5)
    assert request({"prompt": "p", "sampling": '{"top_k": NaN}'}).sampling == SamplingConfig(temperature=0.5)
    messages = [{"role": "user", "content": "hi", "name": nothing}]
    assert request({"messages": messages}).messages == ({"role": "user", "content": "hi"},)
    with pytest.raises(ValueError, match="both missing or null"):
        build({"prompt": nothing})
    with pytest.raises(ValueError, match="'a', which is missing or null"):
        build({"a": nothing}, template="{a}")


def test_a_whole_number_of_a_data_frame_is_an_integer_in_a_template() -> None:
    assert request({"a": 4.0, "b": 4.5}, template="{a} and {b}").prompt == "4 and 4.5"


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


def test_a_seed_of_a_rows_own_is_taken() -> None:
    assert request({"prompt": "p", "sampling": {"seed": 6}}).seed == 6
    assert request({"prompt": "p", "sampling": {"seed": 6}}, seed=5, index=1).seed == 6


def test_a_sampling_seed_of_the_run_is_the_runs_seed_of_which_each_row_has_its_own() -> None:
    config, same = compose(["sampling.seed=5"]), compose(["seed=5"])
    assert (config.seed, config.sampling.seed) == (5, None)
    assert describe(config) == describe(same)
    builder = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, False)
    seeds = [builder.build(Row("f", i, {"prompt": "p"}, index=i)).seed for i in range(2)]  # type: ignore[union-attr]
    assert seeds == [request({"prompt": "p"}, index=i, seed=5).seed for i in range(2)]
    assert seeds[0] != seeds[1]
    with pytest.raises(LLMConfigError, match="seed=4 is not allowed; it must be sampling.seed=5"):
        compose(["sampling.seed=5", "seed=4"])


def test_overflow_reaches_the_runner() -> None:
    assert request({"prompt": "p"}, overflow=Overflow.truncate).truncate
    assert not request({"prompt": "p"}).truncate
