"""What of its machine a process may use: trees of files as /proc and /sys have them, and real limits where possible."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmpipe.config import LlamaCppConfig
from llmpipe.runners.batching import sizing
from llmpipe.system import machine

MB = 10**6
NO_LIMIT = 9223372036854771712
"""What version 1 says where there is no limit."""
V2 = "31 23 0:28 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"


def tree(root: Path, **files: str | int) -> Path:
    """Write files, whose names have `__` for a slash, below a root."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def group(root: Path, place: str, **files: str | int) -> None:
    """Write the files of a control group; `_` stands for the dot in their names' first part."""
    directory = root / "sys/fs/cgroup" / place
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("_", ".", 1)).write_text(f"{text}\n")


def proc(root: Path, cgroup: str, mountinfo: str) -> None:
    tree(root, proc__self__cgroup=cgroup, proc__self__mountinfo="23 1 0:2 / / rw - ext4 /dev/vda rw\n" + mountinfo)


def hyperthreads(root: Path, *cores: str) -> None:
    for siblings in cores:
        for cpu in siblings.split(","):
            place = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            place.mkdir(parents=True)
            (place / "thread_siblings_list").write_text(f"{siblings}\n")


@pytest.mark.parametrize(
    ("quota", "physical"), [("max", 4), (50_000, 1), (140_000, 1), (150_000, 2), (260_000, 3), (800_000, 4)]
)
def test_a_quota_of_version_2_is_rounded_to_whole_cores(tmp_path: Path, quota: str | int, physical: int) -> None:
    proc(tmp_path, "0::/user.slice/job", V2.format(top="/"))
    group(tmp_path, "user.slice/job", cpu_max=f"{quota} 100000")
    hyperthreads(tmp_path, "0", "1", "2", "3")
    assert machine.cores(tmp_path, range(4)).physical == physical


def test_a_limit_of_a_group_above_binds_as_well(tmp_path: Path) -> None:
    proc(tmp_path, "0::/a/b/c", V2.format(top="/"))
    group(tmp_path, "a/b/c", cpu_max="max 100000", memory_max="max", memory_current=30 * MB)
    group(tmp_path, "a/b", cpu_max="300000 100000", memory_max=900 * MB, memory_high=700 * MB, memory_current=500 * MB)
    group(tmp_path, "a", cpu_max="100000 50000", memory_max=800 * MB, memory_current=50 * MB)
    (tmp_path / "sys/fs/cgroup/a/b/memory.stat").write_text(
        f"anon 1\nfile 9\ninactive_file {40 * MB}\nactive_file {60 * MB}\n"
    )
    assert machine.cpu_quota(tmp_path) == 2
    assert machine.memory_bytes(tmp_path) == 700 * MB
    assert machine.free_memory_bytes(tmp_path) == (700 - 500 + 100) * MB


def test_limits_of_version_1_are_read_from_each_controllers_own_group(tmp_path: Path) -> None:
    mounts = V1.format(top="/", name="cpu").replace("rw,cpu", "rw,cpu,cpuacct") + V1.format(top="/", name="memory")
    proc(tmp_path, "5:memory:/m/job\n3:cpu,cpuacct:/c\n1:name=systemd:/s\n", mounts)
    group(tmp_path, "cpu/c", cpu_cfs_quota_us=150_000, cpu_cfs_period_us=100_000)
    group(tmp_path, "cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    group(tmp_path, "memory/m/job", memory_limit_in_bytes=NO_LIMIT, memory_usage_in_bytes=10)
    group(tmp_path, "memory/m", memory_limit_in_bytes=400 * MB, memory_usage_in_bytes=300 * MB)
    (tmp_path / "sys/fs/cgroup/memory/m/memory.stat").write_text(
        f"inactive_file 5\nactive_file 5\ntotal_inactive_file {100 * MB}\ntotal_active_file {50 * MB}\n"
    )
    assert machine.cpu_quota(tmp_path) == 1.5
    assert machine.memory_bytes(tmp_path) == 400 * MB
    assert machine.free_memory_bytes(tmp_path) == 250 * MB


def test_both_versions_at_once_are_read(tmp_path: Path) -> None:
    mounts = V1.format(top="/", name="memory") + V2.format(top="/").replace(
        "/sys/fs/cgroup ", "/sys/fs/cgroup/unified "
    )
    proc(tmp_path, "4:memory:/old\n0::/new\n", mounts)
    group(tmp_path, "memory/old", memory_limit_in_bytes=400 * MB, memory_usage_in_bytes=0)
    group(tmp_path, "unified/new", cpu_max="100000 100000")
    assert (machine.cpu_quota(tmp_path), machine.memory_bytes(tmp_path)) == (1, 400 * MB)


@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/", "/"),  # a container with a name space of its own
        ("/docker/1f", "/docker/1f"),  # one without
        ("/kubepods/x", "/docker/1f"),  # a group out of sight
        ("/../other", "/"),
        ("/gone", "/"),
    ],
)
def test_in_a_container_the_groups_that_can_be_seen_count(tmp_path: Path, path: str, top: str) -> None:
    proc(tmp_path, f"0::{path}", V2.format(top=top))
    group(tmp_path, "", cpu_max="100000 100000", memory_max=300 * MB, memory_current=100 * MB)
    assert (machine.cpu_quota(tmp_path), machine.free_memory_bytes(tmp_path)) == (1, 200 * MB)


