"""Every number of a report or a track, once: its name, how it is shown, where it is from, and the gate's rule on it.

Terminal tables, CSV, Markdown, HTML, the flags of `curv gate`, the keys of [gate] and the inputs of action.yml are made from
PARTS and POINTS: a further number is a field of its document, a line here, and what measures it. Where it has a rule,
docs/write_action.py and docs/write_cli.py write the rest; judge.readings takes its bracket from here, unless one needs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, get_args

if TYPE_CHECKING:
    from curvcli.documents.record import Record
    from curvcli.documents.report import Estimate, Report
    from curvcli.documents.track import TrackPoint

T = TypeVar("T")
Value: TypeAlias = "float | str | None"
Kind = Literal["number", "count", "word"]
# The terminal's table, the table of a page, CSV, the Markdown table, and what the summary of a single report lists.
Place = Literal["table", "page", "csv", "markdown", "summary"]
# What a rule looks at, in the order in which rules are listed.
Scope = Literal["full model", "parts", "layers", "next update", "comparison", "run", "data"]
_SCOPES: tuple[Scope, ...] = get_args(Scope)
LimitKind = Literal["limit", "percent", "count", "flag"]
_METAVARS: dict[LimitKind, str | None] = {"limit": "X", "percent": "PERCENT", "count": "N", "flag": None}


@dataclass(frozen=True)
class GateRule:
    """What the gate may demand of a number.

    Args:
        name: of the flag, the key in [gate] and the action's input; "min-..." is a lower limit, any other an upper one.
        scope: what it looks at: the full model, each part alone, layers but not embedding and head, the next update, two
            measurements, the run, or the data.
        help: a whole phrase, for the flag and for the action.
        what: what the outcome's message calls the number; "" is the column's label.
        kind: of the limit: above 0, percent, whole number, or none at all.
    """

    name: str
    scope: Scope
    help: str
    what: str = ""
    kind: LimitKind = "limit"

    @property
    def least(self) -> bool:
        """Whether the limit is a lower one."""
        return self.name.startswith("min-")

    @property
    def field(self) -> str:
        """The name as an identifier: of the parameter, and of the table's field."""
        return self.name.replace("-", "_")

    @property
    def metavar(self) -> str | None:
        """What stands for the limit in the flag's help; None where the rule takes no limit."""
        return _METAVARS[self.kind]


@dataclass(frozen=True)
class Column(Generic[T]):
    """A number (or word) and everything that is said of it.

    Args:
        key: its name in CSV and in records.
        label: its name where people read it.
        get: the value of a part or a measurement; None where there is none.
        kind: a measured number, a count, or a word.
        digits: significant digits of a number where people read it.
        unit: "" where it has none.
        absent: where it is not shown: everywhere else it is.
        rank: where it stands in tables, from left to right; CSV keeps the order of the lines below.
        leaves: order in which a narrow terminal loses it, 0 first; None is never.
        optional: left out of a table in which no row has it.
        solved: it is the eigensolver's, and not to be relied on where that has not converged.
        before: put before it where people read it: what the value is no more than.
        after: put after it: what to look at.
        bracket: its lower and upper end, which a limit is held against; None where the value is exact.
        rule: of the gate, where it has one.
    """

    key: str
    label: str
    get: Callable[[T], Value]
    kind: Kind = "number"
    digits: int = 4
    unit: str = ""
    absent: Sequence[Place] = ()
    rank: int = 85  # before status and source (90), where a line does not say
    leaves: int | None = 0
    optional: bool = False
    solved: bool = False
    before: Callable[[T], str] = lambda item: ""
    after: Callable[[T], str] = lambda item: ""
    bracket: Callable[[T], tuple[float | None, float | None]] | None = None
    rule: GateRule | None = None


@dataclass(frozen=True)
class Part:
    """An estimate of a report and what it is of.

    Args:
        kind: full, body (without rare rows), ends (embedding and head), layer, restricted or truncated (over depth).
        index: of the layer, or the depth.
    """

    kind: Literal["full", "body", "ends", "layer", "restricted", "truncated"]
    index: int | None
    name: str
    parameters: int | None
    estimate: Estimate


