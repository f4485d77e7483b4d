"""Models made on the spot: the shapes that matter for speed, with random weights and a vocabulary of bytes.

Every ASCII letter is one token, so a prompt of N letters has N tokens, on every engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

SEED = 7


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    weights: gguf.GGMLQuantizationType
    context: int = 4096


SHAPES = {
    "S": Shape(6, 256, 8, 4, 768, 4096, gguf.GGMLQuantizationType.F16),
    "S-Q8_0": Shape(6, 256, 8, 4, 768, 4096, gguf.GGMLQuantizationType.Q8_0),
    "M": Shape(30, 576, 9, 3, 1536, 49152, gguf.GGMLQuantizationType.Q8_0),
}
"""S has 7 million parameters in F16, M 135 million in Q8_0."""


def write_gguf(path: Path, shape: Shape) -> Path:
    """Write a model of the given shape, unless it is there."""
    if path.is_file():
        return path
    random = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path.with_suffix(".tmp"), "llama")
    head = shape.hidden // shape.heads
    writer.add_name(path.stem)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(7 if shape.weights is gguf.GGMLQuantizationType.Q8_0 else 1)
    _add_vocabulary(writer, shape.vocabulary)

    def add(name: str, rows: int, columns: int) -> None:
        tensor = random.normal(0, 0.7 / np.sqrt(columns), (rows, columns)).astype(np.float32)
        writer.add_tensor(name, quantize(tensor, shape.weights), raw_dtype=shape.weights)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))

    add("token_embd.weight", shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        add_norm(prefix + "attn_norm.weight")
        add(prefix + "attn_q.weight", shape.hidden, shape.hidden)
        add(prefix + "attn_k.weight", shape.kv_heads * head, shape.hidden)
        add(prefix + "attn_v.weight", shape.kv_heads * head, shape.hidden)
        add(prefix + "attn_output.weight", shape.hidden, shape.hidden)
        add_norm(prefix + "ffn_norm.weight")
        add(prefix + "ffn_gate.weight", shape.ffn, shape.hidden)
        add(prefix + "ffn_up.weight", shape.ffn, shape.hidden)
        add(prefix + "ffn_down.weight", shape.hidden, shape.ffn)
    add_norm("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".tmp").rename(path)
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add the 256 bytes, in the spelling of byte-level BPE, fillers without merges, and an end token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelling)}
    tokens = [spelling[byte] for byte in range(256)] + [f"<filler-{i}>" for i in range(size - 257)] + ["<end>"]
    kinds = [gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{spelling[0]} {spelling[0]}"])
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
