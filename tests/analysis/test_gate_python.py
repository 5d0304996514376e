"""`curvcli.gate` from Python decides what `curv gate` decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import ASSETS
from tiny import run_of
from tracks import course_of
from typer.testing import CliRunner

import curvcli
from curvcli import UsageError
from curvcli.cli import app
from curvcli.documents import Gate, load_report
from curvcli.errors import InputError

HOT, CALM = ASSETS / "hot-60.gate.report.json", ASSETS / "calm-60.gate.report.json"


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def by_verb(*arguments: object) -> tuple[dict[str, Any], int]:
    done = CliRunner().invoke(app, ["gate", *map(str, arguments), "--format", "json"])
    assert done.exit_code in (0, 1, 3), done.output
    return json.loads(done.stdout), done.exit_code


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"max_rho": 1.6}, 0),
        ({"max_rho": 1.0, "max_layer_rho": 0.8, "min_tokens": 100, "require_resolved": True}, 1),
        ({"max_rho": 1.46}, 3),
        ({"max_rho": 1.46, "unresolved": "pass"}, 0),
        ({"max_surge": 2.0, "max_regression": 5.0, "baseline": CALM, "regression_tolerance": 2.0}, 1),
        ({"max_update_ratio": 1.0}, None),
    ],
)
def test_python_says_what_the_verb_says(given: dict[str, Any], code: int | None) -> None:
    flags: list[object] = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, value]
    said, exit_code = by_verb(HOT, *flags)
    decided = curvcli.gate(HOT, **given)
    assert isinstance(decided, Gate)
    assert json.loads(decided.to_json()) == said
    assert decided.exit_code == exit_code
    assert code is None or code == exit_code


def test_documents_themselves_are_judged(tmp_path: Path) -> None:
    hot, calm = load_report(HOT), load_report(CALM)
    decided = curvcli.gate(hot, max_regression=5.0, baseline=calm)
    by_path = curvcli.gate(str(HOT), max_regression=5.0, baseline=str(CALM))
    assert decided.outcomes == [o.model_copy() for o in by_path.outcomes]
    assert decided.baseline == calm.checkpoint.path
    track = course_of([1.0, 2.0, 3.0])
    (tmp_path / "track.json").write_text(track.to_json())
    judged = curvcli.gate(track, max_surge=1.1)
    assert judged.subject.kind == "track"
    assert judged.outcomes == curvcli.gate("track.json", max_surge=1.1).outcomes
    assert curvcli.gate(hot, max_surge=9.0, baseline=track).outcomes[0].rule == "max-surge"
    with pytest.raises(InputError, match="run has no certified point"):
        curvcli.gate(hot, max_surge=1.1, baseline=course_of([None, None]).model_copy(update={"run": "run"}))


def test_the_working_directorys_rules_count_too(tmp_path: Path) -> None:
    (tmp_path / "curv.toml").write_text("[gate]\nmax-rho = 1.0\nunresolved = 'fail'\n")
    decided = curvcli.gate(HOT)
    assert [(o.rule, o.outcome) for o in decided.outcomes] == [("max-rho", "broken")]
    assert "curv.toml" in decided.outcomes[0].source
    assert curvcli.gate(HOT, max_rho=2.0).outcomes[0].outcome == "passed", "what is given wins"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no rule is in force"),
        ({"max_rho": -1.0}, "--max-rho: Input should be greater than 0"),
        ({"max_rho": 1.0, "tokens": 8}, "--tokens is for checkpoints"),
        ({"max_rho": 1.0, "budget": 9.0}, "--budget is for checkpoints"),
        ({"max_surge": 2.0}, "max-surge compares with a baseline"),
    ],
)
def test_what_cannot_be_judged_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        curvcli.gate(HOT, **given)


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_python(tmp_path: Path) -> None:
    told: list[str] = []
    run = run_of(tmp_path, 60)
    decided = curvcli.gate(
        run,
        max_rho=1e6,
        tokens=256,
        mode="kept",
        depths=False,
        report="kept.json",
        progress=lambda stage, done: told.append(stage),
    )
    assert (decided.subject.kind, decided.subject.tokens, decided.outcome) == ("checkpoint", 256, "passed")
    assert load_report(tmp_path / "kept.json").full.rho == decided.subject.rho
    assert told[0] == "importing torch"
    with pytest.raises(UsageError, match="'max_roh' is no rule and no option"):
        curvcli.gate(run, max_rho=1.0, max_roh=1.0)


@pytest.mark.slow
def test_no_more_is_measured_than_rules_look_at(tmp_path: Path) -> None:
    run = run_of(tmp_path, 60)

    def measured(**rules: Any) -> set[str]:
        told: list[str] = []
        decided = curvcli.gate(
            run, **rules, data=str(tmp_path / "data" / "shard.bin"), tokens=256, mode="kept",
            progress=lambda stage, done: told.append(stage.split()[0]),
        )  # fmt: skip
        assert not any("not measured" in str(outcome.message) for outcome in decided.outcomes)
        return {"layer", "restricted"} & set(told)

    assert measured(max_rho=1e6, require_resolved=True, max_update_ratio=1e6, min_tokens=10) == set()
    assert measured(max_layer_rho=1e6) == {"layer"}
    assert measured(max_rho=1e6, report=tmp_path / "kept.json") == {"layer", "restricted"}
    assert measured(max_regression=1e6, baseline=tmp_path / "kept.json") == {"layer"}
