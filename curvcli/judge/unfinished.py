"""Why parts of an analysis were not measured, and what to do about it: a time budget ran out, or a disk was full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from curvcli.documents import Finding, Report
from curvcli.errors import FullDiskError


def unfinished(skipped: Sequence[str], of: int, full_disk: FullDiskError | None) -> list[Finding]:
    """The finding that says so; none where all was measured.

    Args:
        skipped: names of the layers and depths that were not measured, of so many.
        full_disk: what ended the analysis, if it was that.
    """
    if full_disk is not None:
        left = f"{len(skipped)} of {of} layers and depths were not measured, {skipped[0]} the first" if skipped else ""
        said = "; ".join(part for part in (f"the disk was full: {full_disk.message}", left, full_disk.hint) if part)
        return [Finding(code="disk-full", severity="warning", message=said)]
    if not skipped:
        return []
    left = f"{len(skipped)} of {of} layers and depths, {skipped[0]} the first"
    message = f"the time budget ran out before {left}; raise --budget"
    return [Finding(code="out-of-time", severity="warning", message=message)]


def remedy(*, skipped: bool, full_disk: FullDiskError | None, further: str) -> str:
    """What helps a solve that did not converge.

    Args:
        further: the option that does where nothing else ended the analysis.
    """
    if full_disk is not None:
        return f"the disk was full: {full_disk.hint}"
    return f"raise {'--budget' if skipped else further}"


def why_not(report: Report, status: Literal["unconverged", "skipped"]) -> str:
    """Why an estimate of a report has no number to rely on, as it goes on behind the estimate's name."""
    full = next((finding.message for finding in report.findings if finding.code == "disk-full"), "")
    if status == "skipped":
        return f"was not measured, {full or 'the time budget ran out; raise --budget'}"
    where = "make room on the disk that was full" if full else "--budget where one is set"
    return f"has not converged; raise --max-hvps, or {where}"
