"""A run of curv with two more numbers, each added in one place. Prints as JSON where they were found.

A process of its own: flags, keys and tables are made when their modules are imported.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from places import ROOT

from curvcli.documents import columns

Column, GateRule = columns.Column, columns.GateRule
Document = TypeVar("Document")


def participation(measurement: columns.Measurement) -> float | None:
    return measurement.report.participation if measurement.report else None


def around(measurement: columns.Measurement) -> tuple[float | None, float | None]:
    value = participation(measurement)
    return (None, None) if value is None else (0.5 * value, 2 * value)


columns.PARTS += (
    Column(
        "toy_error", "toy error", lambda p: p.estimate.eigenvalue and p.estimate.residual / p.estimate.eigenvalue, digits=3,
        rule=GateRule("max-toy-error", "parts", "Largest toy error of any layer."),
    ),
)  # fmt: skip
columns.POINTS += (
    Column(
        "toy_spread", "toy spread", participation, digits=3, bracket=around,
        rule=GateRule("min-toy-spread", "full model", "Least toy spread: of the full model."),
    ),
)  # fmt: skip


def main(report_path: Path) -> dict[str, Any]:
    from rich.console import Console
    from typer.main import get_group
    from typer.testing import CliRunner

    from curvcli.analysis.config import GateTable
    from curvcli.cli import app
    from curvcli.documents import Track, TrackPoint, json_schema, load_report
    from curvcli.judge.readings import NoReadings
    from curvcli.render import TEXT, table, track_table
    from curvcli.render.html import report_page, track_page

    report = load_report(report_path)
    point: dict[str, Any] = {"checkpoint": "a", "step": 1, "source": "measured", "report": report, "training_loss": 1.0}
    point |= {"surge": None, "surged": False}
    track = Track(
        run="run", points=[TrackPoint(**point)], log=[], window=5, surge_limit=2.0, findings=[], hvps=1, seconds=1.0,
        versions=report.versions,
    )  # fmt: skip

    def drawn(show: Callable[[Document, Console], object], document: Document) -> str:
        text = io.StringIO()
        show(document, Console(file=text, width=140))
        return text.getvalue()

    def gate(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["gate", str(report_path), *arguments, "--format", "json"])
        return {"code": done.exit_code, "outcomes": json.loads(done.stdout)["outcomes"] if done.exit_code < 2 else None}

    spec = importlib.util.spec_from_file_location("write_action", ROOT / "docs" / "write_action.py")
    assert spec
    assert spec.loader
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    Path("curv.toml").write_text("[gate]\nmax-toy-error = 1e-9\n")
    by_file = gate()
    Path("curv.toml").unlink()
    nothing = [columns.ruled()[name] for name in ("max-toy-error", "min-toy-spread")]
    assert all(NoReadings("out of time").of(column)[0].reason for column in nothing)
    return {
        "table": drawn(table.show, report),
        "track table": drawn(track_table.show, track),
        "csv": TEXT["csv"](report),
        "track csv": track_table.to_csv(track),
        "markdown": TEXT["markdown"](report),
        "page": report_page(report),
        "track page": track_page(track),
        "flags": [name for p in get_group(app).commands["gate"].params for name in p.opts],
        "help": CliRunner().invoke(app, ["gate", "--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}).stdout,
        "keys": [field.alias for field in GateTable.model_fields.values()],
        "schema": json_schema("gate")["$defs"]["Outcome"]["properties"]["rule"]["enum"],
        "action": writer.action(writer.ACTION.read_text()),
        "by flag": gate("--max-toy-error", "1e-9"),
        "by file": by_file,
        "passed": gate("--max-toy-error", "1e9", "--min-toy-spread", "1"),
        "too little": gate("--min-toy-spread", "1e9"),
        "between": gate("--min-toy-spread", str(report.participation), "--unresolved", "pass"),
    }


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    print(json.dumps(main(Path(sys.argv[1]))))
