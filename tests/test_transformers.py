"""What is particular to the transformers backend: text of any tokenizer, padding, checkpoints, end tokens."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llmpipe import BaseLLMRunner, LLMInferenceError, LLMInitializationError, LLMRunnerFactory, SamplingConfig
from llmpipe.config import TransformersConfig
from llmpipe.runners.batching import Engine
from llmpipe.runners.decoding import Utf8Stream
from llmpipe.runners.transformers.detokenizer import Detokenizer
from llmpipe.runners.transformers.padded import PaddedExecutor
from llmpipe.runners.weights import BUNDLED_DIR

BATCHING = ["slots", "padded"]
STORY = "Tell me a story about a fox and a violin."
PIECES = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12)


def byte_level() -> tuple[Any, list[int]]:
    """Return the bundled tokenizer, and for each byte the token that is this byte alone."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR)
    letters = bytes_to_unicode()
    return tokenizer, [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in range(256)]


def byte_fallback() -> tuple[Any, list[int]]:
    """Return a tokenizer in the way of SentencePiece, whose unknown characters become tokens like <0xE6>."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "▁", "!"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), list(range(1, 257))


TOKENIZERS = {"byte-level": byte_level(), "byte fallback": byte_fallback()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(before=PIECES, text=PIECES)
def test_any_text_comes_out_byte_token_by_byte_token_with_whole_characters(kind: str, before: str, text: str) -> None:
    tokenizer, byte_tokens = TOKENIZERS[kind]
    stream = Detokenizer(tokenizer, [byte_tokens[byte] for byte in before.encode()])
    pieces = [stream.push(byte_tokens[byte]) for byte in text.encode()]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) == len(text)  # each character as soon as it is complete


@given(before=st.binary(max_size=4), data=st.binary(max_size=16))
def test_bytes_of_no_character_are_replaced_as_llama_cpp_replaces_them(before: bytes, data: bytes) -> None:
    tokenizer, byte_tokens = TOKENIZERS["byte-level"]
    expected, bytewise = Utf8Stream(), Detokenizer(tokenizer, [byte_tokens[byte] for byte in b"ab"])
    text = "".join(expected.push(bytes([byte])) for byte in data)
    assert "".join(bytewise.push(byte_tokens[byte]) for byte in data).rstrip("\ufffd") == text.rstrip("\ufffd")


@pytest.mark.parametrize("garbage", [1, 2, 3, 4, 7])
def test_text_after_garbage_comes_out_again_with_byte_fallback(garbage: int) -> None:
    tokenizer, byte_tokens = TOKENIZERS["byte fallback"]
    hello = tokenizer.convert_tokens_to_ids("▁Hello")
    stream = Detokenizer(tokenizer, [hello])
    tokens = [byte_tokens[0xFF]] * garbage + [hello] + [byte_tokens[byte] for byte in "日".encode()]
    assert "".join(stream.push(token) for token in tokens) == "\ufffd" * garbage + " Hello日"


def test_leading_spaces_are_those_of_the_whole_text() -> None:
    tokenizer, _ = TOKENIZERS["byte fallback"]
    hello, world, space, mark = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world", "▁", "!"])
    stream = Detokenizer(tokenizer, [hello])
    assert [stream.push(token) for token in (world, mark, space, space, hello)] == [" world", "!", " ", " ", " Hello"]
    assert [Detokenizer(tokenizer, []).push(hello)] == ["Hello"]


def test_text_before_an_unfinished_character_is_not_held_back_with_it() -> None:
    """A token may end one character and begin the next; nothing of the first is lost when the answer ends there."""

    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return b"".join([b"ab\xe6", b"\x97", b"\xa5!"][i] for i in ids).decode("utf-8", "replace")

    stream = Detokenizer(Tokenizer(), [])
    assert [stream.push(i) for i in (0, 1, 2)] == ["ab", "", "日!"]


def test_special_tokens_have_no_text_and_disturb_none(transformers_runner: BaseLLMRunner) -> None:
    tokenizer, byte_tokens = TOKENIZERS["byte-level"]
    a = byte_tokens[ord("a")]
    stream = Detokenizer(tokenizer, [a])
    assert [stream.push(token) for token in (a, tokenizer.eos_token_id, a, tokenizer.eos_token_id, a)] == [
        "a", "", "a", "", "a",
    ]  # fmt: skip


@given(data=st.data(), kind=st.sampled_from(list(TOKENIZERS)))
@settings(max_examples=200, deadline=None)
def test_tokens_one_by_one_give_what_all_of_them_give_at_once(data: st.DataObject, kind: str) -> None:
    """Whole characters, words, special tokens and ids beyond the vocabulary; of bytes, also those of no character."""
    tokenizer, byte_tokens = TOKENIZERS[kind]
    characters = st.characters(codec="utf-8", exclude_characters="\ufffd").map(
        lambda c: [byte_tokens[b] for b in c.encode()]
    )
    others = st.sampled_from([*tokenizer.all_special_ids, len(tokenizer) + 5]) | st.integers(257, len(tokenizer) - 1)
    pieces = characters | others.map(lambda token: [token])
    if kind == "byte-level":  # the other one decodes a run of bytes as a whole, and so backwards in time
        pieces |= st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    many = st.integers(1, 50).flatmap(lambda n: pieces.map(lambda piece: piece * n))
    ids = [i for piece in data.draw(st.lists(pieces | many, max_size=12)) for i in piece]
    prompt = [byte_tokens[ord("a")]]
    stream = Detokenizer(tokenizer, prompt)
    text = "".join(stream.push(token) for token in ids)
    expected = tokenizer.decode(prompt + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ("a" + text).rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert expected.startswith("a" + text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_takes_no_more_time_and_room_however_many_came_before(kind: str) -> None:
    tokenizer, byte_tokens = TOKENIZERS[kind]
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    silent = [tokenizer.all_special_ids[0], len(tokenizer) + 5]
    for tokens in ([byte_tokens[0xFF]], [byte_tokens[0xE6]], [byte_tokens[0xF0], byte_tokens[0xFF]], silent):
        stream = Detokenizer(Counting(), [byte_tokens[ord("a")]])
        text = "".join(stream.push(token) for _ in range(1000) for token in tokens)
        assert len(tokens) * 1000 - 4 <= len(text) <= len(tokens) * 1000 if tokens != silent else not text
    assert max(decoded) < 50
    assert len(decoded) < 2.5 * 6000


# --- padding ----------------------------------------------------------------------------------------------------------


class Tape:
    """Stands for a tokenizer: the text of a token is its number."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{i} " for i in ids)


