"""One line of the log that a tracker writes inside a training job: "curv.curvature/1"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from curvcli.documents.base import Document
from curvcli.documents.report import StableLr

RecordStatus = Literal["converged", "unconverged", "non-finite", "asymmetric", "failed"]


class Record(Document):
    """Curvature of the training model after one optimizer step; a JSONL file has one a line.

    Values are null where `status` says that none could be had. "failed" carries its reason in `message`. Where no parameter
    has a lambda, as under Lion, `status` is that of sharpness in the optimizer's norm.
    """

    schema_: Literal["curv.curvature/1"] = Field(default="curv.curvature/1", alias="schema")
    step: Annotated[int, Field(ge=0)]
    loss: float | None = Field(description="of the training step, as the user gave it, in nats per token")
    lr: float | None
    eigenvalue: float | None = Field(description="lambda over the parameters that train")
    rho: float | None
    residual: float | None
    update_ratio: float | None = Field(description="lr over the critical lr of the next update; null if none exists")
    update_rms: float | None = Field(
        default=None, description="root mean square of the next update, in units of the learning rate"
    )
    loss_sigmas: float | None = Field(
        default=None,
        description="largest number of standard deviations by which log loss of a step since the last record lay above the "
        "mean of up to 100 steps before it; null while fewer than ten came before, and in records of older versions",
    )
    loss_finite: bool | None = Field(
        default=None, description="every loss since the last record was a finite number; null where the job gave none"
    )
    gradient_norm: float | None = Field(default=None, description="of the loss on the probe, over the parameters that train")
    gradient_sigmas: float | None = Field(
        default=None,
        description="standard deviations by which log gradient_norm lies above the mean of up to 100 measurements before; "
        "null while fewer than ten came before",
    )
    gradient_outlier: bool | None = Field(default=None, description="gradient_sigmas is above 6; null without it")
    gradient_quotient: float | None = Field(default=None, description="g'Hg / g'g on the probe, where it is asked for")
    attention_logit: float | None = Field(default=None, description="largest of any layer, where it is asked for")
    attention_entropy: float | None = Field(default=None, description="smallest mean of a layer, where it is asked for")
    sharpness: float | None = Field(
        default=None, description="S in the norm that the optimizer's step is steepest in (Muon, Lion), a lower bound"
    )
    dual_norm: float | None = Field(default=None, description="of the gradient on the probe, in that norm's dual")
    z: float | None = Field(default=None, description="lr S / (2 dual norm); 1 is the edge of normalised descent")
    spectral_norm: float | None = Field(
        default=None,
        description="largest of a block's weight matrices, where it is asked for; null where one is not known",
    )
    active_depth: int | None = Field(description="blocks that train, under architecture warm-up")
    hvps: Annotated[int, Field(ge=0)]
    seconds: float = Field(description="that the measurement took")
    overhead: float | None = Field(
        default=None,
        description="seconds spent measuring over those spent training since the job began or was resumed; null in its "
        "first record, and in records of older versions",
    )
    probe_batches: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="batches of the probe that were measured; a budget chooses how many"
    )
    status: RecordStatus
    message: str | None = None
    early: bool = Field(default=False, description="the optimizer is young: rho means nothing yet, whatever it is")
    stable_lr: StableLr | None = Field(
        default=None,
        description="null where rho is not certified or not above 0, it is too early, or an older version wrote",
    )
    odds: float | None = Field(default=None, description="chance that a run at this rho ends badly; null as stable_lr is")

    @property
    def idle(self) -> bool:
        """Whether nothing was to be measured, as no step is taken: the learning rate is 0, as where a schedule has ended."""
        return self.lr == 0 and self.status == "failed"

    @property
    def outcome(self) -> str:
        """The status in a word for people."""
        return "lr is 0" if self.idle else self.status

    def to_line(self) -> str:
        """The record as one line of JSONL."""
        return self.model_dump_json(by_alias=True) + "\n"
