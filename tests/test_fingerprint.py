"""What a resumption must have in common with the run it continues: contents, not names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmpipe import LLMInitializationError, RunConfig, compose
from llmpipe.datasets import Dataset
from llmpipe.fingerprint import fingerprint
from llmpipe.runners.weights import model_digest


@pytest.fixture
def of(write_jsonl: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Return the fingerprint of a run over one row, with the given overrides."""
    path = write_jsonl({"prompt": "hi"})

    def make(*overrides: str) -> dict[str, Any]:
        config: RunConfig = compose([f"dataset.path={path}", *overrides])
        return fingerprint(config, Dataset(config.dataset).scan())

    return make


def test_answers_decide_it_and_speed_does_not(of: Callable[..., dict[str, Any]]) -> None:
    plain = of()
    for same in ("backend.slots=3", "backend.threads=1", "backend.micro_batch_tokens=64", "output=parquet"):
        assert of(same) == plain, same
    for other in ("sampling.top_k=5", "seed=1", "prompt.system=hi", "backend.cache_type_k=f32", "dataset.limit=1"):
        assert of(other) != plain, other


def test_in_reproducible_mode_the_last_digit_counts(of: Callable[..., dict[str, Any]]) -> None:
    plain = of("backend.reproducible=true")
    assert of("backend.reproducible=true", "backend.slots=3") == plain
    assert of("backend.reproducible=true", "backend.micro_batch_tokens=64") != plain
    assert of("backend.reproducible=true", "device=cpu") != plain


def test_a_file_counts_by_its_content(of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    template, adapter = tmp_path / "chat.jinja", tmp_path / "a.gguf"
    template.write_text("one")
    adapter.write_bytes(b"one")
    asked = (f"backend.chat_template={template}", f"backend.lora=['{adapter}=0.5']")
    before = of(*asked)
    assert of(*asked) == before
    template.write_text("two")
    changed = of(*asked)
    assert changed != before
    adapter.write_bytes(b"two")
    assert of(*asked) != changed


def test_tools_count_by_what_they_are_and_not_by_where_they_stand(
    of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('[{"name": "f"}]')
    other.write_text('[ {"name": "f"} ]')
    before = of(f"prompt.tools={one}")
    assert before == of(f"prompt.tools={other}") == of("prompt.tools=[{name:f}]") != of()
    one.write_text('[{"name": "g"}]')
    assert of(f"prompt.tools={one}") != before
    assert of("prompt.chat_template_kwargs={enable_thinking:false}") != of() != of("prompt.continue_final=false")


def test_a_backend_of_someone_elses_is_taken_at_its_word(of: Callable[..., dict[str, Any]]) -> None:
    foreign = ("backend=echo", "backend._target_=mine.Remote", "trusted_modules=[mine]")
    one = of(*foreign, "backend.model=gpt-x")
    assert one["model"] == "gpt-x"
    assert of(*foreign, "backend.model=gpt-y") != one


def test_a_model_in_parts_is_all_its_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    before = model_digest(str(parts[0]))
    parts[1].write_bytes(b"GGUF changed")
    assert model_digest(str(parts[0])) != before


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(LLMInitializationError, match="does not exist"):
        model_digest("./nowhere")
