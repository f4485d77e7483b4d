"""What decides the answers of a run: its resumption must have the same."""

from __future__ import annotations

import math
from typing import Any

from llmpipe.config import BackendConfig, RunConfig, answer_fields, describe
from llmpipe.datasets import Scan, digest_of
from llmpipe.runners.weights import content_digest, model_digest

ROUNDING_OPTIONS = ("n_gpu_layers", "tensor_split", "batching", "batch_tokens", "micro_batch_tokens")
"""Options that change an answer's last digits, and so count in reproducible mode only."""


def fingerprint(config: RunConfig, scan: Scan) -> dict[str, Any]:
    """Return what decides the answers of a run, as nested plain values.

    Raises:
        LLMInitializationError: the model cannot be found.
    """
    return {
        **_of_backend(config),
        "sampling": answer_fields(config.sampling),
        "prompt": answer_fields(config.prompt),
        "dataset": {
            "digest": digest_of(scan.contents),
            "rows": scan.rows,
            "columns": describe(config.dataset.columns),
            "shuffle": config.dataset.shuffle,
            "offset": config.dataset.offset,
            "limit": config.dataset.limit,
        },
        "seed": config.seed,
    }


def continued(asked: dict[str, Any], known: dict[str, Any] | None, scan: Scan) -> dict[str, Any]:
    """Return a fingerprint with the dataset as an earlier run knew it, if that has only grown since.

    Args:
        asked: The fingerprint of what is asked now.
        known: That of the earlier run, where there is one.
        scan: What is in the dataset now, and was in the first rows, as many as the earlier run had.
    """
    if not known or scan.earlier is None:
        return asked
    now, before = asked["dataset"], known["dataset"]
    most = [math.inf if dataset.get("limit") is None else dataset["limit"] for dataset in (before, now)]
    as_before = {**now, **{name: before.get(name) for name in ("digest", "rows", "limit")}}
    grown = digest_of(scan.earlier) == before.get("digest") and most[0] <= most[1] and as_before == before
    return {**asked, "dataset": before} if grown else asked


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
    return describe(config.backend) if isinstance(config.backend, BackendConfig) else dict(config.backend)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
