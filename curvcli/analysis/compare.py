"""Two checkpoints side by side, measured where they are no reports yet. Imports torch only to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvcli.analysis.options import Options, changed, options_of
from curvcli.documents import Comparison, Report, load_report, schema_of
from curvcli.errors import InputError, UsageError
from curvcli.judge.compare import compare as compare_reports


def compare(
    a: Path | str | Report, b: Path | str | Report, *, progress: Callable[[str, float], None] | None = None, **options: Any
) -> Comparison:
    """What changed between two checkpoints: `curv compare` from Python.

    Checkpoints are measured, each from a random start and without the curves over depth; two reports are compared as they
    are, without importing torch.

    Args:
        a: the earlier one: a report, the path of one, or a checkpoint's.
        b: the later one.
        progress: called with what is being done and the fraction done.
        **options: how checkpoints are measured, by the names of `curvcli.analysis.options.Options` (data, tokens,
            sequence_length, lr, ...); the same for both.

    Returns:
        Eigenvalue and rho of both and their ratios with brackets, of the full model and of each layer; findings say what
        makes the two no like for like.

    Raises:
        UsageError: an option is none, or is given with two reports.
        InputError: one of the two is neither report nor checkpoint, or cannot be read.
    """
    how = options_of(options, fixed=("depths", "deadline", "truncated"))
    sides = [side if isinstance(side, Report) else Path(side) for side in (a, b)]
    done = [isinstance(side, Report) or _is_report(side) for side in sides]
    if all(done) and (given := changed(how)):
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{flag} is for checkpoints, and both are reports", hint=f"drop {flag}")
    if not all(done) and progress:
        progress("importing torch", 0.0)
    reports = []
    for place, (side, is_report) in enumerate(zip(sides, done, strict=True)):
        if isinstance(side, Report):
            reports.append(side)
        elif is_report:
            reports.append(load_report(side))
        else:
            reports.append(_measured(side, how, place, progress or (lambda stage, done: None)))
    first, second = (side.checkpoint.path if isinstance(side, Report) else str(side) for side in sides)
    return compare_reports(*reports, names=(first, second))


def _measured(path: Path, how: Options, place: int, progress: Callable[[str, float], None]) -> Report:
    """The report of a checkpoint, the first or the second half of the work."""
    from curvcli.analysis.checkpoint import analyze_checkpoint

    def within(stage: str, done: float) -> None:
        progress(f"{path.name}: {stage}", (place + done) / 2)

    # No curve over depth: a comparison shows none.
    return analyze_checkpoint(path, replace(how, depths=False), within)


def _is_report(path: Path) -> bool:
    """Whether this is a document, by its content or its name. Raises InputError where it is another than a report."""
    if path.is_dir() or not (path.suffix == ".json" or _starts_as_json(path)):
        return False
    if (schema := schema_of(path)) == "curv.track/1":
        raise InputError(
            f"{path} is a track of many checkpoints, and two single ones are compared",
            hint="name checkpoints or reports; against another track, curv gate TRACK --baseline TRACK --max-regression 10",
        )
    if schema != "curv.report/1":
        raise InputError(f"{path} is {schema or 'no document of curv'}, no report", hint="give reports or checkpoints")
    return True


def _starts_as_json(path: Path) -> bool:
    """Whether a file begins as a JSON object does; checkpoints are directories, zip archives or pickles."""
    try:
        if not path.is_file():  # a pipe would wait for its other end
            return False
        with path.open("rb") as stream:
            return stream.read(64).lstrip().startswith(b"{")
    except OSError:
        return False
