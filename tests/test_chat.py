"""Chats → prompt text: as transformers renders them, in a sandbox, with every failure an error of its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import LLMConfigError, LLMRunnerFactory
from llmpipe.runners.chat import ChatTemplate, ChatTemplateError, read_template
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
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages) == expected


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
        ChatTemplate(source).render(HELLO)


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
        ChatTemplate(source).render(messages)
    assert messages == HELLO


def test_text_of_a_message_is_never_a_template() -> None:
    text = "{{ 7 * 7 }}{% raw %}"
    assert text in ChatTemplate(CHATML).render([{"role": "user", "content": text}])


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
    assert len(ChatTemplate(CHATML).render(long)) > 15 * 10**6
    assert len(ChatTemplate(CHATML).render(HELLO * 5000)) > 5000 * 20


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
