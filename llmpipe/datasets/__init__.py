"""File → rows, one at a time. Knows nothing of prompts or models.

A row that cannot be read is still a row: it carries the reason, and its place in the order. What would fail every row
(no such file, an unknown type, a missing column, duplicate ids) is refused by `Dataset.scan`, before a model loads.

To add a format: write a function like `read_jsonl` in a file of its own and name it in `READERS`.

dataset.py     `Dataset`: its rows, and the `Scan` of all of them before a run
sources.py     a path, a directory or a pattern → files
formats.py     which format a file has, and what reads it
json.py        JSON: an array, objects one after another, or a list inside an object
jsonl.py       JSON Lines
csv.py         CSV and TSV
parquet.py     Parquet
opening.py     files, unpacked where they are packed
partitions.py  columns in the names of directories, such as `lang=en`
shuffle.py     a random order, the same everywhere, with few rows in memory
contents.py    digests of the rows: whether a dataset has changed, or only grown
inputs.py      copies of standard input and pipes
"""

from llmpipe.datasets.contents import digest_of, first_change
from llmpipe.datasets.dataset import Dataset, Scan
from llmpipe.datasets.formats import READERS
from llmpipe.datasets.inputs import Inputs

__all__ = ["READERS", "Dataset", "Inputs", "Scan", "digest_of", "first_change"]
