"""The library as the mission document shows it, on both backends: texts, streams, chats, state, errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

import llmpipe
from llmpipe import (
    BackendType,
    BaseLLMRunner,
    DeviceType,
    LLMConfigError,
    LLMError,
    LLMInferenceError,
    LLMInitializationError,
    LLMRunnerFactory,
    ModelConfig,
    Request,
    SamplingConfig,
)
from llmpipe.runners.weights import BUNDLED_DIR

STORY = "Tell me a story about a fox and a violin."
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
LOCAL = {"llama_cpp": "tiny-chat.gguf", "transformers": "."}


@pytest.fixture(params=["llama_cpp", "transformers"])
def fresh(request: pytest.FixtureRequest) -> Iterator[BaseLLMRunner]:
    """A runner of the test's own, which it may close and reload."""
    with LLMRunnerFactory.create_runner(
        {"backend": request.param, "temperature": 0.0, "device": "cpu", "threads": 1}
    ) as runner:
        yield runner


# --- as in the document -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["llama.cpp", "llama_cpp", "transformers"])
def test_a_dictionary_under_llm_makes_a_runner_that_answers(backend: str) -> None:
    model = BUNDLED_DIR / LOCAL[backend.replace(".", "_")]
    config = {"llm": {"backend": backend, "model_path": str(model), "temperature": 0.8, "max_tokens": 5}}
    with LLMRunnerFactory.create_runner(config) as runner:
        assert (runner.sampling.temperature, runner.sampling.max_tokens) == (0.8, 5)
        assert runner.generate_text("Hello, world!", ignore_eos=True)


@pytest.mark.parametrize("backend", [BackendType.LLAMA_CPP, BackendType.TRANSFORMERS])
def test_a_typed_configuration_makes_a_runner_that_answers(backend: BackendType) -> None:
    config = ModelConfig(backend=backend, device=DeviceType.AUTO, temperature=0.7, max_tokens=4, options={"threads": 1})
    with LLMRunnerFactory.create_runner(config) as runner:
        assert type(runner).__name__ == {"llama.cpp": "LlamaCppRunner"}.get(backend.value, "TransformersRunner")
        assert runner.config.threads == 1
        assert runner.run([STORY])[0].completion_tokens == 4


def test_streamed_pieces_come_one_by_one_and_join_to_the_text(runner: BaseLLMRunner) -> None:
    stream = runner.generate_text_streaming(STORY, max_tokens=20)
    first = next(stream)
    pieces = [first, *stream]
    assert len(pieces) > 10
    assert "".join(pieces) == runner.generate_text(STORY, max_tokens=20)


def test_text_is_streamed_while_it_is_generated(fresh: BaseLLMRunner) -> None:
    def first_of(max_tokens: int) -> float:
        started = time.perf_counter()
        assert next(fresh.generate_text_streaming(STORY, max_tokens=max_tokens, ignore_eos=True))
        return time.perf_counter() - started

    started = time.perf_counter()
    fresh.generate_text(STORY, max_tokens=200, ignore_eos=True)
    assert first_of(200) < (time.perf_counter() - started) / 4


def test_a_stream_that_is_dropped_half_read_leaves_the_runner_free(runner: BaseLLMRunner) -> None:
    for _ in runner.generate_text_streaming(STORY):
        break
    for _ in runner.create_chat_completion(MESSAGES, stream=True):
        break
    assert runner.generate_text(STORY, max_tokens=2)


def test_a_chat_completion_is_what_openai_types_parse(runner: BaseLLMRunner) -> None:
    from openai.types.chat import ChatCompletion

    response = runner.create_chat_completion(MESSAGES, n=2, max_completion_tokens=3, max_tokens=None, stop="\x00")
    parsed = ChatCompletion.model_validate(response, strict=True)
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.choices[0].message.content == response["choices"][0]["message"]["content"] != ""
    assert parsed.usage is not None
    request = runner.request(MESSAGES)
    assert parsed.usage.prompt_tokens == len(runner.encode(request)[0])  # type: ignore[attr-defined]
    done = runner.run([MESSAGES], n=2, max_tokens=3)
    assert parsed.usage.completion_tokens == sum(c.completion_tokens or 0 for c in done)
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens
    assert [choice.finish_reason for choice in parsed.choices] == [c.finish_reason for c in done]
    assert parsed.model == "bundled"


