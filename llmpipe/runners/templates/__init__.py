"""A Jinja for chat templates of any origin: they can neither leave it, nor run for ever, nor fill the memory.

limits.py    what one rendering may take, and the operations that are counted against it
methods.py   the methods and functions that templates may call, each bounded
filters.py   the filters and tests that they may use, each bounded
code.py      compiles templates to code that does nothing else
"""
