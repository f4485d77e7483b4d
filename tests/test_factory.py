"""Configuration → runner, and backends of someone else's."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmpipe
from llmpipe import BackendType, LLMConfigError, LLMError, LLMInferenceError, LLMRunnerFactory, ModelConfig, compose
from llmpipe.config import DeviceConfig
from llmpipe.runners import EchoRunner

MODULE = '''
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmpipe import BaseLLMRunner, Chunk, Request
from llmpipe.config import BackendConfig


@dataclass
class ShoutConfig(BackendConfig):
    mark: str = "!"


class Shout(BaseLLMRunner):
    """Batches by itself, and has an option of its own."""

    config_type = ShoutConfig

    def _initialize_model(self) -> None:
        self.loads = getattr(self, "loads", 0) + 1

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        for request in requests:
            text = self.prompt_text(request).upper() + self.config.mark
            for sample in request.samples:
                yield Chunk(request.id, sample, text[:2])
                yield Chunk(request.id, sample, text[2:], "stop", prompt_tokens=1, completion_tokens=1)


class Words(BaseLLMRunner):
    """In the style of the document: one prompt at a time."""

    def _initialize_model(self) -> None:
        pass

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        if "fail" in prompt:
            raise ConnectionError("the server is\\ngone")
        for word in prompt.split()[:max_tokens]:
            yield word + " "


class Nothing(BaseLLMRunner):
    def _initialize_model(self) -> None:
        pass


not_a_class = 3
'''


@pytest.fixture
def mymod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "mymod.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(LLMRunnerFactory, "_registered", {})
    import mymod  # type: ignore[import-not-found]

    yield mymod
    del sys.modules["mymod"]


@pytest.mark.parametrize("name", ["llama.cpp", "llama_cpp", "LLAMA_CPP", "llama-cpp", BackendType.LLAMA_CPP])
def test_llama_cpp_goes_by_several_names(name: str) -> None:
    assert BackendType(name) is BackendType.LLAMA_CPP


def test_a_dictionary_is_read_as_it_is_or_under_llm() -> None:
    for config in ({"backend": "echo", "max_tokens": 2}, {"llm": {"backend": "echo", "max_tokens": 2}, "other": 1}):
        assert LLMRunnerFactory.create_runner(config).generate_text("one two three") == "one two"


def test_options_may_stand_in_options_or_beside_the_others() -> None:
    for config in ({"slots": 3}, {"options": {"slots": 3}}):
        assert LLMRunnerFactory.create_runner({"backend": "echo", **config}).config.slots == 3
    assert LLMRunnerFactory.create_runner(ModelConfig(backend="echo", options={"slots": 3})).config.slots == 3


# --- backends of someone else's ---------------------------------------------------------------------------------------


def test_a_registered_backend_is_made_by_its_name_with_its_own_options(mymod: Any) -> None:
    LLMRunnerFactory.register("shout", mymod.Shout)
    runner = LLMRunnerFactory.create_runner({"backend": "shout", "mark": "?", "model_path": "mine"})
    assert runner.generate_text("hello") == "HELLO?"
    assert list(runner.generate_text_streaming("hello")) == ["HE", "LLO?"]
    assert (
        runner.create_chat_completion([{"role": "user", "content": "hi"}])["choices"][0]["message"]["content"] == "HI?"
    )
    assert [c.text for c in runner.run(["a", "b"], n=2)] == ["A?", "A?", "B?", "B?"]
    runner.reload(model="other")
    assert (runner.loads, runner.config.model) == (2, "other")
    with pytest.raises(LLMConfigError, match="did you mean 'mark'"):
        LLMRunnerFactory.create_runner({"backend": "shout", "marc": "?"})


def test_a_backend_with_only_run_streaming_has_every_convenience(mymod: Any) -> None:
    LLMRunnerFactory.register("words", mymod.Words)
    with LLMRunnerFactory.create_runner({"backend": "words", "max_tokens": 3}) as runner:
        assert list(runner.generate_text_streaming("one two three four")) == ["one ", "two ", "three "]
        done = runner.run(["one two", "one two three four", "", "please fail", "a b"], stop=["o f", "b"])
        assert [c.text for c in done] == ["one two ", "one two three ", "", None, "a "]
        assert [c.finish_reason for c in done] == ["stop", "length", "stop", "error", "stop"]
        assert done[3].error == "the server is gone"
        with pytest.raises(LLMInferenceError, match="gone"):
            runner.generate_text("fail")


@pytest.mark.parametrize("option", [{"top_p": 0.5}, {"seed": 3}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 2}}])
def test_an_option_that_run_streaming_cannot_take_is_refused_by_name(option: dict[str, Any], mymod: Any) -> None:
    (name,) = option
    with pytest.raises(LLMInferenceError, match=f"Words cannot honour sampling.{name}"):
        mymod.Words({}).generate_text("hello", **option)


def test_a_backend_that_cannot_generate_says_what_to_implement(mymod: Any) -> None:
    with pytest.raises(LLMError, match="Nothing must implement stream or _run_streaming"):
        mymod.Nothing({}).generate_text("hello")


def test_a_name_of_llmpipes_own_cannot_be_registered() -> None:
    for name in ("llama.cpp", "llama_cpp", "transformers", "echo"):
        with pytest.raises(LLMConfigError, match="taken"):
            LLMRunnerFactory.register(name, EchoRunner)


def test_an_unknown_backend_is_refused_with_those_there_are(mymod: Any) -> None:
    LLMRunnerFactory.register("shout", mymod.Shout)
    with pytest.raises(LLMConfigError, match="did you mean 'shout'. There are: echo, llama.cpp, shout, transformers"):
        LLMRunnerFactory.create_runner({"backend": "shot"})


@pytest.mark.parametrize("runner", ["Shout", "Words"])
def test_the_pipeline_runs_a_trusted_backend_by_its_target(
    runner: str, mymod: Any, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl({"prompt": "one two"}, {"prompt": "three"})
    overrides = ["backend=echo", f"backend._target_=mymod.{runner}", f"dataset.path={rows}", "trusted_modules=[mymod]"]
    metrics = llmpipe.run(compose(overrides), tmp_path / "run")
    assert (metrics["rows"], metrics["rows_ok"]) == (2, 2)
    expected = {"Shout": ["ONE TWO!", "THREE!"], "Words": ["one two ", "three "]}
    frame, _ = llmpipe.read_run(tmp_path / "run")
    assert list(frame["completion"]) == expected[runner]


def test_the_pipeline_runs_a_backend_of_a_config_directory_with_its_own_options(
    mymod: Any, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "conf/backend").mkdir(parents=True)
    (tmp_path / "conf/backend/mine.yaml").write_text("_target_: mymod.Shout\nmark: '...'\n")
    rows = write_jsonl({"prompt": "one"})
    overrides = ["backend=mine", f"dataset.path={rows}", "trusted_modules=[mymod]"]
    llmpipe.run(compose(overrides, config_dir=tmp_path / "conf"), tmp_path / "run")
    frame, _ = llmpipe.read_run(tmp_path / "run")
    assert list(frame["completion"]) == ["ONE..."]


@pytest.mark.parametrize("trusted", [[], ["other"], ["mymo"], ["mymod.sub"]])
def test_a_target_that_is_not_trusted_is_refused_unimported(trusted: list[str], tmp_path: Path) -> None:
    sys.modules.pop("mymod", None)
    with pytest.raises(LLMConfigError, match=r"not trusted: .*trusted_modules=\[mymod\]"):
        LLMRunnerFactory.from_target({"_target_": "mymod.Shout"}, DeviceConfig(), trusted)
    assert "mymod" not in sys.modules


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("mymod.Missing", "mymod has no Missing"),
        ("mymod.not_a_class", "no subclass of BaseLLMRunner"),
        ("mymod.sub.Runner", "no module mymod.sub"),
        ("Runner", "must be MODULE.CLASS"),
        ("llmpipe.config.RunConfig", "no subclass of BaseLLMRunner"),
    ],
)
def test_a_target_that_is_no_runner_is_refused_with_the_reason(target: str, says: str, mymod: Any) -> None:
    with pytest.raises(LLMConfigError, match=says):
        LLMRunnerFactory.from_target({"_target_": target}, DeviceConfig(), ["mymod"])
