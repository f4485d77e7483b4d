"""llama.cpp's kinds of model, small and real: recurrent, hybrid, sliding windows, adapters; and what cannot run."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf_models
import llama_cpp
import numpy as np
import psutil
import pytest

from llmpipe import BaseLLMRunner, LLMInitializationError, LLMRunnerFactory, Request
from llmpipe.cli import main
from llmpipe.config import LlamaCppConfig, Switch
from llmpipe.runners import trials
from llmpipe.runners.llama_cpp import log as llama_log
from llmpipe.runners.llama_cpp.probe import probe
from llmpipe.runners.weights import BUNDLED_DIR

BUNDLED = BUNDLED_DIR / "tiny-chat.gguf"
F32 = {"cache_type_k": "f32", "cache_type_v": "f32"}
KINDS = ["mamba", "rwkv7", "jamba", "lfm2", "gemma3"]
REPRODUCIBLE: dict[str, Any] = {"reproducible": True}
FAST: dict[str, Any] = {"reproducible": False, "flash_attention": "off"}
"""Flash attention rounds to F16 inside."""

TinyModel = Callable[[str], Path]
Rows = list[tuple[str, int]]
"""Prompts, and how many tokens to generate."""


def letters(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters, k=count))


SHARED = letters(50, 0)
ROWS = [(letters(length, length), tokens) for length, tokens in ((1, 30), (7, 12), (33, 40), (180, 5), (90, 25))]
ROWS += [(SHARED + letters(length, length), tokens) for length, tokens in ((3, 20), (20, 31), (64, 9))]
"""The last three begin alike."""


def load(path: Path, **options: Any) -> BaseLLMRunner:
    fixed = {"backend": "llama_cpp", "temperature": 0.0, "threads": 1, **F32}
    return LLMRunnerFactory.create_runner({**fixed, "model_path": str(path), **options})


def alone(path: Path, rows: Rows, **options: Any) -> list[str]:
    """Answer each row with a model of its own, through llama-cpp-python's own face."""
    answers = []
    for prompt, max_tokens in rows:
        sizes = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
        model = llama_cpp.Llama(str(path), verbose=False, **sizes, **options)
        tokens = model.tokenize(prompt.encode(), special=True)
        done: Any = model.create_completion(tokens, max_tokens=max_tokens, temperature=0.0)
        answers.append(done["choices"][0]["text"])
        model.close()
    llama_log.capture()  # it took llama.cpp's log to itself
    return answers


def requests(runner: BaseLLMRunner, rows: Rows, **sampling: Any) -> list[Request]:
    return [
        runner.request(prompt, i, max_tokens=tokens, prompt_format="raw", **sampling)
        for i, (prompt, tokens) in enumerate(rows)
    ]


def together(runner: BaseLLMRunner, rows: Rows) -> list[str | None]:
    return [done.text for done in runner.run(requests(runner, rows))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Makes a tiny model of an architecture, once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda arch: gguf_models.write_model(folder / f"{arch}.gguf", arch))


@pytest.fixture(scope="module")
def expected(tiny: TinyModel) -> Callable[[str], list[str]]:
    """Gives the answers of a tiny model to each of `ROWS` alone."""
    return cache(lambda arch: alone(tiny(arch), ROWS))


# --- kinds of memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("mode", [REPRODUCIBLE, FAST], ids=["reproducible", "fast"])
@pytest.mark.parametrize("arch", KINDS)
def test_rows_together_get_the_answers_that_each_gets_alone(
    arch: str, mode: dict[str, Any], slots: int, tiny: TinyModel, expected: Callable[[str], list[str]]
) -> None:
    assert len(set(expected(arch))) == len(ROWS)
    with load(tiny(arch), slots=slots, **mode) as runner:
        assert together(runner, ROWS) == expected(arch)
        assert together(runner, ROWS[::-1]) == expected(arch)[::-1]  # in the slots that those before have left


