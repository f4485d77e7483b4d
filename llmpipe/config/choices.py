"""The options that are a choice from a few names, each with what its names mean."""

from __future__ import annotations

from enum import Enum


class BackendType(str, Enum):
    """The backends that come with llmpipe. `llama_cpp` is accepted for `llama.cpp`."""

    LLAMA_CPP = "llama.cpp"
    TRANSFORMERS = "transformers"
    ECHO = "echo"

    @classmethod
    def _missing_(cls, value: object) -> BackendType | None:
        name = str(value).lower().replace("_", ".").replace("-", ".")
        return next((member for member in cls if member.value == name), None)

    @property
    def group(self) -> str:
        """The name of the Hydra option, `backend=...`."""
        return self.value.replace(".", "_")


class DeviceType(str, Enum):
    """Where a model runs. `auto` takes the best device that is there."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class PromptFormat(str, Enum):
    """What a plain prompt becomes before it reaches the model."""

    auto = "auto"
    """`chat` where the model has a chat template, `raw` where it has none."""
    chat = "chat"
    """A user message under the model's chat template."""
    raw = "raw"
    """The text as it is."""


class ControlTokens(str, Enum):
    """What the text of a control token, such as `<|im_end|>`, is inside of a message."""

    literal = "literal"
    """Text as any other: words cannot end a turn, or begin one."""
    parse = "parse"
    """The control token."""


class Overflow(str, Enum):
    """What happens to a prompt that exceeds the context."""

    error = "error"
    """The row becomes an error row."""
    truncate = "truncate"
    """The prompt loses tokens on the left; `truncated_prompt_tokens` says how many."""


class OnError(str, Enum):
    """What an error row does to its run."""

    quarantine = "quarantine"
    """The row goes to `errors.jsonl`, and the run goes on."""
    stop = "stop"
    """The row ends the run, which can be resumed."""


class Switch(str, Enum):
    """A choice that the backend may make by itself."""

    auto = "auto"
    on = "on"
    off = "off"


class CacheType(str, Enum):
    """Number format of cached keys or values, by ggml's name for it."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"


class RopeScaling(str, Enum):
    """How positions beyond those a model was trained for are squeezed into its range."""

    model = "model"
    """As the model's file says."""
    none = "none"
    linear = "linear"
    yarn = "yarn"


class Batching(str, Enum):
    """How rows share the model."""

    auto = "auto"
    """In slots where the model's attention allows it, else in padded batches."""
    slots = "slots"
    """Rows packed to one sequence, each with a cache of its own; a finished row's slot is filled at once."""
    padded = "padded"
    """Batches of rows of similar length, filled up to the longest."""


class Dtype(str, Enum):
    """Number format of weights and activations."""

    auto = "auto"
    """What the checkpoint says where the device computes it well, float32 elsewhere."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
