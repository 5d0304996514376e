"""The report of one checkpoint: "curv.report/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from curvcli.documents.base import Document, Finding, Versions, digested_document
from curvcli.documents.shown import Shown
from curvcli.documents.steepest import ModelSteepest, Steepest

Status = Literal["converged", "unconverged", "non-finite", "asymmetric", "inconsistent", "empty", "skipped"]
VerdictName = Literal["stable", "edge", "hot", "unstable", "early", "unresolved"]
MOST_LAYERS = 100_000  # a page draws a row for each, whoever wrote the document
ENDS = "embedding, head"  # what the part outside the layers is called


class Estimate(Document):
    """One extreme eigenvalue with its certificate.

    Some eigenvalue lies within `residual` of `eigenvalue`, which is a lower bound of the largest.
    Values are null where `status` says that none could be had: "non-finite" (a product overflowed),
    "asymmetric" (products fail u.Gv = v.Gu), "empty" (no parameter moves there), "skipped" (the time
    budget ran out first, or the disk was full). "unconverged" and "inconsistent" (interlacing violated) values are given,
    and must not be relied on.
    """

    eigenvalue: float | None = Field(description="largest algebraic eigenvalue lambda of the preconditioned Hessian")
    rho: float | None = Field(description="lambda over the optimizer's threshold; 1 is the edge of stability")
    residual: float | None = Field(description="norm of G v - lambda v for the unit Ritz vector v")
    most_negative: float | None = Field(description="smallest eigenvalue found, an upper bound of the true one")
    most_negative_residual: float | None = Field(description="its residual norm")
    most_negative_status: Literal["converged", "unconverged"] | None = Field(
        description="converged: the residual is at most 10 % of it; null without a value"
    )
    hvps: Annotated[int, Field(ge=0, description="Hessian-vector products spent")]
    status: Status
    ceiling: float | None = Field(
        default=None,
        description="no eigenvalue lies above it, but for a chance of 1 in 1,000; null in documents of older versions",
    )
    steepest: Steepest | None = Field(
        default=None,
        description="sharpness in the optimizer's norm; null where no parameter has one, or it was not asked for",
    )

    @field_validator("most_negative_status")
    @classmethod
    def _no_digits(cls, status: Any, info: ValidationInfo) -> Any:
        """A value that its residual is larger than is a bound and no more; documents of old versions say otherwise."""
        value, residual = info.data.get("most_negative"), info.data.get("most_negative_residual")
        certified = value is not None and residual is not None and residual <= abs(value)
        return "unconverged" if status == "converged" and not certified else status


class PartEstimate(Estimate):
    """Curvature restricted to the parameters of one part of the network, the rest held still."""

    name: str
    parameters: int


class BodyEstimate(Estimate):
    """Of the full model without the rows of embeddings that the shard hardly looks up, on which its top direction lies.

    Such a row's curvature is that of a few tokens, or with a coupled weight decay of none: no number of the data behind the
    shard, in which other rows are rare. The verdict is on the rest.
    """

    rows: int = Field(description="left out: looked up fewer than ten times, if at all")


class LayerCompanions(Document):
    """Cheap numbers of a layer that stand beside its curvature; null where they could not be had."""

    attention_logit: float | None = Field(
        description="largest |q.k| over heads and pairs that are not masked, as softmax takes it, on the shard's first batch"
    )
    attention_entropy: float | None = Field(
        description="mean over heads and queries of -sum p log p, in nats, on the first batch; not over the log of how many "
        "keys a query has"
    )
    spectral_norm: float | None = Field(description="largest singular value of any of its weight matrices")
    update_rms: float | None = Field(description="root mean square of its next update over the learning rate")


class LayerEstimate(PartEstimate):
    """Of one layer."""

    index: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    companions: LayerCompanions | None = Field(
        default=None, description="null where the time budget ran out before, and in documents of older versions"
    )


class DepthEstimate(Estimate):
    """Curvature over embedding, head and the first `depth` layers."""

    depth: Annotated[int, Field(ge=0, le=MOST_LAYERS)]


class Cumulative(Document):
    """Curvature over depth: of the intact network restricted, and of the truncated network."""

    restricted: list[DepthEstimate]
    truncated: list[DepthEstimate]


class Checkpoint(Document):
    """The checkpoint that was measured; `step` is null where it names none."""

    path: str
    format: str
    step: int | None
    parameters: int
    layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]


class DataFile(Document):
    """One file of the data."""

    path: str
    kind: str = Field(description="what the file was recognised as")
    tokens: int | None = Field(default=None, description="that it holds; null where only reading it would tell")


class Data(Document):
    """The tokens that were averaged over, so that they can be found again."""

    path: str
    files: list[DataFile] = Field(default=[], description="in the order in which their tokens are counted")
    sample: Literal["first", "spread", "random"] = "first"
    offsets: list[tuple[int, int]] = Field(
        default=[],
        description="windows used, as [first token over all files, how many windows of sequence_length + 1 follow on]",
    )
    tokens: int = Field(description="predictions that the loss averages over")
    sequence_length: int | None
    sha256: str = Field(
        description="of the token ids used, as little-endian int64, in order; of examples: of the columns and their shapes"
    )
    loss: float = Field(description="mean loss over the shard, in nats per token")
    unigram_loss: float | None = Field(
        default=None,
        description="entropy of the shard's targets by their frequencies alone, in nats per token: what a model without "
        "context reaches; null where targets are no tokens, the loss is the user's own, and in documents of older versions",
    )


class Optimizer(Document):
    """The optimizer as it was read, and the threshold that follows; null where it has no such option."""

    name: str
    lr: float | None
    lr_source: Literal["checkpoint", "log", "schedule", "option", "optimizer", "none"]
    betas: tuple[float, float] | None
    eps: float | None
    weight_decay: float | None
    momentum: float | None
    step: int | None
    threshold: float | None = Field(description="value of lambda at which rho is 1")
    preconditioner: Literal["checkpoint", "estimated", "none"]
    clip: float | None = Field(
        default=None,
        description="mean of min(1, limit / norm) over the newest logged gradient norms, what clipping leaves of a "
        "gradient: the threshold is that of the optimizer over it; null where the run's record does not say",
    )
    gradient_ratio: float | None = Field(
        default=None,
        description="norm of the data's gradient, without what chance adds to the shard's, over that which the second "
        "moment remembers; null where there is none, and in documents of older versions",
    )
    batch_ratio: float | None = Field(
        default=None, description="the same of the gradient of one batch that the shard is measured in; null as that is"
    )


class Update(Document):
    """The next update u = P^(-1) m to second order: the loss rises where ratio = lr/critical_lr > 1."""

    critical_lr: float | None = Field(description="2 g.u / u.Hu")
    ratio: float | None
    status: Literal["ok", "uphill", "concave", "unavailable", "skipped"] = Field(
        description="uphill: g.u <= 0 on this shard; concave: u.Hu <= 0, no critical lr; unavailable: no momentum or lr, or "
        "a product overflowed; "
        "skipped: the time budget ran out first, or the disk was full"
    )


class StableLr(Document):
    """The learning rate at which rho, lambda as it is, would come to where training broke in runs whose end is known."""

    value: float = Field(description="at which half of the calibration's ramps had broken")
    low: float
    high: float | None = Field(description="null where rho of the data may be 0 or below, and nothing bounds it")
    confidence: float = Field(description="share of the ramps that broke within these ends, rho's own bracket counted in")
    group: Literal["adaptive", "sgd", "all"] = Field(
        description="the optimizers whose ramps these are; all: no ramp had this one, and the ends are the widest"
    )
    uncovered: list[str] = Field(description="what of this run lies outside the calibration's, in words")
    ratio: float = Field(description="the learning rate in force over `value`")


class Companions(Document):
    """Cheap numbers of the whole model that stand beside rho; null where they could not be had."""

    gradient_norm: float | None = Field(description="of the mean loss on the shard, over the parameters that move")
    gradient_quotient: float | None = Field(description="g'Hg / g'g: curvature of the loss along its gradient")
    preconditioned_quotient: float | None = Field(
        description="w'Gw / w'w for w = P^(-1/2) g: the same as the optimizer sees it, at most lambda"
    )
    update_rms: float | None = Field(
        description="root mean square of the next update P^(-1) m, in units of the learning rate"
    )


class TokensPoint(Document):
    """Top eigenvalue on a prefix of the shard, a lower bound: between the vectors that the whole shard was solved with."""

    tokens: int
    eigenvalue: float | None
    rho: float | None


class Generalisation(Document):
    """A bracket for the curvature of the data behind the shard, from what it is when parts of the shard are left out.

    Of the body, where the report has one; else of the full model.
    """

    held_out: float | None = Field(
        description="mean over folds of v.Gv on the fold, for the top eigenvector v of the others: in expectation at most "
        "the data's lambda, as the shard's own lambda is at least that"
    )
    rho_low: float | None
    rho_high: float | None
    standard_error: float | None = Field(
        default=None, description="of lambda, by the jackknife over folds; null where the shard is one batch"
    )
    folds: int | None = Field(default=None, description="parts of the shard, each left out once")
    confidence: float | None = Field(
        default=None, description="how often rho of the data lies within the bracket; null in documents of older versions"
    )


class Attribution(Document):
    """A tensor's share in the sharpest direction."""

    tensor: str
    mass: float = Field(description="share of the top eigenvector's squared norm")
    rows: list[tuple[int, float]] | None = Field(
        default=None, description="rows with the largest shares of the whole, where they are tokens or positions"
    )
    rows_of: Literal["tokens", "positions"] | None = Field(
        default=None, description="what the rows are; in documents of older versions, which went by sizes, not known"
    )


