"""CPU threads: how they wait for each other, and how many compute beside whatever else the machine does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import BaseLLMRunner
from llmpipe.config import LlamaCppConfig
from llmpipe.runners import openmp, threads
from llmpipe.runners.openmp import BRIEFLY, VARIABLES
from llmpipe.runners.threads import Threads, beside
from llmpipe.system import machine

LOOKS_FOR = """
import os, sys
class Looked:
    def find_spec(self, name, *_):
        if name in ("torch", "llama_cpp"):
            print(*(os.environ.get(variable) for variable in {variables}))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Looked())
"""
"""A program that says what is set when a backend's package is first looked for, and ends there."""


def when_first_imported(code: str, **user: str) -> list[str]:
    """Return the variables of OpenMP as they are when code first imports torch or llama_cpp."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | user
    program = LOOKS_FOR.format(variables=list(BRIEFLY)) + code
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "from llmpipe import TransformersRunner",
        "import llmpipe.runners.transformers.sampler",
        "from llmpipe import LLMRunnerFactory; LLMRunnerFactory.create_runner({'backend': 'llama_cpp'})",
        "from llmpipe.runners.factory import import_class; import_class('llmpipe.runners.TransformersRunner')",
    ],
    ids=["library", "one module", "factory", "isolated child"],
)
def test_threads_wait_briefly_however_a_backend_is_imported(code: str) -> None:
    assert when_first_imported(code) == list(BRIEFLY.values())


@pytest.mark.parametrize("variable", VARIABLES)
def test_how_the_user_lets_threads_wait_stands(variable: str) -> None:
    expected = ["7" if name == variable else "None" for name in BRIEFLY]
    assert when_first_imported("from llmpipe import LlamaCppRunner", **{variable: "7"}) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is another one")
def test_openmp_hears_of_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    code = "from llmpipe import LlamaCppRunner"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("llama.cpp is built without GNU's OpenMP here")
    assert f"GOMP_SPINCOUNT = '{BRIEFLY['GOMP_SPINCOUNT']}'" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is another one")
@pytest.mark.parametrize(
    ("user", "expected"), [({}, "True [0, 2, 2, 0, 2]"), ({"GOMP_SPINCOUNT": "9"}, "False [0, 0, 0, 0, 0]")]
)
def test_gnu_openmp_has_too_many_threads_for_as_long_as_they_are_to_sleep(user: dict[str, str], expected: str) -> None:
    code = """
import os, time
import llmpipe.runners.llama_cpp
from llmpipe.runners.openmp import _gnu_libraries, sleep_at_once
if not _gnu_libraries():
    print("none")
    raise SystemExit
processors = _gnu_libraries()[0].omp_get_num_procs()
count = lambda: len(os.listdir("/proc/self/task"))
before, told = count(), []
for wanted in (False, True, True, False, True):
    able, end = sleep_at_once(wanted, processors), time.monotonic() + 5
    while able and count() - before != 2 * wanted and time.monotonic() < end:
        time.sleep(0.01)
    told.append(count() - before)
print(able, told)
"""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | user
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if done.stdout == "none\n":
        pytest.skip("llama.cpp is built without GNU's OpenMP here")
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("room", "most", "expected"),
    [
        *((2.0, 2, 2), (1.6, 2, 2), (1.4, 2, 1), (1.0, 2, 1), (0.1, 2, 1)),
        *((16.0, 16, 16), (15.1, 16, 15), (4.0, 16, 8), (30.0, 8, 8), (1.0, 3, 2), (0.0, 1, 1)),
    ],
)
def test_as_many_threads_compute_as_others_leave_room_for_but_half_at_least(
    room: float, most: int, expected: int
) -> None:
    assert beside(room, most) == expected


class Rooms:
    """What others leave, look by look."""

    def __init__(self, *looks: float | None) -> None:
        self.looks = list(looks)

    def look(self) -> float | None:
        return self.looks.pop(0)


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have four cores, looked at in every step, and an OpenMP that cannot be told how to wait; list what it is told."""
    told: list[bool] = []
    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(4, 4, None))
    monkeypatch.setattr(threads, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(openmp, "sleep_at_once", lambda wanted, _: told.append(wanted))
    return told


@pytest.mark.usefixtures("asleep")
def test_threads_that_cannot_sleep_become_fewer_and_come_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "Room", lambda: Rooms(4.0, 3.1, None, 2.9, 4.0, 2.8))
    with caplog.at_level("INFO", logger="llmpipe"):
        found = Threads(LlamaCppConfig())
        assert found.now == 4
        assert [found.look() for _ in range(6)] == [4, 3, 3, 3, 4, 3]
    assert caplog.messages == ["threads: 3 that give way to other processes, which leave 3.1 processors"]


