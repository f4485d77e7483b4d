"""Chat templates that take too much, or reach for what they should not: by family, each to be refused.

As a program, reads templates as JSON, one a line, and writes what became of each, within limits set by the system.
"""

# ruff: noqa: E501 (templates have long lines)
from __future__ import annotations

import json
import sys
import time

HELLO = [{"role": "user", "content": "Hello"}]
MEMORY = 1536 * 2**20
"""Bytes of address space in which all must be refused, one after another, and their neighbours rendered."""


def grown(step: str, start: str = "'x'", times: int = 99, end: str = "") -> str:
    """Return a template that makes something longer with each turn of a loop."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"


def looped(body: str, depth: int = 3) -> str:
    """Return a template that does something for a long time."""
    return "{% for a in range(9999) %}" * depth + body + "{% endfor %}" * depth


LONG = "{% set x = 'xy' * 9999999 %}"
"""Twenty million characters, which is allowed."""
SHARED = "{% set x = ['abc'] %}" + "{% set x = [x, x] %}" * 60
"""A list that takes little memory, and has 2**60 texts where it is written out."""
SHARED_TUPLE = "{% set x = ('abc',) %}" + "{% set x = (x, x) %}" * 60
DEEP_TUPLE = grown("(ns.x,)", times=99999)

HOSTILE = {
    # texts that double
    "doubling with ~": grown("ns.x ~ ns.x"),
    "doubling with +": grown("ns.x + ns.x"),
    "doubling with *": grown("ns.x * 2"),
    "doubling with join": grown("[ns.x, ns.x] | join"),
    "doubling with the method join": grown("ns.x.join(['', '', ''])"),
    "doubling with format": grown("'{0}{0}'.format(ns.x)"),
    "doubling with named format": grown("'{a}{a}'.format(a=ns.x)"),
    "doubling with %": grown("'%s%s' % (ns.x, ns.x)"),
    "doubling with named %": grown("'%(a)s%(a)s' % {'a': ns.x}"),
    "doubling with the filter format": grown("'%s%s' | format(ns.x, ns.x)"),
    "doubling with replace": grown("ns.x | replace('x', 'xx')"),
    "doubling with the method replace": grown("ns.x.replace('', 'x')"),
    "doubling with a block": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling with a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + grown("f(ns.x)"),
    "doubling with a caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "doubling with a filter block": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set y %}{% filter trim %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling in a straight line": "{% set x = 'x' %}" + "{% set x = x ~ x %}" * 99,
    "doubling with sum": grown("[ns.x, ns.x] | sum(start=[])", "[1]"),
    "JSON of JSON": "{{ ('\"' * 99)" + " | tojson" * 40 + " }}",
    "JSON of JSON in a loop": grown("ns.x | tojson", "'\"'"),
    "the text of a list of a text": grown("[ns.x] | string", "'\\\\'"),
    "indents": grown("ns.x | indent(9999)", "'x\\nx\\nx\\nx'"),
    "truncation with a long end": LONG + "{{ 'ab cd' | truncate(99999999, true, x ~ x ~ x ~ x) }}{{ x ~ x ~ x ~ x }}",
    # something huge at once
    "a product": "{{ 'x' * 10 ** 12 }}",
    "a product in a test": "{% if 'x' * 10 ** 12 %}{% endif %}",
    "a product of a list": "{{ [0] * 99999999999 }}",
    "a product of a tuple": "{{ 99999999999 * (0,) }}",
    "a product of a product": "{{ ('x' * 60000000) ~ ('x' * 60000000) }}",
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a product of numbers": grown("ns.x * ns.x", "3"),
    "a sum of numbers": grown("ns.x + ns.x", "3", 99999),
    "a difference of numbers": grown("ns.x - (0 - ns.x)", "3", 99999),
    "a width": "{{ '%999999999999d' % 1 }}",
    "a precision": "{{ '%.999999999f' % 1.5 }}",
    "a width from elsewhere": "{{ '%*d' % (99999999999, 1) }}",
    "a width behind brackets": "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
    "a width in a test": "{{ '%999999999d' is odd }}",
    "a width in another test": "{{ ['%999999999d'] | select('divisibleby', 7) | list }}",
    "a width of format": "{{ '{:99999999999}'.format(1) }}",
    "a width of format from elsewhere": "{{ '{:{}}'.format(1, 999999999) }}",
    "a precision of format": "{{ '{:.999999999f}'.format(1.5) }}",
    "a width of digits from elsewhere": "{{ '{:９９９９９９９９９}'.format(1) }}",
    "many fields": "{{ ('{0}' * 999999).format('x' * 999) }}",
    "the filter format": "{{ '%99999999999d' | format(1) }}",
    "ljust": "{{ 'x'.ljust(99999999999) }}",
    "rjust and center": "{{ 'x'.rjust(60000000) ~ 'x'.center(60000000) }}",
    "zfill": "{{ 'x'.zfill(99999999999) }}",
    "an infinite width": "{{ [1] | batch('inf' | float, 0) | list }}",
    "an indent of JSON": "{{ messages | tojson(indent=99999999999) }}",
    "separators of JSON": LONG + "{{ range(99) | list | tojson(separators=(x, x)) }}",
    "an indent": "{{ 'x\\nx' | indent(99999999999) }}",
    "an indent that is a text": LONG + "{{ ('\\n' * 99) | indent(x, true, true) }}",
    "a date": "{{ strftime_now('%9999999999Y') }}",
    "a long date": "{{ strftime_now('%A' * 9999999) }}",
    "replace": "{% set x = ('x' * 99999) %}{{ x | replace('x', x) }}",
    "replace as a method": "{% set x = ('x' * 99999) %}{{ x.replace('x', x) }}",
    "a join": LONG + "{{ range(99) | join(x) }}",
    "a range": "{{ range(99999999999) | list }}",
    "batches": "{{ [1] | batch(99999999999, 0) | list }}",
    "slices": "{{ [1] | slice(99999999999) | list }}",
    "rounding": "{{ 1.5 | round(999999999, 'floor') }}",
    "a number that is read": "{{ ('f' * 9999999) | int(base=16) }}",
    "the characters of a text": LONG + "{{ x | list | length }}",
    "the parts of a text": LONG + "{{ x.split('x') | length }}",
    "the words of a text": "{{ ('x ' * 9999999).split() | length }}",
    "the lines of a text": "{{ ('\\n' * 19999999).splitlines() | length }}",
    # lists that double, and what is held twice
    "a list that doubles": grown("ns.x + ns.x", "[1]"),
    "a tuple that doubles": grown("ns.x + ns.x", "(1,)"),
    "lists of sliced lists": "{% set x = range(99999) | list %}" + grown("[ns.x, x[1:]]", "0", 9999),
    "lists of lists": "{% set x = range(99999) | list %}" + grown("[ns.x, x | list]", "0", 9999),
    "a shared list as text": SHARED + "{{ x }}",
    "a shared list as JSON": SHARED + "{{ x | tojson }}",
    "a shared list with ~": SHARED + "{% set y = x ~ '' %}",
    "a shared list compared": SHARED + SHARED.replace("x", "y") + "{{ x == y }}",
    "a shared list in a test": SHARED + SHARED.replace("x", "y") + "{{ x is eq(y) }}",
    "a shared list in a list": SHARED + SHARED.replace("x", "y") + "{{ x in [1, y] + [2] }}",
    "a shared list sorted": SHARED + SHARED.replace("x", "y") + "{{ [x, y] | sort | length }}",
    "a shared list made unique": SHARED + "{{ [x, x] | unique | list | length }}",
    "a shared list counted": SHARED + SHARED.replace("x", "y") + "{{ [y].count(x) }}{{ [y].index(x) }}",
    "a shared list that changed": SHARED + "{% for i in [1, 2] %}{{ loop.changed(x) }}{% endfor %}",
    "a shared list formatted": SHARED + "{{ '%s' % (x,) }}",
    "a shared list as a reason": SHARED + "{{ raise_exception(x) }}",
    "a shared list as a name": SHARED + "{{ {}[x].no }}",
    "a shared list as a filter": SHARED + "{{ [1] | map(x) | list }}",
    "a shared list as a path": SHARED + "{{ [1] | map(attribute=x) | list }}",
    "a shared tuple as a key": SHARED_TUPLE + "{{ {x: 1} | length }}",
    "a shared tuple looked up": SHARED_TUPLE + "{{ {}[x] }}",
    "a shared tuple in a dict": SHARED_TUPLE + "{{ x in {} }}",
    "a shared tuple got": SHARED_TUPLE + "{{ {}.get(x) }}",
    "a shared tuple made unique": SHARED_TUPLE + "{{ [x] | unique | list | length }}",
    "a shared tuple as items": SHARED_TUPLE + "{{ dict([(x, 1)]) | length }}",
    "a deep tuple as a key": DEEP_TUPLE + "{{ {ns.x: 1} | length }}",
    "a deep tuple looked up": DEEP_TUPLE + "{{ {}[ns.x] }}",
    "a deep list as text": grown("[ns.x]", times=99999, end="{{ ns.x }}"),
    "a deep list as JSON": grown("[ns.x]", times=99999, end="{{ ns.x | tojson }}"),
    # what does not end
    "loops": looped(""),
    "loops that print": looped("{{ messages[0].content }}"),
    "loops with a macro": "{% macro f() %}{% endmacro %}" + looped("{{ f() }}"),
    "loops with a test": looped("{% if a %}{% endif %}"),
    "loops that choose": "{% for a in range(9999) %}" + "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "loops that choose by much": "{% for b in range(99) %}{% for a in range(99999) if [" + "a, " * 999 + "] == [] %}"
    "{% endfor %}{% endfor %}",
    "loops that continue": looped("{% continue %}"),
    "loops over texts": LONG + "{% for c in x %}{% for d in x %}{% endfor %}{% endfor %}",
    "macros with much by default": "{% macro f(x="
    + "[" * 20
    + "1"
    + ",1]" * 20
    + ") %}{% endmacro %}"
    + looped("{{ f() }}"),
    "maps": "{% for a in range(9999) %}{% set y = range(99999) | map('string') | list %}{% endfor %}",
    "sorts": "{% for a in range(9999) %}{% set y = range(99999) | sort | list %}{% endfor %}",
    "sums": "{% for a in range(9999) %}{% set y = range(99999) | sum %}{% endfor %}",
    "searches": LONG + looped("{{ 'yx' * 49 ~ 'z' in x }}", 1),
    "searches by a method": LONG + looped("{{ x.find('z') }}{{ x.count('z') }}", 1),
    "searches in a list": "{% set x = range(99999) | list %}" + looped("{% if 'a' in x %}{% endif %}", 1),
    "comparisons of texts": LONG + "{% set y = 'xy' * 9999999 %}" + looped("{{ x == y }}", 1),
    "stripping of many": LONG + "{{ x.strip('ab' * 99999 ~ 'xy') }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a loop that calls itself twice": "{% for x in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1]) }}{{ loop([1]) }}"
    "{% endif %}{% endfor %}",
    "a long output": LONG + "{% for i in range(9999) %}{{ x }}{% endfor %}",
    "work given back": "{{ [1] | map('work of an expression', -10 ** 18) | list }}" + looped(""),
    # what chat templates do not need
    "lipsum": "{{ lipsum(99999, false, 9999, 10000) }}",
    "groupby": "{% for a in range(9999) %}{{ range(99999) | groupby('x') }}{% endfor %}",
    "forceescape": grown("ns.x | forceescape", "'&'"),
    "urlencode": grown("ns.x | urlencode", "'%'"),
    "wordwrap": "{{ ('x' * 999999) | wordwrap(1) }}",
    "xmlattr": "{{ {'a': 'b'} | xmlattr }}",
    "pprint": "{{ messages | pprint }}",
    "center": "{{ 'x' | center(99999999999) }}",
    "attr": "{{ '' | attr('__class__') }}",
    "a filter in a map": "{{ ['x'] | map('urlize') | list }}",
    "a filter that is reached": "{% if messages %}{{ 'x' | striptags }}{% endif %}",
    "a test": "{{ 'x' is filter }}",
    "encode": "{{ 'x'.encode('utf-8') }}",
    "expandtabs": "{{ '\\t'.expandtabs(99999999999) }}",
    "translate": "{{ 'x'.translate({120: 'x' * 99}) }}",
    "format_map": "{{ '{a:99999999999}'.format_map({'a': 1}) }}",
    "fromkeys": "{{ {}.fromkeys('abc') }}",
    "append": "{{ messages.append(1) }}",
    "update": "{% set _ = messages[0].update({'content': 'x'}) %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes in a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by a path": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "the code of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__code__ }}",
    "itself": "{{ self._TemplateReference__context.environment }}",
    "include": "{% include '/etc/passwd' %}",
    "include that may be missing": "{% include '/etc/passwd' ignore missing %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "blocks": "{% block x %}{{ self.x() }}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ '&' }}{% endautoescape %}",
    # what the compiler cannot take
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "operators": "{{ 1" + " + 1" * 9999 + " }}",
    "not": "{{ " + "not " * 9999 + "1 }}",
    "dots": "{{ x" + ".x" * 9999 + " }}",
    "nested ifs": "{% if 1 %}" * 999 + "{% endif %}" * 999,
    "nested loops": "{% for x in [1] %}" * 99 + "{% endfor %}" * 99,
    "a number in hexadecimal": "{{ 0x" + "f" * 99999 + " }}",
    "a long number": "{{ " + "9" * 99999 + " }}",
    "a long template": " " * 10**7,
}


def main() -> None:
    """Read templates, and say of each whether it is refused, why, and how long that took."""
    import resource

    from llmpipe import LLMConfigError
    from llmpipe.chats import ChatInput
    from llmpipe.runners.chat import ChatTemplate, ChatTemplateError
    from llmpipe.runners.templates import limits

    limits.MOST_WORK //= int(sys.argv[1])
    limits.RENDER_S = float("inf")  # what is counted has to do
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (400, 400))
    for line in sys.stdin:
        name, source = json.loads(line)
        began = time.thread_time()
        try:
            said = ["rendered", ChatTemplate(source).render(ChatInput(HELLO))[:200]]
        except LLMConfigError as error:
            said = ["not loaded", str(error)]
        except ChatTemplateError as error:
            said = ["refused", str(error)]
        except BaseException as error:
            said = ["failed", repr(error)[:200]]
        print(json.dumps([name, *said, time.thread_time() - began]), flush=True)


if __name__ == "__main__":
    main()
