"""A GGUF file without its weights: vocabulary, chat template, and what the metadata says of sizes."""

from __future__ import annotations

import llama_cpp

from llmpipe.runners.llama_cpp.model import Model, adapter_file


class Vocabulary(Model):
    """A model that can tokenise and tell of itself, and compute nothing. llama.cpp's own figures are not set in it."""

    vocab_only = True

    def describe(self) -> str:
        """Return architecture and size, such as `llama 2.6M`."""
        return f"{self.metadata('general.architecture')} {self.parameters / 1e6:.1f}M"

    @property
    def train_context(self) -> int:
        """Most tokens of a text that the model was trained for."""
        return self._number("context_length")

    @property
    def cache_values_per_token(self) -> tuple[int, int]:
        """Numbers that the cache holds per token, as keys and as values; at most so many where layers differ.

        llama.cpp hands out the file's figures, but not its lists, one figure per layer.
        """
        if llama_cpp.llama_model_is_recurrent(self.handle):
            return 0, 0
        heads = self._number("attention.head_count", 1)
        kv_heads = self._number("attention.head_count_kv", heads) * self._number("block_count")
        size = self._number("embedding_length") // max(heads, 1)
        key, value = self._number("attention.key_length", size), self._number("attention.value_length", size)
        return kv_heads * key, kv_heads * value

    @property
    def state_bytes(self) -> int:
        """0: the states of recurrent layers can only be measured."""
        return 0

    def _load_adapter(self, text: str) -> None:
        adapter_file(text)

    def _number(self, key: str, default: int = 0) -> int:
        """Return a figure of the architecture."""
        text = self.metadata(f"{self.metadata('general.architecture')}.{key}")
        return default if text is None else int(text)
