"""The promises that both backends keep, on the bundled model: batches, stop strings, characters, sampling, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import CHATS, LONG, MIXES, QUESTIONS, STORIES, STORY, SURROGATE, alone, answers, requests_of

from llmpipe import (
    BaseLLMRunner,
    Completion,
    LLMConfigError,
    LLMInferenceError,
    LLMRunnerFactory,
    Request,
    SamplingConfig,
)
from llmpipe.runners.driver import Driver

# Arithmetic that does not depend on the batch, and is the same on both backends.
EXACT: dict[str, dict[str, Any]] = {
    "llama_cpp": {"reproducible": True, "cache_type_k": "f32", "cache_type_v": "f32"},
    "transformers": {},
}
Make = Callable[..., BaseLLMRunner]


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Make a runner of exact arithmetic, once for each set of options."""
    made: dict[tuple[Any, ...], BaseLLMRunner] = {}

    def get(backend: str, **options: Any) -> BaseLLMRunner:
        key = (backend, *sorted(options.items()))
        if key not in made:
            config = {
                "backend": backend,
                "device": "cpu",
                "threads": 1,
                "temperature": 0.0,
                **EXACT[backend],
                **options,
            }
            made[key] = LLMRunnerFactory.create_runner(config)
        return made[key]

    yield get
    for runner in made.values():
        runner.close()


@pytest.fixture(params=["llama_cpp", "transformers"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[("llama_cpp", {}), ("transformers", {}), ("transformers", {"batching": "padded"})],
    ids=["llama_cpp", "slots", "padded"],
)
def batching(request: pytest.FixtureRequest, make: Make) -> BaseLLMRunner:
    """A runner of each way to share a model, with three rows in flight."""
    backend, options = request.param
    return make(backend, slots=3, **options)


def ids(runner: BaseLLMRunner, text: str) -> list[int]:
    return list(runner.encode(Request(0, SamplingConfig(), prompt=text))[0])  # type: ignore[attr-defined]


def count_tokens(runner: BaseLLMRunner, text: str) -> int:
    tokens, cut_off = runner.encode(Request(0, SamplingConfig(), prompt=text, truncate=True))  # type: ignore[attr-defined]
    return len(tokens) + int(cut_off)


def mixed_requests(runner: BaseLLMRunner) -> list[Request]:
    """Short and long, raw and chat, greedy and seeded, with stops and penalties."""
    prompts: list[Any] = [
        QUESTIONS[0],
        STORY,
        QUESTIONS[200],
        "word " * 150,
        CHATS[0],
        "é日本🙂",
        QUESTIONS[399],
        STORIES[3],
    ]
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "n": 3},
        {"repetition_penalty": 1.3, "ignore_eos": True},
        {"stop": ["e", " a"]},
    ]
    return [
        runner.request(prompt, id=i, max_tokens=3 + i * 5 % 17, **options[i % len(options)])
        for i, prompt in enumerate(prompts)
    ]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_row_gives_alone_whatever_the_slots_and_the_order(backend: str, make: Make) -> None:
    requests = mixed_requests(make(backend, slots=1))
    expected = alone(make(backend, slots=1), requests)
    for slots in (1, 3, 16):
        assert answers(make(backend, slots=slots), requests) == expected
        assert answers(make(backend, slots=slots), reversed(requests)) == expected


@pytest.mark.parametrize("slots", [3])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=MIXES, cancel_after=st.integers(0, 6))
def test_any_mix_of_rows_gives_what_they_give_alone_even_after_a_cancelled_stream(
    backend: str, make: Make, slots: int, mix: list[tuple[Any, str, dict[str, Any]]], cancel_after: int
) -> None:
    runner = make(backend, slots=slots)
    requests = requests_of(runner, mix)
    cancelled = runner.stream(iter(requests))
    list(islice(cancelled, cancel_after))
    cancelled.close()  # type: ignore[attr-defined]
    assert answers(runner, requests) == alone(runner, requests)


