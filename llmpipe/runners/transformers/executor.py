"""A model of transformers as the engine of continuous batching sees it: slots, packed forward passes, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmpipe.config import Batching, TransformersConfig
from llmpipe.exceptions import one_line
from llmpipe.runners.batching import Footprint, Sample, Sizes, sizing
from llmpipe.runners.transformers import memory
from llmpipe.runners.transformers.attention import NAME, Style
from llmpipe.runners.transformers.context import SlotContext
from llmpipe.runners.transformers.detokenizer import Detokenizer
from llmpipe.runners.transformers.sampler import Sampler

GPU_SLOTS = 128
"""Rows in flight on a GPU. Not measured.

A step of few rows waits for the weights to come from the GPU's memory, and for kernels to start: until arithmetic takes
longer than that, at some hundred rows, more rows are nearly free.
"""
PROBES = (7, 12)
"""Lengths of the two rows that show whether a model can be computed in slots."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.05
"""How far logits may be from the model's own, relative to the largest."""


class UnsuitableModelError(Exception):
    """The model cannot be computed in slots; says why."""


class ModelExecutor:
    """What slots and padded batches share; see `Executor` in `batching.executor`.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        end_tokens: Ids that end a generation.
        config: Sizes.
    """

    never_alone = False
    keeps_nan = False

    def __init__(self, model: Any, tokenizer: Any, end_tokens: set[int], config: TransformersConfig) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._config = config
        self._devices = memory.devices_of(model)

    def used_device_bytes(self) -> int:
        """Return the device memory in use."""
        return (memory.used_and_peak_bytes(self._devices) or (0, 0))[0]

    def sampler(self, sample: Sample) -> Sampler:
        """Return the options and the random stream of the sample."""
        return Sampler(sample.request.sampling, sample.request.seed_of(sample.number), sample.prompt)

    def detokenizer(self, sample: Sample) -> Detokenizer:
        """Return what turns the sample's tokens into text."""
        return Detokenizer(self._tokenizer, sample.prompt)

    def is_end(self, token: int) -> bool:
        """Say whether `token` ends a generation."""
        return token in self._end_tokens


class SlotExecutor(ModelExecutor):
    """Computes in slots: rows packed to one sequence, each with a cache of its own.

    The model's attention becomes `attention.slot_attention`.

    Raises:
        UnsuitableModelError: its attention cannot be replaced, or it then computes something else.
    """

    batching = Batching.slots
    is_static = False

    def __init__(self, model: Any, tokenizer: Any, end_tokens: set[int], config: TransformersConfig) -> None:
        super().__init__(model, tokenizer, end_tokens, config)
        on_gpu = any(device.type != "cpu" for device in self._devices)
        self.footprint = Footprint(
            parameters=sum(p.numel() for p in model.parameters()),
            cache_bytes_per_token=adopt(model),
            gpu_slots=GPU_SLOTS if on_gpu else None,
        )

    @property
    def ideal(self) -> Sizes:
        """The sizes that pay; see `sizing.ideal`."""
        return sizing.ideal(self._config, self.footprint)

    def sizes(self, waiting: Sequence[Sample], limit: int, held_tokens: int = 0, is_live: bool = False) -> Sizes:
        """Choose the sizes of a context; see `sizing.choose`."""
        free_bytes = memory.free_bytes(self._devices)
        return sizing.choose(self._config, self.footprint, waiting, limit, held_tokens, free_bytes, is_live)

    def context(self, sizes: Sizes) -> SlotContext:
        """Make a context; its memory is taken when it is first used."""
        return SlotContext(self._model, sizes)


def adopt(model: Any) -> int:
    """Let a model attend over slots, if it then computes what it did before; return its cache's bytes per token.

    Two short rows go through it alone, then together in pieces: a packed prefill, a chunk that continues a prompt, and
    a decode step.

    Raises:
        UnsuitableModelError: says why not; the model is as it was.
    """
    refuse_unsuitable(model)
    before = model.config._attn_implementation
    try:
        expected = [_alone(model, _probe(model, length)) for length in PROBES]
        model.set_attn_implementation(NAME)
        context = SlotContext(model, Sizes(slots=2, prefixes=0, context=32, batch_tokens=64))
        found = _in_pieces(context, *(_probe(model, length) for length in PROBES))
        _check_windows(model, context.styles)
        limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
        for alone, together in zip(expected, found, strict=True):
            difference = float((alone - together).abs().max() / alone.abs().max().clamp(min=1e-6))
            if not difference <= limit:
                raise UnsuitableModelError(f"in slots its logits are off by {difference:.2g} of the largest")
        return context.bytes_per_token
    except UnsuitableModelError:
        model.set_attn_implementation(before)
        raise
    except Exception as error:  # a model is a program of someone else's: it may fail in any way
        model.set_attn_implementation(before)
        raise UnsuitableModelError(one_line(error)) from error


def refuse_unsuitable(model: Any) -> None:
    """Refuse what a model's class and config already say.

    Raises:
        UnsuitableModelError: says why not.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise UnsuitableModelError(f"it has layers of {', '.join(sorted(others))}")
    if not model._supports_attention_backend:
        raise UnsuitableModelError("its attention cannot be replaced")


def _probe(model: Any, length: int) -> list[int]:
    """Return some tokens."""
    size = model.config.get_text_config().vocab_size
    return [(7919 * i + 31 * length) % size for i in range(length)]


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _alone(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the logits after `tokens`, (vocabulary,), as the model computes them by itself."""
    ids = torch.tensor([tokens], device=memory.input_device(model))
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, -1].float()


def _in_pieces(context: SlotContext, one: list[int], other: list[int]) -> torch.Tensor:
    """Return the logits after two rows, (2, vocabulary), each computed in pieces beside the other."""
    batch = context.batch
    batch.add(one[:4], 0, 0, False)
    batch.add(other[:-1], 0, 1, True)
    context.compute()
    batch.clear()
    batch.add(one[4:-1], 4, 0, True)
    context.compute()
    batch.set_columns([one[-1], other[-1]], [len(one) - 1, len(other) - 1], [0, 1])
    context.compute()
    return context.logits


def _check_windows(model: Any, styles: dict[int, Style]) -> None:
    """See to it that attention hears of the sliding windows in the config, which the short rows do not fill.

    Raises:
        UnsuitableModelError: a layer's window is not the one that the config gives it.
    """
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    for layer, style in styles.items():
        expected = window if kinds is None or kinds[layer] == "sliding_attention" else None
        if style.window != expected:
            raise UnsuitableModelError(f"layer {layer} is told of a window of {style.window} tokens, not {expected}")
