"""`curv init`: a curv.toml of what lies in a run and around it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from curvcli.analysis.checkpoint import DEFAULT_TOKENS, architecture_of
from curvcli.analysis.config import Config, find_config
from curvcli.checkpoints import find_checkpoints, open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.data.shards import find_sources
from curvcli.errors import CurvError, InputError, UsageError

NAME = "curv.toml"
# Where data of a run usually lie, from the run's directory, its parent and the working directory.
_FOLDERS = ("", "data", "dataset", "datasets", "shards", "last_run_prepared")  # the last is axolotl's
_SUFFIXES = (".bin", ".npy", ".parquet", ".jsonl", ".arrow", ".txt")
_LOOK = 200  # entries of a folder that are looked at
_BY = {"trainer": "the transformers Trainer", "nanogpt": "nanoGPT", "lightning": "Lightning", "deepspeed": "DeepSpeed"}


@dataclass(frozen=True)
class Initial:
    """A configuration to be written.

    Attributes:
        place: where.
        text: TOML that `curvcli.analysis.config.Config` takes.
        notes: for people, what has to be looked at.
    """

    place: Path
    text: str
    notes: Sequence[str]


def initial(
    run: Path,
    *,
    data: Sequence[Path] | None = None,
    model: str | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Initial:
    """A curv.toml for a run, from its newest checkpoint's headers and the files around it.

    What cannot be known stands in it as a comment that says what to do.

    Args:
        run: run directory or checkpoint.
        data: of the run; otherwise what a configuration says that is there now, or the one file of tokens that lies where
            such files do.
        model: network of the weights, where it is not beside them.
        output: where it is to be written; else in the working directory where the run lies below that, so that its rules for
            the gate count, and in the run's directory otherwise.
        force: whether a file that is there may be replaced.

    Raises:
        UsageError: the run is a URL, there is such a file already, or a link where none was named.
        InputError: there is no checkpoint, or it or the data cannot be read.
    """
    if "://" in str(run) or (":/" in str(run) and not run.exists()):
        raise UsageError(f"{run} is a URL, beside which nothing is written", hint="name a run on this machine")
    find_checkpoints(run)  # raises for what is none, before the folder is looked at
    checkpoint = open_checkpoint(run, architecture_of(model))
    folder = run if run.is_dir() else run.parent
    place = output or (Path() if folder.resolve().is_relative_to(Path().resolve()) else folder) / NAME
    if place.exists() and not force:
        raise UsageError(f"{place} is there already", hint="pass --force to replace it, or -o FILE")
    if output is None and place.is_symlink():
        # A run is untrusted: a link in it would have this written wherever it points.
        raise UsageError(f"{place} is a link", hint="name the file to write with -o")
    before, _ = find_config(checkpoint.path, data=not data)  # which this one would hide
    named = data or before.data
    found = _named(named, checkpoint) if named else _around(folder, checkpoint)
    body = [*_data(found, place), "", *_numbers(found, before, checkpoint)]
    text = "\n".join([*_head(checkpoint), "", *body, "", *_gate(checkpoint)]) + "\n"
    return Initial(place, text, list(_notes(found, place)))


@dataclass(frozen=True)
class _Found:
    files: Sequence[Path]
    tokens: int | None
    others: Sequence[Path] = ()


def _named(data: Sequence[Path], checkpoint: Checkpoint) -> _Found:
    sources = find_sources(data, checkpoint)
    counts = [source.tokens for source in sources]
    return _Found(list(data), None if None in counts else sum(count or 0 for count in counts))


def _around(folder: Path, checkpoint: Checkpoint) -> _Found:
    """The data that lies beside a run, where it is one file and no more: two would be a guess."""
    seen: dict[Path, int | None] = {}
    places = [folder, folder.absolute().parent, Path()]
    for path in dict.fromkeys(file.resolve() for place in places for file in _candidates(place)):
        try:
            sources = find_sources(path, checkpoint)
        except CurvError:
            continue
        seen[path] = sources[0].tokens
    # Beside a validation file there is usually one that is named for training.
    train = [path for path in seen if "train" in path.stem.lower()]
    chosen = train if len(train) == 1 else list(seen)
    if len(chosen) != 1:
        return _Found([], None, list(seen))
    return _Found(chosen, seen[chosen[0]], [path for path in seen if path != chosen[0]])


def _candidates(place: Path) -> Iterator[Path]:
    """Files of tokens by their names. Text is one in a folder of data alone: elsewhere it is notes and logs."""
    for name in _FOLDERS:
        folder = place / name
        try:
            entries = sorted(folder.iterdir())[:_LOOK] if folder.is_dir() else []
        except OSError:
            continue
        for entry in entries:
            if entry.suffix in (".txt", ".jsonl") and not name:
                continue
            # Weights of old checkpoints and dictionaries of trainers are called .bin too.
            weights = entry.name.startswith(("pytorch_model", "training_args", "optimizer", "adapter_model"))
            dataset = entry.is_dir() and (entry / "dataset_info.json").is_file()
            if dataset or (entry.is_file() and entry.suffix in _SUFFIXES and not weights):
                yield entry


def _head(checkpoint: Checkpoint) -> Iterator[str]:
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    yield "# Written by curv init. Read by curv for every checkpoint below this folder; a flag wins over a line here."
    written = f", written by {_BY[checkpoint.format]}" if checkpoint.format in _BY else ""
    yield f"# Newest checkpoint: {_plain(checkpoint.format)}{written}, {_plain(checkpoint.architecture)}{step}."
    if checkpoint.optimizer is None:
        yield "# It has no optimizer state: lambda would be estimated, and there would be no verdict. Save it with the"
        yield "# weights (in the transformers Trainer: save_only_model=False)."


def _data(found: _Found, place: Path) -> Iterator[str]:
    yield "# The training data as the model saw it, tokenised the same way. Paths are relative to this file."
    if found.files:
        shown = [_relative(path, place) for path in found.files]
        yield f"data = {_toml(shown[0]) if len(shown) == 1 else '[' + ', '.join(map(_toml, shown)) + ']'}"
    else:
        for other in found.others[:5]:
            yield f"# data = {_toml(_relative(other, place))}"
        if not found.others:
            yield '# data = "data/train.bin"'
        seen = "several files could be it: keep one line" if found.others else "none was found: name the file"
        yield f"# ({seen}; docs/how-to/data.md has the formats)"


def _numbers(found: _Found, before: Config, checkpoint: Checkpoint) -> Iterator[str]:
    yield "# Predictions in a window: the length of the sequences in training."
    known = min(checkpoint.context or 0, 1024)
    if before.sequence_length is not None:
        yield f"sequence-length = {before.sequence_length}"
    elif known and checkpoint.format == "nanogpt":
        yield f"sequence-length = {known}"
    else:
        why = f"the model takes up to {checkpoint.context:,}" if checkpoint.context else "the checkpoint does not say"
        yield f"# sequence-length = {known or 1024}"
        yield f"# (what training used is in no file: {why}; set it to the trainer's own)"
    yield ""
    yield "# Predictions to average over. More cost time in proportion, and make the bracket of rho narrower."
    wanted = before.tokens or DEFAULT_TOKENS
    if found.tokens is not None and found.tokens < wanted:
        yield f"tokens = {max(1, found.tokens)}  # all that there are; with few the verdict is often unresolved"
    else:
        yield f"tokens = {wanted}"


def _gate(checkpoint: Checkpoint) -> Iterator[str]:
    yield "# Rules of `curv gate RUN`, for CI. They count only for curv called in this folder or below."
    yield "[gate]"
    yield "max-rho = 1.0            # rho, 1 being the edge of stability; broken where its whole bracket lies above"
    if checkpoint.log:
        yield "max-loss-rise = 20.0     # percent that the smoothed loss may lie over the run's own best"
        yield "require-healthy = true   # the verdict on the run: neither hot nor wrecked nor collapsed"
    else:
        yield "# max-loss-rise = 20.0   # percent over the run's own best: these checkpoints bring no log of the loss"
        yield "# require-healthy = true # the verdict on the run: the same"
    yield "# max-surge = 2.0        # rho over the median of earlier checkpoints: gate a track, or the run with --any"
    yield '# unresolved = "fail"    # what CI takes an undecided outcome for, instead of exit code 3'


def _notes(found: _Found, place: Path) -> Iterator[str]:
    if not found.files:
        yield f"no data is set: uncomment or fill in data in {place}"
    elif found.others:
        yield f"data is {found.files[0]}; {len(found.others)} more that could be it: check the line"
    if not Path().resolve().is_relative_to(place.resolve().parent):
        yield (
            f"{place} is not in the working directory or above it: its rules, and data elsewhere, count only where "
            "curv is run from there"
        )


def _relative(path: Path, place: Path) -> str:
    """A path as the file at `place` names it; a pattern stays one."""
    return os.path.relpath(path.resolve(), place.resolve().parent)  # as the configuration is found: links followed


def _toml(name: str) -> str:
    """A path as a TOML string. Raises InputError where TOML, which is UTF-8, has none for it."""
    if any(0xD800 <= ord(c) <= 0xDFFF for c in name):
        raise InputError(f"the name {name!r:.200} is not UTF-8, and cannot stand in TOML", hint="rename it, or pass --data")
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007F")  # JSON leaves that one as it is


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
