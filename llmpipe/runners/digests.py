"""Files that decide answers → a digest that tells them apart, and a witness of whether they have stayed as they were.

Weights are mapped into memory, so that what is written to a file reaches a model that runs; and a backend that is
started again reads its files again. So what was digested is looked at for as long as answers are computed from it. What
was changed and put back leaves a trace in the times that the system keeps, which no program can set.
"""

from __future__ import annotations

import glob
import hashlib
import stat
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llmpipe.exceptions import LLMInferenceError, LLMInitializationError
from llmpipe.runners.weights import local_path

WHOLE_BYTES = 256 * 2**20
"""Files up to this size are digested whole; of larger ones, the length and `SAMPLES` blocks spread evenly."""
SAMPLES = 256
BLOCK_BYTES = 64 * 2**10
TICK_S = 0.02
"""Longer than the steps in which systems count the times of files: two writes within one step look like one."""
ATTEMPTS = 3
"""How often files are digested that change meanwhile."""
TEMPLATES = "additional_chat_templates"
"""The one directory inside a checkpoint that transformers reads."""


class State(NamedTuple):
    """What the file system says of a path: of the link, where it is one, and of the file there."""

    place: tuple[int, ...]
    """Which link leads to which file."""
    written: tuple[int, ...]
    """When it was last written, and how long it is; programs that put something back may set the time, too."""
    rights: tuple[int, ...]
    """What may change while the content stays: owner, mode, further names."""
    changed_ns: tuple[int, ...]
    """When any of this last changed."""
    is_directory: bool

    @classmethod
    def of(cls, path: Path) -> State:
        """Look at a name.

        Raises:
            OSError: there is nothing, or it cannot be seen.
        """
        link, found = path.lstat(), path.stat()
        is_directory = stat.S_ISDIR(found.st_mode)
        return cls(
            place=(link.st_dev, link.st_ino, found.st_dev, found.st_ino),
            written=(found.st_mtime_ns, 0 if is_directory else found.st_size),
            rights=(found.st_mode, found.st_uid, found.st_gid, found.st_nlink),
            changed_ns=(link.st_ctime_ns, found.st_ctime_ns),
            is_directory=is_directory,
        )

    def stayed(self, now: State) -> bool | None:
        """Say whether the content is the same; None where only the content can tell."""
        if self.written != now.written:  # in a directory files come and go, and are looked at by themselves
            return self.is_directory
        if self.changed_ns != now.changed_ns:
            return None if self.place == now.place and self.rights != now.rights else False
        return True if self.place == now.place else None  # some file systems number their files anew now and then


class ModelChanged(LLMInferenceError):
    """What answers were computed with is not what it was."""


class Witness:
    """Remembers what was digested, and notices what is not as it was.

    Args:
        remedy: What to do about it, for the message.
    """

    def __init__(self, remedy: str = "") -> None:
        self._remedy = remedy
        self._seen: dict[Path, tuple[dict[Path, State], str]] = {}
        self._change: str | None = None
        """What was changed, once something was: from then on nothing makes it good."""

    def digest(self, path: Path) -> str:
        """Return a short digest of a file, with its other parts where it is one of several, or of a directory.

        Raises:
            LLMInitializationError: it cannot be read, or is being written.
        """
        try:
            for _ in range(ATTEMPTS):
                if 0 <= time.time_ns() - _newest(_states(path)) < TICK_S * 1e9:
                    time.sleep(TICK_S)
                before, digest = _states(path), _digest(path)
                if _compare(before, _states(path))[0] is None:
                    self._seen[path] = before, digest
                    return digest
        except OSError as error:
            raise LLMInitializationError(f"{error.filename or path} cannot be read: {error.strerror}") from error
        raise LLMInitializationError(f"{path} is being written to: wait until that has ended")

    def check(self) -> None:
        """See whether all is as it was when it was digested. Quick, unless the rights of a file have changed.

        Raises:
            ModelChanged: something is not; names the file.
        """
        for path in list(self._seen):
            self._change = self._change or self._look(path)
        if self._change is not None:
            raise ModelChanged(
                f"{self._change} while answers were computed with it: those since then do not count{self._remedy}"
            )

    def _look(self, path: Path) -> str | None:
        """Say what has changed, if anything has."""
        before, digest = self._seen[path]
        try:
            now = _states(path)
            if now == before:
                return None
            change, unclear = _compare(before, now)
            if change is not None:
                return change
            if not unclear:
                self._seen[path] = now, digest
            elif (again := Witness()).digest(path) == digest:
                self._seen |= again._seen
            else:
                return f"{path} was changed"
        except LLMInitializationError:
            return f"{path} was changed"
        except OSError as error:
            return f"{error.filename or path} was taken away ({error.strerror})"
        return None


