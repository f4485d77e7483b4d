"""What is run: rows with skewed lengths, the same for every contestant."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Job:
    """One row: a prompt of so many tokens (one per letter), and how many tokens to generate."""

    prompt: str
    max_tokens: int


def skewed(rows: int, seed: int = 0) -> list[Job]:
    """Return rows with prompts of 16 to 512 tokens (lognormal, mean about 150) and answers of 16 to 256 (mean 60)."""
    random = np.random.default_rng(seed)
    prompts = np.clip(random.lognormal(4.8, 0.65, rows), 16, 512).astype(int)
    answers = np.clip(random.lognormal(3.9, 0.6, rows), 16, 256).astype(int)
    return [Job(letters(random, p), int(a)) for p, a in zip(prompts, answers, strict=True)]


def shared(rows: int, prefix: int, own: int, max_tokens: int, same: bool, seed: int = 0) -> list[Job]:
    """Return rows of `prefix` + `own` prompt tokens, the prefix the same in all of them or different in each."""
    random = np.random.default_rng(seed)
    common = letters(random, prefix)
    heads = [common if same else letters(random, prefix) for _ in range(rows)]
    return [Job(head + letters(random, own), max_tokens) for head in heads]


def letters(random: np.random.Generator, count: int) -> str:
    """Return random ASCII letters."""
    return "".join(random.choice(list(string.ascii_letters), count))
