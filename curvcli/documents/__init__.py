"""The vocabulary of results: pydantic models, and the versioned JSON documents made of them. No torch.

Names are imported on first use: the command line's help is made of `columns`, and needs no models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvcli.documents.base import Document, Finding, Severity, Versions, dumps, first_problem, read_document, schema_of
    from curvcli.documents.compare import Change, Comparison, Side, load_comparison
    from curvcli.documents.explain import (
        Explanation,
        HeadMass,
        Mass,
        Removal,
        RowMass,
        SequenceShare,
        TokenKind,
        TokenShare,
        load_explanation,
    )
    from curvcli.documents.gate import Gate, Outcome, OutcomeName, Rule, RuleName, Subject, load_gate
    from curvcli.documents.log import LOG_NAME, Follower, Log, find_log, load_records
    from curvcli.documents.output import check_writable, write_whole
    from curvcli.documents.record import Record, RecordStatus
    from curvcli.documents.report import (
        ENDS,
        Attribution,
        BodyEstimate,
        Checkpoint,
        Companions,
        Cost,
        Cumulative,
        Data,
        DataFile,
        DepthEstimate,
        Estimate,
        Generalisation,
        LayerCompanions,
        LayerEstimate,
        LossCourse,
        Optimizer,
        PartEstimate,
        Report,
        StableLr,
        Status,
        TokensPoint,
        Update,
        VerdictName,
        load_report,
    )
    from curvcli.documents.schedule import LrKind, LrSchedule, Order, Phase, Schedule, ScheduleProvenance, load_schedule
    from curvcli.documents.schemas import SCHEMAS, json_schema
    from curvcli.documents.steepest import ModelSteepest, Steepest, SteepestReading, SteepestStatus
    from curvcli.documents.track import ActionName, RunName, RunVerdict, Track, TrackPoint, TrainingStep, load_track

__all__ = [
    "ENDS",
    "LOG_NAME",
    "SCHEMAS",
    "ActionName",
    "Attribution",
    "BodyEstimate",
    "Change",
    "Checkpoint",
    "Companions",
    "Comparison",
    "Cost",
    "Cumulative",
    "Data",
    "DataFile",
    "DepthEstimate",
    "Document",
    "Estimate",
    "Explanation",
    "Finding",
    "Follower",
    "Gate",
    "Generalisation",
    "HeadMass",
    "LayerCompanions",
    "LayerEstimate",
    "Log",
    "LossCourse",
    "LrKind",
    "LrSchedule",
    "Mass",
    "ModelSteepest",
    "Optimizer",
    "Order",
    "Outcome",
    "OutcomeName",
    "PartEstimate",
    "Phase",
    "Record",
    "RecordStatus",
    "Removal",
    "Report",
    "RowMass",
    "Rule",
    "RuleName",
    "RunName",
    "RunVerdict",
    "Schedule",
    "ScheduleProvenance",
    "SequenceShare",
    "Severity",
    "Side",
    "StableLr",
    "Status",
    "Steepest",
    "SteepestReading",
    "SteepestStatus",
    "Subject",
    "TokenKind",
    "TokenShare",
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
    "load_explanation",
    "load_gate",
    "load_records",
    "load_report",
    "load_schedule",
    "load_track",
    "read_document",
    "schema_of",
    "write_whole",
]

_MODULES = {
    "base": ("Document", "Finding", "Severity", "Versions", "dumps", "first_problem", "read_document", "schema_of"),
    "compare": ("Change", "Comparison", "Side", "load_comparison"),
    "explain": (
        "Explanation",
        "HeadMass",
        "Mass",
        "Removal",
        "RowMass",
        "SequenceShare",
        "TokenKind",
        "TokenShare",
        "load_explanation",
    ),
    "gate": ("Gate", "Outcome", "OutcomeName", "Rule", "RuleName", "Subject", "load_gate"),
    "log": ("LOG_NAME", "Follower", "Log", "find_log", "load_records"),
    "output": ("check_writable", "write_whole"),
    "record": ("Record", "RecordStatus"),
    "report": (
        "ENDS",
        "Attribution",
        "Checkpoint",
        "Companions",
        "Cost",
        "Cumulative",
        "Data",
        "DataFile",
        "DepthEstimate",
        "Estimate",
        "Generalisation",
        "BodyEstimate",
        "LayerCompanions",
        "LayerEstimate",
        "LossCourse",
        "Optimizer",
        "PartEstimate",
        "Report",
        "StableLr",
        "Status",
        "TokensPoint",
        "Update",
        "VerdictName",
        "load_report",
    ),
    "schedule": ("LrKind", "LrSchedule", "Order", "Phase", "Schedule", "ScheduleProvenance", "load_schedule"),
    "steepest": ("ModelSteepest", "Steepest", "SteepestReading", "SteepestStatus"),
    "track": ("ActionName", "RunName", "RunVerdict", "Track", "TrackPoint", "TrainingStep", "load_track"),
    "schemas": ("SCHEMAS", "json_schema"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"curvcli.documents.{_HOME[name]}"), name)