@dataclass(frozen=True)
class Measurement:
    """A report, or a point of a track with its report where it has one."""

    report: Report | None
    point: TrackPoint | None = None


def parts(report: Report) -> list[Part]:
    """Every estimate of a report: the full model, embedding and head, layers, and the two curves over depth."""
    found = [Part("full", None, "full model", report.checkpoint.parameters, report.full)]
    if report.body:
        found.append(Part("body", None, "without rare rows", None, report.body))
    found += [Part("ends", None, e.name, e.parameters, e) for e in (report.outside,) if e]
    found += [Part("layer", e.index, e.name, e.parameters, e) for e in report.layers]
    found += [Part("restricted", e.depth, f"depth {e.depth}", None, e) for e in report.cumulative.restricted]
    return found + [Part("truncated", e.depth, f"depth {e.depth}", None, e) for e in report.cumulative.truncated]


def shown(columns: Sequence[Column[T]], place: Place) -> list[Column[T]]:
    """Those that a place shows, in its order."""
    found = [column for column in columns if place not in column.absent]
    return found if place == "csv" else sorted(found, key=lambda column: column.rank)


def ruled() -> dict[str, Column[Any]]:
    """The columns that a gate's rule is on, by the rule's name, in the order in which rules are listed."""
    every: list[Column[Any]] = [*POINTS, *PARTS]
    found = [column for column in every if column.rule]
    found.sort(key=lambda column: (_SCOPES.index(column.rule.scope), column.rank) if column.rule else (0, 0))
    return {column.rule.name: column for column in found if column.rule}


def rules() -> list[GateRule]:
    """The gate's rules, in order."""
    return [column.rule for column in ruled().values() if column.rule]


def is_of_parts(column: Column[Any]) -> bool:
    """Whether it is of a part, and not of a whole measurement."""
    # By identity: rho and others have the same key in both lists.
    return any(other is column for other in PARTS)


def column(columns: Sequence[Column[T]], key: str) -> Column[T]:
    """A column by its key. Raises KeyError."""
    return {column.key: column for column in columns}[key]


def _step(m: Measurement) -> int | None:
    return m.point.step if m.point else m.report.checkpoint.step if m.report else None


def _of(get: Callable[[Report], Value]) -> Callable[[Measurement], Value]:
    """Of the report, where there is one."""
    return lambda m: None if m.report is None else get(m.report)


def _stable(field: str) -> Callable[[Measurement], Value]:
    """Of the largest stable learning rate, where the report has one."""
    return _of(lambda r: None if r.stable_lr is None else getattr(r.stable_lr, field))


def _at(get: Callable[[TrackPoint], Value]) -> Callable[[Measurement], Value]:
    """Of the point of a track, where it is one."""
    return lambda m: None if m.point is None else get(m.point)


def _bound(part: Part) -> str:
    # A Ritz value is an upper bound of the smallest eigenvalue, and no more than that before it has converged.
    return "≤ " if part.estimate.most_negative_status == "unconverged" else ""


def _beside(name: str) -> Callable[[Part], Value]:
    """Of a layer's companions, where it has them."""
    return lambda part: getattr(getattr(part.estimate, "companions", None), name, None)


def _steep(name: str) -> Callable[[Part], Value]:
    """Of sharpness in the optimizer's norm, where the part has it."""
    return lambda part: getattr(part.estimate.steepest, name, None)


def _whole_steep(name: str) -> Callable[[Measurement], Value]:
    """Of the whole model's sharpness in the optimizer's norm."""
    return _of(lambda report: getattr(report.steepest, name, None))


def _with(name: str) -> Callable[[Measurement], Value]:
    """Of the whole model's companions."""
    return _of(lambda report: getattr(report.companions, name, None))


