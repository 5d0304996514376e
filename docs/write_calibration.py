"""Writes the coefficients of curvcli/judge/calibration.json, and how well they tell, into docs/explanation/rho.md.

Run it when they were fitted again: python docs/write_calibration.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from curvcli.judge.calibration import Calibration, calibration, odds, settled_after

PAGE = Path(__file__).with_name("explanation") / "rho.md"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SHOWN = (
    "rho",
    "lr",
    "update ratio",
    "lr g'Hg / 2 g'g",
    "loss, z",
    "gradient norm",
    "gradient norm, 6 sigma",
    "attention logit",
)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of the {name} -->)", re.DOTALL)


def tables(found: Calibration) -> str:
    """The source as a sentence, and a row a group."""
    source = found.source
    low, high = source.parameters
    least, most = source.tokens_per_batch
    lines = [
        f"From {source.runs:,} runs, {source.ramps:,} of them ramps ({', '.join(source.families)}), of {low:,} to {high:,} "
        f"parameters on batches of {least:,} to {most:,} tokens, with {', '.join(source.optimizers)}.",
        f"`{source.command}` fits them again.{f' ({source.note.capitalize()}.)' if source.note else ''}",
        "",
        "| optimizers | training broke at rho, held out | half had at | ramps | intercept | slope | odds at rho 1 | at 4 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group, edge in found.edge.items():
        fit = found.odds[group]
        member = next((name for name in source.optimizers if found.group(name) == group), "")
        chances = " | ".join(f"{100 * (odds(rho, member) or 0):.0f} %" for rho in (1, 4))
        lines.append(
            f"| {group} | {edge.low:g} to {edge.high:g} ({100 * edge.confidence:.0f} %) | {edge.middle:g} | {edge.ramps:,} "
            f"| {fit.intercept:g} | {fit.slope:g} | {chances} |"
        )
    lines += [
        "",
        f"Odds: *stable* is below {100 * found.stable_below:.0f} %, *probably too hot* from {100 * found.hot_from:.0f} %, "
        f"*unstable* from {100 * found.unstable_from:.0f} %; conventions, one in three, one in two, two in three. "
        f"*Too early* are the first {found.early_steps} "
        f"steps, or as many as the first moment or the momentum averages over: {settled_after((0.95, 0.99), None)} at 0.95.",
    ]
    return "\n".join(lines) + "\n"


def scores(found: dict[str, Any], fit: dict[str, Any]) -> str:
    """What became of runs by the verdict before, and how well each signal tells; on held-out runs beside those fitted on."""
    sets = ("fitted on", "held out")
    lines = ["| verdict at a point before anything broke | ended badly, runs fitted on | runs held out |", "|---|--:|--:|"]
    for name in ("stable", "edge", "hot", "unstable", "early"):
        cells = [found[kind]["verdicts"]["points"].get(name) for kind in sets]
        lines.append(
            f"| {name} | "
            + " | ".join("" if c is None else f"{100 * c['end badly']:.0f} % of {c['runs']:.0f}" for c in cells)
            + " |"
        )
    held = found["held out"]["verdicts"]
    edges = ", ".join(f"{100 * fit['checks'][group]['held out']['edge_held']:.0f} % ({group})" for group in fit["checks"])
    lines += [
        "",
        f"Of {held['runs that end badly']} held-out runs that ended badly, {held['flagged before']} were called hot or "
        f"unstable before they broke; of {held['quiet runs']} quiet ones, {held['flagged at any point']} were at some "
        f"point. The interval of the largest stable learning rate held the truth at {edges} of the points of held-out "
        "ramps, and at 90 % of those that it was fitted on; outputs say the former.",
        "",
        "| signal | ends badly: AUC, held out | 5 to 95 % | in a family | breaks in 40 steps | caught, 5 % false alarms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in SHOWN:
        row = found["held out"][name]
        low, high = row["ends badly, interval"]
        lead = row["lead at 5% false alarms"]
        lines.append(
            f"| {name} | {row['ends badly']:.2f} | {low:.2f} to {high:.2f} | {row['ends badly, within families']:.2f} "
            f"| {row['breaks soon']:.2f} | {lead['caught']} of {lead['breaks']} |"
        )
    return "\n".join(lines) + "\n"


def clipped(found: dict[str, Any]) -> str:
    """rho at which ramps broke by what clipping left of a gradient: as it is, and times s; a row a family."""
    rows: dict[str, dict[float | None, str]] = {}
    for entry in found["table"]:
        edge, times = entry["edge"], entry["edge s"]
        cell = "" if edge is None else f"{edge:.3g}" if entry["share"] is None else f"{edge:.3g}, with s {times:.2g}"
        rows.setdefault(entry["family"], {})[entry["share"]] = cell
    shares = sorted({share for row in rows.values() for share in row if share is not None}, reverse=True)
    lines = [
        f"| family | not clipped | {' | '.join(f'to {share:g}' for share in shares)} |",
        f"|---|--:|{'--:|' * len(shares)}",
    ]
    for family, row in rows.items():
        lines.append(f"| {family} | {row.get(None, '')} | {' | '.join(row.get(share, '') for share in shares)} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The text of the page with the numbers as they are now. Raises ValueError where it has no one place for them."""
    names = ("instability_scores", "instability_fit", "clipped")
    of_zoo, fit, hard = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    for name, made in (("calibration", tables(calibration())), ("scores", scores(of_zoo, fit)), ("clipped", clipped(hard))):
        text, found = _place(name).subn(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} places for the {name}, and not one")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
