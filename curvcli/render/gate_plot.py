"""The picture of a gate's outcome: each rule's number and bracket over its limit."""

from __future__ import annotations

from curvcli.documents import Gate, Outcome
from curvcli.render.picture import WIDE, Picture, readable_log
from curvcli.render.style import GATE_LIKE, light


def picture(gate: Gate, *, width: float = WIDE) -> Picture:
    """A line a rule, on a logarithmic axis on which 1 is the limit. Rules without a number or a limit are named alone."""
    heights = [0.5 + 0.4 * len(gate.outcomes)]
    return Picture(lambda drawn: _draw(drawn, gate), heights, f"gate {gate.outcome}", width=width)


def ratios(outcome: Outcome) -> tuple[float | None, float | None, float | None]:
    """Value, low and high over the limit; None where there is none, or none above 0, which such an axis lacks."""
    if not outcome.limit or outcome.limit <= 0:
        return None, None, None
    limit = outcome.limit
    value, low, high = (x / limit if x is not None and x > 0 else None for x in (outcome.value, outcome.low, outcome.high))
    return value, low, high


def _draw(drawn: Picture, gate: Gate) -> None:
    (axes,) = drawn.axes
    axes.set_xscale("log")
    found = [ratios(outcome) for outcome in gate.outcomes]
    known = [x for triple in found for x in triple if x is not None] + [1.0]
    axes.set_xlim(min(known) / 1.6, max(known) * 1.6)
    for place, (outcome, (value, low, high)) in enumerate(zip(gate.outcomes, found, strict=True)):
        colour = light(GATE_LIKE[outcome.outcome])
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
        if value is not None:
            axes.plot([value], [place], "o", color=colour, markersize=6)
    axes.axvline(1, color=light("limit"), linestyle="--", linewidth=1.2)
    gap = "\n" if drawn.narrow else " "
    names = [f"{o.rule}{' (lower limit)' if o.rule.startswith('min-') else ''}:{gap}{o.outcome}" for o in gate.outcomes]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("value over its limit (dashed: the limit)")
    axes.set_ylabel("rule")
    readable_log(axes.xaxis)
    axes.grid(axis="x")