def test_a_streamed_chat_completion_is_what_openai_types_parse(runner: BaseLLMRunner) -> None:
    from openai.types.chat import ChatCompletionChunk

    options: dict[str, Any] = {"max_tokens": 6, "n": 2, "temperature": 1.0, "seed": 1}
    whole = runner.create_chat_completion(MESSAGES, **options)
    stream = runner.create_chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True}, **options)
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(exclude_none=True) == whole["usage"]
    for choice in whole["choices"]:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice["index"]]
        assert own[0].delta.role == "assistant"
        assert [c.delta.role for c in own[1:]] == [None] * (len(own) - 1)
        assert "".join(c.delta.content or "" for c in own) == choice["message"]["content"]
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_a_chat_that_the_template_refuses_raises_with_the_templates_reason(runner: BaseLLMRunner) -> None:
    with pytest.raises(LLMInferenceError, match="the chat template refuses these messages"):
        runner.create_chat_completion([{"role": "assistant", "content": "I begin."}])
    with pytest.raises(LLMInferenceError, match="the chat template refuses"):
        list(runner.create_chat_completion([{"role": "wizard", "content": "?"}], stream=True))


def test_a_chat_comes_in_the_same_way_as_from_a_dataset(runner: BaseLLMRunner) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    in_parts = [MESSAGES[0], {"role": "user", "content": parts}]
    assert runner.render(in_parts) == runner.render(MESSAGES)
    assert runner.prompt_text(Request(0, SamplingConfig(), messages=tuple(in_parts))) == runner.render(MESSAGES)
    assert runner.create_chat_completion(in_parts)["choices"][0]["message"]["content"] == "Paris"
    assert runner.generate_text(in_parts) == "Paris"


PICTURE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": PICTURE}, "message 1 has a content part of type 'image_url'"),
        ({"role": "user", "content": 5}, "message 1 has a number as content, not text"),
        ({"role": "user"}, "message 1 has null as content"),
        ({"content": "hi"}, "message 1 has the role None"),
    ],
)
def test_a_chat_that_is_more_than_text_or_less_is_refused_alone(
    message: Any, reason: str, runner: BaseLLMRunner
) -> None:
    for call in (runner.generate_text, runner.create_chat_completion):
        with pytest.raises(LLMInferenceError, match=reason):
            call([message], max_tokens=2)
    with pytest.raises(ValueError, match=reason):
        runner.render([message])
    bad, good = runner.run([[message], MESSAGES], max_tokens=5)
    assert reason in str(bad.error) and good.text == "Paris"


def test_what_is_no_prompt_among_many_is_refused_alone(runner: BaseLLMRunner) -> None:
    done = runner.run([None, MESSAGES, float("nan"), [1], []], n=2, max_tokens=5)  # type: ignore[list-item]
    assert [(c.request_id, c.sample) for c in done] == [(i, sample) for i in range(5) for sample in range(2)]
    assert [c.text for c in done] == [None, None, "Paris", "Paris", *[None] * 6]
    assert "prompt=nan is not allowed; it must be text or a list of messages" in str(done[4].error)
    for wrong in ({"temprature": 1}, {"tools": "x"}, {"continue_final": "maybe"}, {"prompt_format": "poem"}):
        with pytest.raises(LLMConfigError):
            runner.run([MESSAGES], **wrong)