def test_rows_at_the_contexts_end_do_not_disturb_a_model_with_learned_positions() -> None:
    """GPT-2 has no position after its last; a finished row that waits for its batch must not ask for one."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    sampling = SamplingConfig(temperature=0, max_tokens=100)
    from llmpipe import Request

    requests = [Request(i, sampling, prompt=str(size)) for i, size in enumerate((15, 12, 14, 2, 1, 3))]

    def run(slots: int) -> dict[int, str]:
        config = TransformersConfig(slots=slots)
        engine = Engine(PaddedExecutor(model, Tape(), set(), config, 16), config, 16)
        texts = dict.fromkeys(range(6), "")
        for chunk in engine.stream(requests, lambda request: (list(range(1, 1 + int(request.prompt))), 0)):
            texts[chunk.request_id] += chunk.text
        return texts

    assert [len(text.split()) for text in run(6).values()] == [1, 4, 2, 14, 15, 13]
    assert run(6) == run(1)


@pytest.mark.parametrize("batching", BATCHING)
def test_a_model_that_fails_raises_one_readable_error(batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes\ndo not fit")

    with LLMRunnerFactory.create_runner(
        {"backend": "transformers", "device": "cpu", "batching": batching, "reproducible": True}
    ) as runner:
        monkeypatch.setattr(runner._model, "forward", fail)  # type: ignore[attr-defined]
        with pytest.raises(LLMInferenceError, match="the model fails: shapes do not fit"):
            runner.generate_text(STORY)


# --- memory -----------------------------------------------------------------------------------------------------------


def scarce(runner: Any, monkeypatch: pytest.MonkeyPatch, most_tokens: int, last_position: int = 2**31) -> None:
    """Let the model run out of memory with more tokens in a call, or with a longer row."""
    forward = runner._model.forward

    @functools.wraps(forward)
    def limited(*args: Any, **inputs: Any) -> Any:
        if inputs["input_ids"].numel() > most_tokens or int(inputs["position_ids"].max()) > last_position:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **inputs)

    monkeypatch.setattr(runner._model, "forward", limited)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batching", BATCHING)
def test_rows_survive_running_out_of_memory_with_the_answers_they_had(
    batching: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"Add {i} and {i + 3}, please." for i in range(24)]
    options = {"max_tokens": 12, "temperature": temperature}
    with LLMRunnerFactory.create_runner({"backend": "transformers", "device": "cpu", "batching": batching}) as runner:
        expected = [c.text for c in runner.run(prompts, **options)]
        longest = max(c.prompt_tokens or 0 for c in runner.run(prompts, **options))
        scarce(runner, monkeypatch, max(3 * longest, 40))
        assert [c.text for c in runner.run(prompts, **options)] == expected
        assert runner.info()["shrinks"] > 0
        monkeypatch.undo()
        assert [c.text for c in runner.run(prompts * 6, **options)][: len(prompts)] == expected


@pytest.mark.parametrize("batching", BATCHING)
def test_a_row_that_does_not_fit_by_itself_is_an_error_and_its_neighbours_finish(
    batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Add 1 and 2.", STORY * 8, "Add 2 and 3.", "Add 4 and 4."]
    with LLMRunnerFactory.create_runner({"backend": "transformers", "device": "cpu", "batching": batching}) as runner:
        expected = [c.text for c in runner.run(prompts, max_tokens=8, temperature=0.0)]
        scarce(runner, monkeypatch, 10_000, last_position=60)
        done = runner.run(prompts, max_tokens=8, temperature=0.0)
    assert "out of memory on cpu for this row alone" in (done[1].error or "")
    assert [done[i].text for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_more_rows_are_tried_again_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"backend": "transformers", "device": "cpu", "slots": 4}
    with LLMRunnerFactory.create_runner(config) as runner:
        scarce(runner, monkeypatch, 3)
        runner.run(["a"] * 4, prompt_format="raw", max_tokens=4, ignore_eos=True, n=1)
        scheduler: Any = runner._engine.scheduler  # type: ignore[attr-defined]
        assert scheduler._cap.slots < 4
        monkeypatch.undo()
        scheduler.most_rows_in_flight = 0
        runner.run(["a"] * 100, prompt_format="raw", max_tokens=4, ignore_eos=True)
        assert scheduler.most_rows_in_flight == 4
        assert scheduler._cap is None or scheduler._cap.slots >= 4


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(BUNDLED_DIR, tmp_path / "copy", ignore=shutil.ignore_patterns("*.gguf"))
    yield tmp_path / "copy"


def load(checkpoint: Path, **options: Any) -> BaseLLMRunner:
    config = {"backend": "transformers", "device": "cpu", "temperature": 0.0, "model_path": str(checkpoint), **options}
    return LLMRunnerFactory.create_runner(config)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_pickled_weights_are_loaded_only_where_it_is_allowed(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(LLMInitializationError, match="safetensors") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)
    with load(checkpoint, allow_pickle=True) as runner:
        assert runner.generate_text(STORY, max_tokens=2)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_an_error_in_one_line_that_names_the_model(name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:200])
    with pytest.raises(LLMInitializationError, match="TransformersRunner cannot load '.*copy'") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_model_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(LLMInitializationError, match=r"encoder-decoder model \(T5Config\)"):
        load(checkpoint)


def test_end_tokens_of_generation_config_and_tokenizer_both_end_an_answer(
    checkpoint: Path, transformers_runner: BaseLLMRunner
) -> None:
    expected = transformers_runner.generate_text("Add 1 and 2.", max_tokens=50)
    edit(checkpoint / "generation_config.json", eos_token_id=0)
    with load(checkpoint) as runner:
        assert runner.generate_text("Add 1 and 2.", max_tokens=50) == expected


def test_the_context_is_what_the_model_was_trained_for(checkpoint: Path) -> None:
    for trained, context in ((128, 128), (100_000, 100_000)):
        edit(checkpoint / "config.json", max_position_embeddings=trained)
        with load(checkpoint) as runner:
            assert runner.info()["context"] == context


def test_another_chat_template_may_be_given(checkpoint: Path) -> None:
    with load(checkpoint, chat_template="Q: {{ messages[0].content }}\nA:") as runner:
        assert runner.prompt_text(runner.request("Why?")) == "Q: Why?\nA:"


def test_a_model_without_a_chat_template_takes_plain_prompts_and_refuses_chats(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with load(checkpoint) as runner:
        assert runner.request(STORY).messages is None
        with pytest.raises(LLMInferenceError, match="no chat template: use prompt=raw or backend.chat_template=FILE"):
            runner.create_chat_completion([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_number_format_is_what_was_asked_for(dtype: str) -> None:
    with LLMRunnerFactory.create_runner({"backend": "transformers", "device": "cpu", "dtype": dtype}) as runner:
        assert runner.info()["dtype"] == dtype.replace("auto", "float32")
        assert runner.run([STORY], max_tokens=3)[0].error is None


def test_reproducible_runs_each_row_by_itself() -> None:
    config = {"backend": "transformers", "device": "cpu", "reproducible": True, "slots": 8}
    with LLMRunnerFactory.create_runner(config) as runner:
        assert runner.run(["a", "b", "c"], max_tokens=2)[0].error is None
        assert runner.info()["most_rows_in_flight"] == 1
        assert "1 row at a time: backend.reproducible=true" in runner.info()["sizes"]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_answers(transformers_runner: BaseLLMRunner) -> None:
    prompts = [STORY, "Add 1 and 2."]
    expected = [c.text for c in transformers_runner.run(prompts, max_tokens=10)]
    config = {"backend": "transformers", "device": "cpu", "compile": True, "temperature": 0.0}
    with LLMRunnerFactory.create_runner(config) as runner:
        assert [c.text for c in runner.run(prompts, max_tokens=10)] == expected
