"""Models made on the spot: the shapes that matter for speed, with random weights.

Every ASCII letter is one token, so a prompt of N letters has N tokens, on every engine.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import gguf

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
    tied: bool
    """Whether the output head is the embedding."""
    gguf_weights: str = "F16"
    context: int = 4096

    @property
    def head(self) -> int:
        """Values per attention head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """All weights, but for the norms."""
        layer = 2 * self.hidden * (self.heads + self.kv_heads) * self.head + 3 * self.hidden * self.ffn
        return self.layers * layer + self.embedding * (1 if self.tied else 2)

    @property
    def embedding(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def cache_values_per_token(self) -> int:
        """Keys and values that a token leaves in the cache."""
        return 2 * self.layers * self.kv_heads * self.head


SMALL = Shape(6, 256, 8, 4, 768, 4096, tied=False)
SHAPES = {
    "S": SMALL,
    "S-Q8_0": replace(SMALL, gguf_weights="Q8_0"),
    "M": Shape(30, 576, 9, 3, 1536, 49152, tied=True, gguf_weights="Q8_0"),
    "1B": Shape(16, 2048, 32, 8, 8192, 128256, tied=True),
    "8B": Shape(32, 4096, 32, 8, 14336, 128256, tied=False),
}
"""S has 6.8 million parameters, M 135 million; the others are shaped like the Llama 3 models of their sizes."""


def gguf_path(work: Path, name: str) -> Path:
    """Return where a model is as GGUF; its size is in the name, lest a model of another shape is taken for it."""
    return work / f"{name}-{SHAPES[name].parameters / 1e6:.1f}M.gguf"


def checkpoint_path(work: Path, name: str, dtype: str) -> Path:
    """Return where a model is as a safetensors checkpoint."""
    return work / f"{name}-{SHAPES[name].parameters / 1e6:.1f}M-{dtype}"


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, shape: Shape) -> None:
    """Write a model of the given shape, unless it is there."""
    import gguf
    from gguf.quants import quantize

    if path.is_file():
        return
    random = np.random.default_rng(SEED)
    kind = gguf.GGMLQuantizationType[shape.gguf_weights]
    writer = gguf.GGUFWriter(path.with_suffix(".tmp"), "llama")
    writer.add_name(path.stem)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{shape.gguf_weights}"])
    add_vocabulary(writer, shape.vocabulary)

    def add(name: str, rows: int, columns: int) -> None:
        tensor = random.normal(0, 0.7 / np.sqrt(columns), (rows, columns)).astype(np.float32)
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))

    add("token_embd.weight", shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        add_norm(prefix + "attn_norm.weight")
        add(prefix + "attn_q.weight", shape.hidden, shape.hidden)
        add(prefix + "attn_k.weight", shape.kv_heads * shape.head, shape.hidden)
        add(prefix + "attn_v.weight", shape.kv_heads * shape.head, shape.hidden)
        add(prefix + "attn_output.weight", shape.hidden, shape.hidden)
        add_norm(prefix + "ffn_norm.weight")
        add(prefix + "ffn_gate.weight", shape.ffn, shape.hidden)
        add(prefix + "ffn_up.weight", shape.ffn, shape.hidden)
        add(prefix + "ffn_down.weight", shape.hidden, shape.ffn)
    add_norm("output_norm.weight")
    if not shape.tied:
        add("output.weight", shape.vocabulary, shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".tmp").rename(path)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add the 256 bytes, in the spelling of byte-level BPE, fillers without merges, and an end token."""
    import gguf

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


# --- safetensors ------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, shape: Shape, dtype: str, device: str) -> None:
    """Write a checkpoint that `from_pretrained` reads, with its tokenizer, unless it is there; made on `device`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if path.is_dir():
        return
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=shape.vocabulary - 1,
        pad_token_id=shape.vocabulary - 1,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    unfinished = path.with_name(path.name + ".tmp")
    model.save_pretrained(unfinished)
    _write_tokenizer(unfinished, shape.vocabulary)
    unfinished.rename(path)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of letters, fillers, and an end token that is the padding too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters
    tokens = [*letters, "<unknown>", *(f"<filler-{i}>" for i in range(size - len(letters) - 2)), "<end>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>", pad_token="<end>", padding_side="left"
    ).save_pretrained(folder)