def test_an_answer_goes_on_from_a_last_message_of_the_assistants(runner: BaseLLMRunner) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Par"}]
    assert runner.prompt_text(runner.request(begun)) == f"{runner.render(MESSAGES)}Par"
    assert runner.generate_text(begun) == runner.run([begun])[0].text == "is"
    assert runner.create_chat_completion(begun)["choices"][0]["message"]["content"] == "is"
    closed = runner.request(begun, continue_final=False)
    assert runner.prompt_text(closed).endswith("Par<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(LLMInferenceError, match="not the beginning of an answer: its role is 'user'"):
        runner.generate_text(MESSAGES, continue_final=True)
    with pytest.raises(LLMConfigError, match="continue_final='maybe' is not allowed; it must be auto, true or false"):
        runner.generate_text(begun, continue_final="maybe")


def test_what_only_chats_have_is_refused_where_it_would_be_dropped(runner: BaseLLMRunner) -> None:
    weather = {"type": "function", "function": {"name": "weather"}}
    options: list[dict[str, Any]] = [{"tools": [weather]}, {"chat_template_kwargs": {"a": 1}}, {"continue_final": True}]
    for option in options:
        with pytest.raises(LLMConfigError, match="need a chat, not a raw prompt"):
            runner.generate_text(STORY, prompt_format="raw", **option)
    with pytest.raises(LLMConfigError, match="tools are an object, not a list"):
        runner.create_chat_completion(MESSAGES, tools=weather)
    with pytest.raises(LLMConfigError, match="cannot have the name 'messages'"):
        runner.generate_text(MESSAGES, chat_template_kwargs={"messages": []})
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]
    for choice in choices:
        with pytest.raises(LLMConfigError, match="tool_choice=.* is not allowed; it must be 'auto' or 'none'"):
            runner.create_chat_completion(MESSAGES, tools=[weather], tool_choice=choice)


@pytest.mark.parametrize("messages", [[], "hello", [1], None])
def test_what_is_no_chat_is_refused(messages: Any, runner: BaseLLMRunner) -> None:
    with pytest.raises(LLMConfigError, match="list of messages"):
        runner.create_chat_completion(messages)


def test_a_plain_prompt_is_a_chat_unless_it_is_asked_for_raw(runner: BaseLLMRunner) -> None:
    chat = runner.generate_text(STORY, max_tokens=10)
    assert chat == runner.generate_text([{"role": "user", "content": STORY}], max_tokens=10)
    assert chat == runner.generate_text(STORY, prompt_format="chat", max_tokens=10)
    request = runner.request(STORY, prompt_format="raw")
    assert (request.prompt, request.messages) == (STORY, None)
    with pytest.raises(LLMConfigError, match="auto, chat or raw"):
        runner.generate_text(STORY, prompt_format="poem")


def test_completions_come_in_the_order_of_the_prompts(runner: BaseLLMRunner) -> None:
    prompts = [STORY, "Add 1 and 2.", [{"role": "user", "content": "Add 20 and 3."}]] * 4
    done = runner.run(prompts, max_tokens=15)
    assert [c.request_id for c in done] == list(range(12))
    assert [c.text for c in done] == [c.text for c in done[:3]] * 4
    assert all(c.latency_s >= (c.first_token_s or 0) > 0 and c.queue_s is not None for c in done if c.latency_s)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["What is 2 + 2?", {"role": "user"}, pd.DataFrame({"prompt": ["a"]})])
def test_what_is_not_many_prompts_is_refused(prompts: Any, runner: BaseLLMRunner) -> None:
    with pytest.raises(LLMConfigError, match="it must be a list of prompts"):
        runner.run(prompts)


def test_reload_takes_another_model_and_device(fresh: BaseLLMRunner, tmp_path: Path) -> None:
    text = fresh.generate_text(STORY, max_tokens=8)
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED_DIR, copy)
    model = copy / LOCAL["llama_cpp" if "Llama" in type(fresh).__name__ else "transformers"]
    fresh.reload(model=str(model), device="cpu")
    assert fresh.config.model == str(model)
    assert fresh.generate_text(STORY, max_tokens=8) == text
    assert fresh.load_s > 0


def test_a_failed_reload_leaves_the_runner_closed_and_able_to_come_back(fresh: BaseLLMRunner, tmp_path: Path) -> None:
    for wrong in ({"model": str(tmp_path / "nowhere")}, {"device": "mps"}, {"device": "abacus"}):
        with pytest.raises(LLMError):
            fresh.reload(**wrong)
    fresh.reload(device="cpu")
    with pytest.raises(LLMInitializationError, match="nowhere"):
        fresh.reload(model=str(tmp_path / "nowhere"))
    assert not fresh.is_loaded
    with pytest.raises(LLMInferenceError, match="closed"):
        fresh.generate_text(STORY)
    fresh.reload()
    assert fresh.config.model == "bundled"
    assert fresh.generate_text(STORY, max_tokens=2)


