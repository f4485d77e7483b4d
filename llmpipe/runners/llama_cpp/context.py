"""A llama.cpp context: sequences with a cache each, decode calls, logits. Knows nothing of requests or scheduling."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from llmpipe.config import LlamaCppConfig, RopeScaling, Switch
from llmpipe.exceptions import LLMInferenceError, LLMInitializationError
from llmpipe.runners.batching import Batch, Sizes
from llmpipe.runners.llama_cpp import log
from llmpipe.runners.llama_cpp.abort import Abort
from llmpipe.runners.llama_cpp.ggml import number_format
from llmpipe.runners.llama_cpp.model import Model
from llmpipe.runners.llama_cpp.sampler import Sampler
from llmpipe.runners.threads import Threads

FLASH_ATTENTION = {Switch.auto: -1, Switch.off: 0, Switch.on: 1}
REASONS = {1: "no room in the KV cache", 2: "it was interrupted"}
ROPE_SCALING = {RopeScaling.model: -1, RopeScaling.none: 0, RopeScaling.linear: 1, RopeScaling.yarn: 2}


class NativeBatch(Batch):
    """A batch that llama.cpp reads in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ones = np.ones(capacity, np.int32)
        base, step = self.slots.ctypes.data, self.slots.itemsize
        self._slot_pointers = np.arange(base, base + capacity * step, step, dtype=np.uintp)
        self.struct = llama_cpp.llama_batch()
        kinds = dict(llama_cpp.llama_batch._fields_)
        for name, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._ones),
            ("seq_id", self._slot_pointers),
            ("logits", self.outputs),
        ):
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kinds[name]))


class LlamaContext:
    """Sequences of one model that are computed together; see `Context` in `batching.executor`.

    Args:
        model: The loaded model.
        config: Arithmetic and batch sizes.
        sizes: How many sequences of which length.
        threads: CPU threads.
        on_gpu: Whether a GPU may take part.
        abort: Ends what it computes.

    Raises:
        LLMInitializationError: llama.cpp cannot make such a context, for want of memory or of a feature.
    """

    def __init__(
        self, model: Model, config: LlamaCppConfig, sizes: Sizes, threads: Threads, on_gpu: bool, abort: Abort
    ) -> None:
        self.sizes = sizes
        self._model = model
        self._threads = threads
        # In reproducible mode a row is never decoded alone, see the engine.
        sequences = max(sizes.slots + sizes.prefixes, 2 if config.reproducible else 1)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * sizes.context
        params.n_batch = max(min(sizes.batch_tokens, params.n_ctx), sequences)
        params.n_ubatch = max(min(config.micro_batch_tokens, params.n_batch), sequences)
        params.n_threads = params.n_threads_batch = threads.now
        params.flash_attn_type = FLASH_ATTENTION[Switch.off if config.reproducible else config.flash_attention]
        params.type_k = number_format(config.cache_type_k).type
        params.type_v = number_format(config.cache_type_v).type
        params.rope_scaling_type = ROPE_SCALING[config.rope_scaling]
        params.rope_freq_base, params.rope_freq_scale = config.rope_freq_base, config.rope_freq_scale
        params.yarn_orig_ctx = config.yarn_original_context
        params.kv_unified = False
        params.swa_full = False  # sequences are copied and removed whole, so what a window left behind is not needed
        params.offload_kqv = params.op_offload = on_gpu
        params.no_perf = True
        abort.tell(params)
        log.clear()
        self._handle: Any = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise LLMInitializationError(
                f"llama.cpp cannot make {sequences} slots of {sizes.context} tokens: "
                f"{log.last_errors() or 'no reason given'}; try a smaller backend.slots or backend.context"
            )
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self.batch = NativeBatch(llama_cpp.llama_n_batch(self._handle))
        model.apply_adapters(self._handle)

    @property
    def handle(self) -> Any:
        """llama.cpp's own pointer, for samplers."""
        return self._handle

    def compute(self) -> None:
        """Compute the batch.

        Raises:
            LLMInferenceError: llama.cpp failed.
        """
        batch = self.batch
        batch.struct.n_tokens = batch.size
        if (threads := self._threads.look()) != llama_cpp.llama_n_threads(self._handle):
            llama_cpp.llama_set_n_threads(self._handle, threads, threads)
        status = llama_cpp.llama_decode(self._handle, batch.struct)
        if status == 0 and batch.outputs[: batch.size].any():
            llama_cpp.llama_synchronize(self._handle)
        if status:
            reason = REASONS.get(status) or log.last_errors() or "no reason given"
            raise LLMInferenceError(f"llama_decode failed with status {status}: {reason}")

    def sample(self, samplers: Sequence[Sampler]) -> list[int]:
        """Choose a token for each of the batch's outputs, in order; -1 where its logits are no numbers."""
        if not samplers:  # then llama.cpp may have no logits at all
            return []
        # llama.cpp draws something from anything, so what goes into its samplers is looked at here.
        best, indices = self.best_tokens().tolist(), self.batch.output_indices.tolist()
        return [
            best[i] if best[i] < 0 else sampler.sample(self._handle, indices[i], best[i])
            for i, sampler in enumerate(samplers)
        ]

    def best_tokens(self) -> npt.NDArray[np.int64]:
        """Return the token with the largest logit for each of the batch's outputs, in order.

        It is -1 where a logit is NaN or infinite, or all are minus infinity.
        """
        outputs = len(self.batch.output_indices)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._handle), (outputs, self._model.n_vocab))
        best: npt.NDArray[np.int64] = logits.argmax(axis=1)  # which finds a NaN, if there is one
        return np.where(np.isfinite(logits[np.arange(outputs), best]), best, -1)

    def copy(self, source: int, target: int) -> None:
        """Make `target` what `source` is."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget(self, slot: int) -> None:
        """Empty a slot."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def close(self) -> None:
        """Free the memory; the context cannot be used afterwards."""
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None
