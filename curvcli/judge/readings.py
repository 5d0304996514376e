"""What the gate's rules ask for: numbers with the brackets that limits are held against (docs/how-to/gate.md says why)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isclose
from statistics import median
from typing import Any, Protocol

from curvcli.documents import Estimate, Report, RunVerdict, Track, TrackPoint, VerdictName
from curvcli.documents.columns import Column, Measurement, Part, is_of_parts
from curvcli.documents.columns import parts as parts_of
from curvcli.judge.clipping import alike, lowest, narrow
from curvcli.judge.compare import shard_of
from curvcli.judge.limits import certified, on_shard
from curvcli.judge.run import judge_run, judge_track
from curvcli.judge.steepest import alone, words
from curvcli.judge.unfinished import why_not


@dataclass(frozen=True)
class Reading:
    """A number with the bracket that a limit is held against, or the reason why there is none to go by.

    Args:
        what: the number's name, as in "rho of model.layers.0".
        value: best estimate; low, high: the bracket around it.
        reason: why the number must not be relied on; then the bracket is not looked at.
        narrow: what to do where the limit lies inside the bracket.
        part: the layer it is of, or embedding and head.
        note: added to every message.
    """

    what: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    narrow: str = ""
    part: str | None = None
    note: str = ""


class Readings(Protocol):
    """What rules ask for. A report answers; so can a track of many steps."""

    def of(self, column: Column[Any]) -> Sequence[Reading]:
        """Of a number that a rule is on; at least one: of each part where that is the rule's scope."""
        ...

    def verdict(self) -> VerdictName:
        """The verdict on rho of the full model; "unresolved" where nothing was measured."""
        ...

    def run(self) -> RunVerdict | None:
        """The verdict on the run; None where nothing was measured."""
        ...


