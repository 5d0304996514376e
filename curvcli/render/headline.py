"""What is known first of a measurement: its verdict, on one line and as a report's beginning."""

from __future__ import annotations

from rich.text import Text

from curvcli.documents import Report, TrackPoint
from curvcli.errors import counted, plain
from curvcli.judge.limits import certified
from curvcli.judge.steepest import alone, words
from curvcli.render.cells import summary
from curvcli.render.frame import number
from curvcli.render.largest_lr import action, told
from curvcli.render.style import COLOURS, said


def head(report: Report) -> Text:
    """Checkpoint, verdict, rho, bracket and next update: a report's first lines in a terminal."""
    checkpoint, optimizer = report.checkpoint, report.optimizer
    colour = COLOURS[report.verdict]
    text = Text()
    text.append(plain(checkpoint.path), style="bold")
    step = f"step {checkpoint.step:,}, " if checkpoint.step is not None else ""
    text.append(
        f"\n{step}{counted(checkpoint.parameters, 'parameter')}, {counted(report.data.tokens, 'token')}, "
        f"loss {report.data.loss:.3f}\n"
    )
    lr = f"lr {number(optimizer.lr)}" if optimizer.lr is not None else "no lr"
    state = {"checkpoint": "", "estimated": ", preconditioner estimated", "none": ", no preconditioner"}
    text.append(f"{optimizer.name}, {lr}{'' if report.steepest else state[optimizer.preconditioner]}\n\n")
    text.append(f" {said(report.verdict).upper()} ", style=f"bold reverse {colour}")
    if report.judged.rho is not None:
        text.append(f"  rho {number(report.judged.rho, 3)}", style="bold")
        text.append(f"  (lambda {number(report.judged.eigenvalue)}, threshold {number(optimizer.threshold)})")
    elif alone(report):
        text.append(f"  {z_line(report)}", style="bold")
    elif report.judged.eigenvalue is not None:
        text.append(f"  lambda {number(report.judged.eigenvalue)}, no threshold without a learning rate")
    else:
        text.append(f"  no estimate: {report.judged.status}")
    low, high = report.generalisation.rho_low, report.generalisation.rho_high
    if report.generalisation.held_out is not None and low is not None and high is not None:
        odds = f" ({report.generalisation.confidence:.0%})".replace("%", " %") if report.generalisation.confidence else ""
        text.append(f"\n of the data behind the shard rho is between {number(low, 3)} and {number(high, 3)}{odds}")
    if report.steepest is not None and not alone(report):
        text.append(f"\n {optimizer.name.split()[0]}'s parameters, which rho is not of: {z_line(report)}")
    if report.update.ratio is not None:
        text.append(
            f"\n next update: lr is {number(report.update.ratio, 3)} of its critical {number(report.update.critical_lr, 3)}"
        )
    for label, value in summary(report):
        text.append(f"\n {label} {plain(value)}")
    for line in told(report):
        text.append(f"\n {plain(line)}")
    text.append(f"\n what to do: {action(report)}")
    text.append("\n")
    return text


def z_line(report: Report) -> str:
    """Z and what it is made of, and what it means, as "Z 0.46 (S 254 in the max-norm, gradient 2.73 in its dual), ..."."""
    found = report.steepest
    if found is None:
        return ""
    norm = "max-norm" if found.norm == "max" else "spectral norm"
    made = f"S {number(found.sharpness)} or more in the {norm}, gradient {number(found.dual_norm, 3)} in its dual"
    value = "no Z" if found.z is None else f"Z {number(found.z, 3)}"
    return f"{value} ({made}): {words(found)}"


def verdict_line(report: Report) -> str:
    """The verdict in a line, as "verdict stable, rho 0.62 (0.55 to 0.69)"; lambda where there is no threshold."""
    judged, held = report.judged, report.generalisation
    if report.steepest is not None and alone(report):
        z = "no Z" if report.steepest.z is None else f"Z {number(report.steepest.z, 3)}"
        return f"verdict {said(report.verdict)}, {z}, {words(report.steepest)}"
    if judged.rho is None:
        value = f"lambda {number(judged.eigenvalue)}" if judged.eigenvalue is not None else f"no estimate: {judged.status}"
    else:
        value = f"rho {number(judged.rho, 3)}"
        if held.rho_low is not None and held.rho_high is not None:
            value += f" ({number(held.rho_low, 3)} to {number(held.rho_high, 3)})"
    doubt = "" if certified(judged) or judged.eigenvalue is None else f", {judged.status}"
    stable = f", largest stable lr {number(report.stable_lr.value, 2)}" if report.stable_lr else ""
    return f"verdict {said(report.verdict)}, {value}{doubt}{stable}"


def early_line(report: Report) -> str:
    """The same as soon as it is known, and what is still to come."""
    coming = " and ".join([*["layers"][: bool(report.layers)], *["depths"][: bool(report.cumulative.restricted)]])
    return f"{verdict_line(report)}{f'; {coming} follow' if coming else ''}"


def point_line(point: TrackPoint) -> str:
    """A checkpoint of a run in a line."""
    where = plain(point.checkpoint) if point.step is None else f"step {point.step:,}"
    if point.report is None:
        return f"{where}: not measured: {plain(point.message or '')}"
    surged = f", {number(point.surge, 2)} times the median before" if point.surged else ""
    return f"{where}: {verdict_line(point.report)}{surged}"