class Cost(Document):
    """What the measurement took."""

    hvps: int
    seconds: float
    peak_memory_bytes: int = Field(description="of the process that held most, where there are several")
    device: str
    mode: str
    ranks: int = Field(default=1, description="processes that measured it together (torchrun)")
    mode_seconds: dict[str, float] = Field(description="seconds of a product on a few rows, by the modes that were tried")


class LossCourse(Document):
    """What the loss says of the run up to a checkpoint: its own log, and the loss on the shard beside the tokens' entropy.

    Losses are medians of `window` logged ones. "wrecked": the loss lies above the run's own best for good, or is no number
    any more. "collapsed": it is no better than the frequencies of the tokens give, long after the start. "short": the log
    is too short to say, or there is none.
    """

    name: Literal["healthy", "wrecked", "collapsed", "short"]
    step: int | None = Field(default=None, description="first step that was logged after it went wrong")
    loss: float | None = Field(default=None, description="now, in nats per token")
    best: float | None = Field(default=None, description="the run's own best before")
    best_step: int | None = None
    rise: float | None = Field(default=None, description="percent of now over the best; null where that is not positive")
    margin: float | None = Field(default=None, description="nats that the loss may lie over the best and mean nothing")
    window: int | None = Field(default=None, description="logged losses that a median is over")
    spikes: list[int] = Field(default=[], description="steps at which the loss jumped and came back")
    lr_share: float | None = Field(default=None, description="newest learning rate over the highest one logged")
    lr_highest: float | None = Field(
        default=None, description="highest learning rate logged until it went wrong, or until now"
    )
    reason: str = Field(default="", description="why, in plain words")

    @property
    def lost(self) -> bool:
        """Whether the loss says that training has failed, whatever rho is."""
        return self.name in ("wrecked", "collapsed")


