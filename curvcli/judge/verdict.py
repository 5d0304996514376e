"""The verdict: pure functions from measured results to where a run stands, by the limits and by the odds."""

from __future__ import annotations

from collections.abc import Sequence

from curvcli.documents import Estimate, Generalisation, Record, VerdictName
from curvcli.judge.calibration import calibration
from curvcli.judge.limits import certified, classify


def judge(
    judged: Estimate,
    generalisation: Generalisation,
    *,
    early: bool = False,
    odds: float | None = None,
    odds_at_most: float | None = None,
    partial: bool = False,
) -> VerdictName:
    """Verdict on the full model, or on its body where rare rows are left out; unresolved where more data could change it.

    Args:
        early: the optimizer is young, and no rho says anything yet.
        odds: chance of a bad end at this rho; None where it is not known.
        odds_at_most: the same where rho may be too high, and the lower end counts with that: what it would keep from being
            called stable is unresolved.
        partial: rho is that of some parameters, and the others, whose step is steepest in a norm, have none: that some are
            stable says nothing of all, and that they are not does.
    """
    if early:
        return "early"
    if not certified(judged) or generalisation.rho_low is None or generalisation.rho_high is None:
        return "unresolved"
    found = verdict_at(generalisation.rho_low, generalisation.rho_high, odds)
    if found == "stable" and odds_at_most is not None and odds_at_most >= calibration().stable_below:
        return "unresolved"
    return _of_all(found, partial=partial)


def _of_all(found: VerdictName, *, partial: bool) -> VerdictName:
    """One part past its edge can break a run; one part below its edge does not make it stable."""
    return "unresolved" if partial and found == "stable" else found


def verdict_at(low: float, high: float, odds: float | None) -> VerdictName:
    """Verdict on a rho that lies between two ends: where it stands to the edge, and what became of runs like it.

    Both ends on one side of the limits say where it stands. The odds then keep a rho below the edge from being called
    stable, and one past it from being called unstable, where runs at such a rho ended otherwise; and they decide where the
    ends lie on two sides, as far as they can.

    Args:
        odds: chance of a bad end; None where it is not known, and the limits alone decide.
    """
    known = calibration()  # the odds at which verdicts change
    places = {classify(low), classify(high)}
    if places == {"stable"}:
        return "stable" if odds is None or odds < known.stable_below else "edge"
    if places == {"unstable"}:
        return "unstable" if odds is None or odds >= known.unstable_from else "hot"
    if places == {"edge"}:
        return "edge"
    # The bracket spans a limit: at most `hot`, since `unstable` requires all of it above.
    if "unstable" in places:
        return "hot" if odds is not None and odds >= known.hot_from else "unresolved"
    return "edge" if odds is not None and odds >= known.stable_below else "unresolved"


def standing(records: Sequence[Record]) -> Record:
    """The record that says where a job stands: the newest, or the newest at which the learning rate was not 0.

    A schedule that decays to 0 ends in a record at which no step is taken: that says nothing of the run, and the one before
    it does. Where no step was taken at all it is the newest.

    Args:
        records: of a job's log in step order, at least one.
    """
    return next((record for record in reversed(records) if not record.idle), records[-1])


def verdict_of(record: Record) -> VerdictName:
    """Verdict of a training job's record, whose rho is that of its probe and no more."""
    if record.early:
        return "early"
    if record.rho is None or not certified(record):
        return "unresolved"
    # Where some parameters have a sharpness in a norm, rho is of the others alone.
    return _of_all(verdict_at(record.rho, record.rho, record.odds), partial=record.sharpness is not None)
