"""Metrics and a few rows → one self-contained HTML page.

Nothing on the page is trusted but its template and its style: what a browser would obey, drop or hide is spelt out, the
rest is escaped, and the page forbids the browser to run, load or send anything. It holds no date and nothing random, so
the same run gives the same bytes.

page.py           what is kept of a run, and the page
page.html.jinja   what stands where
page.css          how it looks
excerpts.py       what is kept of a row and its answer
"""

from llmpipe.report.page import Report

__all__ = ["Report"]
