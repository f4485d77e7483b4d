"""Loading checkpoints of transformers: formats, adapters, offloading, missing packages, and memory given back."""

from __future__ import annotations

import builtins
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checkpoints import LENGTH, PROMPTS, answers, edit, load, make_adapter, refusal
from families import COMMON, GROUPED
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpipe.exceptions import MissingDependencyError
from llmpipe.runners.transformers import loading
from llmpipe.runners.weights import BUNDLED_DIR

BATCHING = ["slots", "padded"]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with load() as runner:
        return answers(runner)


def save(model: hf.PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(BUNDLED_DIR).save_pretrained(directory)
    return directory


# --- number formats ---------------------------------------------------------------------------------------------------


def test_auto_keeps_a_float32_checkpoint_as_it_is_and_says_nothing() -> None:
    with load() as runner:
        assert runner.info()["dtype"] == "float32"
        assert not any("float" in choice for choice in runner.info()["sizes"])


@pytest.mark.parametrize(
    ("stored", "has_units", "dtype", "choice"),
    [
        ("bfloat16", True, "bfloat16", "bfloat16: the checkpoint's, and this processor has units for it"),
        ("bfloat16", False, "float32", "float32: this processor computes bfloat16 slowly"),
        ("float16", True, "float32", "float32: this processor computes float16 slowly"),
    ],
)
def test_auto_computes_half_precision_on_a_cpu_only_where_it_has_units(
    stored: str, has_units: bool, dtype: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR).to(getattr(torch, stored))
    monkeypatch.setattr(loading, "has_bfloat16_units", lambda: has_units)
    with load(save(model, tmp_path)) as runner:
        assert runner.info()["dtype"] == dtype
        assert choice in runner.info()["sizes"]
        assert answers(runner)


# --- where the weights are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["100KB", "1MB", "1GB"])
@pytest.mark.parametrize("batching", BATCHING)
def test_weights_on_disk_give_the_same_answers(batching: str, memory: str, tmp_path: Path, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = save(hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, **GROUPED)), tmp_path / "untied")
    with load(model) as runner:
        expected = answers(runner)
    offload = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": str(tmp_path / "offload")}
    with load(model, batching=batching, **offload) as runner:
        on_disk = [p for p in runner._model.parameters() if p.device.type == "meta"]
        assert bool(on_disk) == (memory != "1GB")
        assert answers(runner) == expected
        assert (runner.info()["batching"], runner.info()["device"]) == (batching, "cpu")


def test_a_gguf_file_answers_as_the_safetensors_do_even_beside_them(expected: list[str], tmp_path: Path) -> None:
    shutil.copy(BUNDLED_DIR / "tiny-chat.gguf", tmp_path)
    with load() as reference:
        for directory in (BUNDLED_DIR, tmp_path):
            with load(directory / "tiny-chat.gguf") as runner:
                assert answers(runner) == expected
                assert runner.generate_text("Add 1 and 2.", temperature=0) == reference.generate_text(
                    "Add 1 and 2.", temperature=0
                )
                assert runner.chat_template == reference.chat_template


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_of_transformers_is_computed_in_padded_batches_with_the_same_answers(
    implementation: str, expected: list[str]
) -> None:
    with load(attn_implementation=implementation) as runner:
        assert runner._model.config._attn_implementation == implementation
        assert f"padded batches: backend.attn_implementation={implementation}" in runner.info()["sizes"]
        assert runner.info()["batching"] == "padded"
        assert answers(runner) == expected


def test_an_attention_that_is_not_there_is_refused_by_name() -> None:
    assert "nonsense" in refusal(attn_implementation="nonsense")
    assert "package" in refusal(attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.BloomConfig(**{**COMMON, "n_layer": 2, "n_head": 4}), "its attention cannot be replaced"),
        (hf.Lfm2Config(**COMMON, **GROUPED, layer_types=["conv", "full_attention"]), "it has layers of conv"),
        (hf.Llama4TextConfig(**COMMON, **GROUPED, num_local_experts=2, intermediate_size_mlp=96,
                             attention_chunk_size=8), "it has layers of chunked_attention"),
        (hf.LlamaConfig(**COMMON, **GROUPED, sliding_window=8), "layer 0 is told of a window of None tokens, not 8"),
        (hf.DiffLlamaConfig(**COMMON, **GROUPED), "in slots its logits are off"),
    ],
    ids=["no interface", "state", "chunks", "untold window", "other attention"],
)  # fmt: skip
def test_slots_are_refused_for_a_model_that_cannot_and_auto_runs_it_padded(
    config: hf.PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path)
    assert f"backend.batching=slots, but {tmp_path} cannot: {reason}" in refusal(model, batching="slots")
    with load(model) as runner:
        assert any(choice.startswith(f"padded batches: {reason}") for choice in runner.info()["sizes"])
        assert len(answers(runner)) == len(PROMPTS)