def test_a_closed_runner_refuses_work_and_says_what_to_do(fresh: BaseLLMRunner) -> None:
    stream = fresh.generate_text_streaming(STORY)  # not begun
    fresh.close()
    fresh.close()
    uses = [
        lambda: fresh.generate_text(STORY),
        lambda: fresh.generate_text(STORY, prompt_format="chat"),
        lambda: fresh.create_chat_completion(MESSAGES),
        lambda: fresh.run([STORY]),
        lambda: list(stream),
        lambda: list(fresh.stream([])),
        lambda: fresh.info(),
    ]
    for use in uses:
        with pytest.raises(LLMInferenceError, match=r"closed: call reload\(\) first"):
            use()
    assert fresh.memory_usage()["device_mb"] is None


def test_a_second_stream_in_one_thread_is_refused_and_the_first_goes_on(runner: BaseLLMRunner) -> None:
    expected = runner.generate_text(STORY, max_tokens=10)
    stream = runner.generate_text_streaming(STORY, max_tokens=10)
    text = next(stream)
    with pytest.raises(LLMInferenceError, match="busy with a stream of this thread"):
        runner.generate_text(STORY)
    assert text + "".join(stream) == expected
    assert runner.generate_text(STORY, max_tokens=10) == expected


def test_threads_take_turns(runner: BaseLLMRunner) -> None:
    expected = runner.generate_text(STORY, max_tokens=10)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(runner.generate_text(STORY, max_tokens=10))) for _ in range(3)
    ]
    stream = runner.generate_text_streaming(STORY, max_tokens=10)
    text = next(stream)
    for thread in threads:
        thread.start()
    assert found == []  # they wait for the open stream
    text += "".join(stream)
    for thread in threads:
        thread.join(60)
    assert [text, *found] == [expected] * 4


def test_leaving_a_with_block_amid_a_stream_closes_both_and_shows_the_real_error(fresh: BaseLLMRunner) -> None:
    with pytest.raises(KeyError, match="mine"):
        with fresh:
            stream = fresh.generate_text_streaming(STORY, max_tokens=50)
            next(stream)
            raise KeyError("mine")
    assert not fresh.is_loaded
    assert list(stream) == []


def test_closing_from_inside_a_stream_is_refused(fresh: BaseLLMRunner) -> None:
    def requests() -> Iterator[llmpipe.Request]:
        yield fresh.request(STORY, max_tokens=2)
        fresh.close()

    with pytest.raises(LLMInferenceError, match="busy"):
        list(fresh.completions(requests()))
    assert fresh.generate_text(STORY, max_tokens=2)


def test_memory_usage_names_what_it_measures(runner: BaseLLMRunner) -> None:
    usage = runner.memory_usage()
    assert usage["rss_mb"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.2)
    assert set(usage) == {"rss_mb", "device_mb", "peak_device_mb"}


def grows_by_mb(runner: BaseLLMRunner, reloads: int) -> float:
    for _ in range(2):
        runner.reload()
        runner.generate_text(STORY, max_tokens=2)
    before = runner.memory_usage()["rss_mb"] or 0
    for _ in range(reloads):
        runner.reload()
        runner.generate_text(STORY, max_tokens=2)
    return (runner.memory_usage()["rss_mb"] or 0) - before


def test_reloading_gives_the_memory_back(fresh: BaseLLMRunner) -> None:
    assert grows_by_mb(fresh, 4) < 25  # the model has 10 MB of weights and twice that in caches


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_reloads(fresh: BaseLLMRunner) -> None:
    assert grows_by_mb(fresh, 20) < 25


