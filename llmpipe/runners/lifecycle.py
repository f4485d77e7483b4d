"""The life of a model: how it is loaded, loaded again and closed, and that one call or stream at a time has a turn."""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from llmpipe.config import BackendConfig, DeviceConfig, DeviceType, ModelConfig, SamplingConfig, backend_config
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError, one_line
from llmpipe.runners.driver import NOBODY, Driver
from llmpipe.runners.rendering import ChatRenderer
from llmpipe.runners.stepper import Stepper
from llmpipe.runners.turns import Holder, Stream, Turns
from llmpipe.system import memory

if TYPE_CHECKING:
    from llmpipe.runners.preview import Preview

T = TypeVar("T")


class Lifecycle(ABC):
    """A loaded model.

    Loading happens in the constructor; `close`, or leaving a `with` block, gives the memory back. One stream runs at
    a time: a second thread waits its turn, and a second stream in the same thread is refused, because it could only
    wait for itself. A stream may go from thread to thread. It is closed when it is dropped, when its thread has ended
    and another call comes, and when the runner is closed and nobody has asked it for more for a second.

    Args:
        config: A backend config, a flat `ModelConfig`, or a dictionary of the backend's options.
        device: Where to run; by default the best device there is.
        sampling: What the conveniences use where a call does not say otherwise.
        weights: Whether to load them. Without, the runner renders and encodes prompts, and `preview` tells of it.

    Raises:
        LLMConfigError: an option is unknown or out of range.
        LLMInitializationError: the model cannot be found or loaded, or the device is not there.
    """

    config_type: ClassVar[type[BackendConfig]] = BackendConfig
    """The dataclass of this backend's options."""
    config: BackendConfig
    """The options it was loaded with."""

    def __init__(
        self,
        config: BackendConfig | ModelConfig | Mapping[str, Any],
        device: DeviceConfig | DeviceType | str | None = None,
        sampling: SamplingConfig | None = None,
        weights: bool = True,
    ) -> None:
        if isinstance(config, ModelConfig):
            device = device or config.device
            sampling = sampling or config.sampling
        self.config = backend_config(config, self.config_type)
        self.device = DeviceConfig.parse(device)
        self.sampling = sampling or SamplingConfig()
        self.load_s = 0.0
        self.is_loaded = False
        self._turns = Turns()
        self._own_stepper = Stepper(self._turns)
        self._driver = NOBODY
        self._resident = threading.RLock()
        """Held by whoever reads a model without having a turn, and while it is released."""
        self.now = datetime.now().astimezone()
        """The time that chat templates are told; of a run, its start, so that it has the same prompts when resumed."""
        self.renderer = ChatRenderer()
        """Renders chats, and says what of them is worth saying."""
        self.preview: Preview | None = None
        """What is known without the weights, where they are not loaded and the backend can say."""
        self._load(weights)

    @abstractmethod
    def _initialize_model(self) -> None:
        """Load the model that `self.config` and `self.device` name.

        Raises:
            LLMInitializationError: it cannot be found or loaded, or the device is not there.
        """

    def _preview_model(self) -> Preview | None:
        """Read what can be known without the weights; after it, `chat_template`, `render` and `encode` must work.

        Raises:
            LLMInitializationError: as `_initialize_model`.
        """
        return None

    def _release_model(self) -> None:  # noqa: B027  a backend without memory of its own has nothing to do
        """Drop everything `_initialize_model` made."""

    def _device_memory_mb(self) -> tuple[float, float] | None:
        """Return the device memory in use and its peak since loading, in MB; None where it is the host's."""
        return None

    def reload(self, model: str | None = None, device: DeviceConfig | DeviceType | str | None = None) -> None:
        """Give the memory back and load again, with another model or device where one is named.

        Raises:
            LLMInitializationError: as when loading; the runner is then closed, and names what it had before, so that
                another `reload()` brings that back.
        """
        before = self.config, self.device
        after_device = self.device if device is None else DeviceConfig.parse(device)
        with self._turns.turn(ends=True):
            self._unload()
            self.device = after_device
            if model is not None:
                self.config = replace(self.config, model=model)
            try:
                self._load()
            except LLMError:
                self.config, self.device = before
                raise

    def close(self) -> None:
        """Give the model's memory back. A closed runner can be reloaded; closing twice is fine."""
        self._stepper.end(LLMInferenceError("the runner was closed before the answer was complete"))
        with self._turns.turn(ends=True):
            self._unload()

    def memory_usage(self) -> dict[str, float | None]:
        """Return resident memory of this process and, where the model is on a device, memory there, in MB (10^6 B)."""
        device = self._device_memory_mb() if self.is_loaded else None
        return {
            "rss_mb": self.rss_bytes() / 1e6,
            "device_mb": device[0] if device else None,
            "peak_device_mb": device[1] if device else None,
        }

    def rss_bytes(self) -> int:
        """Return the resident memory of this process, and of another that the model may be in."""
        return memory.own_rss_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _unload(self) -> None:
        with self._resident:
            if self.is_loaded or self.preview is not None:
                self.is_loaded, self.preview = False, None
                self._release_model()
                memory.give_back()

    def _load(self, weights: bool = True) -> None:
        started = time.perf_counter()
        try:
            if weights:
                self._initialize_model()
            else:
                self.preview = self._preview_model()
        except LLMError:
            self._release_model()
            raise
        except Exception as error:
            self._release_model()
            message = f"{type(self).__name__} cannot load {self.config.model!r}: {one_line(error)}"
            raise LLMInitializationError(message) from error
        self.load_s = time.perf_counter() - started
        self.is_loaded = weights

    @property
    def _stepper(self) -> Stepper:
        """Answers what is asked asynchronously; a new one in a forked process, where no thread came along."""
        if self._own_stepper.is_elsewhere:
            self._own_stepper = Stepper(self._turns)
        return self._own_stepper

    def _check_loaded(self) -> None:
        if not self.is_loaded:
            raise LLMInferenceError("this runner is closed: call reload() first")

    def _exclusively(self, items: Iterator[T], driver: Driver = NOBODY, place: Holder | None = None) -> Stream[T]:
        """Yield `items` while holding the runner, which `driver` drives; closing what is returned closes `items`.

        A `place` in the queue may have been taken before.
        """

        def held(stream: weakref.ref[Stream[T]]) -> Generator[T]:
            with self._turns.turn(stream, tick=driver.tick, place=place) as holder:
                self._check_loaded()
                self._driver = driver
                try:
                    for item in items:
                        yield item
                        holder.go_on()
                finally:
                    self._driver = NOBODY
                    close = getattr(items, "close", None)
                    if close is not None:
                        close()

        return Stream(held)