def test_a_row_that_cannot_be_run_is_an_error_and_its_neighbours_are_as_without_it(backend: str, make: Make) -> None:
    runner = make(backend, slots=3)
    good = [runner.request(prompt, id=i, max_tokens=8) for i, prompt in enumerate([STORY, QUESTIONS[0], QUESTIONS[9]])]
    expected = answers(runner, good)
    sampling = SamplingConfig(temperature=0)
    bad = {
        "no tokens": Request(10, sampling, prompt=""),
        "exceeds|context": Request(11, sampling, prompt=LONG),
        "surrogate": Request(12, sampling, prompt=SURROGATE),
        "empty": Request(13, sampling, messages=()),
        "refuses": Request(14, sampling, messages=({"role": "wizard", "content": "hi"},)),
        "first": Request(15, sampling, messages=({"role": "assistant", "content": "I begin"},)),
        "logit_bias": Request(16, sampling.replace({"logit_bias": {10**6: 1.0}}), prompt="hi"),
        "names token -1": Request(17, sampling.replace({"logit_bias": {-1: 1.0}}), prompt="hi", samples=(0, 1)),
    }
    found = answers(runner, [good[0], *list(bad.values())[:3], good[1], *list(bad.values())[3:], good[2]])
    assert {key: found.pop(key) for key in expected} == expected
    assert sorted(found) == [(10, 0), (11, 0), (12, 0), (13, 0), (14, 0), (15, 0), (16, 0), (17, 0), (17, 1)]
    for reason, request in bad.items():
        text, finish_reason, _, _, error = found[request.id, 0]
        assert (text, finish_reason) == (None, "error")
        assert "\n" not in error
        assert any(word in error for word in reason.split("|")), error


def test_cancelled_requests_end_at_once_in_flight_or_waiting_and_the_others_go_on(batching: BaseLLMRunner) -> None:
    lengths = [30, 30, 30, 5, 5]  # the longest begin
    asked = [batching.request(f"Tell me about {i} foxes.", i, max_tokens=lengths[i], ignore_eos=True) for i in range(5)]
    expected = answers(batching, asked)
    stream = batching.stream(asked)
    chunks = [next(stream)]
    batching.cancel(0)
    batching.cancel(4)
    chunks += stream
    last = {chunk.request_id: chunk for chunk in chunks}
    assert [last[i].error for i in range(5)] == ["cancelled", None, None, None, "cancelled"]
    for i in (1, 2, 3):
        assert "".join(chunk.text for chunk in chunks if chunk.request_id == i) == expected[i, 0][0]


def test_prefill_and_decode_are_counted_apart_for_each_stream(batching: BaseLLMRunner) -> None:
    asked = [batching.request(f"{STORY} {i}", i, max_tokens=4 + i, ignore_eos=True) for i in range(5)]
    for _ in range(2):
        done = list(batching.completions(asked))
        spent = batching.info()["engine"]
        computed = sum((c.prompt_tokens or 0) - (c.cached_prompt_tokens or 0) for c in done)
        assert spent["prefill_tokens"] == computed
        assert spent["decode_tokens"] == sum((c.completion_tokens or 0) - 1 for c in done)  # the first ends the prefill
        assert spent["prefill_s"] > 0 and spent["decode_s"] > 0


def test_rows_that_cannot_be_run_have_ticks_too(batching: BaseLLMRunner) -> None:
    ticks: list[None] = []
    bad = (Request(i, SamplingConfig(), prompt="") for i in range(100))
    assert len(list(batching.completions(bad, Driver(lambda: ticks.append(None))))) == 100
    assert len(ticks) >= 100 / 12


def test_requests_are_pulled_when_there_is_room_and_not_ahead(backend: str, make: Make) -> None:
    runner = make(backend, slots=3)
    pulled = []

    def endless() -> Iterator[Request]:
        for i in count():
            pulled.append(i)
            yield runner.request(QUESTIONS[i % 400], id=i, max_tokens=4)

    completions = runner.completions(endless())
    assert len(list(islice(completions, 2))) == 2
    assert len(pulled) <= 4 * 3 + 3
    completions.close()  # type: ignore[attr-defined]
    assert runner.generate_text(QUESTIONS[0], max_tokens=2)  # the runner is free again


def test_the_callers_own_exception_comes_through_and_the_runner_goes_on(backend: str, make: Make) -> None:
    runner = make(backend, slots=3)

    def failing() -> Iterator[Request]:
        yield runner.request(STORY, max_tokens=30)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        list(runner.completions(failing()))
    assert runner.generate_text(QUESTIONS[0], max_tokens=2)


def test_a_long_prompt_loses_its_left_end_where_truncation_is_asked_for(backend: str, make: Make) -> None:
    runner = make(backend, context=64)
    request = replace(runner.request(LONG, prompt_format="raw", max_tokens=5), truncate=True)
    (chunk,) = [chunk for chunk in runner.stream([request]) if chunk.finish_reason]
    assert chunk.finish_reason != "error"
    assert chunk.prompt_tokens == 63
    assert chunk.truncated_prompt_tokens == count_tokens(make(backend), LONG) - 63


