"""`curv report` and `curv schema`: a document as a page to read and to send, and what documents look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvcli.cli.app import app, check_outputs, exit_codes


@app.command(
    epilog="Examples:\n\n"
    "`curv report report.json -o report.html`\n\n"
    "`curv report track.json -o track.html`\n\n"
    "`curv report run/curvature.jsonl -o run.html`\n\n"
    "`curv analyze ckpt/ -o report.json && curv report report.json > report.html`"
)
def report(
    document: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Document that curv analyze, track, schedule, gate or compare wrote with -o, or a job's log.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the page (HTML) here.  [default: stdout]")
    ] = None,
) -> None:
    """Turn a document, or a job's log, into one self-contained HTML file: no network, light and dark, fit for print."""
    with exit_codes():
        check_outputs(output, None)
        from curvcli.documents import write_whole
        from curvcli.render.html import page

        text = page(document)
        if output:
            write_whole(output, text.encode())
        else:
            typer.echo(text, nl=False)


@app.command(epilog="Example:\n\n`curv schema report > curv.report.schema.json`")
def schema(
    document: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Kind of document: report, track, compare, compare-tracks, explain, schedule, curvature, alert or gate.",
        ),
    ],
) -> None:
    """Print the JSON Schema of a document that curv writes."""
    with exit_codes():
        from curvcli.documents import dumps, json_schema

        typer.echo(dumps(json_schema(document)), nl=False)
