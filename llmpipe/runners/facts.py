"""What decides a runner's answers beside its options, and is known only once its model is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Plain values, as JSON has them, grouped by what another value means for a run that is resumed."""

    decides: dict[str, Any] = field(default_factory=dict)
    """Another value is another model: the number format that `auto` became, the commit of a hub model. Refused."""
    may_decide: dict[str, Any] = field(default_factory=dict)
    """Another value may change some answers: versions of packages. Mentioned; in reproducible mode refused."""
    last_digits: dict[str, Any] = field(default_factory=dict)
    """Another value rounds differently: the device, its kernels. Counts in reproducible mode only, and is refused."""
