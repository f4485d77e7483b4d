"""Chat templates of any origin: what they may use renders as in transformers, and nothing they do takes too much."""

# ruff: noqa: E501 (templates have long lines)
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_templates
import pytest
from hostile_templates import HELLO, HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import LLMConfigError
from llmpipe.chats import ChatInput
from llmpipe.runners.chat import ChatTemplate, ChatTemplateError
from llmpipe.runners.templates import limits

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
REASONS = (
    "refuses these messages: it ",
    "refuses these messages: its ",
    "which are ",
    "may not use",
    "cannot be compiled",
    "characters, more than",
    "Range too big",
    "recursion depth",
    "is undefined",
    "neither odd nor even",
    "cannot be interpreted as an integer",
)
"""How a refusal says why; to run out of memory is none of them."""


def as_transformers(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"add_generation_prompt": True, **SPECIAL, **variables}
    return str(render_jinja_template([messages], chat_template=source, **variables)[0][0])


def as_here(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    template = ChatTemplate(source)
    variables = {"tools": None, "documents": None, "add_generation_prompt": True, **SPECIAL, **variables}
    return template._environment.render(template._template, {"messages": messages, **variables})


# --- what takes too much ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the system sets no such limits")
@pytest.mark.parametrize("share", [32, pytest.param(1, marks=pytest.mark.slow)])
def test_a_hostile_template_is_refused_by_what_is_counted_within_little_memory(share: int) -> None:
    usual = {f"usual {number}": "{% for m in messages %}{{ m.content }}{% endfor %}" for number in range(3)}
    templates = {**dict.fromkeys(["usual"], usual["usual 0"]), **HOSTILE, **usual}
    done = subprocess.run(
        [sys.executable, hostile_templates.__file__, str(share)],
        input="".join(json.dumps(item) + "\n" for item in templates.items()),
        capture_output=True,
        text=True,
    )
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(templates), done.stderr
    for name, (verdict, reason, seconds) in found.items():
        if name in HOSTILE:
            assert verdict in ("refused", "not loaded") and any(words in reason for words in REASONS), (name, reason)
        else:
            assert (verdict, reason) == ("rendered", "Hello")
        assert seconds < 200 / share + 3, name


def test_what_a_template_may_not_use_is_refused_by_its_name_as_soon_as_it_is_known() -> None:
    with pytest.raises(
        LLMConfigError, match="line 2: the filter 'groupby' is not one .* which are abs, batch, .*upper"
    ):
        ChatTemplate("fine\n{{ messages | groupby('role') }}")
    with pytest.raises(LLMConfigError, match="line 1: the test 'filter' is not one"):
        ChatTemplate("{{ 'x' is filter }}")
    with pytest.raises(LLMConfigError, match="line 1: chat templates may not use 'include'"):
        ChatTemplate("{% include 'x' %}")
    unreached = ChatTemplate("{% if messages | length > 1 %}{{ 'x' | urlencode }}{{ ''.encode() }}{% endif %}fine")
    assert unreached.render(ChatInput(HELLO)) == "fine"
    with pytest.raises(ChatTemplateError, match="the filter 'urlencode' is not one"):
        unreached.render(ChatInput(HELLO * 2))
    with pytest.raises(ChatTemplateError, match="may not use 'encode' of a str"):
        ChatTemplate("{{ ''.encode() }}").render(ChatInput(HELLO))


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    source = "{{ 'x' * 5 }}{{ 'yy' | upper }}{{ 'a' ~ 'b' }}{% if 'c' * 3 %}{% endif %}{% set z = 7 ** 3 %}{{ -1 + 2 }}"
    code = str(ChatTemplate("")._environment.compile(source, raw=True))
    assert not [made for made in ("xxxxx", "YY", "ab'", "ccc", "343") if made in code]
    assert ChatTemplate(source).render(ChatInput(HELLO)) == "xxxxxYYab1"


def test_a_large_chat_may_take_more_and_what_is_thrown_away_is_given_back() -> None:
    document, kept = "word " * 2**21, "{% set ns = namespace(x='') %}"
    source = "{% for m in messages %}{{ '>' ~ (m.content | trim).replace('o', '0') | tojson ~ '\n' }}{% endfor %}"
    assert len(ChatTemplate(source).render(ChatInput([{"role": "user", "content": document}]))) > 2**23
    grow = kept + "{% for m in messages %}{% set ns.x = ns.x + m.content + '\n' %}{% endfor %}{{ ns.x }}"
    messages = [{"role": "user", "content": f"message {number}"} for number in range(10_000)]
    assert ChatTemplate(grow).render(ChatInput(messages)).count("message") == 10_000


def test_a_verdict_depends_on_template_and_chat_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% set ns = namespace(x='x') %}{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}"
    template, times = ChatTemplate(source), []
    for _ in range(2):
        for count in range(20, 30):
            try:
                template.render(ChatInput(HELLO * count))
            except ChatTemplateError:
                times.append(count)
                break
        monkeypatch.setattr(limits, "RENDER_S", float("inf"))
    assert times[0] == times[1] and 20 < times[0] < 28


