"""File → rows, one at a time. Knows nothing of prompts or models.

A row that cannot be read is still a row: it carries the reason, and its place in the order. What would fail every row
(no such file, an unknown type, a missing column, duplicate ids) is refused by `Dataset.scan`, before a model loads.

To add a format: write a function like `read_jsonl` in a file of its own and name it in `READERS`.
"""

from llmpipe.datasets.contents import digest_of, first_change
from llmpipe.datasets.dataset import Dataset, Scan
from llmpipe.datasets.formats import READERS
from llmpipe.datasets.inputs import Inputs

__all__ = ["READERS", "Dataset", "Inputs", "Scan", "digest_of", "first_change"]
