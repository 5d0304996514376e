"""What to do next: from a report's verdict and findings to steps, with a command where there is one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from math import inf

from curvcli.documents import Report, Track
from curvcli.judge.limits import STABLE_BELOW, at_rounding
from curvcli.render.largest_lr import action, lower_to
from curvcli.render.track_points import newest


@dataclass(frozen=True)
class Step:
    """One thing to do, and the command line that does it."""

    text: str
    command: str | None = None


def advice(report: Report) -> list[Step]:
    """Steps, the verdict's own first."""
    return [*_verdict(report), *_findings(report)]


def track_advice(track: Track) -> list[Step]:
    """Steps for a run: the newest checkpoint's own, after what the run itself asks for."""
    points = track.points
    steps = []
    surged = [index for index, point in enumerate(points) if point.surged]
    if surged:
        here = points[surged[-1]].checkpoint
        before = next((p.checkpoint for p in reversed(points[: surged[-1]]) if p.report is not None), None)
        command = f"curv compare {shlex.quote(before)} {shlex.quote(here)}" if before is not None else None
        steps.append(Step("See layer by layer what changed at the last surge.", command))
    if failed := [point for point in points if point.report is None]:
        steps.append(
            Step(
                f"{len(failed)} of {len(points)} checkpoints could not be measured: the reasons are below their table. "
                "Once mended, run it again; what was measured is kept.",
                f"curv track {shlex.quote(track.run)}",
            )
        )
    last = newest(track)
    return [*steps, *advice(last.report)] if last and last.report else steps


def _verdict(report: Report) -> list[Step]:
    rho, lr = report.judged.rho, report.optimizer.lr
    # With the curvature as it is, rho grows in proportion to lr but for a part of weight decay over 2/lr.
    target = lr * STABLE_BELOW / rho if lr and rho and rho > 0 else inf
    # A rho that is next to nothing says nothing of the learning rate.
    known = f"; with curvature as it is now, rho would be {STABLE_BELOW:g} at a learning rate of about {target:.2g}"
    at = known if target < inf else ""
    if report.verdict == "early" or (report.course is not None and report.course.lost):
        return [Step(f"{action(report).capitalize()}.")]
    if report.verdict in ("unstable", "hot"):
        rate = lower_to(report) if report.stable_lr else None
        to = f" to about {rate:.2g}, the low end of the largest stable one," if rate is not None else ""
        return [
            Step(f"Lower the learning rate{to} or lengthen its warm-up{at}. Curvature moves with it: measure again after."),
            Step("Measure the checkpoints before and after this one: a crossing that passes matters less than a stay."),
        ]
    if report.verdict == "edge":
        return [Step(f"Training settles here by itself. Before raising the learning rate, make room{at}.")]
    if report.verdict == "stable":
        return [Step(f"Curvature asks for nothing at this learning rate{at}. Measure again once it has changed.")]
    return []


_ENDED = {
    "disk-full": "Measure again with TMPDIR on a disk that has room, or with more --memory.",
    "out-of-time": "Measure again with a larger --budget.",
}


def _findings(report: Report) -> list[Step]:
    files = [file.path for file in report.data.files] or [report.data.path]
    given = [("data", path) for path in files] + [("sequence-length", report.data.sequence_length)]
    again = f"curv analyze {shlex.quote(report.checkpoint.path)}"
    again += "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given if value is not None)
    longer, option = "let the eigensolver run longer", "--max-hvps 400"
    if at_rounding(report.judged):
        longer, option = "give a tolerance that float32 can meet", "--tolerance 1e-5"
    codes = {finding.code for finding in report.findings}
    # What ended the analysis is what has to give: more products would not be reached either.
    cut = codes & {"unresolved-residual", "unconverged-parts", "unresolved-budget", "unresolved-disk"}
    ended = next((how for code, how in _ENDED.items() if cut and code in codes), "")
    codes -= cut if ended else set()
    steps = {
        "no-threshold": Step("Give the learning rate in force: without one there is no edge.", f"{again} --lr LR"),
        "unresolved-tokens": Step("Measure on more tokens.", f"{again} --tokens {4 * report.data.tokens}"),
        "unresolved-residual": Step(f"{longer.capitalize()}.", f"{again} {option}"),
        "unconverged-parts": Step(f"Some layers or depths did not converge: {longer}.", f"{again} {option}"),
        "estimated-preconditioner": Step("Analyze a checkpoint that has its optimizer state: the estimate can be far off."),
        "loss-apart": Step("Look at the data first: their loss is not the one that the run logged."),
        "rare-tokens": Step("Look at the token that holds the sharpest direction, in the table of where it lives."),
        "update-overshoots": Step("Watch the loss of the next steps: the next update is past its critical length."),
        "ends-dominate": Step("Do not expect freezing blocks to help: embedding and head carry most of lambda."),
    }
    first = [Step(ended)] if ended else []
    return [*first, *(steps[found.code] for found in report.findings if found.code in steps and found.code in codes)]
