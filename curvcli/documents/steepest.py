"""Sharpness in a norm, of optimizers whose normalised step is steepest in it: a part of "curv.report/1"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from curvcli.documents.base import Document

SteepestStatus = Literal["settled", "unsettled", "flat", "no-gradient", "non-finite", "skipped"]
SteepestReading = Literal["below", "edge", "past", "early", "unresolved"]


class Steepest(Document):
    """Sharpness in the norm that the optimizer's step is steepest in, restricted to some of the parameters that have one.

    Values are null where `status` says that none could be had: "non-finite" (a product overflowed), "skipped" (the time
    budget ran out first, or the disk was full). "flat": no positive curvature was found, so there is no Z; "no-gradient":
    the gradient is 0. "unsettled" values still rose when the products were spent. A settled one can lie below the largest,
    too.
    """

    sharpness: float | None = Field(
        description="S, the largest d'Hd found over directions d of norm 1, the other parameters held still: a lower bound"
    )
    dual_norm: float | None = Field(
        description="of the gradient on the shard: the sum of l1 norms (Lion), or of nuclear norms (Muon), times radii"
    )
    z: float | None = Field(description="lr S / (2 dual norm): 1 is the edge of normalised descent; null without a lr")
    hvps: Annotated[int, Field(ge=0, description="Hessian-vector products spent")]
    status: SteepestStatus


class ModelSteepest(Steepest):
    """Of all parameters that have a norm, as one ball."""

    norm: Literal["spectral", "max"] = Field(description="of each tensor: spectral (Muon) or max (Lion)")
    lr: float | None = Field(description="that Z is at and radii are over: that of the largest group with a norm")
    tensors: int
    parameters: int
    rest: int = Field(description="parameters that move and have no norm: rho is theirs, with the others held still")
    starts: list[tuple[str, float]] = Field(
        default=[], description="what each start had come to when all had taken as many products: gradient, momentum, random"
    )
    spread: float | None = Field(description="best start less the worst, over the best; null with one start")
    improvement: float | None = Field(description="of S by the last step, over S")
    reading: SteepestReading = Field(
        description="what Z says, on a scale of its own and advisory: past the edge, at it, or below, which proves nothing"
    )
