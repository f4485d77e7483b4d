"""Tiny checkpoints of many architectures, with random weights, to test the transformers backend on what they differ in.

The text of a token is its piece of the vocabulary after a space, so that equal texts mean equal tokens (but for qwen2,
for which transformers insists on a decoder of its own).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from llmpipe.runners.weights import BUNDLED_DIR

VOCABULARY = 1536
CONTEXT = 128
END_TOKENS = [2, *range(5, VOCABULARY, 12)]
"""So many that answers of random weights end, now and then."""
WINDOW = 8

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": END_TOKENS,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
ALTERNATING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2: dict[str, Any] = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}

Make = Callable[[], PreTrainedConfig]


def family(config: type[PreTrainedConfig], *parts: dict[str, Any], **own: Any) -> Make:
    """Return what makes a small configuration of the class: common options, changed by `parts` and `own`."""
    options = dict(COMMON)
    for part in (*parts, own):
        options.update(part)
    return partial(config, **options)


FAMILIES: dict[str, Make] = {
    "llama": family(hf.LlamaConfig, GROUPED),
    "qwen2": family(hf.Qwen2Config, GROUPED),
    "qwen3": family(hf.Qwen3Config, GROUPED),
    "mistral": family(hf.MistralConfig, GROUPED, sliding_window=WINDOW),
    "gemma2": family(hf.Gemma2Config, GROUPED, ALTERNATING, attn_logit_softcapping=5.0, final_logit_softcapping=20.0),
    "gemma3": family(hf.Gemma3TextConfig, GROUPED, ALTERNATING),
    "phi3": family(hf.Phi3Config, GROUPED, original_max_position_embeddings=CONTEXT),
    "gpt2": family(hf.GPT2Config),
    "gpt_neox": family(hf.GPTNeoXConfig),
    "opt": family(hf.OPTConfig, ffn_dim=96, word_embed_proj_dim=64, init_std=0.3),
    "bloom": family(hf.BloomConfig, n_layer=2, n_head=4),
    "falcon_alibi": family(hf.FalconConfig, alibi=True, new_decoder_architecture=False, multi_query=True),
    "stablelm": family(hf.StableLmConfig, GROUPED, qk_layernorm=True, use_qkv_bias=True),
    "mixtral": family(hf.MixtralConfig, GROUPED, EXPERTS),
    "qwen2_moe": family(
        hf.Qwen2MoeConfig, GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
    ),
    "gpt_oss": family(
        hf.GptOssConfig, GROUPED, EXPERTS, ALTERNATING, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "mamba": family(hf.MambaConfig, state_size=8),
    "mamba2": family(hf.Mamba2Config, state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=8),
    "jamba": family(
        hf.JambaConfig, MAMBA, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "bamba": family(hf.BambaConfig, MAMBA2, num_key_value_heads=2, attn_layer_indices=[1]),
    "falcon_h1": family(hf.FalconH1Config, MAMBA2, GROUPED, mamba_d_ssm=128),
    "qwen3_next": family(
        hf.Qwen3NextConfig, GROUPED, layer_types=["linear_attention", "full_attention"], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "lfm2": family(hf.Lfm2Config, GROUPED, layer_types=["conv", "full_attention"]),
    "gptj": family(hf.GPTJConfig, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, rotary_dim=8),
    "cohere2": family(hf.Cohere2Config, GROUPED, ALTERNATING),
    "deepseek_v3": family(
        hf.DeepseekV3Config, num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, moe_intermediate_size=48, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
"""Family → what makes its configuration."""
RARER = {"falcon_alibi", "qwen2_moe", "mamba2", "bamba", "falcon_h1", "lfm2", "gptj", "cohere2", "deepseek_v3"}
"""Families that differ from the others in little that matters here, or are slow."""


def save(name: str, directory: Path) -> Path:
    """Write a checkpoint of the family into `directory`, the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
    model.generation_config.eos_token_id = END_TOKENS
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_DIR)
    tokenizer.backend_tokenizer.decoder = None
    tokenizer.save_pretrained(directory)
    return directory
