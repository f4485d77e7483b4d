"""Checkpoints from anywhere: what leads to code or to files elsewhere, or would end the process, is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPTS, answers, edit, load, make_adapter, refusal
from safetensors.torch import load_file
from transformers import Gemma3Config

from llmpipe import LLMConfigError, LLMInitializationError
from llmpipe.cli import main
from llmpipe.config import TransformersConfig
from llmpipe.runners import trials
from llmpipe.runners.transformers import TransformersRunner
from llmpipe.runners.transformers.loading import refuse_kernels
from llmpipe.runners.transformers.trial import try_tokenizer
from llmpipe.runners.weights import BUNDLED_DIR


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with load() as runner:
        return answers(runner)


# --- files ------------------------------------------------------------------------------------------------------------


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(checkpoint, model_type="custom", auto_map={"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"})
    assert "trust_remote_code=True" in refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def list_weights(checkpoint: Path, file: Any, index: str = "model.safetensors.index.json") -> None:
    names = load_file(checkpoint / "model.safetensors")
    (checkpoint / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("w.bin", "names 'w.bin', which is no safetensors; pickled weights need backend.allow_pickle=true"),
        ("{outside}/model.safetensors", "which does not lie beside it"),
        ("../other/model.safetensors", "which does not lie beside it"),
        ("inside/model.safetensors", "which does not lie beside it"),
        ("..", "which does not lie beside it"),
        ("", "which does not lie beside it"),
        (None, "names 'None', which does not lie beside it"),
        (["w.bin"], "which does not lie beside it"),
    ],
)
def test_weights_that_an_index_names_lie_beside_it_and_are_safetensors(
    file: Any, reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for directory in (other, checkpoint / "inside"):
        directory.mkdir()
        shutil.copy(checkpoint / "model.safetensors", directory)
    if isinstance(file, str):
        file = file.format(outside=other)
    list_weights(checkpoint, file)
    (checkpoint / "model.safetensors").rename(tmp_path / "aside")
    (checkpoint / "w.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    assert reason in refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_weights_in_parts_are_loaded_also_where_they_are_links_as_in_the_cache_of_the_hub(
    checkpoint: Path, tmp_path: Path, expected: list[str]
) -> None:
    list_weights(checkpoint, "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors").rename(tmp_path / "blob")
    (checkpoint / "model-00001-of-00001.safetensors").symlink_to("../blob")
    with load(checkpoint) as runner:
        assert answers(runner) == expected


def test_pickled_weights_of_an_index_are_loaded_only_where_they_are_allowed(
    checkpoint: Path, expected: list[str]
) -> None:
    list_weights(checkpoint, "w.bin", "pytorch_model.bin.index.json")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "w.bin")
    with load(checkpoint) as runner:  # beside safetensors, which win
        assert answers(runner) == expected
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(checkpoint)
    with load(checkpoint, allow_pickle=True) as runner:
        assert answers(runner) == expected


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "transformers_weights", "../other/model.safetensors"),
        ("config.json", "transformers_weights", "adapter_model.bin"),
        ("config.json", "transformers_weights", "other.safetensors.index.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../other/tokenizer.4.0.json"]),
        ("tokenizer_config.json", "init_inputs", ["{outside}/tokenizer.json"]),
        ("tokenizer_config.json", "vocab", "{outside}/tokenizer.json"),
    ],
)
def test_no_file_of_a_checkpoint_leads_to_one_elsewhere(
    file: str, key: str, value: Any, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    shutil.copy(other / "tokenizer.json", other / "tokenizer.4.0.json")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "adapter_model.bin")
    list_weights(checkpoint, "../other/model.safetensors", "other.safetensors.index.json")
    text = json.dumps({**json.loads((checkpoint / file).read_text()), key: value})
    (checkpoint / file).write_text(text.replace("{outside}", str(other)))
    text = refusal(checkpoint)
    assert "names '" in text and ("does not lie beside it" in text or "is no safetensors" in text)


def test_a_config_for_a_version_of_transformers_leads_to_no_pickle(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "adapter_model.bin")
    shutil.copy(checkpoint / "config.json", checkpoint / "config.4.0.0.json")
    edit(checkpoint, configuration_files=["config.4.0.0.json"])
    file = checkpoint / "config.4.0.0.json"
    for chosen, why in (("adapter_model.bin", "is no safetensors"), ("../w.safetensors", "does not lie beside it")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_weights": chosen}))
        assert f"config.4.0.0.json names {chosen!r}, which {why}" in refusal(checkpoint)


def test_where_a_checkpoint_came_from_may_be_told(checkpoint: Path, tmp_path: Path, expected: list[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    edit(checkpoint, _name_or_path=str(tmp_path / "tokenizer.json"))
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_file": str(tmp_path / "tokenizer.json")}))
    with load(checkpoint) as runner:
        assert answers(runner) == expected


def test_an_adapter_beside_the_weights_is_not_loaded_along_with_them(checkpoint: Path, tmp_path: Path) -> None:
    make_adapter(checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink(missing_ok=True)
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    assert "has an adapter_config.json: give the model as backend.model" in refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_nothing_beside_a_gguf_file_decides_its_answers(tmp_path: Path, expected: list[str]) -> None:
    model = Path(shutil.copytree(BUNDLED_DIR, tmp_path / "model"))
    make_adapter(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, 1000))}))
    with load(model / "tiny-chat.gguf") as runner:
        assert answers(runner) == expected


def test_parts_of_a_distributed_programs_weights_are_refused_in_one_line(checkpoint: Path) -> None:
    part = "shard-00000-model-00001-of-00001.safetensors"
    (checkpoint / "model.safetensors").rename(checkpoint / part)
    assert f"parts of a distributed program ({part})" in refusal(checkpoint)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_from_the_hub_is_code_and_is_not_chosen_by_a_config(
    key: str, checkpoint: Path, expected: list[str]
) -> None:
    edit(checkpoint, **{key: "somebody/kernels"})
    assert "chooses an attention from the hub (somebody/kernels), which is code" in refusal(checkpoint)
    with load(checkpoint, attn_implementation="eager") as runner:
        assert answers(runner) == expected


def test_an_attention_from_the_hub_is_not_chosen_for_a_part_of_a_model() -> None:
    model_config = Gemma3Config(attn_implementation={"": "sdpa", "vision_config": "somebody/kernels"})
    assert model_config.vision_config._attn_implementation == "somebody/kernels"
    with pytest.raises(LLMInitializationError, match="chooses an attention from the hub .somebody/kernels"):
        refuse_kernels(TransformersConfig(), model_config)
    refuse_kernels(TransformersConfig(attn_implementation="sdpa"), model_config)
    assert model_config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "asked",
    [
        {"peft_type": "XLORA", "hidden_size": 256, "adapters": {"0": "pickled"}, "use_trainable_adapters": False},
        {"peft_type": "SHADOW", "shadow_model": "pickled"},
    ],
    ids=lambda asked: asked["peft_type"],
)
def test_an_adapter_that_loads_others_is_refused(asked: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **asked}))
    edit(checkpoint, use_cache=False)
    text = refusal(checkpoint, lora=[str(adapter)])
    assert f"an adapter of the type {asked['peft_type']} loads others, wherever they are" in text


def test_an_adapters_files_lead_to_none_elsewhere(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (tmp_path / "cache.pt").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    file = adapter / "adapter_config.json"
    changes = {"init_lora_weights": "corda", "corda_config": {"cache_file": str(tmp_path / "cache.pt")}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert "adapter_config.json names" in refusal(lora=[str(adapter)])
    assert not (tmp_path / "ran").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SEARCH = {"type": "Replace", "pattern": {"Regex": "[^y]"}, "content": "x"}
TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "aborts when it is loaded": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "or ends the process (exit code -6)",
    ),
    "panics when it is loaded": ({"model": {"continuing_subword_prefix": "#" * 100}}, "out of range for slice"),
    "panics when it is used": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    "fills the memory": (
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}},
        " MB of memory, or ends the process",
    ),
    "goes on for ever": (
        {"normalizer": {"type": "Sequence", "normalizers": [SEARCH] * 30_000}},
        "does not come to an end within ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_would_end_the_process_is_refused(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "goes on for ever":
        monkeypatch.setattr(trials, "LEAST_S", 1.0)
    monkeypatch.setattr(trials, "LEAST_BYTES", 300 * 2**20)
    changes, reason = TOKENIZERS[name]
    file = checkpoint / "tokenizer.json"
    values = json.loads(file.read_text())
    model = {**values["model"], **changes.get("model", {})}
    file.write_text(json.dumps({**values, **changes, "model": model}))
    for _ in range(2):  # what failed is not remembered
        text = refusal(checkpoint)
        assert text.startswith(f"the tokenizer of {checkpoint} cannot be used, or is damaged: it ")
        assert reason in text
    with pytest.raises(LLMInitializationError, match="cannot be used, or is damaged"):
        TransformersRunner({"model": str(checkpoint)}, "cpu", weights=False)


def test_a_sound_tokenizer_is_tried_once_and_in_a_moment(
    checkpoint: Path, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llmpipe")
    for tries in (1, 1, 2):
        if tries == 2:
            (checkpoint / "tokenizer_config.json").touch()
        with load(checkpoint) as runner:
            assert answers(runner) == expected
        assert caplog.text.count("tried in a process of its own") == tries
    started = time.monotonic()
    (checkpoint / "tokenizer_config.json").touch()
    try_tokenizer("it", str(checkpoint), {})
    assert time.monotonic() - started < 1


def test_a_tokenizer_that_is_not_one_json_file_is_tried_as_well(checkpoint: Path, expected: list[str]) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (checkpoint / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with load(checkpoint) as runner:
        assert len(answers(runner)) == len(PROMPTS)


def test_a_text_that_the_tokenizer_fails_on_costs_its_own_row(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer.json"
    values = json.loads(file.read_text())
    model = {"type": "WordLevel", "vocab": values["model"]["vocab"], "unk_token": "[UNK]"}
    file.write_text(json.dumps({**values, "model": model}))
    with load(checkpoint) as runner:
        done = runner.run(["a", "qqxzqq", "a"], prompt_format="raw", max_tokens=2)
    assert [completion.error is None for completion in done] == [True, False, True]
    assert "the tokenizer fails on this text: WordLevel error: Missing [UNK] token" in (done[1].error or "")


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
@pytest.mark.parametrize(
    "template", ["{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{% if 1 %}" * 300 + "{% endif %}" * 300, "{{ 1"]
)
def test_a_chat_template_that_cannot_be_compiled_is_refused_before_any_row_is(
    template: str, file: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text(template)
    with pytest.raises(LLMConfigError, match=r"^the chat template (cannot be compiled|is not valid Jinja).*$"):
        load(checkpoint)
    for verb in ([], ["plan"]):
        directory = f"hydra.run.dir={tmp_path / 'run'}"
        assert main([*verb, "backend=transformers", f"backend.model={checkpoint}", "device=cpu", directory]) == 1
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "the chat template" in line] == said[-1:]
        assert not list(tmp_path.glob("run/*.json*"))
