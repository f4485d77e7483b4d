"""What is particular to the llama.cpp backend: its own answers, its files, its log, its options."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import psutil
import pytest

from llmpipe import BaseLLMRunner, LLMInferenceError, LLMInitializationError, LLMRunnerFactory
from llmpipe.config import DeviceConfig, data_dir
from llmpipe.runners.llama_cpp import devices
from llmpipe.runners.llama_cpp import log as llama_log
from llmpipe.runners.llama_cpp import model as llama_model
from llmpipe.runners.weights import BUNDLED_DIR

STORY = "Tell me a story about a fox and a violin."
GGUF = BUNDLED_DIR / "tiny-chat.gguf"
F32: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
QUESTIONS = [json.loads(line)["prompt"] for line in (data_dir() / "questions.jsonl").open(encoding="utf-8")]


def load(**options: Any) -> BaseLLMRunner:
    return LLMRunnerFactory.create_runner({"backend": "llama_cpp", "temperature": 0.0, "threads": 1, **options})


@pytest.fixture(scope="module")
def theirs() -> Iterator[llama_cpp.Llama]:
    """llama-cpp-python's own face."""
    f32 = {"type_k": 0, "type_v": 0}  # rounding to f16 would amplify the last bit, in which batched sums differ
    model = llama_cpp.Llama(str(GGUF), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, **f32)
    yield model
    model.close()
    llama_log.capture()  # it took llama.cpp's log to itself


def assert_answers_equal_create_completion(theirs: llama_cpp.Llama, prompts: list[str], max_tokens: int) -> None:
    with load(reproducible=True, **F32) as runner:
        requests = [runner.request(prompt, i, max_tokens=max_tokens) for i, prompt in enumerate(prompts)]
        ours = runner.run(requests)
        for request, done in zip(requests, ours, strict=True):
            tokens = runner.encode(request)[0]  # type: ignore[attr-defined]
            expected: Any = theirs.create_completion(tokens, max_tokens=max_tokens, temperature=0.0)
            assert done.text == expected["choices"][0]["text"]
            assert done.finish_reason == expected["choices"][0]["finish_reason"]
            assert done.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_greedy_answers_are_those_of_create_completion(theirs: llama_cpp.Llama) -> None:
    assert_answers_equal_create_completion(theirs, [*QUESTIONS[::40], STORY], 24)


@pytest.mark.slow
def test_greedy_answers_are_those_of_create_completion_for_all_bundled_rows(theirs: llama_cpp.Llama) -> None:
    stories = [json.loads(line)["prompt"] for line in (data_dir() / "open.jsonl").open(encoding="utf-8")]
    assert_answers_equal_create_completion(theirs, QUESTIONS + stories, 100)


def test_stop_strings_cut_as_create_completion_cuts(theirs: llama_cpp.Llama) -> None:
    with load(reproducible=True, **F32) as runner:
        text = runner.generate_text(STORY, max_tokens=30)
        tokens = runner.encode(runner.request(STORY))[0]  # type: ignore[attr-defined]
        for stop in (text[7:12], text[20], text[-4:]):
            expected: Any = theirs.create_completion(tokens, max_tokens=30, temperature=0.0, stop=[stop])
            assert runner.generate_text(STORY, max_tokens=30, stop=stop) == expected["choices"][0]["text"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 24, 1000, 60_000, -1000])
def test_a_truncated_file_is_an_error_with_llama_cpps_reason(size: int, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(GGUF.read_bytes()[:size])
    with pytest.raises(LLMInitializationError, match=r"llama\.cpp cannot load .*cut\.gguf: .*(fail|corrupt)") as caught:
        load(model_path=str(file))
    assert "\n" not in str(caught.value)


def test_garbage_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    """In a process of its own, which must come to its end by itself."""
    for seed in range(3):
        (tmp_path / f"{seed}.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + random.Random(seed).randbytes(20_000))
    code = (
        "import sys\nfrom llmpipe import LLMRunnerFactory, LLMInitializationError\n"
        "for file in sys.argv[1:]:\n"
        "    try: LLMRunnerFactory.create_runner({'model_path': file})\n"
        "    except LLMInitializationError: print('refused')\n"
    )
    files = [str(tmp_path / f"{seed}.gguf") for seed in range(3)]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n" * 3, "")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 pickle")
    with pytest.raises(LLMInitializationError, match="not a GGUF file; for other formats use backend=transformers"):
        load(model_path=str(tmp_path / "model.gguf"))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"mmap": False},
        {"cache_type_k": "f32", "cache_type_v": "f32"},
        {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attention": "on"},
        {"flash_attention": False},
        {"batch_tokens": 7, "micro_batch_tokens": 3, "slots": 3},
        {"n_gpu_layers": 0, "main_gpu": 0},
        {"slots": 40, "context": 128},
    ],
    ids=str,
)
def test_every_option_loads_and_answers(options: dict[str, Any]) -> None:
    with load(**options) as runner:
        done = runner.run([STORY, QUESTIONS[0], QUESTIONS[200], STORY], max_tokens=5)
        assert [c.error for c in done] == [None] * 4
        assert done[0].text == done[3].text != ""


def test_a_prompt_longer_than_a_batch_is_computed_in_parts_with_the_same_answer() -> None:
    prompts = ["word " * 150, STORY, "word " * 90]
    found = []
    for batch_tokens in (2048, 50):
        with load(reproducible=True, batch_tokens=batch_tokens, cache_type_k="f32", cache_type_v="f32") as runner:
            found.append([c.text for c in runner.run(prompts, max_tokens=8)])
    assert found[0] == found[1]


