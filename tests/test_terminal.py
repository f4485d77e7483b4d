"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import sys

import pytest

from llmpipe.terminal import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("last", [400, 999])
def test_the_bar_ends_with_what_was_done_however_fast_the_rows_came(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as bar:
        for done in range(1, last + 1):
            bar.update(done, 1000, done)
    assert f"{last}/1000" in terminal.getvalue()


def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with ProgressBar() as bar:
        bar.update(1, 2, 3)
    assert stream.getvalue() == ""
