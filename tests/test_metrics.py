"""Completions → figures: percentiles, totals, scores, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmpipe.exceptions import LLMConfigError
from llmpipe.metrics import Totals, environment, percentiles
from llmpipe.records import Completion, failed
from llmpipe.scorers import contains, exact_match, scorers_named
from llmpipe.system.memory import MemorySampler


def done(row: int, sample: int = 0, reason: str = "stop", **values: float) -> Completion:
    figures = {"prompt_tokens": 5, "cached_prompt_tokens": 2, "completion_tokens": 10, **values}
    return Completion(row, sample, "text", reason, queue_s=0.5, first_token_s=1.0, **figures)  # type: ignore[arg-type]


def summary(*completions: Completion, wall_s: float = 2.0) -> dict[str, object]:
    totals = Totals()
    for completion in completions:
        totals.add(completion)
    return totals.summary(wall_s)


def test_percentiles_interpolate_between_values() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0]) == pytest.approx(
        {"p50": 2.5, "p90": 3.7, "p99": 3.97, "mean": 2.5, "max": 4.0}
    )


def test_percentiles_of_one_value_are_that_value_and_of_none_are_null() -> None:
    assert set(percentiles([0.25]).values()) == {0.25}
    assert set(percentiles([]).values()) == {None}


def test_totals_count_tokens_rows_and_rates() -> None:
    found = summary(done(0, latency_s=1.0), done(1, reason="length", latency_s=3.0), failed(2, "why"))
    expected = {
        "rows": 3,
        "rows_ok": 2,
        "rows_error": 1,
        "completions": 2,
        "finish_reasons": {"stop": 1, "length": 1, "error": 1},
        "prompt_tokens": 10,
        "cached_prompt_tokens": 4,
        "completion_tokens": 20,
        "truncated_prompts": 0,
        "wall_s": 2.0,
        "prompt_tokens_per_s": 5.0,
        "completion_tokens_per_s": 10.0,
        "rows_per_s": 1.5,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["latency_s"] == percentiles([1.0, 3.0])


def test_a_row_with_several_samples_counts_once_and_is_ok_only_if_all_are() -> None:
    found = summary(
        done(0, 0), done(0, 1), done(1, 0), failed(1, "why", 1), failed(2, "why", 0), done(2, 1), done(3, 0), done(3, 1)
    )
    assert (found["rows"], found["rows_ok"], found["rows_error"], found["completions"]) == (4, 2, 2, 6)


def test_nothing_gives_zero_counts_and_no_rates() -> None:
    found = summary(wall_s=0.0)
    assert (found["rows"], found["rows_ok"], found["rows_error"]) == (0, 0, 0)
    assert found["prompt_tokens_per_s"] is None
    assert found["scores"] == {}


def test_truncated_prompts_are_counted() -> None:
    assert summary(done(0, truncated_prompt_tokens=3), done(1, truncated_prompt_tokens=0))["truncated_prompts"] == 1


def test_scores_are_means_over_what_was_scored() -> None:
    right, wrong, unscored = done(0), done(1), done(2)
    right.scores, wrong.scores = {"exact_match": 1.0}, {"exact_match": 0.0}
    found = summary(right, wrong, unscored)
    assert (found["scores"], found["scored_samples"]) == ({"exact_match": 0.5}, {"exact_match": 2})


@pytest.mark.parametrize(
    ("completion", "reference", "exact", "inside"),
    [
        (" Paris\n", "Paris", 1.0, 1.0),
        ("paris", "Paris", 0.0, 0.0),
        ("It is Paris.", "Paris ", 0.0, 1.0),
        ("", "Paris", 0.0, 0.0),
    ],
)
def test_scorers_compare_text(completion: str, reference: str, exact: float, inside: float) -> None:
    assert (exact_match(completion, reference), contains(completion, reference)) == (exact, inside)


def test_an_unknown_scorer_is_refused_naming_those_there_are() -> None:
    with pytest.raises(LLMConfigError, match="'exact_mach'; did you mean 'exact_match'.*contains, exact_match"):
        scorers_named(["exact_mach"])


def test_the_memory_sampler_sees_a_peak_that_is_gone_at_the_end() -> None:
    with MemorySampler(0.001) as memory:
        before = memory.peak_rss_mb
        block = np.ones(20_000_000)
        time.sleep(0.2)
        del block
    assert before + 100 < memory.peak_rss_mb < before + 1000


def test_the_environment_names_version_and_machine() -> None:
    found = environment()
    assert set(found) == {"llmpipe", "python", "platform", "cpu_cores", "memory_mb"}
    assert math.isfinite(found["memory_mb"])


def test_the_peak_of_a_job_is_its_own_whatever_ran_before_it_in_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmpipe", "-m", "backend=llama_cpp", "backend.slots=4,200,4"]
    command += ["sampling.max_tokens=8", f"hydra.sweep.dir={tmp_path}"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
    found = [json.loads((tmp_path / str(job) / "metrics.json").read_text()) for job in range(3)]
    first, large, third = (one["peak_rss_mb"] for one in found)
    assert large > first + 40
    assert abs(third - first) < 12  # what imports and first calls leave for good
