"""Metrics and rows → a page that shows them, and does nothing that a row, a metric or an option asks of a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import compose
from llmpipe.config import ColumnsConfig, describe
from llmpipe.metrics import Totals, environment
from llmpipe.records import Completion, Row, failed
from llmpipe.report import Report
from llmpipe.report.excerpts import CHARACTERS, PLAIN, TURNS, shown
from llmpipe.report.page import ANSWERS, ERROR_ROWS
from llmpipe.units import memory, number, seconds

CONFIG = describe(compose())
HOSTILE = [
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "' onmouseover='document.title=1",
    "</pre></article><script>document.title='pwned'</script>",
    "</title></style><style>*{display:none}</style><meta http-equiv=refresh content='0;url=https://example.com'>",
    "<a href='javascript:document.title=1'>x</a><iframe srcdoc='<script>1</script>'></iframe>",
    "javascript:document.title=1",
    "{{7*7}} {% raw %} {# #}",
    "<!-- ]]><![CDATA[ &lt;b&gt; &amp &#60;",
    "nul \0 escape \x1b[31m bell \a return \r\n next \x85 \u2028",
    "half a pair \ud800 \udfff, none \ufffe",
    "bidi \u202egnp.exe\u202c \u2066 \u200f",
]
ANY_TEXT = st.text(
    st.characters(exclude_categories=()) | st.sampled_from("<>&\"'`{}%#=/-\n\t\0\u202e\ud800"), max_size=40
)
PLACES = 20
KEY = 10
"""The place inside a row that is shown as JSON, and so not as it is."""


class Page(HTMLParser):
    """A page as a browser would understand it."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.source = page.decode("utf-8")
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = self.style = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "style" and not self.style:
            self.style = data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def metrics_of(*completions: Completion, **changes: Any) -> dict[str, Any]:
    totals = Totals()
    for completion in completions:
        totals.add(completion)
    nothing = dict.fromkeys(
        (
            "load_s",
            "peak_rss_mb",
            "peak_device_mb",
            "prompt_format",
            "model_digest",
            "runner",
            "started_at",
            "finished_at",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
        )
    )
    rest: dict[str, Any] = {
        "error_reasons": [],
        "seed": 0,
        "dataset_digest": "sha256:0",
        "environment": environment(),
        "output": "outputs.jsonl",
    }
    return {**totals.summary(2.0), **nothing, **rest, **changes}


def page_of(report: Report, *completions: Completion, config: dict[str, Any] = CONFIG, **changes: Any) -> Page:
    times = [one.latency_s for one in completions if one.latency_s is not None]
    tokens = [one.completion_tokens for one in completions if one.completion_tokens is not None]
    return Page(report.page(metrics_of(*completions, **changes), config, times, tokens))


def answer(number: int = 0, text: str = "Paris", score: float | None = None) -> Completion:
    scores = {} if score is None else {"exact_match": score}
    return Completion(number, 0, text, "stop", 5, 0, None, 10, 0.1, 0.2, 0.3, None, scores)


def row(number: int = 0, **values: Any) -> Row:
    return Row("rows.jsonl", number + 1, {"prompt": "Where?", **values}, index=number)


def page(*answered: tuple[Row, Completion], **changes: Any) -> Page:
    report = Report(ColumnsConfig())
    for one in answered:
        report.add(*one)
    return page_of(report, *(completion for _, completion in answered), **changes)


def page_with(texts: list[str]) -> Page:
    """Return a page with the texts in all places where there is text."""
    t = iter(texts)
    chat = [{"role": next(t), "content": next(t)}, {"role": "user", "content": [{"text": next(t)}]}]
    answers = [answer(0, next(t), 1.0), answer(1, next(t), 0.0), answer(2)]
    answers[0].finish_reason = next(t)
    report = Report(ColumnsConfig())
    report.add(Row(next(t), 1, {"id": next(t), "messages": chat, "reference": next(t)}, index=0), answers[0])
    report.add(Row("f", 2, {"prompt": next(t), "reference": "x"}, index=1), answers[1])
    report.add(Row("f", 3, {next(t).replace("\\", ""): 1}, index=2), answers[2])
    report.add(Row(next(t), 4, {"id": next(t)}, index=3), failed(3, next(t)))
    runner = {"model": texts[0], "model_type": next(t), "device": next(t), "more": [{texts[0]: next(t)}]}
    changes = {"finish_reasons": {next(t): 1}, "environment": {"k": next(t)}, "runner": runner}
    config = {**CONFIG, "more": {next(t): {"k": [None, True, texts[0]]}}}
    assert next(t, None) is None
    return page_of(report, *answers, config=config, **changes)


