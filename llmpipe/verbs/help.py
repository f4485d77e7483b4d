"""`llmpipe help [VERB]`, `llmpipe --help`: the verbs, the groups, and what the config says of every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from llmpipe.config import BACKENDS, BackendConfig, RunConfig, conf_dir, field_docs
from llmpipe.config.checks import reject_unknown
from llmpipe.config.options import default_of
from llmpipe.verbs import VERBS, main_of
from llmpipe.verbs.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Print the help of a verb, or of all there is."""
    verbs = Parser("help", "Explains a verb, or every key.").read(arguments).words
    reject_unknown(verbs, VERBS, "verb")
    if verbs:
        main_of(verbs[0])(["--help"])
    else:
        print(help_text(), end="")


def help_text() -> str:
    """Return the text of `--help`: the groups, and what each key means."""
    lines = [
        "llmpipe: an offline batch runner for language models.",
        "",
        *(f"  {f'{name} {verb.takes}':<43}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "llmpipe VERB --help explains one. Some commands:",
        "",
        "  llmpipe backend=transformers device=cuda",
        "  llmpipe dataset.path=prompts.jsonl sampling.max_tokens=100 output=parquet",
        "  llmpipe -m sampling.temperature=0,0.7,1.2",
        "  llmpipe resume outputs/2026-01-31/12-00-00",
        "  llmpipe export outputs/2026-01-31/12-00-00 --to so-far.parquet",
        "",
        "Choose one option per group (group=option):",
        "",
    ]
    for group in ("backend", "device", "sampling", "dataset", "prompt", "output", "metrics", "experiment"):
        options = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        sign = "+" if group == "experiment" else " "
        lines.append(f"  {sign}{group + '=':<12}{'|'.join(options)}")
    lines += ["", "Change any key (key=value); after each, its default:", ""]
    for field in fields(RunConfig):
        lines += _help_of(RunConfig, field.name)
    lines += [
        "'KEY=${oc.env:NAME}' takes a value from the environment; all that is written has this reference instead.",
        "hydra.run.dir=DIR chooses the run directory. --cfg job prints the config, --hydra-help Hydra's flags.",
    ]
    return "\n".join(lines) + "\n"


def _help_of(owner: type[Any], name: str, prefix: str = "") -> list[str]:
    field = next(f for f in fields(owner) if f.name == name)
    default = default_of(field)
    doc = field_docs(owner)[name]
    if name == "backend":
        return [f"  backend: {doc}", *_help_of_backends()]
    if hasattr(default, "__dataclass_fields__"):
        inner = [line for f in fields(default) for line in _help_of(type(default), f.name, f"{prefix}{name}.")]
        return [f"  {prefix}{name}: {doc}", *inner, ""] if not prefix else inner
    shown = getattr(default, "value", default)
    shown = (
        {None: "null", True: "true", False: "false"}.get(shown, shown)
        if isinstance(shown, (bool, type(None)))
        else shown
    )
    first = f"    {prefix}{name} = {shown}" if shown != "???" else f"    {prefix}{name}"
    return [f"{first:<44} {doc}"] if len(first) < 44 else [first, f"{'':<44} {doc}"]


def _help_of_backends() -> list[str]:
    """Return the keys that all backends share, then those of each."""
    shared = {f.name: f.default for f in fields(BackendConfig)}
    lines = [line for name in shared for line in _help_of(BackendConfig, name, "backend.")] + [""]
    for backend, schema in BACKENDS.items():
        lines.append(f"  backend={backend.group}: {(schema.__doc__ or '').splitlines()[0]}")
        own = [f.name for f in fields(schema) if f.name not in shared or f.default != shared[f.name]]
        own = [name for name in own if name != "_target_"]
        lines += [line for name in own for line in _help_of(schema, name, "backend.")] + [""]
    return lines
