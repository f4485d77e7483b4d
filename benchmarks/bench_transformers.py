"""llmpipe's transformers backend against transformers' own ways to run a dataset, on this machine.

    python benchmarks/bench_transformers.py                                  # on the CPU, in fp32
    python benchmarks/bench_transformers.py --models S --contestants llmpipe,generate
    python benchmarks/bench_transformers.py --device cuda --models 1B,8B     # on a GPU, in bf16

Every row has a length of its own. A padded batch of `generate` has one length for all its rows, the longest: what goes
beyond a row's own length is cut off and not counted, as its user would. Loading and a short warm-up are not timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import THREADS, Benchmark, Contestant, Figures, Line, Setting, main, run_llmpipe, speed
from models import SHAPES, checkpoint_path, write_checkpoint
from workload import Job, shared, skewed

ROWS, CUDA_ROWS = {"S": 96, "M": 24}, 512
SLOTS = {"S": 32, "M": 16, "1B": 128, "8B": 128}
"""Rows at once, for everyone."""
PIPELINE_BATCHES = (1, 4, 8)
TRIAL_ROWS = 8
"""Rows that the pipeline's batch sizes are tried with."""
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DECODE_ROWS = (1, 32, 128)
DECODE_PROMPT, DECODE_SHORT, DECODE_LONG = 128, 16, 144
"""Tokens of the rows that decoding is timed with."""
COPY_BYTES = 4 * 2**30


def prepare(setting: Setting) -> None:
    """Make the model."""
    write_checkpoint(path_of(setting), SHAPES[setting.model], DTYPE[setting.device], setting.device)


def path_of(setting: Setting) -> Path:
    """Return the model's directory."""
    return checkpoint_path(setting.work, setting.model, DTYPE[setting.device])


def rows_of(setting: Setting) -> int:
    """Return how many rows a run has."""
    return setting.rows or (ROWS[setting.model] if setting.device == "cpu" else CUDA_ROWS)


# --- llmpipe ----------------------------------------------------------------------------------------------------------


def ours(setting: Setting) -> Figures:
    """Run llmpipe with as many rows at once as the others."""
    return ours_on(setting, skewed(rows_of(setting)), SLOTS[setting.model])


def ours_auto(setting: Setting) -> Figures:
    """Run llmpipe with the number of rows that it chooses."""
    return ours_on(setting, skewed(rows_of(setting)), "auto")


def prefixes(setting: Setting, same: bool) -> Figures:
    """Rows with one 256-token prefix, or with one each."""
    return ours_on(setting, shared(rows_of(setting), 256, 32, 32, same), SLOTS[setting.model])


def ours_on(setting: Setting, jobs: Sequence[Job], slots: int | str) -> Figures:
    """Run jobs through llmpipe's runner."""
    with runner_of(setting, slots) as runner:
        run_llmpipe(runner, warm_up(jobs))
        return run_llmpipe(runner, jobs) | device_memory(setting)


def runner_of(setting: Setting, slots: int | str) -> Any:
    """Load the model into llmpipe's runner."""
    from llmpipe import TransformersRunner

    return TransformersRunner({"model": str(path_of(setting)), "slots": slots, "threads": THREADS}, setting.device)


def decode(setting: Setting) -> Figures:
    """Time decoding alone, and say which share of the card's memory bandwidth it uses.

    Rows that all run at once are generated twice, with short and with long answers; the difference is decode steps and
    nothing else. Model bandwidth utilisation (MBU) is as defined in "LLM Inference Performance Engineering: Best
    Practices" (Databricks, 2023): (bytes of the parameters + bytes of the KV cache) / time per output token, over the
    peak bandwidth. Of the parameters the embedding is not counted where it is only looked up; the KV cache is that of
    all rows, halfway between the short and the long answers; the bandwidth is that of a large copy within the card,
    counting what is read and what is written.
    """
    shape = SHAPES[setting.model]
    weights = shape.parameters - (0 if shape.tied else shape.embedding)
    context = DECODE_PROMPT + (DECODE_SHORT + DECODE_LONG) / 2
    bandwidth = copy_bandwidth()
    figures: Figures = {"bandwidth_gb_per_s": bandwidth / 1e9}
    with runner_of(setting, max(DECODE_ROWS)) as runner:
        for rows in DECODE_ROWS:
            steps_s = wall_s(runner, rows, DECODE_LONG) - wall_s(runner, rows, DECODE_SHORT)
            step_s = steps_s / (DECODE_LONG - DECODE_SHORT)
            read = 2 * (weights + rows * context * shape.cache_values_per_token)  # two bytes each in bf16
            figures |= {
                f"step_ms_{rows}": step_s * 1e3,
                f"tokens_per_s_{rows}": rows / step_s,
                f"mbu_{rows}": read / step_s / bandwidth,
            }
    return figures


