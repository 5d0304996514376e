"""The documents by their short names, and the JSON Schema of each."""

from __future__ import annotations

from typing import Any

from curvcli.documents.base import Document
from curvcli.documents.compare import Comparison
from curvcli.documents.explain import Explanation
from curvcli.documents.gate import Gate
from curvcli.documents.record import Record
from curvcli.documents.report import Report
from curvcli.documents.schedule import Schedule
from curvcli.documents.track import Track
from curvcli.errors import UsageError

SCHEMAS: dict[str, type[Document]] = {
    "report": Report,
    "schedule": Schedule,
    "curvature": Record,
    "gate": Gate,
    "track": Track,
    "compare": Comparison,
    "explain": Explanation,
}


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a document by its short name. Raises UsageError for an unknown one."""
    if name not in SCHEMAS:
        raise UsageError(f"no document is called {name!r}", hint=f"one of: {', '.join(SCHEMAS)}")
    return SCHEMAS[name].model_json_schema(by_alias=True, mode="serialization")