@dataclass(frozen=True)
class ReportReadings:
    """Readings of one report, against another where a rule compares.

    Args:
        baseline: what lambda may not rise over; rho neither, where there is no history.
        history: certified reports of the run before, oldest first: a surge is over the median of their rho.
        whole: the verdict on the run, where more is known of it than this report.
    """

    report: Report
    baseline: Report | None = None
    history: Sequence[Report] = ()
    whole: RunVerdict | None = None

    def of(self, column: Column[Any]) -> Sequence[Reading]:
        """Of a number that a rule is on."""
        name = column.rule.name if column.rule else ""
        return _OWN[name](self) if name in _OWN else self._plain(column)

    def rho(self) -> Reading:
        """rho of the full model on the data."""
        full, held = self.report.judged, self.report.generalisation
        if reason := _why(self.report, full) or _early(self.report):
            return Reading("rho", full.rho, reason=reason)
        if self.report.optimizer.preconditioner == "estimated":
            return Reading("rho", full.rho, reason="the second moment is estimated, and rho's scale with it")
        if held.rho_low is None or held.rho_high is None:
            return Reading("rho", full.rho, reason="nothing could be held out to check it against; measure more tokens")
        how, normed = narrow(self.report.optimizer, "measure more tokens"), self.report.steepest
        note = f"; of {normed.rest:,} parameters, the other {normed.parameters:,} have none" if normed else ""
        return Reading("rho", full.rho, held.rho_low, held.rho_high, narrow=how, note=note)

    def layers(self) -> Sequence[Reading]:
        """rho of each part alone: embedding and head, and each layer; at least one reading."""
        return self._each(self._part)

    def _each(self, read: Callable[[Part, str], Reading], kinds: Sequence[str] = ("ends", "layer")) -> list[Reading]:
        parts = [part for part in parts_of(self.report) if part.kind in kinds]
        moving = [part for part in parts if part.estimate.status != "empty"]
        still = len(parts) - len(moving)
        note = f"; {still} of {len(parts)} parts do not train and are left out" if still else ""
        if not moving:
            return [Reading("rho of layers", reason="the report has no layer that trains")]
        return [read(part, note) for part in moving]

    def _part(self, part: Part, note: str) -> Reading:
        estimate, name = part.estimate, part.name
        what = f"rho of {name}"
        if reason := _why(self.report, estimate) or _early(self.report):
            return Reading(what, estimate.rho, reason=reason, part=name, note=note)
        threshold = self.report.optimizer.threshold
        low, high = on_shard(estimate.rho, estimate, threshold)
        low = None if low is None else lowest(low, self.report.optimizer)
        how = narrow(self.report.optimizer, "lower --tolerance of curv analyze")
        return Reading(what, estimate.rho, low, high, narrow=how, part=name, note=note)

    def _plain(self, column: Column[Any]) -> list[Reading]:
        """Of a number whose bracket is its column's, or which is exact."""
        rule, full = column.rule, self.report.full
        what = (rule and rule.what) or column.label

        def read(item: Any, estimate: Estimate, what: str, part: str | None = None, note: str = "") -> Reading:
            value = column.get(item)
            if column.solved and (reason := _reason(self.report, estimate)):
                return Reading(what, reason=reason, part=part, note=note)
            if not isinstance(value, (int, float)):
                return Reading(what, reason="is missing from the report", part=part, note=note)
            low, high = column.bracket(item) if column.bracket else (value, value)
            return Reading(what, value, low, high, part=part, note=note)

        if rule and rule.scope in ("parts", "layers"):
            kinds = ("ends", "layer") if rule.scope == "parts" else ("layer",)
            return self._each(lambda part, note: read(part, part.estimate, f"{what} of {part.name}", part.name, note), kinds)
        whole = parts_of(self.report)[0] if is_of_parts(column) else Measurement(self.report)
        return [read(whole, full, what)]

    def update_ratio(self) -> Reading:
        """The learning rate over the critical one of the next update."""
        update = self.report.update
        if update.ratio is not None and update.status == "ok":
            return Reading("update ratio", update.ratio, update.ratio, update.ratio)
        reasons = {
            "uphill": "the momentum points uphill on this shard, and no critical learning rate exists",
            "concave": "the loss curves down along the next update, and no critical learning rate exists",
            "unavailable": "the checkpoint has no momentum, or no learning rate is known",
            "skipped": f"it {why_not(self.report, 'skipped')}",
        }
        return Reading("update ratio", reason=reasons.get(update.status, "the report has none"))

    def z(self) -> Reading:
        """Z of the parameters that have a norm. It is a lower bound: what holds is that it is no less."""
        found = self.report.steepest
        if found is None or found.z is None or found.reading in ("early", "unresolved"):
            return Reading(
                "Z", reason=words(found) if found else "no parameter has a norm, as Muon's and Lion's have; use rho"
            )
        return Reading("Z", found.z, found.z, found.z, note="; a lower bound")

    def lr_ratio(self) -> Reading:
        """The learning rate over the largest stable one, within the ends that this has."""
        report, what = self.report, "lr over the largest stable one"
        found = report.stable_lr
        if found is not None:
            # Not the optimizer's: the rate that the ratio was made with.
            lr = found.ratio * found.value
            return Reading(what, found.ratio, 0.0 if found.high is None else lr / found.high, lr / found.low)
        if reason := _why(report, report.judged) or _early(report):
            return Reading(what, reason=reason)
        flat = report.judged.rho is not None and report.judged.rho <= 0
        return Reading(
            what,
            reason="no curvature is positive, so none sets a learning rate"
            if flat
            else "the report has none: its preconditioner is not known in full, nor how hard gradients were clipped, or an "
            "older version wrote it",
        )

    def surge(self) -> Reading:
        """rho over what it was before."""
        if reason := _early(self.report):
            return Reading("surge of rho", reason=reason)
        if self.history:
            return self._over_history("surge of rho")
        times = alike(self.report, self.baseline)
        return self._ratio(
            "surge of rho", lambda r: (r.judged.rho or 0.0) * times(r), lambda r: (r.optimizer.threshold or 0.0) / times(r)
        )

    def _over_history(self, what: str) -> Reading:
        """rho over the median of what it was; the corners of both brackets."""
        report = self.report
        if reason := _why(report, report.judged):
            return Reading(what, reason=reason)
        if len(self.history) < 2:
            return Reading(what, reason="fewer than two certified points stand before it")
        for old in self.history:
            if reason := incomparable(report, old):
                return Reading(what, reason=f"the baseline does not compare: {reason}")
            if shard_of(old) != shard_of(report):
                return Reading(what, reason="the shards differ; measure the whole run on one")
        every, times = (report, *self.history), alike(report, *self.history)
        brackets = [(times(r), *on_shard(r.judged.rho, r.judged, r.optimizer.threshold)) for r in every]
        known = [(low * by, high * by) for by, low, high in brackets if low is not None and high is not None]
        if len(known) < len(brackets):
            return Reading(what, reason="a value is missing")
        (low, high), before = known[0], known[1:]
        # A median is monotone in each of its numbers, so the medians of both ends bracket the median of the true values.
        old_low, old_high = median(b[0] for b in before), median(b[1] for b in before)
        if old_low <= 0:
            return Reading(what, reason=f"the median before may be 0 or below ({old_low:.4g}): nothing can be divided by it")
        corners = [a / b for a in (low, high) for b in (old_low, old_high)]
        narrow = "lower --tolerance of curv track"
        return Reading(what, low / old_low, min(corners), max(corners), narrow=narrow)

    def regression(self) -> Reading:
        """Percent that lambda has risen over the baseline's."""
        return self._ratio(
            "rise of lambda in percent", lambda r: r.judged.eigenvalue, lambda r: 1.0, lambda x: 100 * (x - 1)
        )

    def _ratio(
        self,
        what: str,
        number: Callable[[Report], float | None],
        unit: Callable[[Report], float | None],
        scale: Callable[[float], float] = lambda x: x,
    ) -> Reading:
        """A number of the report over the baseline's, with `unit` eigenvalues to it."""
        if self.baseline is None:
            return Reading(what, reason="there is nothing to compare with; pass --baseline")
        if reason := incomparable(self.report, self.baseline):
            return Reading(what, reason=f"the baseline does not compare: {reason}")
        same = shard_of(self.report) == shard_of(self.baseline)
        pairs = []
        for name, report in (("", self.report), ("the baseline's ", self.baseline)):
            value, per = number(report), unit(report)
            if reason := _reason(report, report.judged) or ("" if per and per > 0 else _NO_RHO):
                return Reading(what, reason=f"{name}{'lambda ' if name else ''}{reason}")
            low, high = on_shard(value, report.judged, per)
            if not same:
                held, threshold = report.generalisation, report.optimizer.threshold
                if held.held_out is None or low is None or high is None or not per:
                    return Reading(what, reason=f"the shards differ, and {name or 'the '}report held nothing out")
                # On different tokens each value is fitted to its own shard: the held-out value is the lower end.
                low = min(held.held_out / per, low)
                if threshold and held.rho_low is not None and held.rho_high is not None:
                    low, high = min(low, held.rho_low * threshold / per), max(high, held.rho_high * threshold / per)
            pairs.append((value, low, high))
        (value, low, high), (old, old_low, old_high) = pairs
        if value is None or low is None or high is None or old is None or old_low is None or old_high is None:
            return Reading(what, reason="a value is missing")
        if not 0 < old_low <= old_high:
            return Reading(
                what, reason=f"the baseline's value may be 0 or below ({old_low:.4g}): nothing can be divided by it"
            )
        corners = [scale(a / b) for a in (low, high) for b in (old_low, old_high)]
        narrow = "lower --tolerance of curv analyze" if same else "measure both on the same shard"
        return Reading(what, scale(value / old), min(corners), max(corners), narrow=narrow)

    def verdict(self) -> VerdictName:
        """The report's own; it is not judged again, and the baseline does not change it."""
        return self.report.verdict

    def run(self) -> RunVerdict:
        """The verdict on the run; of the report alone where nothing more is known of it."""
        return self.whole or judge_run([self.report])

    def loss_rise(self) -> Reading:
        """Percent that the logged loss lies over the run's own best."""
        what, course = "rise of the loss in percent", self.report.course or self.run().course
        if course is None or course.rise is None:
            lost = course.reason if course and course.lost else "the run has no log, or too short a one"
            return Reading(what, reason=lost)
        return Reading(what, course.rise, course.rise, course.rise)


