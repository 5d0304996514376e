"""What a checkpoint's sharpness is made of: "curv.explain/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from curvcli.documents.base import Document, Finding, Versions, read_document
from curvcli.documents.report import Checkpoint, Cost, Data, Estimate, Generalisation, Optimizer, VerdictName


class Mass(Document):
    """A share of the sharpest direction's squared norm; those of one list sum to 1."""

    name: str
    mass: float


class HeadMass(Document):
    """Of one attention head, over those of its weights whose entries lie head by head."""

    layer: int
    head: int
    of: Literal["query", "key-value"] = Field(
        description="query: its queries and its part of the output, and keys and values where there are as many heads of "
        "them; key-value: keys and values, of which several heads of queries share one"
    )
    mass: float


class RowMass(Document):
    """Of one row of an embedding or of the head."""

    tensor: str
    rows_of: Literal["tokens", "positions"]
    row: int
    text: str | None = Field(description="of the token; null for positions, and where no tokenizer says it")
    mass: float


class TokenShare(Document):
    """One prediction's part of lambda."""

    sequence: int = Field(description="index among the sequences of the shard")
    position: int = Field(description="of the label, among the sequence's")
    token: int = Field(description="id of the label: the token that was to be predicted")
    text: str | None
    context: str | None = Field(description="what stands before it, a few tokens")
    loss: float = Field(description="in nats")
    curvature: float = Field(description="v' P^(-1/2) H_t P^(-1/2) v for the Hessian H_t of this prediction's loss")
    share: float = Field(description="of what all predictions together have of lambda; may be negative")


class SequenceShare(Document):
    """One sequence's part of lambda."""

    sequence: int = Field(description="index among the sequences of the shard, 0 the first")
    predictions: int
    loss: float | None = Field(description="mean over its predictions, in nats; null where predictions cannot be told apart")
    quotient: float = Field(description="v' P^(-1/2) H_i P^(-1/2) v for the Hessian H_i of this sequence's mean loss")
    share: float = Field(description="of what all sequences together have of lambda; may be negative")
    tokens: list[TokenShare] = Field(description="its predictions with the largest shares")


class TokenKind(Document):
    """All predictions of one token."""

    token: int
    text: str | None
    count: int
    share: float = Field(description="of what all predictions together have of lambda")


class Removal(Document):
    """The same network and optimizer on the shard without the part of it that carries most of lambda."""

    what: Literal["sequences", "predictions"]
    removed: int
    total: int
    share: float = Field(description="of lambda that these had, along the direction of the whole shard")
    estimate: Estimate = Field(description="on what is left, solved anew from a random start; what the verdict is on")
    generalisation: Generalisation
    verdict: VerdictName
    changes: bool = Field(description="whether the verdict is another than that of the whole shard")


class Explanation(Document):
    """What `curv explain` found; document "curv.explain/1"."""

    schema_: Literal["curv.explain/1"] = Field(default="curv.explain/1", alias="schema")
    checkpoint: Checkpoint
    data: Data
    optimizer: Optimizer
    direction: Literal["full", "body"] = Field(
        description="whose top eigenvector v is explained: that of what the verdict is on, the full model or its body "
        "(without rows of embeddings that the shard hardly looks up)"
    )
    estimate: Estimate
    generalisation: Generalisation
    verdict: VerdictName
    participation: float | None = Field(description="entries that v is spread over: 1 / sum of v^4")
    parts: list[Mass] = Field(description="embedding, head and other parts outside the layers, and each layer")
    kinds: list[Mass] = Field(description="by what a matrix is for: q, k, v, o, gate, up, down, norm, ...")
    heads: list[HeadMass] = Field(description="attention heads, the heaviest first; at most 20")
    rows: list[RowMass] = Field(description="rows of tokens and positions, the heaviest first; at most 10")
    sequences: list[SequenceShare] = Field(description="the five with the largest shares")
    tokens: list[TokenKind] = Field(description="the five labels with the largest shares, over all sequences")
    per: Literal["prediction", "sequence", "nothing"] = Field(
        description="what lambda could be told apart by, exactly; prediction: by sequence, too"
    )
    sum: float | None = Field(
        description="what all sequences and a coupled weight decay add up to, which is lambda but for rounding"
    )
    decay: float = Field(description="what a coupled weight decay has of lambda")
    removals: list[Removal]
    findings: list[Finding]
    cost: Cost
    versions: Versions


def load_explanation(path: Path) -> Explanation:
    """Read an explanation. Raises InputError where the file is no curv.explain/1."""
    return read_document(Explanation, path, "curv.explain/1", "write one with curv explain -o")