def test_an_answer_ends_where_the_context_does(backend: str, make: Make) -> None:
    runner = make(backend, context=64)
    (done,) = runner.run([STORY], max_tokens=500, ignore_eos=True)
    assert done.finish_reason == "length"
    assert (done.prompt_tokens or 0) + (done.completion_tokens or 0) == 64


def uncached(done: list[Completion]) -> list[int]:
    """Return the prompt tokens that were computed rather than copied, of each completion."""
    return [(c.prompt_tokens or 0) - (c.cached_prompt_tokens or 0) for c in done]


def test_a_prompt_is_computed_once_for_any_number_of_samples(runner: BaseLLMRunner) -> None:
    request = runner.request("a little fox, " * 12, n=600, temperature=1.0, max_tokens=1)
    done = runner.run([request])
    prompt = done[0].prompt_tokens or 0
    assert sorted(uncached(done)) == [1] * 599 + [prompt]
    some = list(runner.completions([replace(request, samples=tuple(range(7, 600, 2)))]))  # as after a resume
    assert sorted(uncached(some))[:-1] == [1] * (len(some) - 1)
    assert {c.sample: c.text for c in some} == {c.sample: c.text for c in done if c.sample in range(7, 600, 2)}


def test_each_of_several_prompts_is_computed_once_whatever_they_share(runner: BaseLLMRunner) -> None:
    """Many more prompts than are kept, several blocks of them, and a common beginning, which is computed once too."""
    system, n = "the same old story again, " * 8, 9
    prompts = [f"{system}and now number {i}: " + f"{chr(97 + i % 26)} " * (9 + i) for i in range(30)]
    done = runner.run([runner.request(prompt, i, "raw", n=n, max_tokens=1) for i, prompt in enumerate(prompts)])
    common = min((c.cached_prompt_tokens or 0) for c in done if c.cached_prompt_tokens)
    assert common >= 40
    paid = [[count for count in uncached(done[i : i + n]) if count > 1] for i in range(0, len(done), n)]
    assert all(len(counts) <= 1 for counts in paid)
    assert sum(map(sum, paid)) < 2 * common + sum((c.prompt_tokens or 0) - common for c in done[::n])


# --- where an answer ends ---------------------------------------------------------------------------------------------


def test_stop_strings_cut_exactly_also_across_token_borders(backend: str, make: Make) -> None:
    runner = make(backend, slots=16)
    text = runner.generate_text(STORY, max_tokens=40, ignore_eos=True)
    stops = [text[start : start + size] for start in range(3, 40, 5) for size in (1, 4, 11)]
    done = runner.run([runner.request(STORY, max_tokens=40, ignore_eos=True, stop=stop) for stop in stops])
    assert [c.text for c in done] == [text[: text.index(stop)] for stop in stops]
    assert {c.finish_reason for c in done} == {"stop"}


def test_the_stop_string_that_is_complete_first_counts(backend: str, make: Make) -> None:
    runner = make(backend)
    text = runner.generate_text(STORY, max_tokens=30, ignore_eos=True)
    early, late = text[10:16], text[18:24]
    prefix = text[10:12]
    cases = [
        [late, early],
        [early, prefix],
        ["never to be seen", late],
        [text[8:14], text[10:18]],
        [text[10:16], text[12:14]],
    ]
    done = runner.run([runner.request(STORY, max_tokens=30, ignore_eos=True, stop=stops) for stops in cases])
    assert [c.text for c in done] == [cut(text, stops) for stops in cases]


def cut(text: str, stops: list[str]) -> str:
    """Cut `text` as if its characters came one by one."""
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


def test_text_held_back_for_a_stop_string_is_given_out_when_the_answer_ends(backend: str, make: Make) -> None:
    runner = make(backend)
    text = runner.generate_text(STORY, max_tokens=12)
    (done,) = runner.run([STORY], max_tokens=12, stop=[text[-3:] + "\x00"])
    assert done.text == text


def test_max_tokens_ends_an_answer_with_length_and_the_end_token_with_stop(backend: str, make: Make) -> None:
    runner = make(backend)
    short, whole = runner.run([runner.request(QUESTIONS[0], max_tokens=1), runner.request(QUESTIONS[0])])
    assert (short.finish_reason, short.completion_tokens) == ("length", 1)
    assert whole.finish_reason == "stop"
    assert 0 < (whole.completion_tokens or 0) < 256
    (exact,) = runner.run([QUESTIONS[0]], max_tokens=(whole.completion_tokens or 0) + 1)
    assert (exact.text, exact.finish_reason) == (whole.text, "stop")  # the end token is not counted


