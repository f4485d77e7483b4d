"""Tokenizers that were never loaded here are loaded first in a process of their own; see runners/trials.py.

A tokenizer in one JSON file, as nearly all are, is loaded there by the library that transformers has for it, which
takes a moment. For any other, transformers itself is asked, which takes seconds.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from llmpipe.exceptions import LLMInitializationError
from llmpipe.runners.digests import files_of
from llmpipe.runners.transformers.files import Files
from llmpipe.runners.trials import Trial

log = logging.getLogger(__name__)

ONE_FILE = "tokenizer.json"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
"""How files end that say nothing of a tokenizer."""
GROWTH = 50
"""Bytes of memory for each of a tokenizer in JSON; common ones take ten."""
BAD = 3
"""The program's exit code where the tokenizer failed as no Python code does."""
_PROGRAM = f"""
import json, resource, sys
sys.path[:], most_bytes, most_s, file, path, source = json.loads(sys.argv[1])
for limit, most in (resource.RLIMIT_DATA, most_bytes), (resource.RLIMIT_CPU, most_s), (resource.RLIMIT_CORE, 0):
    try:
        resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
    except (OSError, ValueError):  # there is a lower one, or none on this system
        pass
text = "".join(map(chr, [*range(32, 0x3000), *range(0x4E00, 0x4F00), *range(0x1F300, 0x1F600)])) + "a" * 99 + "\\n"
try:
    if file is not None:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(file)
        tokenizer.no_padding(), tokenizer.no_truncation()
        tokenizer.encode(text)
    else:
        from transformers import AutoTokenizer
        AutoTokenizer.from_pretrained(path, **source)(text, verbose=False)
except MemoryError:
    sys.exit(1)
except Exception:  # the parent will say so in its own words
    pass
except BaseException as error:
    print(error, file=sys.stderr)
    sys.exit({BAD})
"""


def try_tokenizer(name: str, path: str, source: Mapping[str, Any]) -> None:
    """Make sure that loading a tokenizer neither ends the process, nor fills the memory, nor goes on for ever.

    Args:
        name: What the user calls the model.
        path: A directory, or a hub id.
        source: Where to find its files, for transformers.

    Raises:
        LLMInitializationError: it does.
    """
    files, one = Files(name, path, source), None
    if "gguf_file" in source:
        read, growth = [(Path(path) / source["gguf_file"]).resolve()], 0  # most of it is not read
    else:
        if "fast_tokenizer_files" not in files.read("tokenizer_config.json"):
            one = files.find(ONE_FILE)
        directory = Path(one or files.find("config.json") or path).parent
        read, growth = [file for file in files_of(directory) if file.suffix not in WEIGHTS], GROWTH
    trial = Trial(read, ("tokenizer", tokenizers.__version__, transformers.__version__), growth)
    if not trial.is_needed or trial.recall():
        return
    log.info("%s: its tokenizer was not loaded here before, so it is tried in a process of its own", name)
    asked = json.dumps([sys.path, trial.most_bytes, int(trial.most_s), one, path, dict(source)])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM, asked],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=trial.most_s,
        )
        code, said = done.returncode, done.stderr.decode("utf-8", "replace").splitlines()
    except subprocess.TimeoutExpired:
        code, said = -signal.SIGXCPU, []
    if code:
        log.debug("the process that the tokenizer was tried in said last: %a", "\n".join(said[-20:]))
        why = {
            -signal.SIGXCPU: f"does not come to an end within {trial.most_s:.0f} s",
            BAD: f"fails with {said[-1][:200]!r}" if said else "fails",
        }.get(code, f"fills {trial.most_bytes // 2**20:,} MB of memory, or ends the process (exit code {code})")
        raise LLMInitializationError(f"the tokenizer of {name} cannot be used, or is damaged: it {why}")
    trial.remember("tokenizer")
