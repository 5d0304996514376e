"""Two checkpoints side by side, measured where they are no reports yet, or two tracks. Imports torch only to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from curvcli.analysis.options import Options, changed, options_of
from curvcli.documents import Comparison, Report, Track, TrackComparison
from curvcli.documents.base import document_in, named_content
from curvcli.errors import InputError, UsageError
from curvcli.judge.compare import compare as compare_reports
from curvcli.judge.compare_tracks import compare_tracks

Side = Path | str | Report | Track


@overload
def compare(
    a: Track, b: Track | Path | str, *, progress: Callable[[str, float], None] | None = None, **options: Any
) -> TrackComparison: ...
@overload
def compare(
    a: Report, b: Report | Path | str, *, progress: Callable[[str, float], None] | None = None, **options: Any
) -> Comparison: ...
@overload
def compare(
    a: Side, b: Side, *, progress: Callable[[str, float], None] | None = None, **options: Any
) -> Comparison | TrackComparison: ...
def compare(
    a: Side, b: Side, *, progress: Callable[[str, float], None] | None = None, **options: Any
) -> Comparison | TrackComparison:
    """What changed between two checkpoints, or how two runs differ step by step: `curv compare` from Python.

    Checkpoints are measured, each from a random start and without the curves over depth; two reports or two tracks are
    compared as they are, without importing torch.

    Args:
        a: the earlier one: a report, the path of one, or a checkpoint's; of two runs a track, or the path of one.
        b: the later one, or the other run's track.
        progress: called with what is being done and the fraction done.
        **options: how checkpoints are measured, by the names of `curvcli.analysis.options.Options` (data, tokens,
            sequence_length, lr, ...); the same for both.

    Returns:
        Eigenvalue and rho of both and their ratios with brackets, of the full model and of each layer; findings say what
        makes the two no like for like. Of two tracks, both at each step of either, and which is further below its edge.

    Raises:
        UsageError: an option is none, or is given with two reports or tracks.
        InputError: one of the two is neither report, track nor checkpoint, or cannot be read; or only one is a track.
    """
    how = options_of(options, fixed=("depths", "deadline", "truncated", "shard"))
    given = [side if isinstance(side, (Report, Track)) else Path(side) for side in (a, b)]
    names = (_name(given[0]), _name(given[1]))
    first, second = (_read(side) if isinstance(side, Path) else side for side in given)
    if isinstance(first, Track) and isinstance(second, Track):
        _no_options(how, "tracks")
        return compare_tracks(first, second, names=names)
    if isinstance(first, Track) or isinstance(second, Track):
        track, other = names if isinstance(first, Track) else names[::-1]
        raise InputError(
            f"{track} is a track of many checkpoints, and {other} is none",
            hint="name two tracks, or two checkpoints or reports; against a run's past, curv gate REPORT --baseline TRACK",
        )
    if isinstance(first, Report) and isinstance(second, Report):
        _no_options(how, "reports")
    elif progress:
        progress("importing torch", 0.0)
    say = progress or (lambda stage, done: None)
    reports = (
        side if isinstance(side, Report) else _measured(side, how, place, say) for place, side in enumerate((first, second))
    )
    return compare_reports(*reports, names=names)


def _no_options(how: Options, what: str) -> None:
    """Raise UsageError where an option of measuring is given, and nothing is measured."""
    if given := changed(how):
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{flag} is for checkpoints, and both are {what}", hint=f"drop {flag}")


def _name(side: Path | Report | Track) -> str:
    """What the user called it."""
    return side.checkpoint.path if isinstance(side, Report) else side.run if isinstance(side, Track) else str(side)


def _measured(path: Path, how: Options, place: int, progress: Callable[[str, float], None]) -> Report:
    """The report of a checkpoint, the first or the second half of the work."""
    from curvcli.analysis.checkpoint import analyze_checkpoint

    def within(stage: str, done: float) -> None:
        progress(f"{path.name}: {stage}", (place + done) / 2)

    # No curve over depth: a comparison shows none.
    return analyze_checkpoint(path, replace(how, depths=False), within)


def _read(path: Path) -> Path | Report | Track:
    """The report or track in a file, read once; a checkpoint's own path. Raises InputError where it is another document."""
    if path.is_dir() or not (path.suffix == ".json" or _starts_as_json(path)):
        return path
    schema, content = named_content(path)
    if schema == "curv.report/1":
        return document_in(content, Report, path, schema, "write one with curv analyze -o")
    if schema == "curv.track/1":
        return document_in(content, Track, path, schema, "write one with curv track -o")
    raise InputError(
        f"{path} is {schema or 'no document of curv'}, no report", hint="give two reports, checkpoints or tracks"
    )


def _starts_as_json(path: Path) -> bool:
    """Whether a file begins as a JSON object does; checkpoints are directories, zip archives or pickles."""
    try:
        if not path.is_file():  # a pipe would wait for its other end
            return False
        with path.open("rb") as stream:
            return stream.read(64).lstrip().startswith(b"{")
    except OSError:
        return False
