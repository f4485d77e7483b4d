"""The transformers backend.

runner.py    `TransformersRunner`: the face; loading, placing, tokenising
engine.py    padded batches: how rows share forward passes
sampler.py   `SamplingConfig` → transformers' logits processors and a draw
text.py      tokens → text as they come
"""

from llmpipe.runners.transformers.runner import TransformersRunner

__all__ = ["TransformersRunner"]