def test_quantised_values_without_flash_attention_are_refused_with_llama_cpps_reason() -> None:
    with pytest.raises(LLMInitializationError, match="flash|Flash|V cache"):
        load(cache_type_v="q8_0", flash_attention="off")


@pytest.mark.parametrize(("reproducible", "flash"), [(True, 0), (False, -1)])
def test_reproducible_turns_flash_attention_off(
    reproducible: bool, flash: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def refuse(model: Any, params: Any) -> None:
        seen.append((params.flash_attn_type, params.kv_unified))

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", refuse)
    with pytest.raises(LLMInitializationError, match="try a smaller backend.slots or backend.context"):
        load(reproducible=reproducible)
    assert seen == [(flash, False)]


def test_another_chat_template_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("Q: {{ messages[0].content }}\nA:")
    with load(chat_template=str(file)) as runner:
        assert runner.prompt_text(runner.request("Why?")) == "Q: Why?\nA:"


def test_a_model_without_a_chat_template_takes_plain_prompts_and_refuses_chats(
    llama_cpp_runner: BaseLLMRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp_runner._model, "chat", None)  # type: ignore[attr-defined]
    assert llama_cpp_runner.request(STORY).messages is None
    with pytest.raises(LLMInferenceError, match="no chat template: use prompt=raw or backend.chat_template=FILE"):
        llama_cpp_runner.create_chat_completion([{"role": "user", "content": "hi"}])


def test_all_end_of_generation_tokens_end_an_answer(llama_cpp_runner: BaseLLMRunner) -> None:
    model = llama_cpp_runner._model  # type: ignore[attr-defined]
    ends = [token for token in range(model.n_vocab) if model.is_end(token)]
    assert llama_cpp.llama_vocab_eos(model.vocab) in ends
    for end in ends:
        (done,) = llama_cpp_runner.run([STORY], logit_bias={end: 1000.0}, max_tokens=5)
        assert (done.text, done.finish_reason, done.completion_tokens) == ("", "stop", 0)


@pytest.mark.parametrize(
    ("device", "flag"), [("cuda", "-DGGML_CUDA=on"), ("cuda:1", "CUDA"), ("mps", "-DGGML_METAL=on")]
)
def test_a_build_without_a_gpu_names_the_command_that_makes_one(
    device: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(LLMInitializationError, match=f"CMAKE_ARGS='.*{flag}.*pip install"):
        llama_model.can_offload(DeviceConfig.parse(device))
    assert llama_model.can_offload(DeviceConfig.parse("auto")) is False


def test_a_numbered_gpu_gets_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def refuse(path: bytes, params: Any) -> None:
        seen.append((params.n_gpu_layers, params.split_mode, params.main_gpu))

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", refuse)
    from llmpipe.config import LlamaCppConfig

    for offload, gpu in ((True, None), (True, 1), (False, 1)):
        with pytest.raises(LLMInitializationError):
            llama_model.Model(GGUF, LlamaCppConfig(main_gpu=0), offload, gpu)
    layer, none = llama_cpp.LLAMA_SPLIT_MODE_LAYER, llama_cpp.LLAMA_SPLIT_MODE_NONE
    assert seen == [(-1, layer, 0), (-1, none, 1), (0, layer, 0)]


# --- log --------------------------------------------------------------------------------------------------------------


def test_llama_cpps_log_goes_to_pythons_and_not_to_the_terminal(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="llmpipe.llama_cpp"):
        load().close()
    assert any("loaded meta data" in record.message for record in caplog.records)
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_by_default() -> None:
    code = (
        "from llmpipe import LLMRunnerFactory as F\nwith F.create_runner({}) as r: r.generate_text('hi', max_tokens=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_slots_are_free_again_after_every_kind_of_end() -> None:
    with load(slots=2) as runner:
        scheduler = runner._engine.scheduler  # type: ignore[attr-defined]
        for max_tokens in (1, 30):
            stream = runner.stream([runner.request(STORY, i, max_tokens=max_tokens, n=2) for i in range(3)])
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            assert sorted(scheduler._free) == [0, 1]
        runner.run([STORY, "", STORY], max_tokens=2)
        assert sorted(scheduler._free) == [0, 1]


def test_a_failing_decode_call_is_one_readable_error_and_leaves_the_slots_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(slots=2) as runner:
        monkeypatch.setattr(llama_cpp, "llama_decode", lambda context, batch: -3)
        with pytest.raises(LLMInferenceError, match="llama_decode failed with status -3"):
            runner.run([STORY] * 3)
        monkeypatch.undo()
        assert runner.generate_text(STORY, max_tokens=2)


def test_ggml_says_how_much_memory_each_device_has() -> None:
    found = list(devices.devices())
    assert found
    assert all(0 <= free <= total for _, free, total in found)
    host = [total for kind, _, total in found if kind == 0]
    assert host == [pytest.approx(psutil.virtual_memory().total, rel=0.1)]


@pytest.mark.skipif(bool(llama_cpp.llama_supports_gpu_offload()), reason="this build of llama.cpp has a GPU")
def test_no_memory_of_a_gpu_is_reported_without_one() -> None:
    assert devices.gpu_memory() == (0, 0)
    with load() as runner:
        assert runner.memory_usage()["device_mb"] is None
