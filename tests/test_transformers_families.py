"""Whatever its architecture, a model answers in a batch what transformers' own `generate` answers row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import END_TOKENS, FAMILIES, RARER, VOCABULARY, save
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CHATS, MIXES, QUESTIONS, STORIES, Answer, alone, answers, collect, requests_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpipe import LLMInitializationError, Request, SamplingConfig, TransformersRunner
from llmpipe.records import Chunk
from llmpipe.runners.weights import BUNDLED_DIR
from llmpipe.stopwatch import complete

MAX_TOKENS = 12
LEAST_GAP = 5e-5
"""Of the best two logits of a reference: several times what another order of the same sum makes of them."""
WORDS = " ".join(STORIES).split()
LENGTHS = (1, 30, 2, 17, 5, 26, 3, 9, 28, 1, 12, 21, 4, 7, 15, 24)
PROMPTS = [" ".join(WORDS[7 * i : 7 * i + length]) for i, length in enumerate(LENGTHS)]
PREFIX = " ".join(WORDS[200:240])
SHARED = [PREFIX, *(f"{PREFIX} {' '.join(WORDS[9 * i : 9 * i + i])}" for i in range(1, 6)), PROMPTS[3], PREFIX]


PADDED = {"bloom", "falcon_alibi", "stablelm", "gptj"}  # of an attention that cannot be replaced
PADDED |= {"mamba", "mamba2", "jamba", "bamba", "falcon_h1", "qwen3_next", "lfm2"}  # with layers of another kind


class Reference:
    """What transformers itself makes of a checkpoint, a row at a time."""

    def __init__(self, path: Path, end_tokens: Iterable[int] = END_TOKENS) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path).eval()
        self._model.generation_config.eos_token_id = None
        self._end_tokens = set(end_tokens)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self.greedy = cache(self._greedy)

    def _greedy(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, and `MAX_TOKENS` after it."""
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        best, second = torch.cat(made.logits).topk(2).values.T
        assert (best - second).min() > LEAST_GAP, "nearly a tie: change the family's seed"
        return ids[0].tolist(), made.sequences[0, ids.shape[1] :].tolist()

    def answer(self, request: Request) -> Answer:
        prompt, tokens = self.greedy(request.prompt)
        tokens, reason = tokens[: request.sampling.max_tokens], "length"
        ends = [i for i, token in enumerate(tokens) if token in self._end_tokens]
        if ends and not request.sampling.ignore_eos:
            tokens, reason = tokens[: ends[0]], "stop"
        before, after = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens))
        return after.removeprefix(before).rstrip("\ufffd"), reason, len(prompt), len(tokens), None

    def answers(self, requests: Iterable[Request]) -> dict[tuple[int, int], Answer]:
        return {(request.id, 0): self.answer(request) for request in requests}