def model_digest(model: str, witness: Witness | None = None) -> str:
    """Return a short digest of the weights and of what stands beside them; of a hub id, the id itself.

    Small files are read whole; of large ones, 16 MB spread evenly: enough to tell models apart, not to find a flipped
    bit.

    Args:
        model: As in `backend.model`.
        witness: Is to remember the files.

    Raises:
        LLMInitializationError: the model does not exist, or cannot be read.
    """
    path = local_path(model)
    return f"hub:{model}" if path is None else (witness or Witness()).digest(path)


def content_digest(text: str, witness: Witness | None = None) -> str:
    """Return `text` with what it names, a path alone or PATH=VALUE, replaced by a digest of its content.

    Args:
        text: Anything.
        witness: Is to remember what is named.

    Raises:
        LLMInitializationError: what it names cannot be read.
    """
    name, sign, rest = text.rpartition("=") if "=" in text and not _exists(text) else (text, "", "")
    return f"{(witness or Witness()).digest(Path(name).expanduser())}{sign}{rest}" if _exists(name) else text


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, of nobody's home: it is no name at all
        return False


def files_of(path: Path) -> list[Path]:
    """Return all that is read of a model, an adapter or a template: of a directory, or of a file in parts."""
    if path.is_dir():
        found = [*path.iterdir(), *(path / TEMPLATES).glob("*.jinja")]
        return sorted(file for file in found if file.is_file() and file.suffix != ".md")
    head, sign, _ = path.name.partition("-00001-of-")
    return sorted(path.parent.glob(f"{glob.escape(head)}-*-of-*.gguf")) if sign else [path]


def _states(path: Path) -> dict[Path, State]:
    """Return the states of all files of a model that are read, and of their directory.

    Raises:
        OSError: something is not there any more.
    """
    return {file: State.of(file) for file in (path if path.is_dir() else path.parent, *files_of(path))}


def _compare(before: dict[Path, State], now: dict[Path, State]) -> tuple[str | None, bool]:
    """Return what has changed, where the states tell, and whether only the content could tell more."""
    for file in sorted(before.keys() ^ now.keys()):
        return f"{file} was {'taken away' if file in before else 'added'}", False
    stayed = {file: state.stayed(now[file]) for file, state in before.items()}
    changed = (f"{file} was changed" for file, verdict in stayed.items() if verdict is False)
    return next(changed, None), None in stayed.values()


def _newest(states: dict[Path, State]) -> int:
    return max(max(state.changed_ns) for state in states.values())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in files_of(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{name}\0{size}\0".encode())
            _feed(digest, stream, size)
    return f"sha256:{digest.hexdigest()[:32]}"


def _feed(digest: hashlib._Hash, stream: BinaryIO, size: int) -> None:
    if size <= WHOLE_BYTES:
        stream.seek(0)
        while block := stream.read(2**20):
            digest.update(block)
        return
    for i in range(SAMPLES):
        stream.seek((size - BLOCK_BYTES) * i // (SAMPLES - 1))
        digest.update(stream.read(BLOCK_BYTES))
