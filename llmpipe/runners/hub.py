"""Whether the model hub answers, asked before its client does, which would try again for minutes."""

from __future__ import annotations

import logging
import os
import threading

from llmpipe.exceptions import LLMInitializationError, one_line

log = logging.getLogger(__name__)

ANSWERS_WITHIN_S = 3.0
"""How long a hub that answers may take; `HF_HUB_ETAG_TIMEOUT` in the environment can make it longer."""
PATIENCE_WITH_CACHE_S = 1.0
"""How long it may take where what it would be asked for is here."""


def is_needed(model: str, cached: bool) -> bool:
    """Say whether the hub is to be asked for a model: False where it does not answer, and the cache has the model.

    Args:
        model: Id of the repository.
        cached: Whether the cache has it.

    Raises:
        LLMInitializationError: the hub does not answer, or is not to be asked, and the cache has nothing.
    """
    from huggingface_hub import constants

    within_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWERS_WITHIN_S)
    why = _silence(PATIENCE_WITH_CACHE_S if cached else within_s)
    if why is None:
        return True
    if cached:
        log.info("the hub does not answer (%s): %s is taken from the cache", why, model)
        return False
    raise LLMInitializationError(
        f"cannot fetch {model!r}: the hub {constants.ENDPOINT} does not answer ({why}), and {constants.HF_HUB_CACHE} "
        f"does not have it; give a local file, or check the network (HF_HUB_ETAG_TIMEOUT=30 waits longer)"
    )


def _silence(within_s: float) -> str | None:
    """Say why the hub does not answer; None where it does, whatever it says.

    In a thread, because no timeout of a connection's ends the search for its address.
    """
    from huggingface_hub import constants, get_session

    why = [f"nothing within {within_s:g} s"]

    def look() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=within_s)
            why[0] = ""
        except Exception as error:  # each client, and each version of one, has its own
            why[0] = one_line(error)

    thread = threading.Thread(target=look, name="llmpipe-hub", daemon=True)
    thread.start()
    thread.join(within_s)
    return why[0] or None
