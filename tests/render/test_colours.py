"""Colours that share a picture are told apart by everybody, by simulation of how dichromats see them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from logs import job
from pages import SCHEDULE, decided
from places import ROOT
from tracks import asset, course

from curvcli.documents import Schedule, VerdictName
from curvcli.judge.compare import compare
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.render import html
from curvcli.render.style import COLOURS, PALETTE, variables

# Machado, Oliveira and Fernandes 2009, severity 1.0: linear RGB as the three kinds of dichromats see it.
SEEN = {
    "everybody": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
TOGETHER = [
    ("restricted", "truncated", "layer", "ends", "limit"),
    ("measured", "surge", "limit", "bracket"),
    ("measured", "logged", "limit"),  # a schedule: what is predicted, the learning rate, the edge
    ("measured", "soft", "bracket"),  # a comparison: rho, lambda, their bracket
    ("first", "second", "limit", "soft"),  # two runs, the edge, and since when one is below
    ("measured", "truncated", "limit", "soft"),  # a job's log
    ("ink", "unstable", "unlock"),  # its levels, over the lines of unlocks
    ("stable", "unstable", "unresolved"),  # a gate's rules
    ("ink", "layer"),  # a bar and its bracket
    ("ink", "ends"),
]


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of #rrggbb as it is seen."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(seen @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-3))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("scheme", [0, 1])
def test_what_shares_a_picture_is_told_apart_by_everybody(seen: str, scheme: int) -> None:
    for names in (*TOGETHER, get_args(VerdictName)):
        for one, other in combinations(names, 2):
            apart = lab(PALETTE[one][scheme], SEEN[seen]) - lab(PALETTE[other][scheme], SEEN[seen])
            assert np.linalg.norm(apart) > 12, (one, other)
    for n in range(6):
        apart = lab(PALETTE[f"rho{n}"][scheme], SEEN[seen]) - lab(PALETTE[f"rho{n + 1}"][scheme], SEEN[seen])
        assert np.linalg.norm(apart) > 10, n


def test_colours_have_one_home() -> None:
    """One dark twin each, and no colour written down anywhere else."""
    assert len(set(PALETTE.values())) == len({look[0] for look in PALETTE.values()})
    package = ROOT / "curvcli" / "render"
    for path in [*package.rglob("*.py"), *package.rglob("*.css"), *package.rglob("*.html")]:
        if path.name != "style.py":
            assert not re.search(r"#[0-9a-fA-F]{6}\b", path.read_text()), path
    css = variables() + (package / "templates/style.css").read_text()
    assert set(re.findall(r"var\(--(\w+)\)", css)) <= set(PALETTE)
    assert set(get_args(VerdictName)) <= set(COLOURS)


DRAWN: dict[str, Callable[[], str]] = {
    "report": lambda: html.report_page(asset("hot")),
    "track": lambda: html.track_page(course()),
    "schedule": lambda: html.schedule_page(Schedule.model_validate(SCHEDULE)),
    "gate": lambda: html.gate_page(decided()),
    "compare": lambda: html.comparison_page(compare(asset("calm"), asset("hot"), names=("a", "b"))),
    "runs": lambda: html.track_comparison_page(compare_tracks(course(), course(), names=("a", "b"))),
    "log": lambda: html.log_page(job()),
}


def used(svg: str) -> set[str]:
    """Colours of a picture's marks and lines, without those of its grid, its text and the page behind it."""
    root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))  # noqa: S314
    marks = [element for element in root.iter() if element.tag not in ("text", "title")]
    found = [re.fullmatch(r"var\(--(\w+)\)", mark.get(look, "")) for mark in marks for look in ("fill", "stroke")]
    return {match[1] for match in found if match} - {"page", "line"}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_so_is_whatever_a_page_draws(name: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", DRAWN[name](), re.DOTALL)
    assert pictures
    for svg in pictures:
        names = used(svg)
        assert len(names) > 1
        # The classes of the map stand in their order beside each other, and have a test of their own.
        for one, other in combinations(sorted(n for n in names if not n.startswith("rho")), 2):
            for seen, matrix in SEEN.items():
                for scheme in (0, 1):
                    apart = lab(PALETTE[one][scheme], matrix) - lab(PALETTE[other][scheme], matrix)
                    assert np.linalg.norm(apart) > 12, (one, other, seen, ("light", "dark")[scheme])
