"""Chats → prompt text: as transformers renders them, in a sandbox, with every failure an error of its row."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import LLMConfigError, LLMRunnerFactory, compose, run
from llmpipe.chats import ChatInput, parse_messages
from llmpipe.runners.chat import MARK, ChatTemplate, ChatTemplateError, read_template
from llmpipe.runners.rendering import ChatRenderer
from llmpipe.runners.templates import limits

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if loop.first %}\nFirst: {{ m.content }}\n    {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "tools": "{% if tools is none and documents is none %}plain{% endif %}{{ messages[-1]['content'] }}",
    "date": "{{ strftime_now('%Y') }}",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENT = st.text(st.characters(codec="utf-8"), max_size=30)
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENT}), min_size=1
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=15, deadline=None)
@given(messages=CHATS)
def test_a_template_renders_as_transformers_renders_it(name: str, messages: list[dict[str, Any]]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(ChatInput(messages)) == expected


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is false %}/no{% endif %}{{ documents }}"
    "{% for m in messages %}{{ m.role }}{{ m.reasoning_content }}{{ m.thinking }}{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize(
    "kwargs", [{}, {"enable_thinking": False}, {"documents": [{"title": "d"}], "enable_thinking": True}]
)
@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_tools_arguments_and_thoughts_reach_the_template_as_in_transformers(
    tools: list[dict[str, Any]] | None, kwargs: dict[str, Any]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Lyon"}}}
    chat = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "so", "thinking": "it seems"},
    ]
    (expected,), _ = render_jinja_template(
        [chat], tools=tools, chat_template=TOOLS, add_generation_prompt=True, **kwargs
    )
    assert ChatTemplate(TOOLS).render(ChatInput(chat, tools, kwargs)) == expected
    assert "hmhm" in expected and '"town": "Lyon"' in expected


# --- answers that go on from a message --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "bos", "generation"])
@settings(max_examples=40, deadline=None)
@given(messages=CHATS, final=CONTENT.filter(str.strip))
def test_a_message_is_continued_as_transformers_continues_it(
    name: str, messages: list[dict[str, Any]], final: str
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [*messages, {"role": "assistant", "content": final}]
    (expected,), _ = render_jinja_template(
        [chat], chat_template=TEMPLATES[name], continue_final_message=True, **SPECIAL
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(ChatInput(chat, continue_final=True)) == expected
    assert expected.rstrip().endswith(final.strip())


@pytest.mark.parametrize("final", ["", "  ", "\n"])
def test_a_message_without_a_word_opens_the_answer_also_where_the_template_trims(final: str) -> None:
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    chat = [*HELLO, {"role": "assistant", "content": final}]
    opened = ChatTemplate(CHATML).render(ChatInput(HELLO))
    assert ChatTemplate(trimming).render(ChatInput(chat, continue_final=True)) == opened
    assert ChatTemplate(CHATML).render(ChatInput(chat, continue_final=True)) == opened + final


def test_a_message_that_holds_the_mark_is_continued_at_its_end() -> None:
    chat = [*HELLO, {"role": "assistant", "content": f"{MARK}and {MARK}"}]
    assert ChatTemplate(CHATML).render(ChatInput(chat, continue_final=True)).endswith(f"assistant\n{MARK}and {MARK}")


@pytest.mark.parametrize(
    "content",
    [
        "m.content | upper",
        "m.content[:3]",
        "m.content.split('</think>')[-1] ~ '.'",
        "m.content | replace('a', 'e')",
        "''",
    ],
)
def test_a_template_that_drops_or_alters_what_is_to_be_continued_refuses_the_row(content: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ " + content + " }};{% endfor %}")
    chat = [*HELLO, {"role": "assistant", "content": "<think>a</think>and"}]
    with pytest.raises(ChatTemplateError, match="drops or alters the last message, which the answer should continue"):
        template.render(ChatInput(chat, continue_final=True))


def test_the_time_is_the_one_that_is_told_on_its_own_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M%z') }}")
    eve = datetime.fromisoformat("2024-02-29T23:59:59+05:30")
    assert template.render(ChatInput(HELLO, now=eve)) == "29 Feb 2024 23:59"
    clock = ChatTemplate("{{ strftime_now('%s') }}")
    earlier, untold, later = datetime.now(), clock.render(ChatInput(HELLO)), datetime.now()
    assert int(earlier.timestamp()) <= int(untold) <= int(later.timestamp())


# --- what a template cannot take as it is -----------------------------------------------------------------------------

ONLY_SYSTEM = (
    "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)
TO_DEVELOPER = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def rendered(caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[str, list[str]]]:
    """Render a chat; return the text and what was logged so far."""
    renderer, now = ChatRenderer(), datetime.now()

    def render(source: str, messages: Any, tools: Any = None, continue_final: bool = False) -> tuple[str, list[str]]:
        chat = parse_messages(messages)
        text = renderer.render(ChatTemplate(source), ChatInput(chat, tools, None, continue_final, now))
        renderer.look_for_dropped(chat, text, 7)
        return text, caplog.messages

    return render


def test_a_developer_is_the_system_where_the_template_knows_only_that(
    rendered: Callable[..., tuple[str, list[str]]],
) -> None:
    for _ in range(2):
        text, said = rendered(ONLY_SYSTEM, TO_DEVELOPER)
        assert text == "system:Be brief.;user:Why?;"
        assert len(said) == 1 and "knows no developer" in said[0]
    knows = ONLY_SYSTEM.replace("'system'", "'developer'")
    assert rendered(knows, TO_DEVELOPER) == ("developer:Be brief.;user:Why?;", said)


def test_a_template_that_refuses_system_messages_refuses_a_developers(
    rendered: Callable[..., tuple[str, list[str]]],
) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ChatTemplateError, match="no system"):
        rendered(refuses, TO_DEVELOPER)


def test_tools_that_the_template_does_not_know_are_mentioned_once(
    rendered: Callable[..., tuple[str, list[str]]],
) -> None:
    assert rendered(CHATML, HELLO)[1] == []
    for _ in range(2):
        (said,) = rendered(CHATML, HELLO, [WEATHER])[1]
        assert "knows no tools" in said
    assert rendered(TOOLS, HELLO, [WEATHER])[1] == [said]


def test_a_message_that_the_template_leaves_out_is_reported_once(
    rendered: Callable[..., tuple[str, list[str]]],
) -> None:
    chat = [*HELLO, {"role": "assistant", "content": "Bonjour"}, {"role": "user", "content": "Hello again"}]
    for _ in range(2):
        (said,) = rendered(ONLY_SYSTEM, chat)[1]
        assert "leaves out a message of the role 'assistant', first in row-7" in said


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (CHATML, "  \n "),
        ("{{ messages[0].content | trim }}", "  Hello\n"),
        ("{{ messages[0].content | tojson }}", 'He said "no",\nand <left> & that\tis all é'),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "Où est-il ? 里昂"),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "里昂"),
        ("{{ messages[0].content | escape }}", "a < b & c > 'd'"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "<think>First this.</think>Yes"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "First this, at length.</think>Yes"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "<think>First this.</think>"),
    ],
)
def test_what_templates_trim_escape_or_leave_out_of_thoughts_is_no_loss(
    source: str, content: str, rendered: Callable[..., tuple[str, list[str]]]
) -> None:
    assert rendered(source, [{"role": "user", "content": content}])[1] == []


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_runner_gives_its_template_all_of_it(backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tools.jinja"
    file.write_text(TOOLS + "{{ strftime_now('%Y') }}")
    chat = [{"role": "user", "content": [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]}]
    options = {"tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False}}
    with LLMRunnerFactory.create_runner({"backend": backend, "device": "cpu", "chat_template": str(file)}) as runner:
        runner.now = datetime(1999, 12, 31)
        text = runner.render(chat, [WEATHER], {"enable_thinking": False})
        assert text.startswith('[{"type": "function"') and text.endswith("/noNoneuserRain?>1999")
        assert runner.prompt_text(runner.request(chat, **options)) == text
        assert runner.prompt_text(runner.request("Rain?", **options)) == text
        prompt_tokens = runner.create_chat_completion(chat, max_tokens=1, **options)["usage"]["prompt_tokens"]
        assert prompt_tokens == len((runner.encode(runner.request(chat, **options)) or ([],))[0])
        untold = runner.create_chat_completion(chat, max_tokens=1, tool_choice="none", **options)
        assert untold["usage"]["prompt_tokens"] < prompt_tokens
    assert not any("the chat template" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0]['content']['no']['such'] }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.upper() }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_fails_refuses_the_row_with_its_reason(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template refuses these messages: .+"):
        ChatTemplate(source).render(ChatInput(HELLO))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_change_the_messages(source: str) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(ChatInput(messages))
    assert messages == HELLO


def test_text_of_a_message_is_never_a_template() -> None:
    text = "{{ 7 * 7 }}{% raw %}"
    assert text in ChatTemplate(CHATML).render(ChatInput([{"role": "user", "content": text}]))


def test_a_template_that_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(LLMConfigError, match="not valid Jinja, line 2"):
        ChatTemplate("fine\n{% if %}")


def test_a_template_is_read_from_a_file_or_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert read_template(str(file)) == read_template(CHATML) == CHATML
    with pytest.raises(LLMConfigError, match="neither Jinja nor a readable file"):
        read_template(str(tmp_path / "missing.jinja"))


# --- what takes too much ----------------------------------------------------------------------------------------------

LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
ENDS = "{% endfor %}" * 3


def test_the_limits_leave_usual_templates_alone() -> None:
    long = [{"role": "user", "content": "word " * 10**6}] * 3
    assert len(ChatTemplate(CHATML).render(ChatInput(long))) > 15 * 10**6
    assert len(ChatTemplate(CHATML).render(ChatInput(HELLO * 5000))) > 5000 * 20


def test_both_backends_render_within_the_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "RENDER_S", 0.3)
    file = tmp_path / "loops.jinja"
    file.write_text("{% if messages[0].content == 'loop' %}" + LOOPS + ENDS + "{% endif %}" + CHATML)
    for backend in ("llama_cpp", "transformers"):
        with LLMRunnerFactory.create_runner(
            {"backend": backend, "device": "cpu", "chat_template": str(file)}
        ) as runner:
            good, bad = runner.run(["Hello", "loop"], max_tokens=2)
            assert good.text is not None
            assert "takes more than 0.3 s" in str(bad.error)


@pytest.mark.parametrize("isolation", [False, True])
def test_messages_that_nest_too_deeply_cost_their_own_row(
    isolation: bool, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner = "[" * levels + "]" * levels
        return {"messages": '[{"role": "user", "content": "What is 2 + 2?", "x": ' + inner + "}]"}

    rows = [nested(levels) for levels in (150, 250, 900, 5000)]
    config = compose([f"dataset.path={write_jsonl(*rows)}", f"backend.isolation={str(isolation).lower()}"])
    assert (metrics := run(config, tmp_path / "run"))["rows_error"] == 3, metrics
    assert metrics["rows_ok"] == 1


def test_what_is_worth_saying_of_chats_is_said_once_in_a_run(
    write_jsonl: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    path = write_jsonl(*[{"messages": chat, "functions": [1]} for _ in range(3)])
    run(compose([f"dataset.path={path}"]), tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in said if "knows no developer" in text]) == 1, said
    assert len([text for text in said if "nothing reads the columns functions" in text]) == 1, said
