"""The documents by their short names, and the JSON Schema of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curvcli.documents.alert import Alert
from curvcli.documents.base import Document, document_in, named_content
from curvcli.documents.compare import Comparison, TrackComparison
from curvcli.documents.explain import Explanation
from curvcli.documents.gate import Gate
from curvcli.documents.log import Log, find_log, load_records
from curvcli.documents.record import Record
from curvcli.documents.report import Report
from curvcli.documents.schedule import Schedule
from curvcli.documents.track import Track
from curvcli.errors import InputError, UsageError

SCHEMAS: dict[str, type[Document]] = {
    "report": Report,
    "schedule": Schedule,
    "curvature": Record,
    "gate": Gate,
    "track": Track,
    "compare": Comparison,
    "compare-tracks": TrackComparison,
    "explain": Explanation,
    "alert": Alert,
}
# Where the schemas are published: docs/reference/schemas, which docs/write_schemas.py writes.
HOME = "https://raw.githubusercontent.com/OWNER/curv/main/docs/reference/schemas"


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a document by its short name, with the address that it is published at as its id.

    Raises UsageError for an unknown name.
    """
    if name not in SCHEMAS:
        raise UsageError(f"no document is called {name!r}", hint=f"one of: {', '.join(SCHEMAS)}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{HOME}/{name}.json",
        **SCHEMAS[name].model_json_schema(by_alias=True, mode="serialization"),
    }


def load(path: Path | str) -> Document | Log:
    """Read any document that curv wrote: a report, track, comparison, explanation, gate or schedule, or a job's log.

    Args:
        path: of the file; of a directory, the curvature.jsonl in it.

    Returns:
        The document as its class, by the schema that it names; of a log its records, newest last.

    Raises:
        InputError: it is larger than any document, no JSON, or none that this version knows.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".jsonl":
        if (found := find_log(path)) is None:
            raise InputError(f"{path} holds no curvature.jsonl", hint="name a document, or the log of a job")
        return load_records(found)
    name, content = named_content(path)
    kind = {f"curv.{short}/1": kind for short, kind in SCHEMAS.items()}.get(name or "")
    if kind is None or name is None:
        raise InputError(f"{path} names the schema {name!r:.80}", hint=f"known: {', '.join(f'curv.{n}/1' for n in SCHEMAS)}")
    return document_in(content, kind, path, name, "write it anew with the verb that made it")
