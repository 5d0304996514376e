"""`curv explain`: what a checkpoint's sharpness is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.cli.formats import ShortFormat
from curvcli.errors import plain

if TYPE_CHECKING:
    from curvcli.documents import Explanation


@app.command(
    epilog="Exit codes: 0 explained, 2 bad usage or input, 3 the budget was too short for the full model.\n\n"
    "Examples:\n\n"
    "`curv explain sample_checkpoints/hot/checkpoint-60`\n\n"
    "`curv explain ckpt/ --data train.bin -o explain.json`\n\n"
    "`curv report explain.json -o explain.html`"
)
@options.measuring(ranks=False)
def explain(
    checkpoint: options.Checkpoint,
    given: dict[str, Any],
    budget: options.Budget = None,
    output: options.Output = None,
    format: options.ShortFormatOption = ShortFormat.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say why a checkpoint is sharp: where the sharpest direction lies, which data carry it, and what is left without them.

    The sequences and predictions with the largest parts of lambda are shown as text; the 1 % of them that have most are left
    out, and lambda and the verdict measured again.
    """
    started = time.monotonic()
    found, reason = None, ""
    with exit_codes():
        settings = options.settings(given)
        seconds = options.seconds(budget)
        check_outputs(output, None)
        from curvcli.analysis.budget import Budget, within
        from curvcli.cli.progress import reporting
        from curvcli.documents import write_whole

        limit = Budget(inf if seconds is None else seconds, started)

        def work(progress: Callable[[str, float], None]) -> Explanation:
            from curvcli.analysis.explain import explain as explained

            return explained(checkpoint, budget=limit, progress=progress, **settings)

        with reporting(quiet, verbose) as progress:
            found, reason = within(limit, work, progress)
        if found is None:
            typer.echo(plain(f"curv: {reason}"), err=True)
        else:
            if output:
                write_whole(output, found.to_json().encode())
            _print(found, format)
    if found is None:
        raise typer.Exit(3)


def _print(found: Explanation, format: ShortFormat) -> None:  # noqa: A002
    if format is ShortFormat.json:
        typer.echo(found.to_json(), nl=False)
        return
    from curvcli.cli.screen import terminal
    from curvcli.render.explain import show

    show(found, terminal())
