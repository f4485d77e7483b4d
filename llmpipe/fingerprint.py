"""What decides the answers of a run: its resumption must have the same.

What the options and files say is known before anything is loaded, and is compared first. What a runner says of itself,
its facts, is known once it is loaded, and is compared before any row is run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmpipe.chats import read_tools
from llmpipe.config import BACKENDS, BackendConfig, RunConfig, answer_fields, describe, is_own
from llmpipe.config.checks import check, readable
from llmpipe.datasets import Scan
from llmpipe.exceptions import LedgerError, LLMConfigError, LLMInitializationError
from llmpipe.redaction import Place, as_written, below, differences, redacted, sealed
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.digests import Witness, content_digest, model_digest
from llmpipe.version import __version__

log = logging.getLogger(__name__)


def fingerprint(
    config: RunConfig, scan: Scan, known: dict[str, Any] | None = None, witness: Witness | None = None
) -> dict[str, Any]:
    """Return what decides the answers of a run, as nested plain values.

    Of what came from the environment there is a digest beside the reference; see `llmpipe.redaction.sealed`.

    Args:
        config: The run.
        scan: What is in its dataset.
        known: The fingerprint of an earlier run that this is to be compared with.
        witness: Is to remember the files of the model.

    Raises:
        LLMInitializationError: the model cannot be found, or read.
    """
    found = {
        **_of_backend(config, witness),
        "sampling": answer_fields(config.sampling),
        "prompt": {**answer_fields(config.prompt), "tools": read_tools(config.prompt.tools)},
        "dataset": {
            "digest": scan.digest,
            "rows": scan.rows,
            "columns": describe(config.dataset.columns),
            "shuffle": config.dataset.shuffle,
            "offset": config.dataset.offset,
            "limit": config.dataset.limit,
        },
        "seed": config.seed,
    }
    sealing: dict[str, Any] = sealed(found, as_written(found, _places(config)), known)
    return sealing


def _places(config: RunConfig) -> dict[Place, str]:
    """Return what was written where values came from the environment, by their places in the fingerprint."""
    places = dict(config.references)
    places.pop(("dataset", "limit"), None)  # compared as a number, and every file shows how many rows there are
    for written in below(places, "device").values():
        places["backend", "device"] = written
    if ("sampling", "seed") in places:
        places["seed",] = places["sampling", "seed"]
    if ("backend", "model") in places and not isinstance(config.backend, BackendConfig):
        places["model",] = places["backend", "model"]
    return places


def facts_of(runner: BaseLLMRunner) -> dict[str, dict[str, Any]]:
    """Return what a runner says of itself, as nested plain values; without its weights, what is known without them."""
    facts: dict[str, dict[str, Any]] = redacted(asdict(runner.facts()))
    facts["may_decide"]["llmpipe"] = __version__
    return facts


def compare_facts(
    known: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], reproducible: bool, directory: Path
) -> None:
    """See to it that a run goes on with the runner that it began with; other versions are mentioned.

    Args:
        known: The facts of the runner that it began with.
        found: Those of the runner that it is to go on with.
        reproducible: Whether every digit counts.
        directory: The run directory.

    Raises:
        LedgerError: the answers would not be those of one run; names what was and what is.
    """

    def changes(*kinds: str) -> str:
        both = [(kind, known.get(kind, {}).keys() & found.get(kind, {}).keys()) for kind in kinds]
        said = [({k: known[kind][k] for k in keys}, {k: found[kind][k] for k in sorted(keys)}) for kind, keys in both]
        return "; ".join(change for old, new in said for change in differences(old, new))

    if refused := changes("decides", *(["may_decide", "last_digits"] if reproducible else [])):
        why = ", and backend.reproducible=true" if reproducible else ""
        raise LedgerError(
            f"{directory} holds answers of another model, package or machine: {refused}{why}. Go on with those of "
            f"before, or use another hydra.run.dir"
        )
    if mentioned := changes("may_decide"):
        log.warning("answers may differ from those that %s holds so far: %s", directory, mentioned)


def _of_backend(config: RunConfig, witness: Witness | None) -> dict[str, Any]:
    values = backend_values(config)
    if not is_own(values.get("_target_")):  # nobody here knows what its options mean
        values = {name: value for name, value in values.items() if name not in ("isolation", "row_timeout_s")}
        return {"model": values.get("model"), "backend": values}
    values = answer_fields(config.backend, last_digits=config.backend.reproducible)
    model = values.pop("model", None)
    if config.backend.reproducible:
        values["device"] = str(config.device)
    for name in ("chat_template", "lora"):  # what is in the files counts, not what they are called
        with readable(f"backend.{name}", values.get(name), LLMInitializationError):
            values[name] = [content_digest(str(text), witness) for text in _as_list(values.get(name))]
    with readable("backend.model", model, LLMInitializationError):
        return {"model": model if model is None else model_digest(str(model), witness), "backend": values}


def backend_values(config: RunConfig) -> dict[str, Any]:
    """Return a run's backend options, also where its `_target_` is one that has no dataclass here.

    Raises:
        LLMConfigError: there are none, or they are those of a backend that has one.
    """
    if isinstance(config.backend, BackendConfig):
        return describe(config.backend)
    check(isinstance(config.backend, Mapping), "backend", config.backend, "a backend's config, or its options by name")
    target = config.backend.get("_target_", "???")
    check(isinstance(target, str), "backend._target_", target, "MODULE.CLASS")
    if is_own(target):
        own = {schema._target_: kind.group for kind, schema in BACKENDS.items()}
        check(target in own, "backend._target_", target, f"one of {', '.join(own)}, or the class of someone else")
        raise LLMConfigError(
            f"backend._target_={target!r} lacks the options that go with it: begin the file that names it with "
            f"'defaults: [/schema/{own[target]}@_here_]', or use backend={own[target]}"
        )
    return dict(config.backend)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
