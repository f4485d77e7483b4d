"""What a person sees while a run goes on."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from llmpipe.progress import Progress
from llmpipe.records import Completion
from llmpipe.stopwatch import Stopwatch
from llmpipe.terminal import ProgressBar, TerminalHandler

ESCAPES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_in(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let the standard error stream be a terminal; in a fixture, pytest would put its own back."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def progress_of(done: int, expected: int) -> Progress:
    progress = Progress(Stopwatch(), done, expected, 100)
    progress.note(Completion(0, completion_tokens=9))
    return progress


@pytest.mark.parametrize("last", [400, 999])
def test_the_bar_ends_with_what_was_done_however_fast_the_rows_came(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    progress = progress_of(0, last)
    with ProgressBar() as bar:
        for _ in range(last):
            progress.done += 1
            bar.update(progress)
    assert f"{last}/{last}" in terminal.getvalue()


def test_loading_is_called_so_until_the_first_step_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    with ProgressBar() as bar:
        bar._bar.refresh()
        loading = terminal.getvalue()
        bar.update(progress_of(0, 7))
        bar._bar.refresh()
    assert re.search(r"loading.*0:00:0", loading) and "0/" not in loading
    after = terminal.getvalue().removeprefix(loading)
    assert "0/7" in after and "loading" not in after


def test_a_line_of_the_log_stands_above_the_bar_and_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_in(monkeypatch)
    log, handler = logging.Logger("above"), TerminalHandler(terminal)
    log.addHandler(handler)
    said = "continue with: llmpipe resume " + "x/" * 60
    with ProgressBar() as bar:
        bar.update(progress_of(1, 2))
        log.warning("%s", said)
        log.warning("[bold]:smile: %d", 1)
    lines = ESCAPES.sub("", terminal.getvalue()).replace("\r", "\n").split("\n")
    assert said in lines and "[bold]:smile: 1" in lines
    log.warning("after it")
    assert terminal.getvalue().endswith("after it\n")


def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with ProgressBar() as bar:
        bar.update(progress_of(1, 2))
    assert stream.getvalue() == ""


def test_where_there_is_no_terminal_the_log_says_how_far_it_is_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("llmpipe.terminal.LOGGED_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), ProgressBar() as bar:
        bar.update(progress_of(1000, 2000))
    assert re.fullmatch(r"1,000/2,000, [\d,]+ tokens/s(, \d+:\d\d:\d\d left)?", caplog.messages[0])


def screen_of(output: str, columns: int) -> list[str]:
    """Return the lines that a terminal shows at the end; none may be wider than it."""
    lines, y, x = [""], 0, 0
    for part in re.finditer(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b.", output):
        text = part[0]
        if part[2] == "A":
            y -= int(part[1] or 1)
        elif part[2] == "K":
            lines[y] = ""
        elif text == "\r":
            x = 0
        elif text == "\n":
            x, y = 0, y + 1
            lines += [""] * (y == len(lines))
        elif not text.startswith("\x1b"):
            lines[y] = lines[y][:x].ljust(x) + text + lines[y][x + len(text) :]
            x += len(text)
            assert "tokens/s" not in lines[y] or len(lines[y]) <= columns
    return lines


@pytest.mark.parametrize(("columns", "term"), [(60, "screen"), (80, "tmux-256color"), (120, "xterm-256color")])
def test_a_terminal_of_any_width_shows_the_log_one_bar_and_the_figures(columns: int, term: str, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "llmpipe", "sampling.max_tokens=4", "dataset.limit=5", "hydra.run.dir=out"]
    environment = {**os.environ, "TERM": term, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("COLUMNS", None)
    root = Path(__file__).parent.parent
    (tmp_path / "data").symlink_to(root / "data")
    process = subprocess.Popen(command, cwd=tmp_path, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    output = b""
    try:
        while part := os.read(ours, 4096):
            output += part
    except OSError:  # how Linux ends the output of a terminal
        pass
    os.close(ours)
    assert process.wait(60) == 0
    lines = screen_of(output.decode(), columns)
    (bar,) = [line for line in lines if "━" in line]
    assert re.match(r"answers \d:\d\d:\d\d ━+ 5/5  [\d,]+ tokens/s *$", bar)
    above = lines[: lines.index(bar)]
    assert any("rows of at most" in line for line in above) and not any(line.startswith("loading") for line in lines)
