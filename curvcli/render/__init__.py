"""Results to text and pictures. Computes nothing that is not in the document."""

from __future__ import annotations

from collections.abc import Callable

from curvcli.documents import Report
from curvcli.render.csv import csv
from curvcli.render.markdown import markdown

# Formats that are plain text; "table" needs a terminal and lives in table.py.
TEXT: dict[str, Callable[[Report], str]] = {"json": Report.to_json, "csv": csv, "markdown": markdown}
