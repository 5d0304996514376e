"""What a gate decided: "curv.gate/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from curvcli.documents import columns
from curvcli.documents.base import Document, Finding, read_document
from curvcli.documents.report import VerdictName
from curvcli.documents.shown import Shown
from curvcli.documents.track import RunVerdict


def _known(name: str) -> str:
    if name not in columns.ruled():
        raise ValueError(f"no rule is called {name!r:.80}")
    return name


def _listed(schema: dict[str, Any]) -> None:
    schema["enum"] = list(columns.ruled())


RuleName = Annotated[str, AfterValidator(_known), Field(json_schema_extra=_listed)]
OutcomeName = Literal["passed", "broken", "unresolved"]


class Rule(Document):
    """A rule in force and where it is from: a flag, or a file."""

    name: RuleName
    limit: float | None = Field(
        description="max-regression: percent, with the tolerance not yet added; null for what is only required"
    )
    source: str


class Outcome(Document):
    """What became of one rule. "unresolved": the number is missing, not certified, or its bracket holds the limit."""

    rule: RuleName
    limit: float | None = Field(description="as compared: for max-regression percent, the tolerance added")
    source: str
    outcome: OutcomeName
    part: str | None = Field(description="the layer, or embedding and head, that decided a rule on layers")
    step: int | None = Field(default=None, description="of the point that decided, where several are judged")
    value: float | None
    low: float | None = Field(description="lower end of the bracket that the limit is held against")
    high: float | None = Field(description="its upper end")
    message: str


class Subject(Document):
    """What was judged; numbers are null where the time budget ran out before any was known."""

    path: str
    kind: Literal["report", "track", "checkpoint"] = Field(description="of a track the newest `points` are judged")
    checkpoint: str | None
    step: int | None
    tokens: int | None
    rho: float | None
    verdict: VerdictName
    stable_lr: float | None = Field(default=None, description="the largest stable learning rate; null where none is known")
    run: RunVerdict | None = Field(
        default=None, description="on the run, from its loss and what is measured; null in documents of older versions"
    )
    points: int = Field(default=1, description="of a run that were held against the rules, the newest ones")


class Gate(Shown, Document):
    """What `curv gate` decided; document "curv.gate/1"."""

    schema_: Literal["curv.gate/1"] = Field(default="curv.gate/1", alias="schema")
    subject: Subject
    baseline: str | None = Field(description="path of the report or track compared with")
    outcome: OutcomeName = Field(description="broken if any rule is, else unresolved if any is, else passed")
    unresolved: Literal["report", "pass", "fail"] = Field(description="what an unresolved outcome is taken for")
    exit_code: Literal[0, 1, 3]
    outcomes: list[Outcome] = Field(min_length=1)
    findings: list[Finding] = Field(description="the report's own warnings and errors")
    curvcli: str = Field(description="version that judged")


def load_gate(path: Path) -> Gate:
    """Read a gate document. Raises InputError where the file is no curv.gate/1."""
    return read_document(Gate, path, "curv.gate/1", "write one with curv gate -o")
