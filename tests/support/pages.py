"""A page as a reader has it, and text that would act in one."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from places import ASSETS

from curvcli.documents import Gate, Rule, load_report
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings

HOSTILE = [
    "<script>document.documentElement.dataset.owned = 1</script>",
    "<img src=x onerror='document.documentElement.dataset.owned = 1'>",
    "\" onmouseover=\"document.documentElement.dataset.owned = 1\" onfocus=\"document.documentElement.dataset.owned = 1",
    "</title></style></script><svg onload='document.documentElement.dataset.owned = 1'>",
    "{{ 'ja' * 5 }}{% raw %}",
]  # fmt: skip

# A schedule with everything in it.
SCHEDULE: dict[str, Any] = {
    "schema": "curv.schedule/1", "mode": "grow", "depth": 4, "order": "last", "blocks": None, "lock": "zero-output",
    "margin": 0.8, "lr_schedule": {"kind": "linear", "peak": 1e-3, "warmup_steps": 10, "total_steps": 100},
    "phases": [
        {"step": 0, "latest": 0, "active": [0, 1], "unlock": [], "lr": 1e-4, "predicted_rho": 0.3},
        {"step": 50, "latest": 80, "active": [0, 1, 2, 3], "unlock": [2, 3], "lr": 1e-3, "predicted_rho": None},
    ],
    "findings": [{"code": "late", "severity": "warning", "message": "one < two"}],
    "provenance": {"report": "r.json", "report_sha256": "0" * 64, "checkpoint": None,
                   "versions": {"curvcli": "0.1.0", "torch": "2.13.0", "transformers": None, "python": "3.11"}},
}  # fmt: skip


def decided(path: str = "hot.json") -> Gate:
    """A gate with rules broken and passed, an upper limit and a lower one."""
    report = load_report(ASSETS / "hot-60.gate.report.json")
    rules = [
        Rule(name="max-rho", limit=1.0, source="--max-rho"),
        Rule(name="max-layer-rho", limit=2.0, source="curv.toml"),
        Rule(name="min-tokens", limit=10, source="--min-tokens"),
    ]
    return decide(
        rules, ReportReadings(report), report, path=path, kind="report", baseline=None, unresolved="report"
    )  # fmt: skip


class Text(HTMLParser):
    """Visible text and every attribute of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self._hidden = "", False
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("style", "script")
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data