_PEOPLE: tuple[Place, ...] = ("table", "page", "markdown", "summary")  # shown in CSV alone
_TOLD: tuple[Place, ...] = ("summary",)  # a report's summary says it in a sentence
_NARROW: tuple[Place, ...] = ("table", "markdown")
_ELSEWHERE: tuple[Place, ...] = ("table", "summary")

PARTS: tuple[Column[Part], ...] = (
    Column("part", "part", lambda p: p.kind, kind="word", rank=0, absent=("table",)),
    Column("index", "index", lambda p: p.index, kind="count", absent=_PEOPLE),
    Column("name", "name", lambda p: p.name, kind="word", rank=10, leaves=None),
    Column("parameters", "parameters", lambda p: p.parameters, kind="count", rank=20, leaves=None),
    Column("eigenvalue", "lambda", lambda p: p.estimate.eigenvalue, rank=30, leaves=None, solved=True),
    Column(
        "rho", "rho", lambda p: p.estimate.rho, digits=3, rank=40, leaves=None, solved=True,
        rule=GateRule("max-layer-rho", "parts", "Largest rho of any layer alone.", what="rho of layers"),
    ),
    Column("sharpness_in_norm", "S", _steep("sharpness"), rank=44, absent=("table",), optional=True),
    Column("z", "Z", _steep("z"), digits=3, rank=45, leaves=1, optional=True),
    Column("dual_norm", "dual norm", _steep("dual_norm"), absent=_PEOPLE),
    Column("norm_status", "norm's status", _steep("status"), kind="word", absent=_PEOPLE),
    Column("residual", "residual", lambda p: p.estimate.residual, digits=2, rank=50, absent=("table",)),
    Column(
        "most_negative", "most negative", lambda p: p.estimate.most_negative, digits=3, rank=60, absent=("table",),
        before=_bound,
    ),
    Column("ceiling", "at most", lambda p: p.estimate.ceiling, digits=4, rank=55, absent=("table",), optional=True),
    Column("most_negative_residual", "its residual", lambda p: p.estimate.most_negative_residual, absent=_PEOPLE),
    Column("most_negative_status", "its status", lambda p: p.estimate.most_negative_status, kind="word", absent=_PEOPLE),
    Column(
        "attention_logit", "attention logit", _beside("attention_logit"), digits=3, rank=72, absent=_NARROW, optional=True,
        rule=GateRule(
            "max-attention-logit", "layers", "Largest attention logit of any layer, on the first batch.",
            what="largest attention logit",
        ),
    ),
    Column(
        "attention_entropy", "attention entropy", _beside("attention_entropy"), unit="nats", digits=3, rank=73,
        absent=_NARROW, optional=True,
        rule=GateRule(
            "min-attention-entropy", "layers", "Smallest mean entropy of a layer's attention, in nats.",
            what="attention entropy",
        ),
    ),
    Column("spectral_norm", "spectral norm", _beside("spectral_norm"), digits=3, rank=74, absent=_NARROW, optional=True),
    Column("update_rms", "update RMS", _beside("update_rms"), digits=3, rank=75, absent=_NARROW, optional=True),
    Column("hvps", "HVPs", lambda p: p.estimate.hvps, kind="count", rank=70, absent=("table", "markdown")),
    Column("status", "status", lambda p: p.estimate.status, kind="word", rank=90, absent=("table",)),
)  # fmt: skip

