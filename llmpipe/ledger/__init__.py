"""Durable progress: which rows are done, and what came of them. One SQLite file in the run directory.

A completion counts as done once it is committed here; commits are made in small groups, each synced to disk, by a
thread of the ledger's own: they wait for nothing that the model does, nor it for them. A process killed at any instant
loses at most the group that was not committed, and starting again does those rows.

A ledger appears whole, with all that says which run it is of: where it is not, no run has begun.

SQLite notices damage to its own structure only, so every completion and fact carries a checksum of what it says.

format.py    the tables, and what stands in their cells
opening.py   who may have a run directory; how a ledger comes to be, and is opened
reading.py   what was committed, also while a run goes on
writing.py   the ledger of the run that is going on
faults.py    what SQLite says, as one line
"""

from llmpipe.ledger.format import FILE, VERSION
from llmpipe.ledger.opening import begun, held
from llmpipe.ledger.reading import LedgerSnapshot, saved, saved_arguments
from llmpipe.ledger.writing import Ledger

__all__ = ["FILE", "VERSION", "Ledger", "LedgerSnapshot", "begun", "held", "saved", "saved_arguments"]
