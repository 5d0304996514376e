"""An explanation in a terminal, and through the verb."""

from __future__ import annotations

import json
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, Text
from places import ASSETS
from rich.console import Console
from typer.testing import CliRunner

from curvcli.analysis import explain as analysis
from curvcli.cli import app
from curvcli.documents import Explanation, load_explanation
from curvcli.errors import InputError, OutOfTime
from curvcli.render.explain import show
from curvcli.render.html import explanation_page

SAMPLE = ASSETS / "explain-60.json"


def _shown(found: Explanation, width: int = 80) -> str:
    stream = StringIO()
    show(found, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_a_sample_fits_80_columns() -> None:
    found = load_explanation(SAMPLE)
    text = _shown(found)
    wide = _shown(found, 400).splitlines()
    prose = [line for line in wide if line.startswith("verdict-of-few")]
    assert [line for line in wide if len(line.rstrip()) > 80] == prose, "all but sentences, which wrap"
    for part in (
        "UNSTABLE   rho 1.51, lambda 1,904, of the full model",
        " model.layers.0                      82.0 %",
        " layer 0, head 1                     39.7 %",
        " embed_tokens, token 116              3.8 %",
        "a as soon as[ ]",
        " nothing                                        1,904     1.51  unstable",
        " 82 of 8,192 predictions (18% of lambda)        1,633     1.29  unresolved",
    ):
        assert part in text, part
    assert "norm  " not in text, "what has less than half a percent of the direction is left out"


def _changed(**more: Any) -> Explanation:
    return Explanation.read(json.dumps({**json.loads(SAMPLE.read_text()), **more}))


def test_no_gap_is_left_where_nothing_was_found() -> None:
    assert "\n\n\n" not in _shown(_changed(findings=[]))


def test_text_of_the_data_does_not_move_the_terminal() -> None:
    said = json.loads(SAMPLE.read_text())
    token = said["sequences"][0]["tokens"][0]
    token["text"], token["context"] = "\x1b[2J\n", "a\x07\r\nb\u202ec"
    said["rows"][0]["text"] = "\x1b]0;x\x07"
    text = _shown(_changed(sequences=said["sequences"], rows=said["rows"]))
    assert not [letter for letter in text if letter != "\n" and (ord(letter) < 32 or letter in "\x7f\x9b\u202e")]
    assert len(text.splitlines()) == len(_shown(load_explanation(SAMPLE)).splitlines())


def test_without_a_tokenizer_ids_are_shown_and_without_an_estimate_a_status() -> None:
    said = json.loads(SAMPLE.read_text())
    for sequence in said["sequences"]:
        for token in sequence["tokens"]:
            token["text"] = token["context"] = None
    assert "at 35    token 32" in _shown(_changed(sequences=said["sequences"]))
    empty: dict[str, Any] = {n: [] for n in ("parts", "kinds", "heads", "rows", "sequences", "tokens", "removals")}
    estimate = {**said["estimate"], "eigenvalue": None, "rho": None, "residual": None, "status": "non-finite"}
    text = _shown(_changed(**empty, estimate=estimate, participation=None, per="nothing", sum=None))
    assert "no estimate: non-finite" in text
    assert "by part" not in text
    doubtful = _changed(estimate={**said["estimate"], "status": "unconverged"})
    assert "lambda 1,904, unconverged, of the full model" in _shown(doubtful).replace("\n", " ")


def test_the_verb_prints_and_writes_the_same_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def explained(path: Path, *, progress: Any, budget: Any, **settings: Any) -> Explanation:
        asked.update(settings, path=path, seconds=budget.seconds)
        return load_explanation(SAMPLE)

    monkeypatch.setattr(analysis, "explain", explained)
    out = tmp_path / "explain.json"
    done = CliRunner().invoke(app, ["explain", "ckpt", "--tokens", "512", "--format", "json", "-o", str(out), "-q"])
    assert done.exit_code == 0, done.output
    assert done.stdout == out.read_text()
    assert load_explanation(out) == load_explanation(SAMPLE)
    assert (asked["path"], asked["tokens"], asked["seconds"]) == (Path("ckpt"), 512, inf)
    assert "by attention head" in CliRunner().invoke(app, ["explain", "ckpt"], env={"COLUMNS": "80"}).stdout


def test_a_budget_that_ends_before_anything_is_known_is_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explained(path: Path, *, budget: Any, **settings: Any) -> Explanation:
        assert budget.seconds == 90
        raise OutOfTime

    monkeypatch.setattr(analysis, "explain", explained)
    out = tmp_path / "explain.json"
    done = CliRunner().invoke(app, ["explain", "ckpt", "--budget", "90s", "-o", str(out), "-q"])
    assert (done.exit_code, done.stdout, out.exists()) == (3, "", False)
    assert done.stderr == (
        "curv: the budget of 90 s ran out (at: importing torch), and nothing was measured; raise --budget\n"
    )


def test_the_page_says_what_the_terminal_does() -> None:
    text = explanation_page(load_explanation(SAMPLE))
    for part in (
        "rho 1.51", "lambda 1,904, of the full model", "82.0 %", "layer 0, head 1", "embed_tokens, token 116",
        "82 of 8,192 predictions", "verdict-of-few", "Sequence", "a as soon as</span><mark>␣</mark>", "curv.explain/1",
    ):  # fmt: skip
        assert part.lower() in text.lower(), part
    assert "<td>norm</td>" not in text, "what has less than half a percent of the direction is left out"


def test_text_of_the_data_is_no_markup() -> None:
    said = json.loads(SAMPLE.read_text())
    token = said["sequences"][0]["tokens"][0]
    for evil in HOSTILE:
        token["text"] = token["context"] = said["rows"][0]["text"] = said["parts"][0]["name"] = evil
        text = explanation_page(_changed(sequences=said["sequences"], rows=said["rows"], parts=said["parts"]))
        seen = Text(text)
        assert [seen.tags.count(tag) for tag in ("script", "style", "img")] == [1, 1, 0], evil
        assert not [name for _, name, _ in seen.attributes if name.startswith("on")]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "none")])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("curv: error: ")
    with pytest.raises(InputError, match=r"curv\.explain/1"):
        load_explanation(ASSETS / "hot-60.json")