POINTS: tuple[Column[Measurement], ...] = (
    Column("checkpoint", "checkpoint", _at(lambda p: p.checkpoint), kind="word", absent=_PEOPLE),
    Column("step", "step", _step, kind="count", rank=0, leaves=None, absent=_TOLD),
    Column("source", "source", _at(lambda p: p.source), kind="word", rank=90, leaves=1, absent=_TOLD),
    Column(
        "verdict", "verdict", _of(lambda r: r.verdict), kind="word", rank=10, leaves=None, absent=_TOLD,
        rule=GateRule("require-resolved", "data", "The verdict must be resolved.", kind="flag"),
    ),
    Column("status", "status", _of(lambda r: r.judged.status), kind="word", absent=_PEOPLE),
    Column(
        "rho", "rho", _of(lambda r: r.judged.rho), digits=3, rank=20, leaves=None, absent=_TOLD, solved=True,
        rule=GateRule("max-rho", "full model", "Largest rho of the full model."),
    ),
    Column("rho_low", "low", _of(lambda r: r.generalisation.rho_low), digits=3, rank=30, absent=_ELSEWHERE),
    Column("rho_high", "high", _of(lambda r: r.generalisation.rho_high), digits=3, rank=40, absent=_ELSEWHERE),
    Column(
        "lambda", "lambda", _of(lambda r: r.judged.eigenvalue), rank=60, leaves=3, absent=_TOLD, solved=True,
        rule=GateRule(
            "max-regression", "comparison", "Percent that lambda may lie over the baseline's.", kind="percent",
            what="rise of lambda in percent",
        ),
    ),
    Column("residual", "residual", _of(lambda r: r.judged.residual), digits=2, absent=_PEOPLE),
    Column("threshold", "threshold", _of(lambda r: r.optimizer.threshold), rank=65, absent=_ELSEWHERE),
    Column(
        "z", "Z", _whole_steep("z"), digits=3, rank=66, leaves=None, optional=True, absent=_TOLD,
        rule=GateRule(
            "max-z", "full model", "Largest Z of the parameters that Muon, Lion or the like moves; Z is a lower bound.",
            what="Z",
        ),
    ),
    Column("sharpness_in_norm", "S", _whole_steep("sharpness"), optional=True, absent=_ELSEWHERE),
    Column("dual_norm", "dual norm", _whole_steep("dual_norm"), optional=True, absent=_ELSEWHERE),
    Column("norm_spread", "spread of starts", _whole_steep("spread"), digits=2, optional=True, absent=_ELSEWHERE),
    Column("norm_status", "norm's status", _whole_steep("status"), kind="word", absent=_PEOPLE),
    Column("norm_reading", "reading", _whole_steep("reading"), kind="word", absent=_PEOPLE),
    Column(
        "update_ratio", "lr/critical", _of(lambda r: r.update.ratio), digits=3, rank=70, leaves=4,
        absent=_TOLD,
        rule=GateRule(
            "max-update-ratio", "next update", "Largest learning rate over the critical one of the next update.",
            what="update ratio",
        ),
    ),
    Column("critical_lr", "critical lr", _of(lambda r: r.update.critical_lr), digits=3, absent=_PEOPLE),
    Column("lr", "lr", _of(lambda r: r.optimizer.lr), digits=3, rank=75, leaves=2, absent=_TOLD),
    Column("stable_lr", "max lr", _stable("value"), digits=2, rank=76, leaves=5, optional=True, absent=_TOLD, solved=True),
    Column("stable_lr_low", "from", _stable("low"), digits=2, rank=77, optional=True, absent=_ELSEWHERE, solved=True),
    Column("stable_lr_high", "to", _stable("high"), digits=2, rank=78, optional=True, absent=_ELSEWHERE, solved=True),
    Column(
        "lr_ratio", "lr/max lr", _stable("ratio"), digits=2, rank=79, optional=True, absent=_PEOPLE, solved=True,
        rule=GateRule(
            "max-lr-ratio", "full model", "Largest learning rate over the largest stable one.",
            what="lr over the largest stable one",
        ),
    ),
    Column("odds", "odds", _of(lambda r: r.odds), digits=2, rank=45, optional=True, absent=_PEOPLE, solved=True),
    Column(
        "training_loss", "loss", _at(lambda p: p.training_loss), unit="nats per token", rank=80, leaves=None,
        absent=_TOLD,
    ),
    Column("shard_loss", "shard loss", _of(lambda r: r.data.loss), unit="nats per token", absent=_PEOPLE),
    Column(
        "tokens", "tokens", _of(lambda r: r.data.tokens), kind="count", rank=5, absent=_PEOPLE,
        rule=GateRule("min-tokens", "data", "Fewest tokens to have averaged over.", kind="count"),
    ),
    Column(
        "surge", "surge", _at(lambda p: p.surge), digits=2, rank=50, leaves=None, optional=True, absent=_TOLD,
        after=lambda m: " !" if m.point and m.point.surged else "",
        rule=GateRule(
            "max-surge", "comparison", "Largest rho over the baseline's rho, or over a track's median.",
            what="surge of rho",
        ),
    ),
    Column(
        "loss_rise", "loss rise", _of(lambda r: r.course.rise if r.course else None), unit="percent", absent=_PEOPLE,
        rule=GateRule(
            "max-loss-rise", "run", "Percent that the logged loss may lie over the run's own best.", kind="percent",
            what="rise of the loss in percent",
        ),
    ),
    Column(
        "run", "run", _of(lambda r: r.course.name if r.course else None), kind="word", absent=_PEOPLE, rank=90,
        rule=GateRule("require-healthy", "run", "The run must be healthy, its loss and its curvature.", kind="flag"),
    ),
    Column("gradient_norm", "gradient norm", _with("gradient_norm"), digits=3, absent=_PEOPLE),
    Column("gradient_quotient", "g'Hg/g'g", _with("gradient_quotient"), absent=_PEOPLE),
    Column("preconditioned_quotient", "w'Gw/w'w", _with("preconditioned_quotient"), absent=_PEOPLE),
    Column("update_rms", "update RMS", _with("update_rms"), digits=3, absent=_PEOPLE),
    Column("surged", "surged", _at(lambda p: str(p.surged).lower()), kind="word", absent=_PEOPLE),
    Column("message", "message", _at(lambda p: p.message), kind="word", absent=_PEOPLE),
)  # fmt: skip

