"""The bundled checkpoint of transformers: loaded, changed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmpipe import LLMInitializationError
from llmpipe.runners.transformers import TransformersRunner
from llmpipe.runners.weights import BUNDLED_DIR

PROMPTS = ["Tell me a story about a fox and a violin.", "Add 1 and 2.", "What is the capital of France?", "Once"]
LENGTH = 16


def load(model: Path | str = "bundled", **options: Any) -> TransformersRunner:
    return TransformersRunner({"model": str(model), "threads": 1, **options}, "cpu")


def answers(runner: TransformersRunner, prompts: list[str] = PROMPTS) -> list[str]:
    done = runner.run(prompts, prompt_format="raw", max_tokens=LENGTH, temperature=0.0)
    assert [completion.error for completion in done] == [None] * len(prompts)
    return [completion.text for completion in done]


def edit(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(*args: Any, **options: Any) -> str:
    """Return what the user is told instead of a runner: one line."""
    with pytest.raises(LLMInitializationError) as caught:
        load(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(re.sub(r"/[^ ']+/", "", text)) < 600  # however long the paths are
    return text


def make_adapter(directory: Path, seed: int = 0, **options: Any) -> Path:
    """Write an adapter for the bundled model that changes its answers."""
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BUNDLED_DIR), LoraConfig(target_modules=targets, **options)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return directory