def test_a_mount_with_a_blank_in_its_name_is_found(tmp_path: Path) -> None:
    proc(tmp_path, "0::/", V2.format(top="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup/a\040b"))
    group(tmp_path, "a b", cpu_max="100000 100000")
    assert machine.cpu_quota(tmp_path) == 1


def test_without_control_groups_the_hosts_figures_stand(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < machine.free_memory_bytes(tmp_path) < psutil.virtual_memory().total
    assert machine.cores(tmp_path, []).physical >= 1


@pytest.mark.parametrize(
    ("allowed", "physical", "at_once"), [({0, 4}, 1, 2), ({0, 1}, 2, 2), ({0, 1, 4, 5, 2}, 3, 5), (range(8), 4, 8)]
)
def test_hyperthreads_of_a_core_count_once(tmp_path: Path, allowed: set[int], physical: int, at_once: int) -> None:
    hyperthreads(tmp_path, "0,4", "1,5", "2,6", "3,7")
    assert machine.cores(tmp_path, allowed)[:2] == (physical, at_once)


def asked_of(code: str, **options: object) -> str:
    """Run a line of Python in a process of its own; return what it prints."""
    code = f"from llmpipe.system import machine; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)  # type: ignore[call-overload]
    return str(done.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize("binds", ["false", "true"])
def test_the_affinity_of_the_process_bounds_the_threads(binds: str) -> None:
    one = min(os.sched_getaffinity(0))
    code = "import llama_cpp; print(machine.cores().physical)"  # which loads OpenMP
    environment = {**os.environ, "OMP_PROC_BIND": binds}
    assert int(asked_of(code, env=environment)) == machine.cores().physical
    assert asked_of(code, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, {one})) == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere resource limits bind otherwise")
def test_a_limit_of_the_address_space_is_a_limit_of_memory() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9)); "
        "print(machine.memory_bytes(), machine.free_memory_bytes())"
    )
    total, free = map(int, asked_of(code).split())
    assert 0 < free < total <= 4 * 10**9


@pytest.fixture
def real_group() -> Iterator[dict[str, Path]]:
    """A control group of our own, with a quota of one processor and 700 MB of memory."""
    name = f"llmpipe-test-{os.getpid()}"
    settings = {"cpu": {"cpu.max": "100000", "cpu.cfs_quota_us": "100000"}}
    settings["memory"] = {"memory.max": f"{700 * MB}", "memory.limit_in_bytes": f"{700 * MB}"}
    made: dict[str, Path] = {}
    try:
        for controller, files in settings.items():
            above = next(iter(machine._groups(controller, machine.ROOT)), Path("/sys/fs/cgroup"))
            (above / name).mkdir(exist_ok=True)
            made[controller] = above / name
            file = next((above / name / file for file in files if (above / name / file).exists()), None)
            if file is None:
                pytest.skip(f"the control groups here do not hand on {controller!r}")
            file.write_text(files[file.name])
        yield made
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    finally:
        for directory in set(made.values()):
            directory.rmdir()


def test_a_real_control_group_bounds_threads_and_memory(real_group: dict[str, Path]) -> None:
    joined = "; ".join(f"open({str(place / 'cgroup.procs')!r}, 'w').write('0')" for place in real_group.values())
    code = f"{joined}; print(machine.cores().at_once, machine.memory_bytes(), machine.free_memory_bytes())"
    at_once, total, free = map(int, asked_of(code).split())
    assert at_once == 1
    assert 690 * MB < total <= 700 * MB
    assert 400 * MB < free < total


def test_more_threads_than_can_run_are_honoured_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    most = machine.cores().at_once
    assert sizing.threads(LlamaCppConfig(threads=most)) == most
    assert not caplog.records
    assert sizing.threads(LlamaCppConfig(threads=most + 1)) == most + 1
    assert f"backend.threads={most + 1} is slower" in caplog.text