@pytest.mark.parametrize("arch", KINDS)
def test_a_copied_prefix_continues_as_a_computed_one(arch: str, tiny: TinyModel) -> None:
    longer = SHARED + letters(40, 1)
    rows = [((SHARED, longer, "")[i % 3] + letters(1 + i, i), 4 + i % 9) for i in range(30)]
    with load(tiny(arch), slots=4, **FAST) as runner:
        done = runner.run(requests(runner, rows))
    assert sum((c.cached_prompt_tokens or 0) > 0 for c in done) >= 16
    with load(tiny(arch), slots=4, **REPRODUCIBLE) as runner:
        unshared = runner.run(requests(runner, rows))
    assert {c.cached_prompt_tokens for c in unshared} == {0}
    assert [c.text for c in done] == [c.text for c in unshared]


@pytest.mark.parametrize("arch", KINDS)
def test_prompts_in_small_pieces_get_the_same_answers(
    arch: str, tiny: TinyModel, expected: Callable[[str], list[str]]
) -> None:
    with load(tiny(arch), slots=3, batch_tokens=7, micro_batch_tokens=4, **FAST) as runner:
        assert together(runner, ROWS) == expected(arch)


@pytest.mark.parametrize("arch", KINDS)
def test_samples_of_a_row_do_not_depend_on_the_slots(arch: str, tiny: TinyModel) -> None:
    answers = []
    for slots in (1, 16):
        with load(tiny(arch), slots=slots, **REPRODUCIBLE) as runner:
            done = runner.run(requests(runner, ROWS, n=3, temperature=1.0))
            answers.append([(c.request_id, c.sample, c.text) for c in done])
    assert answers[0] == answers[1]
    assert len({text for _, _, text in answers[0]}) == 3 * len(ROWS)


@pytest.mark.parametrize("mode", [REPRODUCIBLE, FAST], ids=["reproducible", "fast"])
@pytest.mark.parametrize("arch", KINDS)
def test_rows_beside_cancelled_ones_and_in_their_slots_get_their_answers(
    arch: str, mode: dict[str, Any], tiny: TinyModel, expected: Callable[[str], list[str]]
) -> None:
    rows, cancelled = ROWS * 2, {2, 4, 6, 10}
    texts, errors = dict.fromkeys(range(len(rows)), ""), {}
    with load(tiny(arch), slots=3, **mode) as runner:
        for chunk in runner.stream(requests(runner, rows)):
            texts[chunk.request_id] += chunk.text
            if chunk.error:
                errors[chunk.request_id] = chunk.error
            if chunk.request_id in cancelled:
                runner.cancel(chunk.request_id)
    assert errors == dict.fromkeys(cancelled, "cancelled")
    for i, text in texts.items():
        whole = expected(arch)[i % len(ROWS)]
        assert text == whole if i not in cancelled else whole.startswith(text) and text != whole


@pytest.mark.parametrize(
    ("arch", "values", "states"),
    [("llama", 4 * 64, 0), ("mamba", 0, 4 * 2 * (3 + 8) * 128), ("rwkv7", 0, 4 * 2 * (2 + 64) * 64),
     ("jamba", 2 * 64, 4 * (3 + 8) * 128), ("lfm2", 2 * 64, 4 * 2 * 64)],
)  # fmt: skip
def test_what_a_sequence_takes_is_known_whatever_the_layers_are(
    arch: str, values: int, states: int, tiny: TinyModel
) -> None:
    """Two layers of 64 numbers: keys and values per token, convolutions and states per sequence."""
    with load(tiny(arch)) as runner:
        model = runner._model  # type: ignore[attr-defined]
        assert values <= sum(model.cache_values_per_token) <= values + 4  # llama.cpp adds a few of its own
        assert states <= model.state_bytes <= states + 100


# --- adapters ---------------------------------------------------------------------------------------------------------