def test_ignore_eos_generates_all_of_max_tokens(backend: str, make: Make) -> None:
    (done,) = make(backend).run([QUESTIONS[0]], max_tokens=60, ignore_eos=True)
    assert (done.finish_reason, done.completion_tokens) == ("length", 60)


def test_characters_come_whole_however_their_bytes_are_split(make: Make) -> None:
    """Both backends are made to say bytes at random; llama.cpp gives the bytes of a token, so it is the witness."""
    runners = [make("llama_cpp"), make("transformers")]
    rare = "é日本🙂ß‰𝄞"
    tokens = [token for char in rare for token in ids(runners[0], char)]
    assert len(tokens) > len(rare)  # several tokens a character: the test tests something
    biases = [dict.fromkeys(tokens[at::step], 60.0) for step in (1, 2, 3) for at in range(4)]
    options = {"max_tokens": 24, "frequency_penalty": 2.0, "repetition_penalty": 1.5, "ignore_eos": True}
    texts = []
    for runner in runners:
        requests = [runner.request("Say", i, "raw", logit_bias=bias, **options) for i, bias in enumerate(biases)]
        texts.append([str(c.text).rstrip("\ufffd") for c in runner.run(requests)])
    assert texts[0] == texts[1]
    assert any(char in text for text in texts[0] for char in rare)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_logit_bias_forces_and_forbids_tokens(backend: str, make: Make) -> None:
    runner = make(backend)
    (token,) = ids(runner, "a")
    assert runner.generate_text(STORY, max_tokens=5, logit_bias={token: 1000}) == "aaaaa"
    first = runner.generate_text(STORY, prompt_format="raw", max_tokens=1, ignore_eos=True)
    banned = dict.fromkeys(ids(runner, first), -1000.0)
    assert runner.generate_text(STORY, prompt_format="raw", max_tokens=1, logit_bias=banned) != first


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {40: 3.0}},
    ],
    ids=str,
)
def test_penalties_mean_the_same_on_both_backends(penalty: dict[str, Any], make: Make) -> None:
    # Raw prompts, in the middle of a text: there the model is less sure of itself.
    prompts = [STORY, "Once upon a time", "word word word word", "a b c a b c"]
    options = {"max_tokens": 24, "ignore_eos": True, "prompt_format": "raw"}
    texts = [
        [c.text for c in make(backend).run(prompts, **options, **penalty)] for backend in ("llama_cpp", "transformers")
    ]
    assert texts[0] == texts[1]
    assert texts[0] != [c.text for c in make("llama_cpp").run(prompts, **options)]


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}], ids=str)
def test_options_that_leave_only_the_best_token_are_greedy(only_best: dict[str, Any], backend: str, make: Make) -> None:
    runner = make(backend)
    greedy = [c.text for c in runner.run([STORY, QUESTIONS[0]], max_tokens=15)]
    assert [
        c.text for c in runner.run([STORY, QUESTIONS[0]], **{"temperature": 1.5, "max_tokens": 15, **only_best})
    ] == greedy


def kept(probabilities: np.ndarray, option: str, value: float) -> np.ndarray:
    """Say which tokens an option keeps, straight from its definition."""
    p, order = probabilities, np.argsort(-probabilities, kind="stable")
    if option == "top_k":
        chosen = order[: int(value)]
    elif option == "min_p":
        chosen = np.flatnonzero(p >= value * p.max())
    else:
        if option == "typical_p":
            surprise = -np.log(p)
            order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
        chosen = order[: np.searchsorted(p[order].cumsum(), value) + 1]
    mask = np.zeros(len(p), bool)
    mask[chosen] = True
    return mask


