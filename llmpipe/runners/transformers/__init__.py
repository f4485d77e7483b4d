"""The transformers backend.

runner.py     `TransformersRunner`: the face
loading.py    a checkpoint → a model on its device
files.py      what a checkpoint's files name that does not lie beside them
trial.py      a tokenizer that was never loaded here is loaded in a process of its own first
executor.py   the model as the engine of `runners.batching` sees it; whether it can be computed in slots
context.py    slots with a cache each, packed forward passes
attention.py  attention over packed rows, each with a cache of its own
padded.py     padded batches, for models whose attention cannot be replaced
sampler.py    `SamplingConfig` → tokens, for all rows of a step at once
tokens.py     a text → its tokens
detokenizer.py   tokens → text as they come
memory.py     running out of device memory, and how much there is
"""

from llmpipe.runners.openmp import wait_briefly

wait_briefly()

from llmpipe.runners.transformers.runner import TransformersRunner  # noqa: E402  which loads OpenMP

__all__ = ["TransformersRunner"]
