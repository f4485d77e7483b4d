"""What decides the answers of a run: its resumption must have the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpipe.chats import read_tools
from llmpipe.config import BackendConfig, RunConfig, answer_fields, describe
from llmpipe.config.checks import check
from llmpipe.datasets import Scan
from llmpipe.runners.weights import content_digest, model_digest

ROUNDING_OPTIONS = ("n_gpu_layers", "tensor_split", "batching", "batch_tokens", "micro_batch_tokens", "repack")
"""Options that change an answer's last digits, and so count in reproducible mode only."""


def fingerprint(config: RunConfig, scan: Scan) -> dict[str, Any]:
    """Return what decides the answers of a run, as nested plain values.

    Raises:
        LLMInitializationError: the model cannot be found.
    """
    return {
        **_of_backend(config),
        "sampling": answer_fields(config.sampling),
        "prompt": {**answer_fields(config.prompt), "tools": read_tools(config.prompt.tools)},
        "dataset": {"digest": scan.digest, "columns": describe(config.dataset.columns), "limit": config.dataset.limit},
        "seed": config.seed,
    }


def _of_backend(config: RunConfig) -> dict[str, Any]:
    values = backend_values(config)
    if not str(values.get("_target_")).startswith("llmpipe."):  # nobody here knows what its options mean
        values = {name: value for name, value in values.items() if name not in ("isolation", "row_timeout_s")}
        return {"model": values.get("model"), "backend": values}
    values = answer_fields(config.backend)
    model = values.pop("model", None)
    if values["reproducible"]:  # then the last digit counts, and these decide it
        values |= {name: value for name, value in describe(config.backend).items() if name in ROUNDING_OPTIONS}
        values["device"] = str(config.device)
    for name in ("chat_template", "lora"):  # what is in the files counts, not what they are called
        values[name] = [content_digest(str(text)) for text in _as_list(values.get(name))]
    return {"model": model if model is None else model_digest(str(model)), "backend": values}


def backend_values(config: RunConfig) -> dict[str, Any]:
    """Return a run's backend options, also where its `_target_` is one that has no dataclass here."""
    if isinstance(config.backend, BackendConfig):
        return describe(config.backend)
    check(isinstance(config.backend, Mapping), "backend", config.backend, "a backend's config, or its options by name")
    return dict(config.backend)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
