"""What of its machine this process may use: how many cores, how much memory; and what others leave of the cores.

A container or a job scheduler gives a process less than the host has: by CPU affinity, by control groups (cgroups, of
version 1, version 2, or both; limits of the groups above bind as well), by resource limits. On Linux they are read each
time they are asked for, as they can change; elsewhere the host's figures stand.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path("/")
"""Where /proc and /sys are."""
LEAST_LOOK_S = 0.2
"""Shortest time over which the use of processors can be measured: the system counts in hundredths of a second."""


class Cores(NamedTuple):
    """The processors that this process may use."""

    physical: int
    """How many of them pay: threads that compute gain little from a core's other hyperthreads."""
    at_once: int
    """How many threads can run at the same time."""
    limit: str | None
    """What keeps them below the host's; None where nothing does."""


def cores(root: Path = ROOT, allowed: Iterable[int] | None = None) -> Cores:
    """Return the cores that this process may use; at least one.

    A CPU quota is rounded to whole cores: threads that wait for each other at every step lose by being stopped at the
    quota's end about what a small part of a core brings. With llama.cpp, two threads under a quota of 1.0, 1.1, 1.25
    and 1.5 cores were 0.87, 0.98, 1.1 and 1.35 times as fast as one.

    Args:
        root: Where /proc and /sys are.
        allowed: The numbers of the processors that it may run on; by default what the system says.
    """
    host = os.cpu_count() or 1
    mask = set(_affinity() if allowed is None else allowed)
    if not mask:
        return Cores(psutil.cpu_count(logical=False) or host, host, None)
    physical, at_once = _physical(mask, root), len(mask)
    limit = f"the CPU affinity allows {at_once} of {host} processors" if at_once < host else None
    quota = cpu_quota(root)
    if quota is not None and (whole := max(1, int(quota + 0.5))) < at_once:
        physical, at_once, limit = min(physical, whole), whole, f"the cgroup has a CPU quota of {quota:g}"
    return Cores(physical, at_once, limit)


class Room:
    """How many processors others leave to this process, from look to look."""

    def __init__(self) -> None:
        self._before = _processor_times()

    def look(self) -> float | None:
        """Return how many were idle or busy with this process, on average since the last look.

        None where the system does not tell, or too little time has passed for it to have counted.
        """
        now = _processor_times()
        passed_s, counted_s, free_s = (b - a for a, b in zip(self._before, now, strict=True))
        if passed_s < LEAST_LOOK_S:
            return None
        self._before = now
        return free_s / passed_s if counted_s > passed_s / 2 else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many processors' time the control groups of this process grant it; None where they set no bound."""
    quotas = []
    for group in _groups("cpu", root):
        version_1 = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        time_us, period_us = map(_number, _text(group / "cpu.max").split() or version_1)
        if time_us is not None and time_us > 0 and period_us:
            quotas.append(time_us / period_us)
    return min(quotas, default=None)


def memory_bytes(root: Path = ROOT) -> int:
    """Return how much memory this process could have if it were alone."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits(root))])


def free_memory_bytes(root: Path = ROOT) -> int:
    """Return how much more memory this process can have; files in the page cache count as free, as the host's do."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _memory_limits(root))]))


def oom_kills(root: Path = ROOT) -> int:
    """Return how many processes the system has ended so far for want of memory: in this group, or on this machine.

    Only how it grows means anything, and where nothing is to be read it never does.
    """
    files = [group / name for group in _groups("memory", root) for name in ("memory.events", "memory.oom_control")]
    for file in (*files, root / "proc/vmstat"):
        for line in _text(file).splitlines():
            if line.startswith("oom_kill "):
                return _number(line.split()[1]) or 0
    return 0


def _affinity() -> set[int]:
    """Return the numbers of the processors that this process may run on; none where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    now = os.sched_getaffinity(0)
    # OpenMP binds the thread that loads it where it is to bind threads, which says nothing of the others.
    binds = os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false")
    return now | _at_start if binds else now


def _processor_times() -> tuple[float, float, float]:
    """Return the clock, and the times that the processors of this process have counted: in all, and free.

    Free is what was idle or spent by this process, and by those of lower priority, which give way. In seconds.
    """
    every: list[Any] = []
    with suppress(OSError):  # some containers hide what their host does
        every = psutil.cpu_times(percpu=True)
    mask = _affinity()
    times = [every[cpu] for cpu in mask if cpu < len(every)] or every
    yields = ("idle", "iowait") if hasattr(os, "nice") and os.nice(0) > 0 else ("idle", "iowait", "nice")
    free = sum(getattr(each, name, 0.0) for each in times for name in yields)
    return time.monotonic(), sum(map(sum, times)), free + time.process_time()


def _physical(processors: set[int], root: Path) -> int:
    """Return how many cores these processors are: hyperthreads of one core count once."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {cpu: _text(root / topology.format(cpu)) for cpu in processors}
    if all(siblings.values()):
        return len(set(siblings.values()))
    return min(len(processors), psutil.cpu_count(logical=False) or len(processors))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield each limit that this process is under and how much of it is used, in bytes."""
    for group in _groups("memory", root):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        limits = [limit for name in names if (limit := _number(_text(group / name))) is not None]
        if limits:
            used = _number(_text(group / "memory.current") or _text(group / "memory.usage_in_bytes")) or 0
            yield min(limits), max(0, used - _cached_bytes(group))
    yield from _resource_limits()


def _cached_bytes(group: Path) -> int:
    """Return how much of a group's memory are files, which give way; in version 1, `total_` counts the groups below."""
    statistics = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    named = [[statistics.get(f"{total}{kind}_file") for total in ("total_", "")] for kind in ("active", "inactive")]
    return sum(_number(own if total is None else total) or 0 for total, own in named)


def _resource_limits() -> Iterator[tuple[int, int]]:
    """Yield what `ulimit` bounds: address space and data."""
    if sys.platform != "linux":  # elsewhere they do not bind, or the system does not say how much is used
        return
    import resource

    used = psutil.Process().memory_info()
    for kind, bytes_used in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, bytes_used


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the directories of the control groups that this process is in: its own, and those above that can be seen.

    Both versions' are yielded where both are mounted; files that a version or a group lacks are for the caller to skip.
    """
    own = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))  # the name of version 2 is empty
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name is None or name not in own or (name and name not in options.split(",")):
            continue
        top, place = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), word) for word in mount.split(" ")[3:5])
        yield from _upwards(root / place.lstrip("/"), top, own[name])


def _upwards(mounted: Path, top: str, path: str) -> Iterator[Path]:
    """Yield the directory of the group `path`, then those above it, where `mounted` shows the groups from `top` on."""
    below = Path(mounted)
    with suppress(ValueError):  # a group out of sight: what is mounted, in a container, is the nearest that can be seen
        inside = Path(path).relative_to(top)
        below = mounted if ".." in inside.parts else mounted / inside
    yield below
    while below != mounted:
        below = below.parent
        yield below


def _text(file: Path) -> str:
    """Return what a file of the system says; nothing where it is not there or may not be read."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(text: str | None) -> int | None:
    """Return a number; None where the text is not one, such as `max`."""
    try:
        return int(text or "")
    except ValueError:
        return None


_at_start = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
