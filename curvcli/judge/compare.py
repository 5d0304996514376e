"""Two reports, part by part. Pure functions of results."""

from __future__ import annotations

from curvcli.documents import Change, Comparison, Estimate, Finding, Report, Side, Versions
from curvcli.judge.limits import certified, changed, highest

LARGE = 2.0  # a change that is worth a finding


def compare(first: Report, second: Report, *, names: tuple[str, str]) -> Comparison:
    """What changed from the first report to the second, as ratios of lambda with brackets.

    Args:
        names: what the user called the two.
    """
    # What each verdict is on, which a lambda of rare rows is not.
    judged = "without rare rows" if first.body and second.body else "what was judged" if first.body or second.body else ""
    changes = [_change("full", judged or "full model", first.judged, second.judged)]
    if first.outside and second.outside:
        changes.append(_change("ends", first.outside.name, first.outside, second.outside))
    later = {layer.name: layer for layer in second.layers}
    for layer in first.layers:
        if layer.name in later:
            changes.append(_change("layer", layer.name, layer, later[layer.name]))
    findings = [*unlike(first, second), *_large(changes), *_verdict(first, second)]
    return Comparison(
        first=_side(first, names[0]),
        second=_side(second, names[1]),
        changes=changes,
        findings=findings,
        versions=Versions.installed(),
    )


def shard_of(report: Report) -> tuple[str, int | None]:
    """What tells the tokens of one report from another's."""
    return report.data.sha256, report.data.sequence_length


def _side(report: Report, name: str) -> Side:
    return Side(
        path=name,
        checkpoint=report.checkpoint.path,
        step=report.checkpoint.step,
        lr=report.optimizer.lr,
        threshold=report.optimizer.threshold,
        loss=report.data.loss,
        update_ratio=report.update.ratio,
        verdict=report.verdict,
        tokens=report.data.tokens,
        stable_lr=report.stable_lr.value if report.stable_lr else None,
        z=report.steepest.z if report.steepest else None,
    )


def _change(part: str, name: str, a: Estimate, b: Estimate) -> Change:
    sides = [_relied_on(a), _relied_on(b)]
    ratio = low = high = message = None
    if sides[0] is None or sides[1] is None:
        status = a.status if sides[0] is None else b.status
        message = f"the {'first' if sides[0] is None else 'second'} is {status}"
    elif sides[0][0] <= 0 or sides[1][0] <= 0:
        # A ratio of signed numbers says nothing: lambda at or below 0 is a concave part.
        message = "lambda is not positive"
    else:
        (x, x_most), (y, y_most) = sides[0], sides[1]
        # A Ritz value is a lower bound.
        ratio, low, high = y / x, y / x_most, y_most / x
    return Change.model_validate(
        {
            "part": part,
            "name": name,
            "first": sides[0][0] if sides[0] else None,
            "second": sides[1][0] if sides[1] else None,
            "first_rho": a.rho if sides[0] else None,
            "second_rho": b.rho if sides[1] else None,
            "first_z": a.steepest.z if a.steepest else None,
            "second_z": b.steepest.z if b.steepest else None,
            "ratio": ratio,
            "low": low,
            "high": high,
            "rho_ratio": b.rho / a.rho if ratio is not None and a.rho and b.rho else None,
            "message": message,
        }
    )


def _relied_on(estimate: Estimate) -> tuple[float, float] | None:
    """lambda, and what no eigenvalue lies above, where they may be relied on."""
    value, most = estimate.eigenvalue, highest(estimate)
    return (value, most) if certified(estimate) and value is not None and most is not None else None


def unlike(first: Report, second: Report, *, what: str = "checkpoints") -> list[Finding]:
    """What makes the ratios no like for like.

    Args:
        what: the two are: checkpoints, or runs.
    """
    found = []
    for code, which, a, b in (
        ("other-data", "tokens", shard_of(first), shard_of(second)),
        ("other-optimizer", "optimizer", first.optimizer.name, second.optimizer.name),
        ("other-preconditioner", "preconditioner", first.optimizer.preconditioner, second.optimizer.preconditioner),
        ("other-layers", "layers", [x.name for x in first.layers], [x.name for x in second.layers]),
        ("other-size", "parameters", first.checkpoint.parameters, second.checkpoint.parameters),
    ):
        if a != b:
            # A digest, or a list of all layers, tells a reader nothing.
            shown = "" if code in ("other-data", "other-layers") else f" ({a}, {b})"
            message = f"the two have different {which}{shown}: their ratios compare more than the {what}"
            found.append(Finding(code=code, severity="warning", message=message))
    if bool(first.body) != bool(second.body):
        message = f"the {'first' if first.body else 'second'} is judged without its rare rows, the other whole: " + (
            f"their ratio compares more than the {what}"
        )
        found.append(Finding(code="other-rows", severity="warning", message=message))
    shares = [first.optimizer.clip, second.optimizer.clip]
    if shares.count(None) == 1 and min(share for share in shares if share is not None) < 1:
        # Of one it is known what clipping left, and its rho is that much less; ratios of lambda are none the worse.
        message = f"rho of the {'second' if shares[0] is None else 'first'} alone counts with clipping: "
        found.append(
            Finding(code="other-clipping", severity="warning", message=f"{message}rho's ratios compare more than the {what}")
        )
    return found


def _large(changes: list[Change]) -> list[Finding]:
    rose = [(c.rho_ratio, c) for c in changes if c.part != "full" and c.rho_ratio and c.ratio and c.low]
    # Compare the low end: rho's ratio has lambda's relative bracket, since thresholds are exact.
    sure = [(ratio, c) for ratio, c in rose if ratio * (c.low or 0.0) / (c.ratio or 1.0) > LARGE]
    if not sure:
        return []
    ratio, most = max(sure, key=lambda pair: pair[0])
    return [Finding(code="layer-rose", severity="warning", message=f"rho of {most.name} rose most, to {ratio:.3g} times")]


def _verdict(first: Report, second: Report) -> list[Finding]:
    if first.verdict == second.verdict:
        return []
    message = f"{first.verdict} before, {second.verdict} now"
    return [Finding(code="verdict-changed", severity=changed(second.verdict), message=message)]