# --- errors that name the remedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"backend": "lama_cpp"}, "did you mean 'llama.cpp'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"thread": 1}, "did you mean 'threads'"),
        ({"temperature": -1}, r"temperature=-1 is not allowed; it must be a number in \[0, 100\]"),
        ({"max_tokens": "many"}, "max_tokens='many' is not allowed"),
        ({"device": "tpu"}, "one of auto, cpu, cuda, mps"),
        ({"slots": 0}, "backend.slots=0 is not allowed"),
        ({"backend": "transformers", "dtype": "float12"}, "one of auto, float32, bfloat16, float16"),
        ({"backend": "transformers", "n_gpu_layers": 3}, "unknown option 'n_gpu_layers'"),
        ({"flash_attention": "on", "reproducible": True}, "needs backend.flash_attention=auto or off"),
        ({"cache_type_k": "f12"}, "one of f32, f16"),
        ({"chat_template": "{{ unclosed"}, "not valid Jinja, line 1"),
        ({"chat_template": "no/such/file"}, "neither Jinja nor a readable file"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(LLMConfigError, match=says) as caught:
        LLMRunnerFactory.create_runner(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["bundled", Path("model.gguf"), None, 5, ["bundled"]])
def test_what_is_no_configuration_is_refused_with_an_example_of_one(config: Any) -> None:
    with pytest.raises(LLMConfigError) as caught:
        LLMRunnerFactory.create_runner(config)
    said = str(caught.value)
    assert f"config={config!r} is not allowed; it must be a ModelConfig or a dictionary, such as {{" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_path": "./nowhere.gguf"}, "does not exist"),
        ({"model_path": "./nowhere", "backend": "transformers"}, "does not exist"),
        ({"device": "cuda"}, "use device=cpu"),
        ({"device": "mps"}, "use device=cpu"),
        ({"device": "cuda", "backend": "transformers"}, "use one of auto, cpu"),
        ({"device": "mps", "backend": "transformers"}, "use one of auto, cpu"),
        (
            {"model_path": str(BUNDLED_DIR / "model.safetensors"), "backend": "transformers"},
            "takes a directory, a GGUF",
        ),
        ({"model_path": str(BUNDLED_DIR / "model.safetensors")}, "use backend=transformers"),
        ({"slots": 100_000}, "backend.slots=100000 is more than"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named_with_the_remedy_in_one_line(config: dict[str, Any], says: str) -> None:
    if config.get("device") == "cuda" and _has_cuda():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(LLMInitializationError, match=says) as caught:
        LLMRunnerFactory.create_runner(config)
    assert "\n" not in str(caught.value)


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("backend", "package", "remedy"),
    [
        ("llama_cpp", "llama_cpp", "pip install 'llmpipe[llama-cpp]'"),
        ("transformers", "torch", "pip install 'llmpipe[transformers]'"),
        ("transformers", "transformers", "pip install 'llmpipe[transformers]'"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(backend: str, package: str, remedy: str) -> None:
    said = python(
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from llmpipe import LLMRunnerFactory, MissingDependencyError\n"
        f"assert LLMRunnerFactory.create_runner({{'backend': 'echo'}}).generate_text('still works') == 'still works'\n"
        f"try: LLMRunnerFactory.create_runner({{'backend': {backend!r}}})\n"
        f"except MissingDependencyError as error: print(error)\n"
    )
    assert remedy in said
    assert said.count("\n") == 1


def test_a_broken_llama_cpp_library_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('Failed to load shared library: libgomp')")
    said = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from llmpipe import LLMInitializationError, LLMRunnerFactory\n"
        "try: LLMRunnerFactory.create_runner({})\n"
        "except LLMInitializationError as error: print(error)\n"
    )
    assert "libgomp" in said
    assert "pip install --force-reinstall" in said


# --- the names --------------------------------------------------------------------------------------------------------


def test_the_old_single_import_has_every_name_and_loads_nothing_heavy() -> None:
    said = python(
        "import sys\n"
        "import llmpipe, llmpipe.llm_runner as old\n"
        "assert set(old.__all__) <= set(llmpipe.__all__)\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'pandas', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from llmpipe.llm_runner import LLMRunnerFactory, ModelConfig, BackendType, DeviceType, LLMInferenceError\n"
        "for name in old.__all__: assert getattr(old, name) is getattr(llmpipe, name)\n"
        "print('fine')\n"
    )
    assert said == "fine\n"


@pytest.mark.parametrize("backend", ["llama.cpp", "transformers"])
def test_the_examples_run(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llmpipe import example

    example.main(backend)
    said = capsys.readouterr().out
    assert "prompt_tokens" in said
    assert "error: the prompt has" in said
    assert "did you mean 'temperature'" in said
