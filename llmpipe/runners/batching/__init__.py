"""Continuous batching, for any backend that can compute tokens of several sequences in one call.

engine.py      the schedule: slots, prefill, decode, shared prefixes, cancelling, running out of memory
executor.py    what the engine asks of a backend: an `Executor`, its `Context`, its samplers
lookahead.py   the rows that wait: order, and what their prompts share
sizing.py      how many slots of how many tokens
throughput.py  tokens and seconds, of prefill and of decode
"""

from llmpipe.runners.batching.engine import Engine
from llmpipe.runners.batching.executor import NO_NUMBERS, Batch, Context, Executor
from llmpipe.runners.batching.lookahead import Sample
from llmpipe.runners.batching.sizing import Footprint, Sizes

__all__ = ["NO_NUMBERS", "Batch", "Context", "Engine", "Executor", "Footprint", "Sizes", "Sample"]
