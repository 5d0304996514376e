"""Writes the coefficients of curvcli/judge/calibration.json, and what they are from, into docs/explanation/rho.md.

Run it when they were fitted again: python docs/write_calibration.py
"""

from __future__ import annotations

import re
from pathlib import Path

from curvcli.judge.calibration import Calibration, calibration, odds, settled_after

PAGE = Path(__file__).with_name("explanation") / "rho.md"
_PLACE = re.compile(r"(<!-- calibration -->\n).*?(<!-- end of the calibration -->)", re.DOTALL)


def tables(found: Calibration) -> str:
    """The source as a sentence, and a row a group."""
    source = found.source
    low, high = source.parameters
    least, most = source.tokens_per_batch
    lines = [
        f"From {source.runs:,} runs and {source.ramps:,} ramps ({', '.join(source.families)}), of {low:,} to {high:,} "
        f"parameters on batches of {least:,} to {most:,} tokens, with {', '.join(source.optimizers)}.",
        f"`{source.command}` fits them again.{f' ({source.note.capitalize()}.)' if source.note else ''}",
        "",
        "| optimizers | training broke at rho | half had at | ramps | intercept | slope | odds at rho 1 | at rho 4 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group, edge in found.edge.items():
        fit = found.odds[group]
        member = next((name for name in source.optimizers if found.group(name) == group), "")
        chances = " | ".join(f"{100 * (odds(rho, member) or 0):.0f} %" for rho in (1, 4))
        lines.append(
            f"| {group} | {edge.low:g} to {edge.high:g} ({100 * edge.confidence:g} %) | {edge.middle:g} | {edge.ramps:,} "
            f"| {fit.intercept:g} | {fit.slope:g} | {chances} |"
        )
    lines += [
        "",
        f"*Probably too hot* begins at odds of {100 * found.hot_from:g} %. *Too early* are the first {found.early_steps} "
        f"steps, or as many as the first moment or the momentum averages over: {settled_after((0.95, 0.99), None)} at 0.95.",
    ]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The text of the page with the coefficients as they are now. Raises ValueError where it has no one place for them."""
    made = tables(calibration())
    text, found = _PLACE.subn(lambda match: f"{match[1]}{made}{match[2]}", text)
    if found != 1:
        raise ValueError(f"{PAGE.name} has {found} places for the calibration, and not one")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