@dataclass
class Family:
    name: str
    reference: Reference
    runner: Callable[[int], TransformersRunner]
    """Slots → a runner."""


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Family by name; its checkpoint is made once, and each runner loaded once."""

    @cache
    def make(name: str) -> Family:
        path = save(name, tmp_path_factory.mktemp(name))
        runner = cache(lambda slots: TransformersRunner({"model": str(path), "slots": slots, "threads": 1}, "cpu"))
        return Family(name, Reference(path), runner)

    return make


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in RARER)) for name in FAMILIES])
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


def greedy(prompts: Iterable[str], **options: Any) -> list[Request]:
    """Ask for answers of mixed lengths, every other of which may end before."""
    samplings = ({"max_tokens": 1 + (5 * i + 11) % MAX_TOKENS, "ignore_eos": i % 2 == 0, **options} for i in range(99))
    return [
        Request(i, SamplingConfig(temperature=0, **sampling), prompt)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=False))
    ]


def test_every_family_runs_in_slots_but_those_that_cannot(family: Family) -> None:
    """Otherwise a mistake in the slots would only make the check at load choose the padded path, and pass unseen."""
    assert family.runner(3).info()["batching"] == ("padded" if family.name in PADDED else "slots")


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_greedy_answers_are_those_of_generate_row_by_row(family: Family, slots: int) -> None:
    asked = greedy(PROMPTS)
    expected = family.reference.answers(asked)
    assert {reason for _, reason, *_ in expected.values()} == {"stop", "length"}
    assert answers(family.runner(slots), asked) == expected


def test_rows_that_share_a_prefix_are_those_of_generate_row_by_row(family: Family) -> None:
    asked = greedy(SHARED)
    assert answers(family.runner(3), asked) == family.reference.answers(asked)


def test_samples_of_a_request_are_those_of_a_request_for_each(family: Family) -> None:
    sampling = SamplingConfig(temperature=1, top_k=20, max_tokens=MAX_TOKENS, n=4, ignore_eos=True)
    asked = Request(0, sampling, PROMPTS[3], seed=6, samples=(0, 1, 2, 3))
    together = answers(family.runner(3), [asked])
    assert together == alone(family.runner(3), [asked])
    assert len({text for text, *_ in together.values()}) == 4


def test_a_cancelled_request_leaves_its_neighbours_unchanged(family: Family) -> None:
    runner, asked = family.runner(3), greedy(PROMPTS[1:9])
    asked[1] = replace(asked[1], sampling=SamplingConfig(temperature=0, max_tokens=60, ignore_eos=True))
    chunks: list[Chunk] = []
    for chunk in runner.stream(asked):
        chunks.append(chunk)
        if len(chunks) == 4:
            runner.cancel(1)
    last = {chunk.request_id: chunk for chunk in chunks}
    assert (last[1].finish_reason, last[1].error) == ("error", "cancelled")
    for request in asked[:1] + asked[2:]:
        text = "".join(chunk.text for chunk in chunks if chunk.request_id == request.id)
        assert (text, last[request.id].finish_reason) == family.reference.answer(request)[:2]


def test_the_bundled_model_answers_as_generate_does(transformers_runner: TransformersRunner) -> None:
    chats = [transformers_runner.request(prompt) for prompt in (*QUESTIONS[::80], *CHATS[::40], *STORIES[::30])]
    asked = greedy(map(transformers_runner.prompt_text, chats), max_tokens=MAX_TOKENS, ignore_eos=False)
    assert answers(transformers_runner, asked) == Reference(BUNDLED_DIR, [0, 2]).answers(asked)


# --- mixes ------------------------------------------------------------------------------------------------------------

MIXED = [
    *(("llama", 15), ("jamba", 10)),
    *(pytest.param(name, 60, marks=pytest.mark.slow) for name in ("llama", "mistral", "bloom", "jamba")),
]
SLOTS = st.sampled_from([1, 3, 16])


@pytest.mark.parametrize(("name", "examples"), MIXED)
def test_any_mix_of_rows_gives_what_they_give_alone_even_after_a_dropped_stream(
    name: str, examples: int, make_family: Callable[[str], Family]
) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)  # other mixes might find a tie of two logits
    @given(mix=MIXES, slots=SLOTS, dropped_after=st.integers(0, 6))
    def check(mix: list[tuple[Any, str, dict[str, Any]]], slots: int, dropped_after: int) -> None:
        runner = make_family(name).runner(slots)
        requests = requests_of(runner, mix)
        stream = runner.stream(iter(requests))
        list(islice(stream, dropped_after))
        stream.close()  # type: ignore[attr-defined]
        assert answers(runner, requests) == alone(runner, requests)

    check()


@pytest.mark.parametrize(("name", "examples"), MIXED)
def test_rows_of_any_mix_are_untouched_by_the_cancelled_ones(
    name: str, examples: int, make_family: Callable[[str], Family]
) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(mix=MIXES, slots=SLOTS, cancelled=st.dictionaries(st.integers(0, 20), st.integers(0, 6), max_size=3))
    def check(mix: list[tuple[Any, str, dict[str, Any]]], slots: int, cancelled: dict[int, int]) -> None:
        runner = make_family(name).runner(slots)

        def stream(requests: Iterable[Request]) -> Iterator[Chunk]:
            for at, chunk in enumerate(runner.stream(requests)):
                if at in cancelled:
                    runner.cancel(cancelled[at])
                yield chunk

        requests = requests_of(runner, mix)
        expected = alone(runner, requests)
        for (request_id, sample), answer in collect(complete(stream, requests)).items():
            if answer[-1] != "cancelled" or request_id not in cancelled.values():
                assert answer == expected[request_id, sample]

    check()


# --- refusals ---------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
NOT_CAUSAL: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "encoder and decoder": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "encoder and decoder, with a decoder to be had": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1)
    ),
    "encoder of both": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "masked, of no causal kind": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
    ),
    "embeddings": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    "embeddings of a decoder": lambda: hf.Qwen2Model(hf.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "classes": lambda: hf.Qwen2ForSequenceClassification(
        hf.Qwen2Config(**SMALL, num_key_value_heads=2, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_a_model_that_is_no_causal_language_model_is_refused_by_its_class(kind: str, tmp_path: Path) -> None:
    model = NOT_CAUSAL[kind]()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BUNDLED_DIR).save_pretrained(tmp_path)
    if "embeddings" in kind:  # as sentence-transformers saves them
        pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (tmp_path / "modules.json").write_text(json.dumps([pooling]))
    names = f"{type(model).__name__}|{type(model.config).__name__}"
    with pytest.raises(LLMInitializationError, match=names) as caught:
        TransformersRunner({"model": str(tmp_path)}, "cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