# Of a training job's log, in the order of its page's table, which on paper loses those that leave; rules are on none.
RECORDS: tuple[Column[Record], ...] = (
    Column("step", "step", lambda r: r.step, kind="count", leaves=None),
    Column("loss", "loss", lambda r: r.loss, unit="nats per token", leaves=None),
    Column("lr", "lr", lambda r: r.lr, digits=3, leaves=None),
    Column("eigenvalue", "lambda", lambda r: r.eigenvalue, solved=True, optional=True, leaves=None),
    Column("rho", "rho", lambda r: r.rho, digits=3, solved=True, optional=True, leaves=None),
    Column("z", "Z", lambda r: r.z, digits=3, optional=True, leaves=None),
    Column("residual", "residual", lambda r: r.residual, digits=2, optional=True),
    Column("update_ratio", "lr/critical", lambda r: r.update_ratio, digits=3, optional=True, leaves=None),
    Column("gradient_norm", "gradient norm", lambda r: r.gradient_norm, digits=3, optional=True, leaves=None),
    Column("gradient_sigmas", "its sd", lambda r: r.gradient_sigmas, digits=2, optional=True),
    Column("update_rms", "update RMS", lambda r: r.update_rms, digits=3, optional=True),
    Column("gradient_quotient", "g'Hg/g'g", lambda r: r.gradient_quotient, digits=3, optional=True),
    Column("attention_logit", "attention logit", lambda r: r.attention_logit, digits=3, optional=True),
    Column("attention_entropy", "attention entropy", lambda r: r.attention_entropy, unit="nats", digits=3, optional=True),
    Column("spectral_norm", "spectral norm", lambda r: r.spectral_norm, digits=3, optional=True),
    Column("active_depth", "depth", lambda r: r.active_depth, kind="count", optional=True, leaves=None),
    Column("hvps", "HVPs", lambda r: r.hvps, kind="count"),
    Column("seconds", "seconds", lambda r: r.seconds, unit="s", digits=2),
    Column("overhead", "share of time", lambda r: r.overhead, digits=2, optional=True, leaves=None),
    Column("status", "status", lambda r: r.outcome, kind="word", leaves=None),
    Column("message", "message", lambda r: r.message, kind="word", optional=True, leaves=None),
)
