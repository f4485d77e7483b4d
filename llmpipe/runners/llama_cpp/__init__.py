"""The llama.cpp backend.

runner.py    `LlamaCppRunner`: the face
model.py     a GGUF file: loading, tokens, text, chat template
engine.py    slots, batches and decode calls: how rows share the model
sampler.py   `SamplingConfig` → a chain of llama.cpp samplers
log.py       llama.cpp's log → Python's logging
"""

from llmpipe.runners.llama_cpp.runner import LlamaCppRunner

__all__ = ["LlamaCppRunner"]
