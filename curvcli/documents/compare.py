"""Two checkpoints side by side: "curv.compare/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from curvcli.documents.base import Document, Finding, Versions, read_document
from curvcli.documents.report import VerdictName


class Side(Document):
    """One of the two."""

    path: str = Field(description="what the user named")
    checkpoint: str
    step: int | None
    lr: float | None
    threshold: float | None
    loss: float = Field(description="mean loss over the shard, in nats per token")
    update_ratio: float | None
    verdict: VerdictName
    tokens: int
    z: float | None = Field(default=None, description="of the parameters whose step is steepest in a norm; null without one")
    stable_lr: float | None = Field(default=None, description="the largest stable learning rate; null where none is known")


class Change(Document):
    """What became of one part: the full model, embedding and head, or a layer. Values are null where not certified."""

    part: Literal["full", "ends", "layer"]
    name: str
    first: float | None = Field(description="lambda of the first")
    second: float | None = Field(description="lambda of the second")
    first_rho: float | None
    second_rho: float | None
    ratio: float | None = Field(description="second lambda over first; null where one is missing or not positive")
    low: float | None = Field(description="lower end of the ratio's bracket, from both residuals")
    high: float | None
    first_z: float | None = Field(default=None, description="Z of the first; null where it has no norm")
    second_z: float | None = None
    rho_ratio: float | None = Field(description="second rho over first: the learning rate counts too")
    message: str | None = Field(description="why there is no ratio")


class Comparison(Document):
    """What `curv compare` found; document "curv.compare/1"."""

    schema_: Literal["curv.compare/1"] = Field(default="curv.compare/1", alias="schema")
    first: Side
    second: Side
    changes: list[Change] = Field(min_length=1)
    findings: list[Finding] = Field(description="first what makes the two no like for like")
    versions: Versions


def load_comparison(path: Path) -> Comparison:
    """Read a comparison. Raises InputError where the file is no curv.compare/1."""
    return read_document(Comparison, path, "curv.compare/1", "write one with curv compare -o")
