"""The files of a checkpoint name others to read. Only those that lie beside them, and hold no code, are read.

What lies beside them is in the digest of the model; what a name leads to elsewhere is not, and may be anybody's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from llmpipe.exceptions import LLMInitializationError

TOLD_ONLY = frozenset({"_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file"})
"""Keys that only say where a file came from. Nobody reads it; transformers replaces `tokenizer_file` by its own."""
LOADS_OTHERS = ("XLORA", "SHADOW")
"""Types of adapters that name other adapters or models, which peft would load from anywhere, even pickled."""
PART = "shard-"
"""Beginning of file names that transformers takes for parts of a distributed program's weights."""


def refuse_strangers(name: str, path: str, source: Mapping[str, Any], allow_pickle: bool) -> None:
    """Refuse a checkpoint, or an adapter, whose files name what does not lie beside them, or is no safetensors.

    Args:
        name: What the user calls it.
        path: A directory, or a hub id.
        source: Where to find its files, for transformers.
        allow_pickle: Whether weights may be something other than safetensors.

    Raises:
        LLMInitializationError: names the file and what it names.
    """
    files = Files(name, path, source)
    indexes = ["model.safetensors.index.json", *(["pytorch_model.bin.index.json"] if allow_pickle else [])]
    ending = "" if allow_pickle else ".safetensors"
    configs = ["config.json"]
    # Of these, transformers reads the one for its own version instead of config.json.
    for other in files.read("config.json").get("configuration_files") or ():
        files.check("config.json", other)
        configs.append(other)
    for config in configs:
        chosen = files.read(config).get("transformers_weights")  # instead of the usual ones
        if chosen is not None:
            files.check(config, chosen, ending and (ending, f"{ending}.index.json"))
            indexes += [chosen] if chosen.endswith(".index.json") else []
    for index in indexes:
        listed = files.read(index).get("weight_map")
        for weights in {str(name): name for name in listed.values()}.values() if isinstance(listed, dict) else ():
            files.check(index, weights, ending)
    tokenizer = files.read("tokenizer_config.json")
    for key in ("fast_tokenizer_files", "init_inputs"):
        for other in tokenizer.get(key) or ():
            files.check("tokenizer_config.json", other)
    kind = files.read("adapter_config.json").get("peft_type")
    if kind in LOADS_OTHERS:
        raise LLMInitializationError(f"{name}: an adapter of the type {kind} loads others, wherever they are")
    for file in (*configs, "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        for text in _texts(files.read(file)):
            if os.path.isfile(text) and Path(text).resolve().parent != Path(path).resolve():
                raise files.stranger(file, text)


def refuse_adapter(name: str, path: str, source: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that transformers would load together with an adapter, or in parts, whatever they are.

    Raises:
        LLMInitializationError: says what to do.
    """
    if Files(name, path, source).find("adapter_config.json") is not None:
        raise LLMInitializationError(
            f"{name} has an adapter_config.json: give the model as backend.model and the adapter as backend.lora"
        )
    if Path(path).is_dir() and (parts := sorted(Path(path).glob(f"{PART}*.safetensors"))):
        raise LLMInitializationError(f"{name} is in parts of a distributed program ({parts[0].name}): save it as one")


class Files:
    """The files of a checkpoint by their names.

    Args:
        name: What the user calls it.
        path: A directory, or a hub id.
        source: Where to find its files, for transformers.
    """

    def __init__(self, name: str, path: str, source: Mapping[str, Any]) -> None:
        self._name, self._path = name, path
        self._source = {key: value for key, value in source.items() if key in ("revision", "local_files_only")}

    def find(self, file: str) -> str | None:
        """Return the path of a file, downloaded where the model is a hub id; None where there is no such file."""
        quiet = ("gated_repo", "missing_entries", "connection_errors")
        found: str | None = cached_file(
            self._path, file, **self._source, **{f"_raise_exceptions_for_{what}": False for what in quiet}
        )
        return found

    def read(self, file: str) -> dict[str, Any]:
        """Return what is in a JSON file; nothing where it is not there, or is no JSON, which others will say."""
        found = self.find(file)
        if found is None:
            return {}
        try:
            values = json.loads(Path(found).read_bytes())
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def check(self, file: str, other: Any, ending: str | tuple[str, ...] = "") -> None:
        """Refuse what a file names.

        Raises:
            LLMInitializationError: it is not the plain name of a file beside it, or does not end as it should.
        """
        if not isinstance(other, str) or other != os.path.basename(other) or other in ("", ".", "..") or "\\" in other:
            raise self.stranger(file, other)
        if not other.endswith(ending):
            raise LLMInitializationError(
                f"{self._name}: {file} names {other[:200]!r}, which is no safetensors; "
                f"pickled weights need backend.allow_pickle=true"
            )

    def stranger(self, file: str, other: Any) -> LLMInitializationError:
        """Return what to say of a file that names one elsewhere."""
        return LLMInitializationError(f"{self._name}: {file} names {str(other)[:200]!r}, which does not lie beside it")


def _texts(values: Any) -> Iterator[str]:
    """Yield all texts in what was JSON, but for those that only tell where something came from."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [inner for key, inner in value.items() if key not in TOLD_ONLY]
        elif isinstance(value, list):
            waiting += value
