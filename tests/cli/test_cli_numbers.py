"""Every number of every verb, given as nobody means it: one line, and never an internal error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS
from typer.main import get_command
from typer.testing import CliRunner

from curvcli.cli import app

NUMBERS = ("nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, "-1", "0", "1e-400", str(2**53), str(2**63), "0x10", "")


def _numbers() -> list[tuple[str, str]]:
    """(verb, option) of every option that is an int or a float."""
    found = []
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        kinds = get_type_hints(command.callback)
        for parameter in command.params:
            if set(get_args(kinds[parameter.name]) or [kinds[parameter.name]]) & {int, float}:
                found.append((verb, parameter.opts[0]))
    return found


ALL = _numbers()
VERBS = sorted({verb for verb, _ in ALL})


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each verb needs beside the number to get as far as it can without a measurement."""
    folder = tmp_path_factory.mktemp("numbers")
    report = shutil.copy(ASSETS / "hot-60.gate.report.json", folder / "hot.json")
    (folder / "curvature.jsonl").write_text("")
    gone = str(folder / "gone")
    verbs = {verb: [gone] for verb in VERBS}
    lr = ["--lr", "0.01", "--lr-schedule", "cosine", "--warmup-steps", "10", "--total-steps", "600"]
    return verbs | {"gate": [str(report)], "watch": [str(folder)], "schedule": ["--depth", "8", *lr]}


def _ends(verb: str, words: list[str]) -> int:
    done = CliRunner().invoke(app, [verb, *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "internal error" not in done.stderr, done.stderr
    assert done.exit_code in (0, 1, 2, 3)
    return done.exit_code


def test_all_verbs_with_numbers_were_found() -> None:
    assert {verb for verb, _ in ALL} >= {"analyze", "gate", "track", "compare", "watch", "schedule"}
    assert len(ALL) > 60


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.sampled_from(NUMBERS))
def test_a_number_nobody_means(arguments: dict[str, list[str]], case: tuple[str, str], number: str) -> None:
    verb, option = case
    code = _ends(verb, [*arguments[verb], f"{option}={number}"])
    if number in ("nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, str(2**63)):
        assert code == 2


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("option", ["--tokens", "--sequence-length", "--batch-size", "--seed", "--max-hvps"])
def test_the_largest_number_allowed_is_measured_with(option: str, samples: Path) -> None:
    where = [str(samples / "nanogpt" / "ckpt.pt"), "--no-depths", "-q"]
    small = ["--tokens", "64", "--sequence-length", "32", "--max-hvps", "3"]
    if option == "--tokens":
        small += ["--data", str(samples / "data" / "shard.bin"), "--device", "nowhere"]  # all data would be measured
    done = CliRunner().invoke(app, ["analyze", *where, *small, option, str(2**53)])
    assert done.exit_code in (0, 2), done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("betas", ["nan,nan", "1e400,0.9", "-1,0.9", "0.9,1", "9,9"])
def test_betas_that_are_none(betas: str, samples: Path) -> None:
    small = ["--tokens", "64", "--sequence-length", "32", "--max-hvps", "3", "--no-depths", "-q"]
    done = CliRunner().invoke(app, ["analyze", str(samples / "calm" / "checkpoint-10"), *small, "--betas", betas])
    assert done.exit_code == 2
    assert "internal error" not in done.stderr
