"""From pieces to text: characters stay whole, stop strings cut exactly, however the pieces fall."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from llmpipe.runners.decoding import StopStrings, Utf8Stream

TEXT = st.text(st.sampled_from("abé"), max_size=20)


def split(items: str | bytes, cuts: Iterable[int]) -> list:
    edges = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[start:end] for start, end in pairwise(edges)]


@given(text=st.text(), cuts=st.lists(st.integers(0, 1000)))
def test_characters_come_whole_however_their_bytes_are_split(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "ignore").decode()
    stream = Utf8Stream()
    pieces = [stream.push(piece) for piece in split(text.encode(), cuts)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_bytes_of_no_character_are_replaced_and_an_unfinished_one_is_dropped() -> None:
    stream = Utf8Stream()
    assert "".join(stream.push(bytes([byte])) for byte in b"a\xff\xe6\x97\xa5b\xf0\x9f\x99") == "a\ufffd日b"


def stopped_by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """Add one character at a time; the first complete stop ends the text, the longest where several are at once."""
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


@given(
    text=TEXT,
    stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4)),
    cuts=st.lists(st.integers(0, 99)),
)
@example(text="xaby", stops=["aby", "b"], cuts=[])
def test_stop_strings_cut_as_if_characters_came_one_by_one(text: str, stops: list[str], cuts: list[int]) -> None:
    watcher, shown = StopStrings(stops), ""
    expected, is_stopped = stopped_by_definition(text, stops)
    for piece in split(text, cuts):
        shown += watcher.push(piece)
        assert expected.startswith(shown)  # nothing that would have to be taken back
        if watcher.stopped:
            break
    assert watcher.stopped == is_stopped
    assert shown + watcher.flush() == expected


def test_no_more_is_held_back_than_can_become_a_stop_string() -> None:
    watcher = StopStrings(["</s>", "abc"])
    assert watcher.push("hello <") == "hello "
    assert watcher.push("b>") == "<b>"
    assert watcher.push("ab") == ""
    assert watcher.push("ab") == "ab"
    assert watcher.flush() == "ab"
    assert watcher.flush() == ""