def wall_s(runner: Any, rows: int, answer: int) -> float:
    """Return the seconds that `rows` answers of one length take: the median of three, after one to warm up."""
    jobs = shared(rows, 0, DECODE_PROMPT, answer, same=False)
    return float(statistics.median([run_llmpipe(runner, jobs)["wall_s"] for _ in range(4)][1:]))


def copy_bandwidth() -> float:
    """Return the bytes per second of a large copy within the card, counting what is read and what is written."""
    import torch

    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()  # what is measured next may look at how much memory is free
    return float(2 * COPY_BYTES / statistics.median(times[2:]))


# --- transformers -----------------------------------------------------------------------------------------------------


def generate(setting: Setting) -> Figures:
    """Run `generate` on padded batches, as the rows come."""
    model, tokenizer = load(setting)

    def run(jobs: Sequence[Job]) -> None:
        for batch in batches(jobs, SLOTS[setting.model]):
            inputs = tokenizer([job.prompt for job in batch], return_tensors="pt", padding=True).to(model.device)
            made = model.generate(**inputs, **forced(batch))[:, inputs["input_ids"].shape[1] :]
            answers = [row[: job.max_tokens] for row, job in zip(made, batch, strict=True)]
            assert all(len(answer) == job.max_tokens for answer, job in zip(answers, batch, strict=True))
            tokenizer.batch_decode(answers, skip_special_tokens=True)

    return timed(setting, skewed(rows_of(setting)), run)


def pipeline(setting: Setting) -> Figures:
    """Run `pipeline("text-generation")` at the batch size that does best on the first rows."""
    import transformers

    model, tokenizer = load(setting)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    jobs = skewed(rows_of(setting))

    def run_at(size: int) -> Callable[[Sequence[Job]], None]:
        def run(jobs: Sequence[Job]) -> None:
            for batch in batches(jobs, size):
                prompts = [job.prompt for job in batch]
                pipe(prompts, batch_size=size, return_full_text=False, **forced(batch))

        return run

    trials = {size: timed(setting, jobs[:TRIAL_ROWS], run_at(size))["tokens_per_s"] for size in PIPELINE_BATCHES}
    best = max(trials, key=lambda size: trials[size])
    return timed(setting, jobs, run_at(best)) | {"batch_size": best, "trials": trials}


def generate_batch(setting: Setting) -> Figures:
    """Run transformers' continuous batching, through the manager behind `generate_batch`, for lengths per row.

    On a GPU it sizes itself. On a CPU it would fill the memory with a cache and a mask over all of it, which every row
    would be computed against: there it gets a cache for as many rows at once as the others have.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = load(setting)
    jobs = skewed(rows_of(setting))
    config = ContinuousBatchingConfig()
    if setting.device == "cpu":
        slots = SLOTS[setting.model]
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        blocks = slots * -(-longest // 256)  # a block is of 256 tokens
        config = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512, max_requests_per_batch=slots)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id)
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:

        def run(jobs: Sequence[Job]) -> None:
            for job in jobs:
                ids = tokenizer(job.prompt)["input_ids"]
                manager.add_request(ids, max_new_tokens=job.max_tokens, eos_token_id=-1)
            answers: list[list[int]] = []
            while len(answers) < len(jobs):
                made = manager.get_result(timeout=1)
                if made is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped before all rows were done")
                if made is not None and made.error is not None:
                    raise RuntimeError(f"continuous batching: {made.error}")
                if made is not None and made.is_finished():
                    answers.append(made.generated_tokens)
            assert sorted(map(len, answers)) == sorted(job.max_tokens for job in jobs)
            tokenizer.batch_decode(answers, skip_special_tokens=True)

        return timed(setting, jobs, run)


def load(setting: Setting) -> tuple[Any, Any]:
    """Load model and tokenizer, as the documentation of transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(THREADS)
    path = path_of(setting)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, DTYPE[setting.device]))
    return model.to(setting.device).eval(), AutoTokenizer.from_pretrained(path)


