"""How tokens are chosen: the options that a run, a row and the library's `ModelConfig` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llmpipe.config.checks import check, count, number, reject_unknown

MAX_SAMPLES = 4096
"""Most samples of one row; they are held in memory together."""


@dataclass
class SamplingConfig:
    """How tokens are chosen. The same option means the same on every backend.

    Logits pass through: logit_bias, repetition_penalty, presence and frequency penalty, temperature, top_k, top_p,
    min_p, typical_p; a token is then drawn from what is left.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token (greedy). In [0, 100]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to top_p (Holtzman et al. 2020); 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024); 0 keeps all."""
    typical_p: float = 1.0
    """Keep the locally typical tokens of mass typical_p (Meister et al. 2022); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divide (multiply where negative) the logits of tokens in prompt and completion (Keskar et al. 2019); 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logit of each token already in the completion, as OpenAI defines it. In [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtract once per occurrence of the token in the completion, as OpenAI defines it. In [-2, 2]."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Add to the logits of these token ids."""
    max_tokens: int = 256
    """Most tokens to generate per sample; the end token is not counted."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the completion; they are cut off, also where they span tokens, or are a control token."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the completion, also with ignore_eos; they are not part of its text."""
    n: int = 1
    """Samples per row, each with its own seed."""
    seed: int | None = None
    """Seed of the row itself; by default derived from the run's seed and the row's id."""
    ignore_eos: bool = False
    """Generate max_tokens tokens, end tokens or not (for benchmarks)."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        check(self.stop is None or isinstance(self.stop, Sequence), "stop", self.stop, "a list of non-empty strings")
        self.stop = list(self.stop or [])
        number("temperature", self.temperature, 0, 100, "a number in [0, 100]")
        count("top_k", self.top_k, 0, "an integer >= 0 (0 is off)")
        number("top_p", self.top_p, 0, 1, "a number in (0, 1]", open_low=True)
        number("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        number("typical_p", self.typical_p, 0, 1, "a number in (0, 1]", open_low=True)
        number("repetition_penalty", self.repetition_penalty, 0, 100, "a number in (0, 100]", open_low=True)
        number("presence_penalty", self.presence_penalty, -2, 2, "a number in [-2, 2]")
        number("frequency_penalty", self.frequency_penalty, -2, 2, "a number in [-2, 2]")
        count("max_tokens", self.max_tokens, 1, "an integer >= 1")
        count("n", self.n, 1, "an integer >= 1")
        check(self.n <= MAX_SAMPLES, "n", self.n, f"at most {MAX_SAMPLES}")
        check(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "a list of non-empty strings")
        ids = self.stop_token_ids
        allowed = "a list of token ids"
        check(ids is None or isinstance(ids, Sequence) and not isinstance(ids, str), "stop_token_ids", ids, allowed)
        self.stop_token_ids = list(ids or [])
        for token in self.stop_token_ids:
            count("stop_token_ids", token, 0, allowed)
        if self.seed is not None:
            count("seed", self.seed, 0, "an integer >= 0, or null")
        check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a map of token id to bias")
        try:
            self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        except (TypeError, ValueError, OverflowError):
            check(False, "logit_bias", self.logit_bias, "a map of token id to bias")
        for token, bias in self.logit_bias.items():
            number(f"logit_bias[{token}]", bias, -1e9, 1e9, "a number in [-1e9, 1e9]")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken; logits divided by less than 1e-5 would overflow."""
        return self.temperature < 1e-5

    def replace(self, changes: Mapping[str, Any]) -> SamplingConfig:
        """Return a copy with `changes` applied; unknown names are refused with the nearest valid one.

        Raises:
            LLMConfigError: an option is unknown or out of range.
        """
        own = {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}
        reject_unknown(changes, own, "sampling option")
        return SamplingConfig(**{**own, **changes})