class Report(Shown, Document):
    """What `curv analyze` found; document "curv.report/1"."""

    schema_: Literal["curv.report/1"] = Field(default="curv.report/1", alias="schema")
    checkpoint: Checkpoint
    data: Data
    optimizer: Optimizer
    full: Estimate
    body: BodyEstimate | None = Field(
        default=None, description="the full model without rare rows, where they carry its top direction"
    )
    ends: PartEstimate | None = Field(
        default=None,
        description="embedding, head and what else lies outside the layers, as one part; null without layers, and in "
        "documents of older versions",
    )
    layers: list[LayerEstimate]
    cumulative: Cumulative
    update: Update
    companions: Companions | None = Field(
        default=None, description="null where the time budget ran out before, and in documents of older versions"
    )
    tokens: list[TokensPoint]
    generalisation: Generalisation
    attribution: list[Attribution]
    participation: float | None = Field(description="entries that the top eigenvector is spread over: 1 / sum of v^4")
    verdict: VerdictName
    stable_lr: StableLr | None = Field(
        default=None,
        description="null where lambda is not certified or not above 0, the preconditioner is estimated, or it is too "
        "early; and in documents of older versions",
    )
    odds: float | None = Field(
        default=None, description="chance that a run at this rho ends badly, by the calibration's runs; null as stable_lr"
    )
    findings: list[Finding]
    course: LossCourse | None = Field(
        default=None, description="of the loss up to here; null without a log and a unigram loss, and in older documents"
    )
    steepest: ModelSteepest | None = Field(
        default=None, description="of Muon, Lion and what else steps along the steepest direction of a norm; else null"
    )
    cost: Cost
    versions: Versions

    @property
    def judged(self) -> Estimate:
        """What the verdict is on: the body where there is one, else the full model."""
        return self.body or self.full

    @property
    def outside(self) -> PartEstimate | None:
        """`ends`; in a document of before they were measured alone, the restricted curve's beginning, which is the same."""
        first = next((e for e in self.cumulative.restricted if e.depth == 0), None)
        if self.ends is not None or first is None or not self.layers:
            return self.ends
        rest = self.checkpoint.parameters - sum(layer.parameters for layer in self.layers)
        return PartEstimate(**first.model_dump(exclude={"depth"}), name=ENDS, parameters=rest)

    @property
    def parts(self) -> list[PartEstimate]:
        """Embedding and head, then the layers: every parameter is in one part."""
        return [*([self.outside] if self.outside else []), *self.layers]


def load_report(path: Path) -> Report:
    """Read a report. Raises InputError where the file is no curv.report/1."""
    return digested_report(path)[0]


def digested_report(path: Path) -> tuple[Report, str]:
    """A report and the SHA-256 of its file. Raises InputError as `load_report` does."""
    return digested_document(Report, path, "curv.report/1", "write one with curv analyze -o")