# --- what is as in transformers ---------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" <now> & é',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Köln", "x"]},
                "days": {"type": "integer", "default": 3},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "c12345678",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "n": [1, None]}},
}
CHATS: dict[str, dict[str, Any]] = {
    "one": {"messages": HELLO},
    "system": {
        "messages": [
            {"role": "system", "content": " Be nice.\n"},
            {"role": "user", "content": "  Hi\n<b>&"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
            {"role": "user", "content": "é😀"},
        ]
    },
    "tools": {"messages": HELLO, "tools": [TOOL]},
    "a call": {
        "messages": [
            *HELLO,
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "c12345678", "name": "weather", "content": '{"t": 3}'},
        ],
        "tools": [TOOL],
    },
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    },
    "last": {"messages": [*HELLO, {"role": "assistant", "content": "It is"}], "add_generation_prompt": False},
    "thoughts": {
        "messages": [*HELLO, {"role": "assistant", "content": "b", "reasoning_content": "a", "thinking": "a"}, *HELLO],
        "enable_thinking": False,
    },
}
FAMILIES = {
    "chatml": """{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable -%}{%- for part in content if part.type == 'text' -%}{{ part['text'] }}{%- endfor -%}
    {%- endif -%}{%- endmacro -%}
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + text(message.content) | trim + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "tools and a date": """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|head|>system<|/head|>\n\nToday: ' + date_string + '\n' }}
{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}
{{- system + '<|eot|>' }}
{%- for message in rest %}
{%- if 'tool_calls' in message %}
{%- for call in message.tool_calls %}{{ '{"name": "' + call.function.name + '", "parameters": ' }}
{{- call.function.arguments | tojson }}{{ '}' if loop.last else '}, ' }}{% endfor %}
{%- elif message.role in ['tool', 'ipython'] %}{{ '<|head|>ipython<|/head|>' + (message.content | string) }}
{%- elif message.content is mapping or message.content is not string %}{{ message.content | map(attribute='text') | join(' ') }}
{%- else %}{{ message.content | trim }}{% endif %}<|eot|>{% endfor %}""",
    "strict turns": """{%- set loop_messages = messages | rejectattr('role', 'in', ['system', 'tool']) | list -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list | length -%}
{{ bos_token ~ users }}{% for m in loop_messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{%- if tools is not none and loop.last %}[TOOLS][{% for tool in tools %}{% set f = tool.function %}
{%- for key, value in f.items() if key != 'return' %}{{ '"%s": %s' % (key, value | tojson) }}{{ ', ' if not loop.last }}
{%- endfor %}{% endfor %}][/TOOLS]{% endif %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
{%- elif m.tool_calls is defined and m.tool_calls is not none and m.tool_calls | length > 0 %}[CALLS][
{%- for c in m.tool_calls %}{%- if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
{{ (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{{ '' if loop.last else ', ' }}{% endfor %}]{{ eos_token }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}""",
    "thinking": """{%- set ns = namespace(multi=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
{%- if ns.multi and message.role == 'user' and message.content is string
    and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
{%- set ns.multi = false %}{% set ns.last = index %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'assistant' %}{% set thoughts = '' %}
{%- if message.reasoning_content is string %}{% set thoughts = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > ns.last and (loop.last or thoughts) %}{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content }}
{%- else %}{{ content }}{% endif %}
{%- elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '[user' }}{% endif %}
{{- content }}{% if loop.last or loop.nextitem.role != 'tool' %}]{% endif %}
{%- else %}{{ message.role.upper() ~ ': ' ~ content }}{% endif %}{% endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}""",
    "a role for the model": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0].content ~ '\n\n' -%}
{% else %}{% set first = '' %}{% endif %}{% for message in messages if message.role != 'system' -%}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
<turn>{{ role }}{{ (first if loop.first else '') }}{% if message.content is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}{% for item in message['content'] %}{{ item.text | trim }}{% endfor %}
{%- endif %}<end>
{% endfor %}{% if add_generation_prompt %}<turn>model{% endif %}""",
    "state in a namespace": """{% set ns = namespace(first=false, tool=false, outputs='', system='') %}
{%- for message in messages %}{% if message.role == 'system' %}{% set ns.system = ns.system + message.content %}{% endif %}
{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{%- if message.role == 'user' %}{% set ns.tool = false %}{{ '<User>' ~ message.content }}{% endif %}
{%- if message.role == 'assistant' and message.tool_calls %}{% for call in message.tool_calls %}
{%- if not ns.first %}{{ '<calls>' }}{% set ns.first = true %}{% else %}{{ '\n' }}{% endif %}
{{- call['type'] + '<sep>' + call.function.name + '\n```json\n' ~ call.function.arguments | tojson(ensure_ascii=False) ~ '\n```' }}
{%- endfor %}{% elif message.role == 'assistant' %}{{ '<Bot>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- if message.role == 'tool' %}{% set ns.tool = true %}{{ message.content }}{% break %}{% endif %}{% endfor %}
{%- if add_generation_prompt and not ns.tool %}<Bot>{% endif %}""",
    "schemas": """{%- macro kind(spec, required, depth=0) -%}
{%- if spec.type == 'array' %}{{ kind(spec['items'], [], depth + 1) + '[]' if spec['items'] else 'any[]' }}
{%- elif spec.enum is defined %}{{ '"' + spec.enum | join('" | "') + '"' }}
{%- elif spec.type == 'object' %}{{ '{\n' }}{% for name, inner in spec.properties | dictsort %}
{{- '  ' * (depth + 1) + name ~ ('' if name in (required or []) else '?') ~ ': ' ~ kind(inner, inner.required, depth + 1) }}
{%- if inner.default is defined %}{{ ', // default: ' ~ inner.default }}{% endif %}{{ ',\n' if not loop.last else '\n' }}
{%- endfor %}{{ '  ' * depth ~ '}' }}
{%- elif spec.type in ['integer', 'number'] %}number{% else %}{{ spec.type | default('any') | lower }}{% endif %}
{%- endmacro -%}
{%- for tool in tools or [] %}{{ 'type ' + tool.function.name + ' = ' }}
{{- kind(tool.function.parameters, tool.function.parameters.required) | indent(2) }};{% endfor %}
{%- for message in messages recursive %}{{ message.role | default('part', true) | capitalize ~ loop.depth }}
{%- if message.content is string %}{{ message.content | replace('"', '&quot;') }}
{%- elif message.content is sequence %}{{ loop(message.content) }}{% else %}{{ message.text | upper }}{% endif %}{% endfor %}""",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_templates_in_the_style_of_known_models_render_as_in_transformers(family: str, chat: str) -> None:
    source, expected = FAMILIES[family], ""
    try:
        expected = as_transformers(source, **CHATS[chat])
    except Exception as error:
        with pytest.raises(type(error)):
            as_here(source, **CHATS[chat])
    else:
        assert as_here(source, **CHATS[chat]) == expected


@pytest.mark.real
def test_templates_of_real_models_render_as_in_transformers(real: Callable[[str], Path]) -> None:
    for file in sorted(real("*.jinja").parent.glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        for name, chat in CHATS.items():
            try:
                expected: str | None = as_transformers(source, **chat)
            except Exception:
                expected = None
            try:
                found: str | None = as_here(source, **chat)
            except Exception:
                found = None
            assert found == expected, (file.name, name)


VALUES = [
    *(
        "'a b,c'",
        "' X\\n y '",
        "'é😀<&\"'",
        "''",
        "'12'",
        "7",
        "-2.5",
        "true",
        "none",
        "missing",
        "messages",
        "[3, 1, 2]",
    ),
    *("['b', 'A', 'a']", "{'k': 'v', 'a': [1]}", "messages[0]", "('x', 1)", "range(3)", "'<b>' | safe", "[[1], [0]]"),
]
STEPS = [
    *(f" | {name}" for name in ("abs", "capitalize", "count", "dictsort", "escape", "first", "float", "int", "items")),
    *(
        f" | {name}"
        for name in ("join", "join(',')", "last", "length", "list", "lower", "max", "min", "reverse", "safe")
    ),
    *(f" | {name}" for name in ("select", "reject('none')", "sort", "sort(reverse=true)", "string", "sum", "title")),
    *(
        f" | {name}"
        for name in ("tojson", "tojson(indent=2)", "trim", "unique", "upper", "wordcount", "indent(2, true)")
    ),
    *(f" | {name}" for name in ("default('d', true)", "replace('a', 'bb')", "batch(2, '-')", "slice(2)", "round(1)")),
    *(f" | {name}" for name in ("map('string')", "map(attribute='role')", "truncate(3)", "map('upper')", "e")),
    *(f" | {name}" for name in ("selectattr('role')", "selectattr('role', 'eq', 'user')", "format(1)", "d('x')")),
    *(".split()", ".split(',', 1)", ".strip('a ')", ".upper()", ".title()", ".startswith('a')", ".items()", ".keys()"),
    *(".get('k')", ".get('role', 1)", ".replace('a', 'x')", ".join(['p', 'q'])", ".format(1)", ".count('a')", ".k"),
    *("[0]", "[1:]", "[::-1]", "['k']", "[-1]", ".zfill(9)", ".partition(' ')", ".splitlines()", ".find('b')", ".role"),
    *(" ~ 'z'", " + 'z'", " + 1", " + [1]", " * 2", " % 3", " - 1", " / 2", " // 2", " ** 2", " == 'a'", " in 'a b,c'"),
    *(" < 3", " != none", " is string", " is mapping", " is iterable", " is none", " is defined", " is odd", " and 1"),
    *(" not in [1, 'a']", " if 1 else 2", " is eq(7)", " is in([7, 'x'])", " is number", " is sequence", " > 1 > 0"),
]


def written_out(text: str) -> bool:
    """Tell whether a text shows an object, in whichever case and however taken apart."""
    return "0x" in re.sub(r"[^0-9a-z]", "", text.lower())


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(VALUES), st.lists(st.sampled_from(STEPS), max_size=5))
def test_any_chain_of_operations_gives_what_it_gives_in_transformers_or_is_refused(
    value: str, steps: list[str]
) -> None:
    expression, bound = "v", "{% set v = " + value + " %}"  # nothing that transformers computes while it compiles
    for step in steps:
        expression = f"({expression}{step})"
    sources = "{{ " + expression + " }}", "{% for x in " + expression + " %}[{{ x }}]{% endfor %}"
    for source in (bound + sources[0], bound + sources[1]):
        try:
            expected = as_transformers(source, HELLO)
        except Exception:
            continue
        try:
            found = as_here(source, HELLO)
        except Exception as error:
            assert written_out(expected) or "which has no text" in str(error), (source, error)
        else:
            assert found == expected or written_out(expected), source


GROWING = [
    *("({x} ~ {x})", "({x} + {x})", "({x} * 9)", "({x} | tojson)", "({x} | string)", "([{x}, {x}])", "([{x}] | join)"),
    *(
        "({x} | list)",
        "({x} | sort)",
        "('%s%s' % ({x}, {x}))",
        "('{{0}}{{0}}'.format({x}))",
        "({x} | indent(99, true))",
    ),
    *("({x} | replace('x', 'xxx'))", "({x} | map('string') | list)", "({x} | escape | string)", "({x}[1:])"),
    *("({x} | batch(9, 1) | list)", "({x}.split('x'))", "({x} | upper)", "dict(a={x}, b={x})", "({x} | unique | list)"),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["'x'", "[1]", "'\"'", "3"]), st.lists(st.sampled_from(GROWING), min_size=1, max_size=4))
def test_no_chain_of_operations_that_grow_makes_more_than_it_may(start: str, steps: list[str]) -> None:
    step = "ns.x"
    for operation in steps:
        step = operation.format(x=step) if step.count("ns.x") < 9 else step
    source = (
        "{% set ns = namespace(x=" + start + ") %}{% for i in range(40) %}{% set ns.x = " + step + " %}{% endfor %}"
    )
    template = ChatTemplate(source + "{{ ns.x }}")
    rendering = template._template.new_context({"messages": HELLO})
    rendering._work = 2**25
    try:
        text = rendering.joined(template._template.root_render_func(rendering))
    except MemoryError:
        raise
    except Exception:
        text = ""
    assert len(text) <= limits.MOST_CHARACTERS
    assert sum(size for _, size in rendering._large.values()) <= limits.MOST_CHARACTERS
