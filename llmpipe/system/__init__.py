"""What llmpipe asks of the operating system; knows nothing of runs, models or rows.

machine.py      cores and memory that this process may use, and what others leave of the cores
memory.py       memory that a process holds, and the most that it has held
files.py        files that are whole or not there
links.py        symbolic links are refused where a file is written in place
small_files.py  files that people write by hand
temporary.py    temporary directories that are always removed
signals.py      signals that ask for an end
streams.py      the standard streams, whatever they are
workers.py      processes that a launcher makes for the jobs of a sweep
"""
