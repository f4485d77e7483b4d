"""What the rendering of one chat template may take, and the operations that are counted against it.

A template is a program by whoever made the model. It is compiled (`code.py`) so that whatever makes a text or a list,
or goes through one, happens here, where the size of what goes in and of what would come out is counted before it is
made. The counts depend on template and chat alone: neither on the machine, nor on what was rendered before.
"""

from __future__ import annotations

import math
import operator
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from markupsafe import Markup, escape

MOST_CHARACTERS = 64 * 2**20
"""The texts and lists that one rendering makes, together; what is large is counted for as long as somebody holds it."""
CHARACTERS_PER_INPUT = 16
"""How many more may be made for each character of a chat that is itself large."""
MOST_WORK = 2**30
"""Units of work of one rendering; one is about a nanosecond, so this is about a second."""
WORK_PER_INPUT = 128
"""How much more may be done for each character of a chat that is itself large."""
RENDER_S = 10.0
"""Seconds of the processor that one rendering may take, whatever was counted; usual is a fraction of a millisecond."""
NODE = 100
"""Work that one name, operator or call of a template counts."""
ELEMENT, PART = 2, 16
"""Characters that weigh as much as a place in a list, and as a new object in it."""
MOST_DEPTH = 100
"""How deep macros and recursive loops may call each other."""
MOST_BITS = 2**14
"""The largest whole number; Python prints none that is larger."""
LARGE = 2**12
"""Characters of a text, or their equal in places of a list, from which on it is given back when it is thrown away."""
_LOOK = 2**22
"""Work between two looks at the clock."""
_SCALARS = frozenset([int, float, bool, type(None)])
_LISTS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
_SIZED: Any = (str, dict, range, *_LISTS)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda item, values: item in values,
    "not in": lambda item, values: item not in values,
}
Made = TypeVar("Made", bound=Sequence[Any])
_KEPT = (object(), 0)
_ALONE = sys.getrefcount(_KEPT[0])
_WIDE = re.compile(r"\d{4}")
_DIRECTIVE = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


class Weight(NamedTuple):
    """How much there is in a value: what is held twice counts twice, as it does wherever the value is written out."""

    items: int
    characters: int
    depth: int


