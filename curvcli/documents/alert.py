"""What a tracker tells of one record: "curv.alert/1", posted to a webhook, and the file that a job may react to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from curvcli.documents.base import Document, read_document
from curvcli.documents.report import VerdictName

LevelName = Literal["INFO", "WARN", "ERROR"]
AlertAction = Literal["go on", "lower the lr", "stop"]


class Alert(Document):
    """One record's level, and what to do about it.

    `lr` and `factor` are set where `action` is "lower the lr" and say the same: a job whose parameter groups have learning
    rates of their own multiplies each by `factor`.
    """

    schema_: Literal["curv.alert/1"] = Field(default="curv.alert/1", alias="schema")
    step: Annotated[int, Field(ge=0)]
    level: LevelName
    verdict: VerdictName
    text: str = Field(description="why, in one sentence")
    action: AlertAction
    lr: float | None = Field(default=None, gt=0, description="to lower to: the largest of the parameter groups'")
    factor: float | None = Field(default=None, gt=0, lt=1, description="lr over the record's own")
    rho: float | None = None
    loss: float | None = None


def load_alert(path: Path) -> Alert:
    """Read an alert. Raises InputError where the file is no curv.alert/1."""
    return read_document(Alert, path, "curv.alert/1", "a tracker with a reaction file writes one")