def test_a_model_that_also_sees_images_answers_text_as_generate_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    text = hf.Gemma3TextConfig(**COMMON, **GROUPED, **windows)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    path = save(hf.Gemma3ForConditionalGeneration(config).eval(), tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with load(path) as runner:
        assert (runner.info()["model_type"], runner.info()["batching"]) == ("Gemma3ForConditionalGeneration", "slots")
        for prompt, answer in zip(PROMPTS, answers(runner), strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
            new = full[0, ids.shape[1] :].tolist()
            assert tokenizer.decode(new, skip_special_tokens=True) == answer


# --- positions --------------------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)]}


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("context", [None, 128])
def test_with_long_rope_a_row_does_not_depend_on_a_long_one_beside_it(
    batching: str, context: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = hf.Phi3Config(
        **COMMON, **GROUPED, rope_parameters={**LONG, **FACTORS}, original_max_position_embeddings=32
    )
    model = save(hf.Phi3ForCausalLM(config), tmp_path)
    with load(model, batching=batching, context=context) as runner:
        assert runner.info()["context"] == (context or 32)
        long = "one two three four five six seven eight " * (1 if context is None else 3)
        prompts = ["Once", long, "Add 1"]
        assert answers(runner, prompts) == [answers(runner, [prompt])[0] for prompt in prompts]


def test_a_context_that_dynamic_rope_would_stretch_for_all_rows_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "backend.context=4096, but with dynamic RoPE" in refusal(checkpoint, context=4096)
    with load(checkpoint, context=2048) as runner:
        assert answers(runner)


# --- adapters ---------------------------------------------------------------------------------------------------------


def generated(model: Any) -> list[str]:
    """Return what `generate` answers row by row."""
    tokenizer, texts = AutoTokenizer.from_pretrained(BUNDLED_DIR), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        full = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False
        )
        texts.append(tokenizer.decode(full[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def with_adapters(*adapters: tuple[Path, float]) -> Any:
    """Return the bundled model with adapters active in peft's own way, nothing merged."""
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR)
    names = [str(i) for i in range(len(adapters))]
    for name, (adapter, scale) in zip(names, adapters, strict=True):
        model = PeftModel.from_pretrained(model, adapter, name) if name == "0" else model
        if name != "0":
            model.load_adapter(adapter, name)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= scale
    model.base_model.set_adapter(names)
    return model.eval()


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("scale", ["", "=0.5", "=2", "=0"])
def test_a_merged_adapter_answers_as_peft_does(batching: str, scale: str, tmp_path: Path, expected: list[str]) -> None:
    adapter = make_adapter(tmp_path / "a", r=4, lora_alpha=8)
    peft = generated(with_adapters((adapter, float(scale.removeprefix("=") or 1))))
    with load(lora=[f"{adapter}{scale}"], batching=batching) as runner:
        assert answers(runner) == peft
    assert (peft == expected) == (scale == "=0")


def test_adapters_add_up(tmp_path: Path) -> None:
    one, other = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2, r=4)
    with load(lora=[f"{one}=0.5", str(other)]) as runner:
        found = answers(runner)
    assert found == generated(with_adapters((one, 0.5), (other, 1)))
    for alone in (one, other):
        with load(lora=[str(alone)]) as runner:
            assert answers(runner) != found


def test_an_adapter_that_is_no_good_is_refused_by_its_name(tmp_path: Path) -> None:
    good = make_adapter(tmp_path / "good")
    weights = load_file(good / "adapter_model.safetensors")

    def variant(name: str, weights: dict[str, torch.Tensor]) -> str:
        shutil.copytree(good, tmp_path / name)
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
        return str(tmp_path / name)

    wider = variant("wider", {key: torch.cat([tensor, tensor], 1) for key, tensor in weights.items()})
    fewer = variant("fewer", {key: tensor for key, tensor in weights.items() if "layers.3" not in key})
    other = variant("other", {key.replace("layers", "h"): tensor for key, tensor in weights.items()})
    damaged = variant("damaged", weights)
    (Path(damaged) / "adapter_model.safetensors").write_bytes(b"junk")
    for adapter, reason in ((wider, "size mismatch"), (fewer, "missing"), (other, "missing"), (damaged, "header")):
        text = refusal(lora=[adapter])
        assert f"backend.lora: {adapter!r} cannot be merged into the model" in text
        assert reason in text
    missing = str(tmp_path / "missing")
    assert refusal(lora=[missing]) == f"backend.lora: {missing!r} is no directory with an adapter_config.json"


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    assert "cannot be merged into the model" in refusal(lora=[str(tmp_path)])


def test_a_pickled_adapter_is_loaded_only_where_it_is_allowed(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    with load(lora=[str(adapter)]) as runner:
        expected = answers(runner)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    assert "pickled weights need backend.allow_pickle=true" in refusal(lora=[str(adapter)])
    with load(lora=[str(adapter)], allow_pickle=True) as runner:
        assert answers(runner) == expected


def test_without_peft_an_adapter_is_refused_with_the_package_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'", name="peft")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependencyError, match="peft.*llmpipe\\[lora\\]") as caught:
        load(lora=[str(tmp_path)])
    assert "\n" not in str(caught.value)


# --- refusals ---------------------------------------------------------------------------------------------------------

QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "optimum": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptqmodel": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "hqq": {"quant_method": "hqq"},
}


@pytest.mark.parametrize("package", QUANTISED)
def test_a_quantised_checkpoint_without_its_package_is_refused_with_the_package_named(
    package: str, checkpoint: Path
) -> None:
    edit(checkpoint, quantization_config=QUANTISED[package])
    text = refusal(checkpoint)
    assert text.startswith(f"{checkpoint} needs a package that is not installed: ")
    assert package in text.removeprefix(str(checkpoint)).lower()


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_hub_model_that_is_not_cached_is_refused_at_once_where_the_hub_may_not_be_asked(
    revision: str | None,
) -> None:
    started = time.monotonic()
    text = refusal("nobody/no-such-model", local_files_only=True, revision=revision)
    assert "'nobody/no-such-model'" in text
    assert time.monotonic() - started < 5


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_reloaded_runner_answers_as_before(expected: list[str]) -> None:
    for batching in BATCHING:
        with load(batching=batching) as runner:
            assert answers(runner) == expected
            runner.reload()
            assert answers(runner) == expected


def test_a_forward_pass_that_fails_leaves_the_runner_usable(
    expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load() as runner:
        layer, fails = runner._model.model.layers[2], [True]
        forward = layer.forward

        def failing(*args: Any, **kwargs: Any) -> Any:
            if fails.pop() if fails else False:
                raise ValueError("once")  # of a type that nobody expects
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", failing)
        with pytest.raises(Exception, match="once"):
            answers(runner)
        assert answers(runner) == expected


def test_a_row_of_nan_is_an_error_and_spoils_no_row_that_has_its_slot_afterwards(expected: list[str]) -> None:
    with load(slots=1) as runner:
        (broken,) = runner._tokenizer("§", add_special_tokens=False)["input_ids"][:1]

        def break_token(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill((inputs[0] == broken)[..., None], float("nan"))

        runner._model.model.embed_tokens.register_forward_hook(break_token)
        done = runner.run([PROMPTS[0] + "§", *PROMPTS], prompt_format="raw", max_tokens=LENGTH, temperature=0.0)
        assert "NaN" in (done[0].error or "")
        assert [(completion.text, completion.error) for completion in done[1:]] == [(text, None) for text in expected]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 100 MB."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**COMMON, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7})
    yield save(hf.LlamaForCausalLM(config), tmp_path_factory.mktemp("large"))


RELOADS = """
import gc, json, sys, psutil
from llmpipe.runners.transformers import TransformersRunner
model, batching, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
def rss(): return psutil.Process().memory_info().rss / 1e6
def answer(): return [c.text for c in runner.run(["Once upon a time"] * 4, max_tokens=8, temperature=0.0)]
runner = TransformersRunner({"model": model, "batching": batching, "threads": 1}, "cpu")
expected, loaded, closed = answer(), [], []
for _ in range(times):
    runner.close()
    closed.append(rss())
    runner.reload()
    assert answer() == expected
    loaded.append(rss())
print(json.dumps([loaded, closed]))
"""


def reloads(model: Path, batching: str, times: int) -> tuple[list[float], list[float]]:
    """Reload in a process of its own; return its memory in MB while loaded, and while closed."""
    command = [sys.executable, "-W", "ignore", "-c", RELOADS, str(model), batching, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, closed = json.loads(done.stdout.splitlines()[-1])
    return loaded, closed


@pytest.mark.slow
@pytest.mark.parametrize("batching", BATCHING)
def test_twenty_reloads_take_no_more_memory_than_a_few(batching: str, large: Path) -> None:
    size = (large / "model.safetensors").stat().st_size / 1e6
    loaded, closed = reloads(large, batching, 20)
    assert size > 90
    assert max(loaded[5:]) - max(loaded[:5]) < 0.1 * size
    assert max(closed[5:]) - max(closed[:5]) < 0.1 * size
    assert min(loaded) - max(closed) > 0.7 * size  # closing gives the weights back


@pytest.mark.slow
@pytest.mark.parametrize("batching", BATCHING)
def test_a_compiled_model_gives_the_same_answers_and_its_memory_back(batching: str, expected: list[str]) -> None:
    runner = load(batching=batching, compile=True)
    assert answers(runner) == expected
    runner.close()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if issubclass(type(thing), hf.PreTrainedModel)]
