"""A model's name → the files that hold it; what tells two models apart by those is digests.py.

The name is `bundled`, a local file or directory, or a hub id. Only safetensors and GGUF count as weights.
"""

from __future__ import annotations

import fnmatch
import os
from contextlib import AbstractContextManager
from pathlib import Path

from llmpipe.config import BUNDLED
from llmpipe.config.checks import readable
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.quoting import listed
from llmpipe.runners import hub

BUNDLED_DIR = Path(__file__).parent.parent / "models" / "tiny-chat"


def local_path(model: str) -> Path | None:
    """Return where `model` is on this machine, or None where it can only be a hub id.

    Raises:
        LLMInitializationError: `model` is written as a path, and nothing is there.
    """
    if model == BUNDLED:
        return BUNDLED_DIR
    with _readable(model):
        path = Path(model).expanduser()
        if path.exists():
            return path
    owner, _, name = model.partition(":")[0].partition("/")
    looks_like_a_path = model.startswith((".", "/", "~", "\\")) or not owner or not name or "/" in name
    if looks_like_a_path or name.endswith((".gguf", ".safetensors")):
        raise LLMInitializationError(
            f"backend.model={model!r} does not exist (from {os.getcwd()}); "
            f"it must be a file, a directory, a hub id such as owner/name, or bundled"
        )
    return None


def _readable(model: str) -> AbstractContextManager[None]:
    return readable("backend.model", model, LLMInitializationError)


def find_gguf(model: str) -> Path:
    """Return the GGUF file of `model`; of a hub id `owner/name[:pattern]`, download it.

    Raises:
        LLMInitializationError: there is no GGUF file, or there are several and none is named.
        MissingDependencyError: a hub id is given and huggingface_hub is not installed.
    """
    path = local_path(model)
    if path is None:
        return _download_gguf(model)
    if path.is_dir():
        with _readable(model):
            files = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
        return path / _only_gguf(files, str(path), f"backend.model={path}/")
    with _readable(model), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LLMInitializationError(
                f"backend.model={model!r} is not a GGUF file; for other formats use backend=transformers"
            )
    return path


def _only_gguf(files: list[str], where: str, remedy: str) -> str:
    first_parts = [name for name in files if "-of-" not in name or "-00001-of-" in name]
    if not first_parts:
        raise LLMInitializationError(f"no GGUF file in {where}; for safetensors use backend=transformers")
    if len(first_parts) > 1:
        raise LLMInitializationError(
            f"{len(first_parts)} GGUF files in {where}; name one: " + listed(remedy + name for name in first_parts)
        )
    return first_parts[0]


def _download_gguf(model: str) -> Path:
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", "transformers", f"the hub model {model}") from error
    repo, _, pattern = model.partition(":")
    try:
        cache = Path(snapshot_download(repo, local_files_only=True))
        there = [file.relative_to(cache).as_posix() for file in sorted(cache.rglob("*.gguf"))]
    except LocalEntryNotFoundError:
        there = []

    def wanted(files: list[str]) -> list[str]:
        named = [name for name in files if fnmatch.fnmatch(name.lower(), f"*{pattern.lower()}*")]
        return [name for name in named if name.endswith(".gguf")]

    online = hub.is_needed(model, cached=bool(wanted(there)))
    try:
        files = HfApi().list_repo_files(repo) if online else there
        name = _only_gguf(wanted(files), f"hub repository {repo}", f"backend.model={repo}:")
        first, split, _ = name.partition("-00001-of-")
        parts = [part for part in files if part.startswith(f"{first}-0")] if split else [name]
        paths = {part: Path(hf_hub_download(repo, part, local_files_only=not online)) for part in parts}
    except LLMInitializationError:
        raise
    except Exception as error:  # whatever the hub or the network says, the remedy is the same
        raise LLMInitializationError(
            f"cannot fetch {model!r} from the hub ({type(error).__name__}); "
            f"give a local file, or check the name and the network"
        ) from error
    return paths[name]


def refuse_unreachable(model: str) -> None:
    """Refuse a model of which nothing is here and whose hub does not answer.

    Backends ask the hub themselves, for what they need of it; but their packages take seconds to import before.

    Raises:
        LLMInitializationError: it is so, or `model` is written as a path, and nothing is there.
    """
    if local_path(model) is not None:
        return
    try:
        from huggingface_hub import constants
    except ImportError:  # whoever needs it says so
        return
    repo = model.partition(":")[0]
    if not Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}").exists():
        hub.is_needed(model, cached=False)


def find_checkpoint(model: str) -> str:
    """Return the directory of a transformers checkpoint, a GGUF file, or the hub id as it is.

    Raises:
        LLMInitializationError: there is no such directory, or it holds no config.json.
    """
    path = local_path(model)
    if path is None:
        return model
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_file():
        raise LLMInitializationError(
            f"backend.model={model!r} is a file; backend=transformers takes a directory, a GGUF file or a hub id"
        )
    with _readable(model):
        whole = (path / "config.json").is_file()
    if not whole:
        raise LLMInitializationError(f"backend.model={model!r} has no config.json, so it is no transformers checkpoint")
    return str(path)


def hub_commit(model: str, file: str | Path, revision: str | None = None) -> str | None:
    """Return the commit of a hub model whose files have been fetched; None of a local one, or where that is unknown.

    Args:
        model: As in `backend.model`.
        file: Name of a file of the repository, or where it was fetched to.
        revision: The branch, tag or commit that was asked for.
    """
    if local_path(model) is not None:
        return None
    found = file if isinstance(file, Path) else cached(model, file, revision)
    return next((path.name for path in found.parents if path.parent.name == "snapshots"), None) if found else None


def cached(model: str, file: str, revision: str | None = None) -> Path | None:
    """Return where the cache has a file of a hub model; None where it does not. Arguments as in `hub_commit`."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.partition(":")[0], file, revision=revision)
    return Path(found) if isinstance(found, str) else None
