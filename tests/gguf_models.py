"""Tiny GGUF files with random weights in F32: one per way in which llama.cpp remembers a sequence, and LoRA adapters.

What a token does to the next ones is as good as random, so an answer shows whether every token before it was remembered
right. The vocabulary is that of the benchmarks: a prompt of N ASCII letters has N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.models import add_vocabulary
from llmpipe.runners.weights import BUNDLED_DIR

BUNDLED = BUNDLED_DIR / "tiny-chat.gguf"
Array = npt.NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]
"""Tensors by name, rows before columns."""

LAYERS, EMBEDDING, HEADS, HEAD, FFN, VOCABULARY, CONTEXT = 2, 64, 4, 16, 96, 288, 512
CONV, INNER, STATE, RANK = 4, 2 * EMBEDDING, 8, 6
SHORT_CONV = 3
LORA = 4
WINDOW = 24
"""Tokens that gemma3's first layer sees."""


def write_model(path: Path, arch: str) -> Path:
    """Write a model of one of `ARCHITECTURES`."""
    describe, shapes = ARCHITECTURES[arch]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    add_vocabulary(writer, VOCABULARY)
    describe(writer)
    random = np.random.default_rng(5)
    for name, shape in shapes.items():
        writer.add_tensor(name, _weights(name, shape, random))
    return _close(writer, path)


def write_vocabulary(path: Path) -> Path:
    """Write a vocabulary without a model."""
    writer = gguf.GGUFWriter(path, "llama")
    add_vocabulary(writer, VOCABULARY)
    return _close(writer, path)


def write_variant(path: Path, changes: Mapping[str, Any], source: Path = BUNDLED) -> Path:
    """Write a copy of a model with other values in its metadata, such as `{"tokenizer.ggml.pre": "gpt-4o"}`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = changes.get(name, field.contents())
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _close(writer, path)


def write_adapter(
    path: Path, factors: Mapping[str, tuple[Array, Array]], arch: str = "llama", invocation: list[int] | None = None
) -> Path:
    """Write a LoRA adapter that adds, at scale 1, the product b @ a to each matrix that is named, given as (a, b).

    Args:
        path: The new file.
        factors: Pairs of one rank.
        arch: Whose matrices they are.
        invocation: Tokens that switch the adapter on, which makes it an activated LoRA.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = next(len(a) for a, _ in factors.values())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)
    if invocation:
        key, kind = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, gguf.GGUFValueType
        writer.add_key_value(key, invocation, kind.ARRAY, sub_type=kind.UINT32)
    for name, (a, b) in factors.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    if name.endswith(("norm.weight", "norm_2.weight", "time_mix_ln.weight", "ssm_d")):
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):  # how fast a state is forgotten
        return -random.uniform(0.05, 0.5, shape).astype(np.float32)
    tensor = random.normal(0, 1.5 / np.sqrt(shape[-1]), shape).astype(np.float32)
    if name == "output.weight":
        tensor[128:256] = tensor[-1] = 0  # answers are ASCII, which no decoding alters, and as long as they may be
    return tensor


# --- tensors ----------------------------------------------------------------------------------------------------------


def _model(*layers: Shapes, output_norm: str = "output_norm", prefix: str = "blk") -> Shapes:
    both = (VOCABULARY, EMBEDDING)
    shapes: Shapes = {"token_embd.weight": both, f"{output_norm}.weight": (EMBEDDING,), "output.weight": both}
    return shapes | _layers(layers, prefix)


def _layers(layers: Sequence[Shapes], prefix: str = "blk") -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i, layer in enumerate(layers) for name, shape in layer.items()}


def _norm(name: str) -> Shapes:
    return {f"{name}.weight": (EMBEDDING,), f"{name}.bias": (EMBEDDING,)}


def _attention(prefix: str = "attn", output: str = "output") -> Shapes:
    matrices = {f"{prefix}_{name}.weight": (EMBEDDING, EMBEDDING) for name in ("q", "k", "v", output)}
    return {f"{prefix}_norm.weight": (EMBEDDING,), **matrices}


