"""`curv demo`: a verdict in seconds, on a checkpoint that comes with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import typer

from curvcli.cli import options
from curvcli.cli.analyze import Early, print_report
from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.cli.formats import Format
from curvcli.cli.progress import reporting, told_early

_NEXT = """
That is a Llama of 3 blocks as the transformers Trainer saved it at step 60, and
4,096 tokens of what it was trained on. On a run of your own:

  curv doctor RUN                    what is there, and what is missing
  curv init RUN                      a curv.toml: its data, rules for a gate
  curv analyze RUN -o report.json    the same as above, and over depth
"""


@app.command(epilog="Examples:\n\n`curv demo`\n\n`curv demo -o report.json && curv report report.json -o report.html`")
def demo(
    output: options.Output = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a small checkpoint that comes with curv, in a few seconds: no data and no training run are needed."""
    with exit_codes():
        check_outputs(output, None)
        from curvcli.documents import write_whole

        home = Path(str(files("curvcli.cli").joinpath("demo")))
        with reporting(quiet, verbose) as progress:
            progress("importing torch", 0.0)
            from curvcli.analysis.checkpoint import Options, analyze_checkpoint

            early = Early(progress) if format is Format.table else None
            # On the CPU, so that everybody sees the same; and nothing of the working directory's curv.toml counts.
            how = Options(
                data=home / "shard.bin", sample="first", tokens=4096, sequence_length=64, batch_size=16, seed=0,
                device="cpu", depths=False,
            )  # fmt: skip
            report = analyze_checkpoint(home / "checkpoint-60", how, progress, early or told_early(progress))
        if output:
            write_whole(output, report.to_json().encode())
        print_report(report, format, early.shown if early else None, verbose)
        if format is Format.table:
            typer.echo(_NEXT, nl=False)