@pytest.mark.parametrize(
    ("option", "value"), [("top_k", 3), ("top_p", 0.6), ("min_p", 0.15), ("typical_p", 0.5), ("temperature", 2.0)]
)
def test_samples_follow_the_distribution_that_an_option_defines(
    option: str, value: float, backend: str, make: Make
) -> None:
    runner, model = make(backend, slots=16), make("transformers", batching="padded")
    import torch

    prompt = "Tell me"
    with torch.inference_mode():
        logits = model._model(torch.tensor([ids(model, prompt)])).logits[0, -1].double().numpy()  # type: ignore[attr-defined]
    temperature = value if option == "temperature" else 1.3
    weights = np.exp((logits - logits.max()) / temperature)
    p = weights / weights.sum()
    if option != "temperature":
        mask = kept(p, option, value)
        p = np.where(mask, p, 0) / p[mask].sum()
    expected: Counter[str] = Counter()
    for token in np.flatnonzero(p > 0):
        expected[model._tokenizer.decode([int(token)], skip_special_tokens=True).replace("\ufffd", "")] += p[token]  # type: ignore[attr-defined]
    n = 400
    done = runner.run([prompt], prompt_format="raw", max_tokens=1, n=n, **{"temperature": 1.3, option: value})
    found = Counter(str(c.text).replace("\ufffd", "") for c in done)
    assert set(found) <= set(expected)
    likely = {text: q for text, q in expected.items() if q >= 0.02}
    for text, q in likely.items():
        assert abs(found[text] / n - q) < 5 * (q * (1 - q) / n) ** 0.5, text


def test_samples_of_a_row_differ_and_come_again_with_the_seed(backend: str, make: Make) -> None:
    runner = make(backend, slots=3)
    options: dict[str, Any] = {"n": 6, "temperature": 1.0, "max_tokens": 12}
    first = [c.text for c in runner.run([STORY], seed=5, **options)]
    assert len(set(first)) > 1
    assert [c.text for c in runner.run([STORY], seed=5, **options)] == first
    assert [c.text for c in runner.run([STORY], seed=6, **options)] != first
    request = replace(runner.request(STORY, seed=5, **options), samples=(4, 2))
    assert {c.sample: c.text for c in runner.completions([request])} == {2: first[2], 4: first[4]}


def test_equal_prompts_of_one_run_get_samples_of_their_own(backend: str, make: Make) -> None:
    runner = make(backend)
    for seed in ({}, {"seed": 5}, {"seed": 2**70}):
        done = runner.run([STORY] * 5, temperature=1.0, max_tokens=10, **seed)
        assert len({c.text for c in done}) > 1
        assert done[0].text == runner.generate_text(STORY, temperature=1.0, max_tokens=10, **seed)


def test_options_out_of_range_and_unknown_ones_are_refused_by_name(backend: str, make: Make) -> None:
    runner = make(backend)
    for name, value in {"temperature": -1, "top_p": 0, "logit_bias": {3: float("nan")}, "stop": [""]}.items():
        with pytest.raises(LLMConfigError, match=name):
            runner.generate_text(STORY, **{name: value})
    with pytest.raises(LLMConfigError, match="did you mean 'temperature'"):
        runner.generate_text(STORY, temprature=1)
    with pytest.raises(LLMInferenceError, match="exceeds|context"):
        runner.generate_text(LONG)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_every_bundled_row_has_the_same_tokens_on_both_backends_and_in_transformers_itself(make: Make) -> None:
    ours, theirs = make("llama_cpp"), make("transformers")
    for prompt in [*QUESTIONS, *STORIES, *CHATS]:
        request = ours.request(prompt)
        encoded = [runner.encode(request)[0] for runner in (ours, theirs)]  # type: ignore[attr-defined]
        expected = theirs._tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            list(request.messages or ()), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert encoded == [expected, expected]
        if isinstance(prompt, str):
            assert ids(ours, prompt) == ids(theirs, prompt)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(min_size=1, max_size=60)
    | st.text(st.sampled_from("ab '\n\t .,1é日🙂\u00a0\u200d<|im_end|>\r"), min_size=1, max_size=30)
)
def test_any_text_has_the_same_tokens_on_both_backends(text: str, make: Make) -> None:
    assert ids(make("llama_cpp"), text) == ids(make("transformers"), text)


@pytest.mark.slow
def test_greedy_answers_of_both_backends_agree_on_the_bundled_rows(make: Make) -> None:
    prompts = [*QUESTIONS, *STORIES, *CHATS]
    ours, theirs = ([c.text for c in make(backend, slots=16).run(prompts, max_tokens=100)] for backend in EXACT)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.99 * len(prompts)


def test_greedy_answers_of_both_backends_agree_on_a_sample_of_rows(make: Make) -> None:
    prompts = [*QUESTIONS[::20], *STORIES[::13], *CHATS[::10]]
    ours, theirs = ([c.text for c in make(backend, slots=16).run(prompts, max_tokens=30)] for backend in EXACT)
    assert ours == theirs