def test_threads_that_can_sleep_all_stay_and_sleep_beside_others(
    asleep: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "Room", lambda: Rooms(4.0, 3.1, None, 2.0, 3.8))
    monkeypatch.setattr(openmp, "sleep_at_once", lambda wanted, _: asleep.append(wanted) or True)
    found = Threads(LlamaCppConfig())
    assert [found.look() for _ in range(5)] == [4] * 5
    assert asleep == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "most", "expected", "told"),
    [({"threads": 3}, 2, 3, [True]), ({"reproducible": True}, 9, 4, [True]), ({}, 1, 1, [])],
    ids=["by hand", "reproducible", "one"],
)
def test_threads_set_by_hand_or_for_equal_sums_stay(
    options: dict[str, Any],
    most: int,
    expected: int,
    told: list[bool],
    asleep: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "Room", lambda: Rooms(0.5))
    assert Threads(LlamaCppConfig(**options), most).look() == expected
    assert asleep == told


@pytest.mark.usefixtures("asleep")
def test_a_system_that_does_not_count_leaves_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Room", lambda: Rooms(None))
    assert Threads(LlamaCppConfig()).look() == 4


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([(0, 0, 0), (1, 2, 1.4)], [1.4]),
        ([(0, 0, 0), (0.1, 0.2, 0.1), (1, 2, 1.5)], [None, 1.5]),
        ([(0, 0, 0), (1, 0, 0.3), (2, 0, 0.6)], [None, None]),
    ],
    ids=["counted", "too soon", "not counted"],
)
def test_room_is_what_was_idle_or_ours_since_the_last_look(
    looks: list[tuple[float, float, float]], expected: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_processor_times", iter(looks).__next__)
    room = machine.Room()
    assert [room.look() for _ in expected] == expected


def test_a_system_that_hides_its_processors_and_what_is_loaded_keeps_all_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden(*_: Any, **__: Any) -> None:
        raise PermissionError("/proc")

    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(4, 4, None))
    monkeypatch.setattr(machine, "LEAST_LOOK_S", 0.0)
    monkeypatch.setattr(machine.psutil, "cpu_times", hidden)
    monkeypatch.setattr(openmp.Path, "read_text", hidden)
    found = Threads(LlamaCppConfig())
    assert [found.look(), found.look()] == [4, 4]
    assert not openmp.sleep_at_once(True, 4)


def test_room_as_this_system_counts_it() -> None:
    room, end = machine.Room(), time.monotonic() + 1.5 * machine.LEAST_LOOK_S
    while time.monotonic() < end:
        pass
    found = room.look()
    assert found is None or 0 < found < machine.cores().at_once + 0.5


def test_a_backend_computes_with_as_many_threads_as_it_is_told(
    runner: BaseLLMRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    set_now: list[int] = []
    set_of_llama, set_of_torch = llama_cpp.llama_set_n_threads, torch.set_num_threads
    monkeypatch.setattr(llama_cpp, "llama_set_n_threads", lambda *a: set_now.append(a[1]) or set_of_llama(*a))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_now.append(count) or set_of_torch(count))
    before = runner.run(["one two three"], max_tokens=6, ignore_eos=True)[0]
    set_now.clear()  # other runners of this process may have chosen otherwise
    told = [2, 2, 1, 2, 1, 1, 1, 1]
    monkeypatch.setattr(runner._threads, "look", lambda: told.pop(0))  # type: ignore[attr-defined]
    assert runner.run(["one two three"], max_tokens=6, ignore_eos=True)[0].text == before.text
    assert set_now == [2, 1, 2, 1]


@given(st.lists(st.integers(1, 40).map(lambda steps: steps * 64), min_size=1, max_size=40))
def test_slots_are_computed_together_where_little_is_computed_in_vain(lengths: list[int]) -> None:
    from llmpipe.runners.transformers.attention import MOST_PADDING, groups

    parts = groups(lengths)
    assert [slot for part in parts for slot in range(len(lengths))[part]] == list(range(len(lengths)))
    assert all(parts[i].stop == parts[i + 1].start for i in range(len(parts) - 1))
    for part in parts:
        assert max(lengths[part]) * len(lengths[part]) <= MOST_PADDING * sum(lengths[part])
    assert len(groups([lengths[0]] * 16)) == 1


def test_answers_that_are_to_be_equal_to_the_last_digit_need_as_many_threads(
    transformers_runner: BaseLLMRunner,
) -> None:
    torch.set_num_threads(1)
    one = transformers_runner.facts().last_digits
    torch.set_num_threads(2)
    two = transformers_runner.facts().last_digits
    torch.set_num_threads(1)
    assert one["kernels"].endswith("1 threads") and two["kernels"].endswith("2 threads")