# Rules on what needs more than the number and its own bracket: another report, the held-out data, reasons of its own.
_OWN: dict[str, Callable[[ReportReadings], Sequence[Reading]]] = {
    "max-rho": lambda readings: [readings.rho()],
    "max-layer-rho": ReportReadings.layers,
    "max-lr-ratio": lambda readings: [readings.lr_ratio()],
    "max-z": lambda readings: [readings.z()],
    "max-update-ratio": lambda readings: [readings.update_ratio()],
    "max-surge": lambda readings: [readings.surge()],
    "max-regression": lambda readings: [readings.regression()],
    "max-loss-rise": lambda readings: [readings.loss_rise()],
}


def track_readings(
    track: Track, baseline: Report | None = None, place: int = -1, run: RunVerdict | None = None
) -> ReportReadings | NoReadings:
    """Readings of one of a track's points, the newest unless said, whose surge is over the certified points before it.

    Args:
        run: the verdict on all of it, where that is known already.
    """
    place %= len(track.points)  # -1 is the newest
    point, run = track.points[place], run or judge_track(track)
    if point.report is None:
        which = "newest checkpoint" if place == len(track.points) - 1 else f"checkpoint {point.checkpoint}"
        return NoReadings(f"the {which} was not measured: {point.message}", run)
    return ReportReadings(point.report, baseline, past(track.points[:place], track.window), run)