TAME = page_with(["tame"] * PLACES)


# --- nothing gets out of its place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_element_and_no_attribute(text: str) -> None:
    hostile = page_with([text] * PLACES)
    assert hostile.elements == TAME.elements
    assert hostile.style == TAME.style
    assert hostile.text.count(shown(text)) >= PLACES - 1  # all but KEY


@given(st.lists(ANY_TEXT, min_size=PLACES, max_size=PLACES))
def test_any_text_in_any_place_is_shown_and_nothing_else(texts: list[str]) -> None:
    found = page_with(texts)
    assert found.elements == TAME.elements
    for place, text in enumerate(texts):
        assert shown(text) in found.text or place == KEY
    assert all(c.isprintable() or c in "\n" + PLAIN for c in found.source)


def test_what_a_reader_would_not_see_is_spelt_out_and_what_scripts_need_is_kept() -> None:
    assert shown("a\0\x1b[1m\u202eb\ud800\r\n\tc") == "a\\x00\\x1b[1m\\u202eb\\ud800\\r\n\tc"
    for text in ("日本　語", "1\u00a0000", "می\u200cخواهم", "👩\u200d🚀"):
        assert shown(text) == text


def test_text_from_a_dataset_is_not_rendered_as_a_template() -> None:
    found = page((row(prompt="{{ 7 * 191 }}{{ m }}"), answer(text="{% for x in y %}")))
    assert "{{ 7 * 191 }}{{ m }}" in found.text
    assert "1337" not in found.source


def test_the_page_forbids_scripts_and_requests_and_allows_its_own_style_alone() -> None:
    found = page((row(), answer()))
    metas = [dict(attributes) for tag, attributes in found.elements if tag == "meta"]
    assert metas[0] == {"charset": "utf-8"}
    digest = base64.b64encode(hashlib.sha256(found.style.encode()).digest()).decode()
    assert metas[1] == {
        "http-equiv": "Content-Security-Policy",
        "content": f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }
    assert metas[2] == {"name": "referrer", "content": "no-referrer"}
    assert len(found.style) > 1000
    assert "url(" not in found.style
    assert "@import" not in found.style
    assert not {"script", "link", "a", "img", "iframe", "object", "form", "base"} & {tag for tag, _ in found.elements}
    names = {name for _, attributes in found.elements for name, _ in attributes}
    assert not [name for name in names if name in ("style", "href", "src", "id") or name.startswith("on")]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_first_rows_of_each_kind_are_shown() -> None:
    good = [(row(i, id=f"good-{i}."), answer(i, score=1.0)) for i in range(ANSWERS + 1)]
    wrong = [(row(100 + i, id=f"wrong-{i}."), answer(100 + i, score=0.0)) for i in range(ANSWERS + 1)]
    bad = [(row(200 + i, id=f"bad-{i}."), failed(200 + i, f"reason {i}.")) for i in range(ERROR_ROWS + 1)]
    found = page(*good, *wrong, *bad).text
    for kind, last in (("good", ANSWERS), ("wrong", ANSWERS), ("bad", ERROR_ROWS), ("reason", ERROR_ROWS)):
        assert f"{kind}-{last - 1}." in found or f"{kind} {last - 1}." in found
        assert f"{kind}-{last}." not in found
        assert f"{kind} {last}." not in found
    assert found.index("good-0.") < found.index("Answers that scored 0") < found.index("wrong-0.")
    assert "rows.jsonl line 201" in found
    assert f"The first {ERROR_ROWS} of {ERROR_ROWS + 1}" in found


