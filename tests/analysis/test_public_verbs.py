"""What the verbs do is there from Python: the same documents, and torch only where something is measured."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ASSETS
from tiny import run_of
from typer.testing import CliRunner

import curvcli
from curvcli.analysis.cache import FileCache
from curvcli.analysis.options import Options, changed, options_of
from curvcli.cli import app
from curvcli.documents import Comparison, Schedule, Track, base, load_report, load_schedule
from curvcli.errors import InputError, UsageError
from curvcli.files.parse import parse_json, read_limited

INIT, HOT, CALM = ASSETS / "init.json", ASSETS / "hot-60.json", ASSETS / "calm-60.gate.report.json"
COSINE: dict[str, Any] = {"lr_schedule": "cosine", "warmup_steps": 100, "total_steps": 600}


def printed(*words: object) -> dict[str, Any]:
    """What a verb prints as JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--format", "json", "-q"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def flags(options: dict[str, Any]) -> list[str]:
    names = {"report": "--from"}
    return [word for name, value in options.items() for word in (names.get(name, f"--{name.replace('_', '-')}"), str(value))]


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what differs from call to call."""
    text = re.sub(r'"(seconds|peak_memory_bytes)": [0-9.e-]+', r'"\1": 0', json.dumps(document))
    return json.loads(re.sub(r'"mode_seconds": \{[^}]*\}', '"mode_seconds": {}', text))  # type: ignore[no-any-return]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two checkpoints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return run_of(tmp_path, 3, 9)


MEASURING: dict[str, Any] = {"data": "data/shard.bin", "tokens": 64, "sequence_length": 16, "max_hvps": 3, "mode": "kept"}


@pytest.mark.slow
def test_track_gives_what_the_verb_prints(run: Path) -> None:
    found = curvcli.track(str(run), cache=False, surge=1.5, window=3, **MEASURING)
    assert isinstance(found, Track)
    assert [point.source for point in found.points] == ["measured", "measured"]
    said = printed("track", run, "--no-cache", "--surge", 1.5, "--window", 3, *flags(MEASURING))
    assert timeless(json.loads(found.to_json())) == timeless(said)


@pytest.mark.slow
def test_track_keeps_reports_where_the_verb_does(run: Path) -> None:
    printed("track", run, *flags(MEASURING))
    stages: list[str] = []
    found = curvcli.track(run, last=1, progress=lambda stage, done: stages.append(stage), **MEASURING)
    assert [(point.step, point.source) for point in found.points] == [(9, "cached")]
    assert stages


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_a_warning(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(RuntimeWarning, match="cannot be written, so nothing is kept"):
        curvcli.track(run, last=1, **MEASURING)
    own = FileCache(tmp_path / "cache" / "own")
    curvcli.track(run, last=1, cache=own, **MEASURING)  # whoever gives a cache can ask it
    assert "cannot be written" in (own.complaint or "")


@pytest.mark.slow
def test_compare_gives_what_the_verb_prints(run: Path) -> None:
    first, second = run / "checkpoint-3", run / "checkpoint-9"
    found = curvcli.compare(first, str(second), **MEASURING)
    assert isinstance(found, Comparison)
    assert timeless(json.loads(found.to_json())) == timeless(printed("compare", first, second, *flags(MEASURING)))


def test_compare_takes_reports_by_path_and_in_hand() -> None:
    said = printed("compare", CALM, HOT)
    assert json.loads(curvcli.compare(CALM, HOT).to_json()) == said
    in_hand = json.loads(curvcli.compare(load_report(CALM), load_report(HOT)).to_json())
    assert in_hand["first"].pop("path") == "sample_checkpoints/calm/checkpoint-60"
    assert in_hand["changes"] == said["changes"]


@pytest.mark.parametrize("verb", ["reports", "tracks", "load"])
def test_a_document_is_read_and_parsed_once(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    parsed: list[int] = []
    theirs, parse = read_limited, parse_json

    def reading(path: Path, limit: int) -> bytes:
        read.append(path)
        return theirs(path, limit)

    def parsing(content: bytes) -> Any:
        parsed.append(len(content))
        return parse(content)

    monkeypatch.setattr(base, "read_limited", reading)
    monkeypatch.setattr(base, "parse_json", parsing)
    other = ASSETS / "documents/0.1.0/track.json"
    files = [tmp_path / "track.json", other] if verb == "tracks" else [CALM, HOT]
    (tmp_path / "track.json").write_bytes(other.read_bytes())
    if verb == "load":
        files = [CALM]
        curvcli.load(CALM)
    else:
        curvcli.compare(*files)
    assert read == files
    assert parsed == [path.stat().st_size for path in files]


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 48},
        {"depth": 12, "order": "interleaved", "start": 4, "groups": 2, "interval": 100, "lr": 0.001},
        {"depth": 12, "lr": 0.01, "lr_schedule": "wsd", "total_steps": 9000, "decay_steps": 500, "min_lr_ratio": 0.1},
        {"report": str(INIT), "warmup_steps": 9},
        {"report": str(INIT), "lr": 0.01, **COSINE},
        {"resume": str(HOT), **COSINE},
        {"resume": str(HOT), "lr": 0.03, "hold": 7, "margin": 0.7, "groups": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_schedule_gives_what_the_verb_prints(options: dict[str, Any]) -> None:
    found = curvcli.schedule(**options)
    assert isinstance(found, Schedule)
    assert json.loads(found.to_json()) == printed("schedule", *flags(options))


def test_schedule_takes_reports_in_hand() -> None:
    for name, path in (("report", INIT), ("resume", HOT)):
        options: dict[str, Any] = {"lr": 0.01, **COSINE}
        given: list[dict[str, Any]] = [{name: path}, {name: load_report(path)}]
        by_path, in_hand = (curvcli.schedule(**source, **options) for source in given)
        assert in_hand.phases == by_path.phases
        assert (by_path.provenance.report, in_hand.provenance.report) == (str(path), None)


@pytest.mark.slow
def test_schedule_measures_a_checkpoint_to_resume(run: Path) -> None:
    options: dict[str, Any] = {"resume": str(run / "checkpoint-9"), "tokens": 64, "lr": 0.003}
    stages: list[str] = []
    found = curvcli.schedule(**options, progress=lambda stage, done: stages.append(stage))
    assert json.loads(found.to_json()) == printed("schedule", *flags(options))
    assert stages[0] == "importing torch"
    assert len(stages) > 3


def test_torch_is_imported_only_to_measure() -> None:
    script = (
        "import sys, curvcli\n"
        "assert not {'torch', 'pydantic'} & set(sys.modules), 'the package itself'\n"
        f"curvcli.schedule(depth=48, lr=0.001)\ncurvcli.schedule(report={str(INIT)!r}, lr=0.001)\n"
        f"curvcli.schedule(resume={str(HOT)!r}, lr=0.001)\ncurvcli.compare({str(CALM)!r}, {str(HOT)!r})\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_schedule_that_locks_the_first_blocks_is_read_and_not_made(tmp_path: Path) -> None:
    old = load_schedule(ASSETS / "documents" / "0.1.0" / "schedule-first.json")
    assert (old.order, old.locked_at(0)) == ("first", frozenset(range(4)))
    with pytest.raises(UsageError, match=r"--order first is not planned.*pass last or interleaved"):
        curvcli.schedule(depth=8, order="first")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: curvcli.schedule(), UsageError, "nothing to plan from"),
        (lambda: curvcli.schedule(8, margin=0.5), UsageError, "takes no --margin"),
        (lambda: curvcli.schedule(resume=HOT, tokens=5), UsageError, "takes no --tokens"),
        (lambda: curvcli.schedule(9, report=INIT), UsageError, "the model measured has 8 blocks"),
        (lambda: curvcli.schedule(report="/nowhere.json"), InputError, "/nowhere.json does not exist"),
        (lambda: curvcli.compare(CALM, HOT, tokens=64), UsageError, "--tokens is for checkpoints, and both are reports"),
        (lambda: curvcli.compare(CALM, "/nowhere"), InputError, "/nowhere"),
        (lambda: curvcli.compare(CALM, HOT, token=64), UsageError, "did you mean tokens"),
        (lambda: curvcli.compare(CALM, HOT, depths=True), UsageError, "'depths' is no option"),
        (lambda: curvcli.compare(ASSETS / "documents/0.1.0/track.json", HOT), InputError, "is a track of many"),
        (lambda: curvcli.track("/nowhere"), InputError, "/nowhere"),
        (lambda: curvcli.track("/nowhere", surge=1.0), UsageError, "surge must be above 1"),
        (lambda: curvcli.track("/nowhere", surge=float("nan")), UsageError, "surge must be above 1"),
        (lambda: curvcli.track("/nowhere", window=1), UsageError, "window at least 2"),
        (lambda: curvcli.track("/nowhere", last=0), UsageError, "last at least 1"),
        (lambda: curvcli.track("/nowhere", sequence_lenght=5), UsageError, "did you mean sequence_length"),
    ],
)
def test_what_cannot_be_done_says_so_and_what_to_do(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)) as caught:
        call()
    assert ";" in str(caught.value), "no remedy"


def test_options_are_told_from_defaults_and_take_paths_as_text() -> None:
    assert changed(Options()) == []
    assert changed(options_of({"tokens": 5, "lr": None, "mode": "kept"})) == ["tokens", "mode"]
    assert options_of({"data": "a.bin"}).data == Path("a.bin")
    assert options_of({"data": ["a.bin", Path("b.bin")]}).data == [Path("a.bin"), Path("b.bin")]


@pytest.mark.parametrize("name", ["track", "compare", "schedule"])
def test_public_functions_document_every_argument(name: str) -> None:
    function = getattr(curvcli, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    (\*\*)?{argument}: ", text, re.MULTILINE), argument
    assert "Returns:" in text
    assert "Raises:" in text
    assert name in curvcli.__all__


def test_every_option_is_documented() -> None:
    text = inspect.getdoc(Options) or ""
    assert [name for name in Options.__dataclass_fields__ if not re.search(rf"^    {name}: ", text, re.MULTILINE)] == []