def forced(batch: Sequence[Job]) -> dict[str, Any]:
    """Return the arguments that make every row of a batch as long as its longest."""
    longest = max(job.max_tokens for job in batch)
    return {"do_sample": False, "min_new_tokens": longest, "max_new_tokens": longest}


def batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """Cut jobs into batches."""
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def timed(setting: Setting, jobs: Sequence[Job], run: Callable[[Sequence[Job]], None]) -> Figures:
    """Run jobs, after a few to warm up; count the tokens that each row asked for."""
    run(warm_up(jobs))
    started = time.perf_counter()
    run(jobs)
    wall = time.perf_counter() - started  # the answers are on the host by now
    return speed(wall, sum(job.max_tokens for job in jobs)) | device_memory(setting)


def warm_up(jobs: Sequence[Job]) -> list[Job]:
    """Return a few short jobs."""
    return [Job(job.prompt[:32], 4) for job in jobs[:2]]


def device_memory(setting: Setting) -> Figures:
    """Return the most device memory that tensors have had, weights included."""
    if setting.device == "cpu":
        return {}
    import torch

    return {"peak_device_mb": torch.cuda.max_memory_allocated() / 1e6}


MB = "{:,.0f} MB"
BENCHMARK = Benchmark(
    description=__doc__,
    prepare=prepare,
    models="S,M",
    devices=("cpu", "cuda"),
    contestants={
        "llmpipe": Contestant(ours),
        "llmpipe-auto": Contestant(ours_auto),
        "generate": Contestant(generate),
        "pipeline": Contestant(pipeline),
        "generate-batch": Contestant(generate_batch),
        "shared-prefix": Contestant(partial(prefixes, same=True)),
        "own-prefixes": Contestant(partial(prefixes, same=False)),
        "decode": Contestant(decode, once=True, only_on="cuda"),
    },
    lines=[
        Line("llmpipe, generated tokens/s", "llmpipe", pattern="{:,.0f}"),
        Line("against `generate`, padded batches of as many rows", "llmpipe", "generate"),
        Line('against `pipeline("text-generation")`, its best batch size', "llmpipe", "pipeline"),
        Line("against `generate_batch` (continuous batching), lengths per row", "llmpipe", "generate-batch"),
        Line("with slots=auto, against as many as the others", "llmpipe-auto", "llmpipe"),
        Line("a shared 256-token prefix against none shared", "shared-prefix", "own-prefixes"),
        *(
            Line(f"peak {kind} memory, {name}", name, figure=figure, pattern=MB, only_on=device)
            for kind, figure, device in (("resident", "peak_rss_mb", None), ("device", "peak_device_mb", "cuda"))
            for name in ("llmpipe", "generate", "pipeline", "generate-batch")
        ),
        *(
            Line(label.format(rows), "decode", figure=f"{figure}_{rows}", pattern=pattern)
            for rows in DECODE_ROWS
            for label, figure, pattern in (
                ("decoding {} rows, generated tokens/s", "tokens_per_s", "{:,.0f}"),
                ("decoding {} rows, share of the memory bandwidth", "mbu", "{:.0%}"),
            )
        ),
        Line("memory bandwidth, a copy within the card", "decode", figure="bandwidth_gb_per_s", pattern="{:,.0f} GB/s"),
    ],
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