def past(points: Sequence[TrackPoint], window: int) -> list[Report]:
    """Reports of the last `window` points whose rho is certified and means something: what a surge is over."""
    reports = [p.report for p in points if p.report and p.report.verdict != "early"]
    return [r for r in reports if r.judged.rho is not None and certified(r.judged)][-window:]


def compared(baseline: Report | Sequence[Report] | None, report: Report | None) -> tuple[Report | None, list[Report]]:
    """What lambda is held against, and what rho is, where the baseline is a run: never the judged checkpoint itself."""
    if report is None or baseline is None or isinstance(baseline, Report):
        return (baseline if isinstance(baseline, Report) else None), []
    known = others(baseline, report)
    return (known[-1] if known else None), known


def others(known: Sequence[Report], report: Report) -> list[Report]:
    """Those of other checkpoints than the report's: a track that has it already would compare it with itself."""
    return [other for other in known if not _same_checkpoint(other, report)]


def _same_checkpoint(a: Report, b: Report) -> bool:
    # A path can be written over by a later step, and a copy lies elsewhere: that is known by its loss on the same tokens.
    if a.checkpoint.step != b.checkpoint.step:
        return False
    return a.checkpoint.path == b.checkpoint.path or (
        shard_of(a) == shard_of(b) and isclose(a.data.loss, b.data.loss, rel_tol=1e-6)
    )


def incomparable(report: Report, before: Report) -> str:
    """Why two lambdas are not of the same thing; empty where they are."""
    for what, mine, theirs in (
        ("layers", report.checkpoint.layers, before.checkpoint.layers),
        ("parameters", report.checkpoint.parameters, before.checkpoint.parameters),
        ("optimizer", report.optimizer.name, before.optimizer.name),
        ("preconditioner", report.optimizer.preconditioner, before.optimizer.preconditioner),
    ):
        if mine != theirs:
            return f"{what} {theirs}, here {mine}"
    return ""


@dataclass(frozen=True)
class NoReadings:
    """In place of readings where nothing was measured."""

    reason: str
    whole: RunVerdict | None = None

    def run(self) -> RunVerdict | None:
        """That of what else was measured of the run."""
        return self.whole

    def of(self, column: Column[Any]) -> Sequence[Reading]:
        """The reason, whatever is asked for."""
        return [Reading((column.rule and column.rule.what) or column.label, reason=self.reason)]

    def verdict(self) -> VerdictName:
        """Always "unresolved", for there is no number to judge."""
        return "unresolved"


_NO_RHO = "no learning rate was known or no optimizer taken, so rho does not exist; pass --lr, and no --optimizer none"


def _why(report: Report, estimate: Estimate) -> str:
    """Why the rho of an estimate must not be relied on; empty where it may be."""
    if alone(report):
        return f"{report.optimizer.name} has no rho; hold Z with --max-z"
    threshold = report.optimizer.threshold
    known = threshold is not None and threshold > 0 and report.judged.rho is not None
    return _reason(report, estimate) or ("" if known else _NO_RHO)


def _reason(report: Report, estimate: Estimate) -> str:
    """Why an estimate must not be relied on; empty where it may be."""
    if estimate.status == "unconverged" or estimate.status == "skipped":
        return why_not(report, estimate.status)
    if estimate.status != "converged":
        return f"is no number to rely on, its status is {estimate.status}"
    if not certified(estimate):
        return "is missing from the report"
    return ""


def _early(report: Report) -> str:
    """Why a young run's rho must not be relied on; empty where it is old enough."""
    if report.verdict != "early":
        return ""
    said = next((finding.message for finding in report.findings if finding.code == "early"), "rho says nothing yet")
    return f"too early: {said}"