class Rendering(Context):
    """The variables of one rendering, what it has left, and its operations.

    Each raises `SecurityError` rather than take more than is left.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._room = MOST_CHARACTERS
        self._work = MOST_WORK
        self._next_look = MOST_WORK - _LOOK
        self._until = math.inf
        self._depth = 0
        self._input_counted = False
        self._large: dict[int, tuple[Any, int]] = {}

    # --- counting -----------------------------------------------------------------------------------------------------

    def spend(self, work: int) -> None:
        """Count what is about to be done."""
        self._work -= work
        if self._work < self._next_look:
            self._look()

    def take(self, characters: int) -> None:
        """Count a text that is about to be made, or as much memory."""
        self._room -= characters
        if self._room < 0:
            self.reserve(0)

    def reserve(self, characters: int) -> None:
        """See whether that much can be made, where it is known only afterwards how much it was."""
        if self._room < characters:
            self._give_back()
        if self._room < characters and not self._input_counted:
            self._count_input()
        if self._room < characters:
            raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")

    def made(self, most: int, function: Callable[..., Made], *args: Any, **options: Any) -> Made:
        """Return the text that `function` makes, or the list, which takes at most `most` characters."""
        if self._room < most:
            self.reserve(most)
        value = function(*args, **options)
        size = len(value) if isinstance(value, str) else ELEMENT * len(value)
        if size < LARGE:
            self._room -= size
        elif id(value) not in self._large:  # else it is what went in
            self._room -= size
            self._large[id(value)] = value, size
            self.spend(size // 4)
        return value

    def _give_back(self) -> None:
        """Count no longer what was made and is held by nobody else."""
        self.spend(NODE * len(self._large))
        for key, kept in list(self._large.items()):
            if sys.getrefcount(kept[0]) <= _ALONE:
                self._room += kept[1]
                del self._large[key]

    def _look(self) -> None:
        if self._work < 0 and not self._input_counted:
            self._count_input()
        if self._work < 0:
            raise SecurityError("it does not come to an end within the steps that a rendering may take")
        now = time.thread_time()
        if self._until == math.inf:
            self._until = now + RENDER_S
        if now > self._until:
            raise SecurityError(f"it takes more than {RENDER_S:g} s")
        self._next_look = max(self._work - _LOOK, 0)

    def _count_input(self) -> None:
        """Allow more where the chat is large: only now, because most never need it."""
        self._input_counted, work = True, self._work
        self._work, self._next_look = 2**62, 0
        given = [value for name, value in self.parent.items() if name not in self.environment.globals]
        items, characters, _ = self.weigh(given, strict=False)
        characters += PART * items
        self._work, self._next_look = work + WORK_PER_INPUT * characters, 0
        self._room += CHARACTERS_PER_INPUT * characters

    def weigh(self, value: Any, strict: bool = True) -> Weight:
        """Return how much is in `value`, and count the work of looking.

        Args:
            value: Anything.
            strict: Refuse what has no text of its own, such as a macro.
        """
        items = characters = depth = 0
        level: list[Any] = [value]
        while level:
            below: list[Any] = []
            depth += 1
            for item in level:
                items += 1
                if isinstance(item, str):
                    characters += len(item)
                elif isinstance(item, dict):
                    self.spend(2 * NODE * len(item))
                    below.extend(item.keys())
                    below.extend(item.values())
                elif isinstance(item, _LISTS):
                    self.spend(NODE * len(item))
                    below.extend(item)
                elif isinstance(item, int):
                    characters += item.bit_length() // 3 + 2
                elif isinstance(item, (float, type(None), Undefined, range)):
                    characters += 40
                elif strict:
                    raise SecurityError(f"it writes out a {type(item).__name__}, which has no text")
            level = below
        return Weight(items, characters, depth)

    # --- texts --------------------------------------------------------------------------------------------------------

    def text(self, value: Any, write: Callable[[Any], str] = str) -> str:
        """Return `value` as text, as `str` or `repr` has it."""
        kind: Any = type(value)
        if kind is str and write is str:
            return value  # type: ignore[no-any-return]
        if kind in _SCALARS:
            return str(value)
        return self.made(self.written(value), write, value)

    def written(self, value: Any) -> int:
        """Return how long the text of `value` can be."""
        weight = self.weigh(value)
        return 10 * (weight.characters + weight.items)

    def joined(self, texts: Iterable[str]) -> str:
        """Return `texts` as one."""
        texts = list(texts)
        return self.made(sum(map(len, texts)), "".join, texts)

    def concatenated(self, values: Sequence[Any]) -> str:
        """Return the texts of `values` as one: the operator `~`."""
        return self.joined(map(self.text, values))

    def escaped(self, value: Any) -> Markup:
        """Return a text in which HTML is escaped."""
        text = value if isinstance(value, str) else self.text(value)
        self.spend(4 * len(text))
        return self.made(5 * len(text), escape, text)

    def percent(self, pattern: str, values: Any) -> str:
        """Return `pattern % values`."""
        if any("(" in name or len(name) > LARGE for name in re.findall(r"%\(([^)]*)", pattern)):
            raise SecurityError("it formats values whose names have brackets, or are huge")
        most, directives = len(pattern), 0
        for width, precision in _DIRECTIVE.findall(pattern):
            directives += 1
            if "*" in (width, precision):
                raise SecurityError("it formats with widths that are values")
            most += self.width(width) + self.width(precision) + 400  # a float has up to 309 digits before its point
        self.spend(NODE * directives)
        most += directives * self.written(values)
        text: str = self.made(most * (5 if isinstance(pattern, Markup) else 1), operator.mod, pattern, values)
        return text

    def width(self, digits: str) -> int:
        """Return a width or precision that stands in a pattern."""
        if len(digits) > 7:
            raise SecurityError("it asks for a huge width")
        return int(digits or 0)

    # --- lists --------------------------------------------------------------------------------------------------------

    def listed(self, values: Any) -> list[Any]:
        """Return the items of anything that can be gone through."""
        if isinstance(values, _SIZED):
            self.spend(NODE * len(values))
            if isinstance(values, (str, range)):
                self.take(PART * len(values))
            return self.made(ELEMENT * len(values), list, values)
        found = []
        for value in values:
            self.spend(NODE)
            self.take(PART)
            found.append(value)
        return found

    def sliced(self, values: Any, start: Any = None, stop: Any = None, step: Any = None) -> Any:
        """Return `values[start:stop:step]`."""
        places = slice(start, stop, step)
        if isinstance(values, (str, list, tuple)):
            count = len(range(*places.indices(len(values))))
            return self.made(count * (1 if isinstance(values, str) else ELEMENT), operator.getitem, values, places)
        return values[places]

    @staticmethod
    def key(key: Any) -> Any:
        """Return a key, if it is a text, a number, or a few of those: to hash others may never end."""
        if isinstance(key, str):
            if len(key) > LARGE:
                raise SecurityError(f"it looks up a text of {len(key):,} characters")
            return key
        if isinstance(key, Undefined) or type(key) in _SCALARS:
            return key
        if (
            not isinstance(key, tuple)
            or len(key) > 8
            or not all(isinstance(k, str) or type(k) in _SCALARS for k in key)
        ):
            raise SecurityError(f"it looks up a {type(key).__name__}, and only texts and numbers can be looked up")
        return key

    # --- operators ----------------------------------------------------------------------------------------------------

    def plus(self, left: Any, right: Any) -> Any:
        """Return `left + right`."""
        if isinstance(left, str) and isinstance(right, str):
            length = len(left) + len(right)
            if type(left) is str and type(right) is str:
                if length >= LARGE:
                    return self.made(length, operator.add, left, right)
                self.take(length)
                return left + right
            return self.made(5 * length, operator.add, left, right)
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            return self.made(ELEMENT * (len(left) + len(right)), operator.add, left, right)
        return self.number(left + right)

    def minus(self, left: Any, right: Any) -> Any:
        """Return `left - right`."""
        if isinstance(left, _LISTS) or isinstance(right, _LISTS):
            raise SecurityError("it subtracts lists")
        return self.number(left - right)

    def times(self, left: Any, right: Any) -> Any:
        """Return `left * right`."""
        for values, count in ((left, right), (right, left)):
            if isinstance(values, (str, list, tuple)) and isinstance(count, int):
                each = 1 if isinstance(values, str) else ELEMENT
                return self.made(len(values) * max(count, 0) * each, operator.mul, left, right)
        return self.number(left * right)

    def power(self, left: Any, right: Any) -> Any:
        """Return `left ** right`."""
        if isinstance(left, int) and isinstance(right, int) and abs(left).bit_length() * right > MOST_BITS:
            raise SecurityError("it computes a huge number")
        return left**right

    def modulo(self, left: Any, right: Any) -> Any:
        """Return `left % right`, which formats where `left` is a text."""
        return self.percent(left, right) if isinstance(left, str) else left % right

    def number(self, value: Any) -> Any:
        """Return a number, if it is not huge."""
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise SecurityError("it computes a huge number")
        return value

    def compared(self, name: str, left: Any, right: Any) -> Any:
        """Return what the comparison called `name` says."""
        if name in ("in", "not in"):
            if isinstance(right, str):
                self.spend(len(right))
            elif isinstance(right, (dict, type({}.keys()), type({}.items()))):
                self.key(left)
            elif not isinstance(right, Undefined):
                right = right if isinstance(right, (list, tuple)) else self.listed(right)
                self.spend((len(right) + 1) * (NODE + sum(self.weigh(left, strict=False)[:2])))
        elif isinstance(left, str) and isinstance(right, str):
            self.spend(min(len(left), len(right)))
        elif type(left) not in _SCALARS and type(right) not in _SCALARS:
            self.weigh_both(left, right)
        return _COMPARE[name](left, right)

    def weigh_both(self, *values: Any) -> None:
        """Count the work of comparing values with each other."""
        for value in values:
            self.spend(self.weigh(value, strict=False).characters)

    # --- calls --------------------------------------------------------------------------------------------------------

    def nested(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call what may call itself."""
        if self._depth >= MOST_DEPTH:
            raise SecurityError(f"its macros and loops call each other more than {MOST_DEPTH} levels deep")
        self._depth += 1
        try:
            return function(*args, **options)
        finally:
            self._depth -= 1

    def call_given(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a function that was given to the template, with texts and numbers."""
        values = [value if type(value) in _SCALARS else self.text(value) for value in (*args, *options.values())]
        if function is self.parent.get("strftime_now"):
            for pattern in values:
                if isinstance(pattern, str) and (len(pattern) > LARGE or _WIDE.search(pattern)):
                    raise SecurityError("it asks for a huge date")
        return function(*values[: len(args)], **dict(zip(options, values[len(args) :], strict=True)))
