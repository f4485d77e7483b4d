"""Continuous batching, for any backend that can compute tokens of several sequences in one call.

engine.py      drives: schedule, compute, sample
scheduler.py   which rows are computed when: slots, prefill, decode, cancelling, running out of memory
sequence.py    a sample in flight: its tokens, its text, how it ends
step.py        what one call computes
prefixes.py    shared prefixes, computed once
lookahead.py   the rows that wait: order, and what their prompts share
sizing.py      how many slots of how many tokens
executor.py    what the engine asks of a backend: an `Executor`, its `Context`, its samplers
throughput.py  tokens and seconds, of prefill and of decode
"""

from llmpipe.runners.batching.engine import Engine
from llmpipe.runners.batching.executor import Batch, Context, Executor
from llmpipe.runners.batching.lookahead import Sample
from llmpipe.runners.batching.sizing import Footprint, Sizes

__all__ = ["Batch", "Context", "Engine", "Executor", "Footprint", "Sample", "Sizes"]