NORMED_ATTENTION = _attention() | {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
FEED_FORWARD: Shapes = {
    "ffn_norm.weight": (EMBEDDING,),
    "ffn_gate.weight": (FFN, EMBEDDING),
    "ffn_up.weight": (FFN, EMBEDDING),
    "ffn_down.weight": (EMBEDDING, FFN),
}
MAMBA: Shapes = {
    "attn_norm.weight": (EMBEDDING,),
    "ssm_in.weight": (2 * INNER, EMBEDDING),
    "ssm_conv1d.weight": (INNER, CONV),
    "ssm_conv1d.bias": (INNER,),
    "ssm_x.weight": (RANK + 2 * STATE, INNER),
    "ssm_dt.weight": (INNER, RANK),
    "ssm_dt.bias": (INNER,),
    "ssm_a": (INNER, STATE),
    "ssm_d": (INNER,),
    "ssm_out.weight": (EMBEDDING, INNER),
}
NORMED_MAMBA = MAMBA | {"ssm_dt_norm.weight": (RANK,), "ssm_b_norm.weight": (STATE,), "ssm_c_norm.weight": (STATE,)}
SHORT_CONVOLUTION: Shapes = {
    "attn_norm.weight": (EMBEDDING,),
    "shortconv.conv.weight": (EMBEDDING, SHORT_CONV),
    "shortconv.in_proj.weight": (3 * EMBEDDING, EMBEDDING),
    "shortconv.out_proj.weight": (EMBEDDING, EMBEDDING),
}
RWKV7: Shapes = {
    **{name: shape for norm in ("attn_norm", "attn_norm_2", "time_mix_ln") for name, shape in _norm(norm).items()},
    **{f"time_mix_{name}.weight": (EMBEDDING,) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
    **{f"time_mix_{name}1.weight": (LORA, EMBEDDING) for name in "wavg"},
    **{f"time_mix_{name}2.weight": (EMBEDDING, LORA) for name in "wavg"},
    **{f"time_mix_{name}.weight": (EMBEDDING, EMBEDDING) for name in ("key", "value", "receptance", "output")},
    "time_mix_lerp_fused.weight": (6, 1, 1, EMBEDDING),
    "channel_mix_lerp_k.weight": (1, 1, EMBEDDING),
    "channel_mix_key.weight": (FFN, EMBEDDING),
    "channel_mix_value.weight": (EMBEDDING, FFN),
}
GEMMA3 = NORMED_ATTENTION | FEED_FORWARD
GEMMA3 |= {"post_attention_norm.weight": (EMBEDDING,), "post_ffw_norm.weight": (EMBEDDING,)}
BERT: Shapes = {
    **{f"attn_{name}.weight": (EMBEDDING, EMBEDDING) for name in ("q", "k", "v", "output")},
    **{f"ffn_{name}.weight": FEED_FORWARD[f"ffn_{name}.weight"] for name in ("up", "down")},
    **_norm("attn_output_norm"),
    **_norm("layer_output_norm"),
}
BERT_EMBEDDINGS: Shapes = {
    "token_embd.weight": (VOCABULARY, EMBEDDING),
    "position_embd.weight": (CONTEXT, EMBEDDING),
    **_norm("token_embd_norm"),
}
T5_ENCODER = _attention(output="o") | FEED_FORWARD
T5_DECODER = T5_ENCODER | _attention("cross_attn", "o")


# --- metadata ---------------------------------------------------------------------------------------------------------


def _describe_attention(writer: gguf.GGUFWriter, kv_heads: int | list[int] = HEADS) -> None:
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)


def _describe_mamba(writer: gguf.GGUFWriter) -> None:
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)


def _describe_jamba(writer: gguf.GGUFWriter) -> None:
    _describe_mamba(writer)
    _describe_attention(writer, [0, HEADS])


def _describe_lfm2(writer: gguf.GGUFWriter) -> None:
    writer.add_shortconv_l_cache(SHORT_CONV)
    _describe_attention(writer, [0, HEADS])


def _describe_gemma3(writer: gguf.GGUFWriter) -> None:
    _describe_attention(writer)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern(LAYERS)


def _describe_rwkv7(writer: gguf.GGUFWriter) -> None:
    writer.add_head_count(0)
    writer.add_wkv_head_size(EMBEDDING)  # llama.cpp's kernel reads past the end of heads below 64
    writer.add_token_shift_count(2)
    writer.add_decay_lora_rank(LORA)
    writer.add_iclr_lora_rank(LORA)
    writer.add_value_residual_mix_lora_rank(LORA)
    writer.add_gate_lora_rank(LORA)


def _describe_bert(writer: gguf.GGUFWriter) -> None:
    _describe_attention(writer)
    writer.add_causal_attention(False)
    writer.add_token_type_count(1)


def _describe_t5(writer: gguf.GGUFWriter) -> None:
    _describe_attention(writer)
    writer.add_relative_attn_buckets_count(8)


ARCHITECTURES: dict[str, tuple[Callable[[gguf.GGUFWriter], None], Shapes]] = {
    "llama": (_describe_attention, _model(*[_attention() | FEED_FORWARD] * LAYERS)),
    "mamba": (_describe_mamba, _model(*[MAMBA] * LAYERS)),
    "rwkv7": (_describe_rwkv7, _model(*[RWKV7] * LAYERS) | _norm("output_norm") | _norm("token_embd_norm")),
    "jamba": (_describe_jamba, _model(NORMED_MAMBA | FEED_FORWARD, _attention() | FEED_FORWARD)),
    "lfm2": (
        _describe_lfm2,
        _model(SHORT_CONVOLUTION | FEED_FORWARD, NORMED_ATTENTION | FEED_FORWARD, output_norm="token_embd_norm"),
    ),
    "gemma3": (_describe_gemma3, _model(*[GEMMA3] * LAYERS)),
    "gemma-embedding": (_describe_gemma3, _model(*[GEMMA3] * LAYERS)),
    "bert": (_describe_bert, BERT_EMBEDDINGS | _layers([BERT] * LAYERS)),
    "t5": (
        _describe_t5,
        _model(*[T5_ENCODER] * LAYERS, output_norm="enc.output_norm", prefix="enc.blk")
        | _model(*[T5_DECODER] * LAYERS, output_norm="dec.output_norm", prefix="dec.blk"),
    ),
    "dream": (_describe_attention, _model(*[_attention() | FEED_FORWARD] * LAYERS)),
}
"""Dense; recurrent (mamba, rwkv7); with attention too (jamba, lfm2); sliding windows (gemma3); the rest cannot."""
