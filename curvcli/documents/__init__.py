"""The vocabulary of results: pydantic models, and the versioned JSON documents made of them. No torch."""

from __future__ import annotations

from typing import Any

from curvcli.documents.base import Document, Finding, Severity, Versions, dumps, first_problem, read_document, schema_of
from curvcli.documents.compare import Change, Comparison, Side, load_comparison
from curvcli.documents.gate import Gate, Outcome, OutcomeName, Rule, RuleName, Subject, load_gate
from curvcli.documents.log import LOG_NAME, Follower, Log, find_log, load_records
from curvcli.documents.output import check_writable, write_whole
from curvcli.documents.record import Record, RecordStatus
from curvcli.documents.report import (
    ENDS,
    Attribution,
    Checkpoint,
    Cost,
    Cumulative,
    Data,
    DataFile,
    DepthEstimate,
    Estimate,
    Generalisation,
    LayerEstimate,
    Optimizer,
    PartEstimate,
    Report,
    Status,
    TokensPoint,
    Update,
    VerdictName,
    load_report,
)
from curvcli.documents.schedule import LrKind, LrSchedule, Order, Phase, Schedule, ScheduleProvenance, load_schedule
from curvcli.documents.track import Track, TrackPoint, TrainingStep, load_track
from curvcli.errors import UsageError

__all__ = [
    "ENDS",
    "LOG_NAME",
    "SCHEMAS",
    "Attribution",
    "Change",
    "Checkpoint",
    "Comparison",
    "Cost",
    "Cumulative",
    "Data",
    "DataFile",
    "DepthEstimate",
    "Document",
    "Estimate",
    "Finding",
    "Follower",
    "Gate",
    "Generalisation",
    "LayerEstimate",
    "Log",
    "LrKind",
    "LrSchedule",
    "Optimizer",
    "Order",
    "Outcome",
    "OutcomeName",
    "PartEstimate",
    "Phase",
    "Record",
    "RecordStatus",
    "Report",
    "Rule",
    "RuleName",
    "Schedule",
    "ScheduleProvenance",
    "Severity",
    "Side",
    "Status",
    "Subject",
    "TokensPoint",
    "Track",
    "TrackPoint",
    "TrainingStep",
    "Update",
    "VerdictName",
    "Versions",
    "check_writable",
    "dumps",
    "find_log",
    "first_problem",
    "json_schema",
    "load_comparison",
    "load_gate",
    "load_records",
    "load_report",
    "load_schedule",
    "load_track",
    "read_document",
    "schema_of",
    "write_whole",
]

SCHEMAS: dict[str, type[Document]] = {
    "report": Report,
    "schedule": Schedule,
    "curvature": Record,
    "gate": Gate,
    "track": Track,
    "compare": Comparison,
}


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a document by its short name. Raises UsageError for an unknown one."""
    if name not in SCHEMAS:
        raise UsageError(f"no document is called {name!r}", hint=f"one of: {', '.join(SCHEMAS)}")
    return SCHEMAS[name].model_json_schema(by_alias=True, mode="serialization")
