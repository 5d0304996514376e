"""Making things fit: text onto a line, columns into a terminal, points into a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10

Points = list[tuple[int, float]]
# Above this rho a linear axis would press the edge to the floor.
LOG_ABOVE = 5.0
DECADES = 2.0  # that values span where a logarithmic axis shows more of them


def spans_decades(values: Iterable[float]) -> bool:
    """Whether values are all above 0 and span two decades or more; NaN counts for none."""
    known = [value for value in values if value == value]
    return bool(known) and min(known) > 0 and max(known) / min(known) >= 10**DECADES


def round_ticks(low: float, high: float, most: int, *, least: float = 0.0) -> list[float]:
    """Ticks from `low` to `high`, 1, 2 or 5 times a power of ten apart, as many as fit into `most`.

    Args:
        least: smallest distance between two, 1 where they are counts.
    """
    span = high - low
    if span <= 0 or most < 1:
        return [low]
    power = 10.0 ** floor(log10(span / most))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= span / most * (1 - 1e-9))
    apart = max(apart, least)
    return [n * apart for n in range(ceil(low / apart - 1e-9), floor(high / apart + 1e-9) + 1)]


def fitting(cells: Sequence[dict[str, str]], width: int, titles: Sequence[str], least_needed: Sequence[str]) -> list[str]:
    """Titles of the columns that a line of that width holds, the least needed left out first.

    Args:
        cells: a row each, by title; a row may lack a column, which is then left out.
        titles: all of them, in order; columns stand one blank apart.
        least_needed: those that may be left out, the first one first.
    """
    kept = [title for title in titles if all(title in row for row in cells)]
    room = {title: max(len(title), *(len(row[title]) for row in cells)) for title in kept}
    for title in least_needed:
        if sum(room[title] + 1 for title in kept) - 1 <= width:
            break
        if title in kept:
            kept.remove(title)
    return kept


def round_log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten from `low` to `high`, as many as fit into `most`; with 2 and 5 times them where they are few."""
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    apart = max(1, ceil((last - first + 1) / max(1, most)))
    found = [10.0**power for power in range(first, last + 1, apart)]
    if len(found) > 2 or most < 4:
        return found
    every = [step * 10.0**power for power in range(first - 1, last + 1) for step in (1, 2, 5)]
    return [tick for tick in every if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def thin(points: Points, columns: int) -> Points:
    """At most four points a column: first, least, greatest, last. A spike of one record stays."""
    if len(points) <= 4 * columns:
        return points
    first, span = points[0][0], points[-1][0] - points[0][0] + 1
    bins: dict[int, Points] = {}
    for point in points:
        bins.setdefault((point[0] - first) * columns // span, []).append(point)
    kept: set[tuple[int, float]] = set()
    for members in bins.values():
        kept |= {members[0], members[-1], min(members, key=lambda p: p[1]), max(members, key=lambda p: p[1])}
    return sorted(kept)
