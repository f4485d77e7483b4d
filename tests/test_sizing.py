"""Sizes chosen from model, prompts and memory."""

from __future__ import annotations

from llmpipe import Request, SamplingConfig
from llmpipe.config import LlamaCppConfig
from llmpipe.runners.batching.lookahead import Sample
from llmpipe.runners.batching.sizing import CPU_SLOTS, SMALL_MODEL_SLOTS, Footprint, Sizes, choose

MODEL = Footprint(parameters=7_000_000_000, cache_bytes_per_token=100_000)
PLENTY = 10**12
GPU_SLOTS = 64


def samples(count: int, need: int, shared: int = 0) -> list[Sample]:
    return [Sample(Request(i, SamplingConfig()), 0, [1] * 50, 0, need, shared) for i in range(count)]


def test_slots_follow_the_model_and_the_device() -> None:
    small = Footprint(1_000_000, 1000)
    gpu = Footprint(7_000_000_000, 1000, gpu_slots=GPU_SLOTS)
    assert choose(LlamaCppConfig(), MODEL, samples(100, 300), 4096, free_bytes=PLENTY).slots == CPU_SLOTS
    assert choose(LlamaCppConfig(), small, samples(100, 300), 4096, free_bytes=PLENTY).slots == SMALL_MODEL_SLOTS
    assert choose(LlamaCppConfig(), gpu, samples(100, 300), 4096, free_bytes=PLENTY).slots == GPU_SLOTS


def test_no_more_slots_than_rows() -> None:
    assert choose(LlamaCppConfig(), MODEL, samples(3, 300), 4096, free_bytes=PLENTY).slots == 3


def test_slots_are_somewhat_longer_than_the_longest_row_looked_at() -> None:
    rows = samples(5, 300) + samples(1, 600)
    assert choose(LlamaCppConfig(), MODEL, rows, 4096, free_bytes=PLENTY).context == 1024
    assert choose(LlamaCppConfig(), MODEL, rows, 700, free_bytes=PLENTY).context == 768


def test_slots_shrink_to_the_memory_that_is_free() -> None:
    found = choose(LlamaCppConfig(), MODEL, samples(100, 512), 4096, free_bytes=512 * 100_000 * 5)
    assert (found.slots, found.prefixes) == (2, 1)  # of the 60 % that may be taken
    assert any("memory" in reason for reason in found.reasons)


def test_sizes_set_by_hand_are_kept() -> None:
    found = choose(LlamaCppConfig(slots=50), MODEL, samples(3, 300), 4096, free_bytes=PLENTY)
    assert found.slots == 50


def test_a_plan_never_asks_for_more_slots_or_more_memory_than_there_is() -> None:
    for tokens in (100, 2_100, 9_000, 50_000):
        for slots in ("auto", 16):
            found = choose(LlamaCppConfig(slots=slots), MODEL, samples(40, 2000), 4096, free_bytes=tokens * 100_000)
            assert found.slots <= CPU_SLOTS
            assert found.tokens <= max(tokens, found.context)


def test_the_memory_of_the_cache_there_is_counts_as_free() -> None:
    rows = samples(100, 512)
    assert (
        choose(LlamaCppConfig(), MODEL, rows, 4096, 10_000, free_bytes=0).slots
        == choose(LlamaCppConfig(), MODEL, rows, 4096, 0, free_bytes=10_000 * 100_000).slots
    )


def test_weights_mapped_from_a_file_do_not_count_as_free() -> None:
    mapped = Footprint(7_000_000_000, 100_000, mapped_bytes=512 * 100_000 * 5)
    rows = samples(100, 512)
    assert choose(LlamaCppConfig(), mapped, rows, 4096, free_bytes=512 * 100_000 * 10).slots == 2


def test_shared_prefixes_get_slots_of_their_own() -> None:
    two_groups = samples(9, 300, shared=40) + samples(9, 300, shared=45)
    assert choose(LlamaCppConfig(), MODEL, two_groups, 4096, free_bytes=PLENTY).prefixes == 2
    assert choose(LlamaCppConfig(), MODEL, samples(9, 300), 4096, free_bytes=PLENTY).prefixes == 1  # for later rows
    assert choose(LlamaCppConfig(reproducible=True), MODEL, samples(9, 300), 4096, free_bytes=PLENTY).prefixes == 0


def test_every_choice_has_a_reason() -> None:
    assert len(choose(LlamaCppConfig(), MODEL, samples(9, 300), 4096, free_bytes=PLENTY).reasons) >= 2


def test_halving_ends_at_one_slot_and_few_tokens_per_call() -> None:
    found: Sizes | None = Sizes(8, 2, 256, batch_tokens=300)
    steps = []
    while found is not None:
        steps.append((found.slots, found.prefixes, found.batch_tokens))
        found = found.halved()
    assert steps == [(8, 2, 300), (4, 1, 150), (2, 0, 75), (1, 0, 37), (1, 0, 32)]
    assert Sizes(1, 0, 256, batch_tokens=8).halved() is None


def test_the_memory_of_a_gpu_bounds_the_slots_where_it_is_known() -> None:
    gpu, rows = Footprint(7_000_000_000, 100_000, gpu_slots=GPU_SLOTS), samples(100, 512)
    assert choose(LlamaCppConfig(), gpu, rows, 4096).slots == GPU_SLOTS
    assert choose(LlamaCppConfig(), gpu, rows, 4096, free_bytes=512 * 100_000 * 5).slots == 2
