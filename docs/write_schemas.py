"""Writes docs/reference/schemas/: the JSON Schema of every document, as `curv schema NAME` prints it.

Run it when a document has changed: python docs/write_schemas.py
"""

from __future__ import annotations

from pathlib import Path

from curvcli.documents import SCHEMAS, dumps, json_schema

HOME = Path(__file__).with_name("reference") / "schemas"


def schemas() -> dict[str, str]:
    """Text by file name."""
    return {f"{name}.json": dumps(json_schema(name)) for name in SCHEMAS}


if __name__ == "__main__":
    HOME.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (HOME / name).write_text(text, encoding="utf-8")