QUESTION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SUBJECTS = ["a fox and a violin", "a bear", "two brothers", "a queen and a lantern"]
ASKED = [(QUESTION.format(f"Tell me a story about {subject}."), 40) for subject in SUBJECTS]
TARGETS = {
    "blk.0.attn_q": (256, 256),
    "blk.1.attn_v": (64, 256),
    "blk.2.ffn_down": (256, 512),
    "blk.3.ffn_up": (512, 256),
}


def factors(seed: int, rank: int = 4, shapes: dict[str, tuple[int, int]] = TARGETS) -> dict[str, Any]:
    """Draw the two factors of a change to each of the matrices."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        f"{name}.weight": (
            (draw((rank, columns)) / columns**0.5).astype(np.float32),
            (draw((rows, rank)) * 0.6).astype(np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [gguf_models.write_adapter(folder / f"{seed}.gguf", factors(seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """The answers without an adapter."""
    return alone(BUNDLED, ASKED)


@pytest.mark.parametrize(("suffix", "scale"), [("", 1.0), ("=0.5", 0.5), ("=-1", -1.0)])
def test_an_adapter_changes_the_answers_as_it_does_for_create_completion(
    suffix: str, scale: float, adapters: list[Path], plain: list[str]
) -> None:
    wanted = alone(BUNDLED, ASKED, lora_path=str(adapters[0]), lora_scale=scale)
    assert all(one != other for one, other in zip(wanted, plain, strict=True))
    for mode in (REPRODUCIBLE, FAST):
        with load(BUNDLED, lora=[f"{adapters[0]}{suffix}"], **mode) as runner:
            assert together(runner, ASKED) == wanted


def test_an_adapter_of_scale_0_changes_nothing(adapters: list[Path], plain: list[str]) -> None:
    with load(BUNDLED, lora=[f"{adapters[0]}=0"], **REPRODUCIBLE) as runner:
        assert together(runner, ASKED) == plain


def test_two_adapters_add_up(adapters: list[Path], tmp_path: Path) -> None:
    one, other = factors(1), factors(2)
    scaled = {name: (a, b * np.float32(0.5)) for name, (a, b) in one.items()}
    sums = {
        name: (np.concatenate([a, other[name][0]]), np.concatenate([b, other[name][1]], axis=1))
        for name, (a, b) in scaled.items()
    }
    both = gguf_models.write_adapter(tmp_path / "both.gguf", sums)
    with load(BUNDLED, lora=[f"{adapters[0]}=0.5", str(adapters[1])], **REPRODUCIBLE) as runner:
        assert together(runner, ASKED) == alone(BUNDLED, ASKED, lora_path=str(both))


def test_adapters_stay_when_slots_are_enlarged_and_when_the_model_is_loaded_again(adapters: list[Path]) -> None:
    long = [(QUESTION.format("Tell me a story. " * 20), 200)]
    wanted = alone(BUNDLED, ASKED + long, lora_path=str(adapters[0]))
    with load(BUNDLED, lora=[str(adapters[0])], **REPRODUCIBLE) as runner:
        assert together(runner, ASKED) == wanted[:-1]
        tokens = runner.info()["slot_tokens"]
        assert together(runner, long) == wanted[-1:]
        assert runner.info()["slot_tokens"] > tokens
        runner.reload()
        assert together(runner, ASKED) == wanted[:-1]


def test_a_run_applies_the_adapters_that_the_command_line_names(
    adapters: list[Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl(*({"prompt": prompt} for prompt, _ in ASKED))
    lora = f"backend.lora=['{adapters[0]}=0.5']"
    f32 = ["backend.cache_type_k=f32", "backend.cache_type_v=f32", "backend.reproducible=true", "backend.threads=1"]
    sampling = ["sampling=greedy", "sampling.max_tokens=40", "prompt=raw"]
    assert main(["backend=llama_cpp", lora, *f32, *sampling, f"dataset.path={rows}", f"hydra.run.dir={tmp_path}"]) == 0
    lines = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = alone(BUNDLED, ASKED, lora_path=str(adapters[0]), lora_scale=0.5)
    assert [json.loads(line)["completion"] for line in lines] == wanted


@pytest.mark.parametrize("arch", ["mamba", "lfm2"])
def test_a_recurrent_models_adapter_applies(arch: str, tiny: TinyModel, tmp_path: Path) -> None:
    name = {"mamba": "blk.1.ssm_in", "lfm2": "blk.0.shortconv.in_proj"}[arch]
    rows = {"mamba": 256, "lfm2": 192}[arch]
    file = gguf_models.write_adapter(tmp_path / "a.gguf", factors(3, shapes={name: (rows, 64)}), arch)
    wanted = alone(tiny(arch), ROWS, lora_path=str(file))
    with load(tiny(arch), slots=3, lora=[str(file)], **REPRODUCIBLE) as runner:
        assert together(runner, ROWS) == wanted
    with load(tiny(arch), slots=3, **REPRODUCIBLE) as runner:
        assert together(runner, ROWS) != wanted


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ({"blk.0.attn_q": (64, 64)}, {}, "incorrect shape .*wrong base model"),
        ({"blk.9.attn_q": (256, 256)}, {}, "does not exist in base model"),
        (TARGETS, {"arch": "mamba"}, "model arch and LoRA arch mismatch"),
        (TARGETS, {"invocation": [1, 2]}, "activated LoRA"),
    ],
    ids=["shape", "layer", "architecture", "activated"],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    shapes: dict[str, tuple[int, int]], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file = gguf_models.write_adapter(tmp_path / "a.gguf", factors(1, shapes=shapes), **options)
    with pytest.raises(LLMInitializationError, match=rf"{file}.*{reason}") as caught:
        load(BUNDLED, lora=[str(file)])
    assert "\n" not in str(caught.value)


def test_a_model_given_as_an_adapter_is_refused() -> None:
    with pytest.raises(LLMInitializationError, match="expect general.type to be 'adapter', but got: model"):
        load(BUNDLED, lora=[str(BUNDLED)])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("bert", "reads in both directions, to embed text"),
        ("gemma-embedding", "reads in both directions, to embed text"),
        ("t5", "has an encoder"),
        ("dream", "writes by diffusion"),
    ],
)
def test_a_model_that_cannot_write_on_is_refused_by_name(arch: str, reason: str, tiny: TinyModel) -> None:
    with pytest.raises(LLMInitializationError, match=rf"{tiny(arch)} \({arch} .*\) {reason}; llmpipe runs") as caught:
        load(tiny(arch))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_a_model_is_refused(tmp_path: Path) -> None:
    file = gguf_models.write_vocabulary(tmp_path / "vocabulary.gguf")
    with pytest.raises(LLMInitializationError, match=rf"cannot load {file}: .*key not found") as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_weights_stay_as_they_are_where_laying_them_out_anew_crashes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(BUNDLED, path)
    target = "repacking.BreakingWhenRepacked"
    for _ in range(2):
        assert probe(path, LlamaCppConfig(_target_=target)) is False
    assert [record.message for record in caplog.records].count(
        "llama.cpp crashes with weights laid out for this processor; trying them as they are"
    ) == 1  # the second time it is remembered
    assert probe(path, LlamaCppConfig(_target_=target, repack=Switch.off)) is False
    with pytest.raises(LLMInitializationError, match="crashed the backend"):
        probe(path, LlamaCppConfig(_target_=target, repack=Switch.on))


@pytest.mark.parametrize("weights", [True, False])
def test_a_file_that_is_loaded_for_ever_or_into_all_memory_is_refused(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(BUNDLED, path)
    monkeypatch.setattr(trials, "LEAST_S", 3.0)
    for target in ("repacking.Endless", "repacking.Huge"):
        with pytest.raises(LLMInitializationError, match=r"model.gguf cannot be loaded, or is damaged: .*") as caught:
            probe(path, LlamaCppConfig(_target_=target), weights)
        assert ("not come to an end within" if target.endswith("Endless") else "MemoryError") in str(caught.value)
        assert not psutil.Process().children()
