"""How tokens are chosen: the options that a run, a row and the library's `ModelConfig` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from llmpipe.config.checks import check, count, number, reject_unknown
from llmpipe.config.conversion import integer, settle
from llmpipe.config.options import option

MAX_SAMPLES = 4096
"""Most samples of one row; they are held in memory together."""


@dataclass
class SamplingConfig:
    """How tokens are chosen. The same option means the same on every backend.

    Logits pass through: logit_bias, repetition_penalty, presence and frequency penalty, temperature, top_k, top_p,
    min_p, typical_p; a token is then drawn from what is left.
    """

    temperature: float = option(0.0, "Divides the logits; 0 takes the most likely token (greedy). In [0, 100].")
    top_k: int = option(0, "Keep the k most likely tokens; 0 keeps all.")
    top_p: float = option(
        1.0, "Keep the smallest set of tokens whose probabilities sum to top_p (Holtzman et al. 2020); 1 keeps all."
    )
    min_p: float = option(
        0.0, "Drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024); 0 keeps all."
    )
    typical_p: float = option(
        1.0, "Keep the locally typical tokens of mass typical_p (Meister et al. 2022); 1 keeps all."
    )
    repetition_penalty: float = option(
        1.0,
        "Divide (multiply where negative) logits of tokens in prompt and completion (Keskar et al. 2019); 1 is off.",
    )
    presence_penalty: float = option(
        0.0, "Subtract from the logit of each token already in the completion, as OpenAI defines it. In [-2, 2]."
    )
    frequency_penalty: float = option(
        0.0, "Subtract once per occurrence of the token in the completion, as OpenAI defines it. In [-2, 2]."
    )
    logit_bias: dict[Any, float] = option({}, "Add to the logits of these token ids, as {5: -100}.")
    max_tokens: int = option(256, "Most tokens to generate per sample; the end token is not counted.")
    stop: list[str] = option(
        [], "Strings that end the completion; they are cut off, also where they span tokens, or are a control token."
    )
    stop_token_ids: list[int] = option(
        [], "Tokens that end the completion, also with ignore_eos; they are not part of its text."
    )
    n: int = option(1, "Samples per row, each with its own seed.")
    seed: int | None = option(
        None,
        "Of a run the same as seed=; of a row's sampling the row's own, by default derived from the run's and its id.",
    )
    ignore_eos: bool = option(False, "Generate max_tokens tokens, end tokens or not (for benchmarks).")

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        if self.stop is None or isinstance(self.stop, str):  # as OpenAI has it
            self.stop = [] if self.stop is None else [self.stop]
        are_texts = not isinstance(self.stop, Iterable) or all(isinstance(stop, str) for stop in self.stop)
        check(are_texts, "stop", self.stop, "a list of non-empty strings")  # a number could be meant as a token
        settle(self)
        number("temperature", self.temperature, 0, 100, "a number in [0, 100]")
        count("top_k", self.top_k, 0, "an integer >= 0 (0 is off)")
        number("top_p", self.top_p, 0, 1, "a number in (0, 1]", open_low=True)
        number("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        number("typical_p", self.typical_p, 0, 1, "a number in (0, 1]", open_low=True)
        number("repetition_penalty", self.repetition_penalty, 0, 100, "a number in (0, 100]", open_low=True)
        number("presence_penalty", self.presence_penalty, -2, 2, "a number in [-2, 2]")
        number("frequency_penalty", self.frequency_penalty, -2, 2, "a number in [-2, 2]")
        count("max_tokens", self.max_tokens, 1, "an integer >= 1")
        count("n", self.n, 1, "an integer >= 1", MAX_SAMPLES)
        check(all(self.stop), "stop", self.stop, "a list of non-empty strings")
        for token in self.stop_token_ids:
            count("stop_token_ids", token, 0, "a list of token ids")
        if self.seed is not None:
            count("seed", self.seed, 0, "an integer >= 0, or null", None)
        for token, bias in self.logit_bias.items():
            number(f"logit_bias[{token}]", bias, -1e9, 1e9, "a number in [-1e9, 1e9]")
        # JSON and the command line have keys that are text.
        self.logit_bias = {integer("a token of logit_bias", token): bias for token, bias in self.logit_bias.items()}

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


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments: type checkers cannot read them off a dataclass."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float]
    max_tokens: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    n: int
    seed: int | None
    ignore_eos: bool
