"""The llama.cpp backend.

runner.py      `LlamaCppRunner`: the face
model.py       a GGUF file: loading, tokens, text, chat template
deep_stack.py  where a text is read that would overflow the stack
executor.py    the model as the engine of `runners.batching` sees it
context.py     sequences, decode calls, logits
sampler.py     `SamplingConfig` → a chain of llama.cpp samplers
probe.py       a file that was never loaded → first into a process of its own
devices.py     the memory of GPUs
ggml.py        number formats
log.py         llama.cpp's log → Python's logging
abort.py       ends a call of llama.cpp from another thread
vocabulary.py  a GGUF file without its weights: tokens, chat template, sizes
"""

from llmpipe.runners.openmp import wait_briefly

wait_briefly()

from llmpipe.runners.llama_cpp.runner import LlamaCppRunner  # noqa: E402  which loads OpenMP

__all__ = ["LlamaCppRunner"]
