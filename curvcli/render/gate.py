"""Gate documents to text: one renderer a format. A format is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from curvcli.documents import Gate
from curvcli.render.gate_github import github
from curvcli.render.gate_junit import junit
from curvcli.render.gate_markdown import markdown
from curvcli.render.gate_text import text


@dataclass(frozen=True)
class Renderer:
    """`suffixes` of files that get this format; none where it is for a terminal's log alone."""

    suffixes: tuple[str, ...]
    render: Callable[[Gate], str]


GATE: dict[str, Renderer] = {
    "text": Renderer((".txt",), text),
    "json": Renderer((".json",), Gate.to_json),
    "github": Renderer((), github),
    "junit": Renderer((".xml",), junit),
    "markdown": Renderer((".md",), markdown),
}
BY_SUFFIX: dict[str, Callable[[Gate], str]] = {suffix: r.render for r in GATE.values() for suffix in r.suffixes}