def test_long_texts_are_cut_and_say_so() -> None:
    found = page((row(prompt="p" * 12_345), answer(text="c" * CHARACTERS))).text
    assert "p" * CHARACTERS in found
    assert "p" * (CHARACTERS + 1) not in found
    assert found.count("characters.") == 1
    assert "The first 2,000 of 12,345 characters." in found


@pytest.mark.parametrize("as_text", [False, True])
def test_of_a_chat_the_last_turns_are_shown(as_text: bool) -> None:
    chat: Any = [{"role": "user", "content": f"turn {i}."} for i in range(TURNS + 2)]
    chat[-2] = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    found = page((row(prompt="unused", messages=json.dumps(chat) if as_text else chat), answer())).text
    assert "turn 1." not in found
    assert "turn 2." in found
    assert '{"tool_calls": [{"name": "look"}]}' in found
    assert "2 earlier turns" in found
    assert "unused" not in found


def test_a_row_without_a_prompt_is_shown_whole_but_for_its_reference() -> None:
    found = page((Row("f", 1, {"question": "Where?", "reference": "Rome"}), answer())).text
    assert '{"question": "Where?"}' in found


def test_of_a_templated_prompt_the_row_is_shown_and_not_what_was_not_asked() -> None:
    report = Report(ColumnsConfig(), templated=True)
    report.add(row(question="Where is it?", messages=[{"role": "user", "content": "Who?"}]), answer())
    found = page_of(report, answer()).text
    assert '"question": "Where is it?"' in found and "\nuser\n" not in found


def test_memory_does_not_grow_with_the_rows() -> None:
    report = Report(ColumnsConfig())
    tracemalloc.start()
    try:
        for i in range(200_000):
            done = Completion(i, 0, str(i) * 500, "stop", 1, 0, None, i % 3000, 0.1, 0.1, 0.001 * (i + 1))
            report.add(row(i, prompt=str(i) * 1000), done)
            if i == 20_000:
                before = tracemalloc.get_traced_memory()[0]
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 300_000
    assert peak < 3_000_000
    found = Page(report.page(metrics_of(), CONFIG, [0.001 * (i + 1) for i in range(200_000)], range(200_000))).text
    assert found.count("of 200,000 answers") == 2


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_and_configuration_are_shown() -> None:
    runner = {"model": "/models/tiny.gguf", "model_type": "llama", "device": "cuda:0"}
    found = page(
        *[(row(i, reference="Paris"), answer(i, score=1.0)) for i in range(3)],
        (row(3), failed(3, "too long")),
        **{"peak_rss_mb": 105.05, "peak_device_mb": 23456.7, "load_s": 71.0, "runner": runner},
    )
    figures = ["tiny.gguf", "llama.cpp on cuda:0, 4 rows of questions.jsonl", "of 4 are ok", "100.0%", "of 3 answers"]
    figures += ["105 MB", "23.5 GB", "1 min 11 s", "300 ms", "75.0%", "_target_:", "max_tokens:", "sha256:0"]
    for figure in figures:
        assert figure in found.text, figure
    assert ("dd", [("class", "bad")]) in found.elements


def test_a_run_of_no_rows_has_a_page() -> None:
    found = page(runner=None, environment={})
    assert "0 rows of" in found.text
    assert found.text.count("There are no answers.") == 2
    assert not {"svg", "article"} & {tag for tag, _ in found.elements}


def test_the_same_run_gives_the_same_bytes() -> None:
    assert page((row(), answer())).source == page((row(), answer())).source


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.0, "0 s"), (3.4e-6, "3.40 µs"), (0.0164, "16.4 ms"), (0.9999, "1,000 ms"), (1.0, "1 s")]
    + [(1.5079, "1.51 s"), (59.0, "59 s"), (60.0, "1 min 00 s"), (5000.3, "1 h 23 min"), (360_000.0, "100 h 00 min")],
)
def test_times_have_the_unit_that_suits_them(value: float | None, expected: str) -> None:
    assert seconds(value) == expected


def test_numbers_and_memory_are_short() -> None:
    assert [number(x) for x in (None, 0, 1.0, 0.5, 1234.5)] == ["–", "0", "1", "0.500", "1,234"]
    assert [memory(x) for x in (None, 105.05, 23456.7)] == ["–", "105 MB", "23.5 GB"]
