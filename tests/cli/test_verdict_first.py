"""The verdict is shown as soon as it is known, in every verb that measures; and what --budget and --estimate print."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from places import ASSETS
from real import CURV, curv, variables
from rich.console import Console
from terminal import Terminal
from tiny import run_of

from curvcli.analysis import solve
from curvcli.documents import load_report, load_track
from curvcli.errors import InputError
from curvcli.render import headline, table

QUICK = ("--tokens", "128", "--mode", "kept", "--max-hvps", "30", "--device", "cpu")
EARLY = re.compile(r"curv: verdict (stable|edge|unstable|too early|unresolved), rho \S+.*; layers and depths follow")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("run"), 1, 3)


@pytest.fixture
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement breaks after the full model: what is printed by then was printed early."""

    def broken(*_: object) -> None:
        raise InputError("it broke", hint="mend it")

    monkeypatch.setattr(solve.Measurement, "parts", broken)


def shown(path: Path) -> str:
    """A report as the terminal view has it, in one piece."""
    console = Console(file=StringIO(), width=80)
    table.show(load_report(path), console, verbose=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_in_a_pipe_the_text_is_the_reports_and_its_head_once(run: Path, tmp_path: Path) -> None:
    done = curv("analyze", run, *QUICK, "-o", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown(tmp_path / "r.json")
    assert done.stdout.count("parameters,") == 1
    assert "verdict" not in done.stderr


@pytest.mark.usefixtures("no_layers")
def test_the_head_is_there_before_the_layers(run: Path) -> None:
    done = curv("analyze", run, *QUICK)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0].endswith("checkpoint-3")
    assert re.match(r" [A-Z ]+   rho [\d.]+", lines[4])
    assert not {"embedding", "out-of-time"} & set(re.findall(r"[a-z-]+", done.stdout))


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize(
    ("kind", "depths", "coming"),
    [("csv", [], "layers and depths"), pytest.param("json", ["--no-depths"], "layers", marks=pytest.mark.slow)],
)
def test_other_formats_have_it_on_stderr(run: Path, kind: str, depths: list[str], coming: str) -> None:
    done = curv("analyze", run, *QUICK, "--format", kind, *depths)
    assert done.stdout == ""
    assert re.search(rf"^curv: verdict [\w ]+, rho .*; {coming} follow$", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.slow
def test_json_is_json_alone(run: Path) -> None:
    done = curv("analyze", run, *QUICK, "--format", "json", "-q", "--no-depths")
    assert json.loads(done.stdout)["schema"] == "curv.report/1"
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.usefixtures("no_layers")
def test_the_gate_says_it_too(run: Path) -> None:
    alone = curv("gate", run, "--max-rho", 1, *QUICK).stderr
    assert re.search(EARLY.pattern.partition("; layers")[0], alone)
    assert "follow" not in alone, "no rule looks at layers"
    assert "; layers follow" in curv("gate", run, "--max-rho", 1, "--max-layer-rho", 9, *QUICK).stderr


@pytest.mark.slow
def test_a_track_says_each_point_as_it_comes(run: Path, tmp_path: Path) -> None:
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    for said in ("measured", "cached"):
        done = curv("track", run, *QUICK, "--format", "json", "-o", tmp_path / "t.json", **place)
        assert done.returncode == 0, done.stderr
        points = load_track(tmp_path / "t.json").points
        assert [point.source for point in points] == [said, said]
        lines = [line for line in done.stderr.splitlines() if "verdict" in line]
        assert lines == [f"curv: step {p.step}: {headline.verdict_line(p.report)}" for p in points if p.report]
        assert len(lines) == 2
    assert curv("track", run, *QUICK, "-q", "--format", "csv", **place).stderr == ""


def test_a_point_that_was_not_measured_says_why() -> None:
    from tracks import failed

    assert headline.point_line(failed(50)) == "step 50: not measured: optimizer.pt is truncated; copy it again"


@pytest.mark.slow
def test_at_a_terminal_the_bar_goes_on_below_the_head(run: Path) -> None:
    terminal = Terminal(80, 60, "analyze", str(run), *QUICK, "--no-depths")
    assert terminal.finish() == 0
    screen = [line.rstrip() for line in terminal.screen.display]
    assert sum(line.endswith("checkpoint-3") for line in screen) == 1
    assert screen[0].endswith("checkpoint-3"), "nothing is left above it"
    assert not any("━" in line for line in screen), "the bar is gone"
    head, rest = terminal.raw.find(b"of the data behind the shard rho is"), terminal.raw.find(b"layer  ")
    assert 0 < head < rest
    assert "━".encode() in terminal.raw[head:rest]
    assert "full model " in "\n".join(screen)


def test_a_head_that_layers_and_depths_changed_is_printed_again() -> None:
    report = load_report(ASSETS / "hot-60.gate.report.json")
    before = headline.head(report)
    console = Console(file=StringIO(), width=80)
    table.show(report.model_copy(update={"verdict": "unresolved"}), console, begun=before)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("layers and depths changed what stands above, which is now:\n\n")
    assert " UNRESOLVED   rho" in text
    console = Console(file=StringIO(), width=80)
    table.show(report, console, begun=before)
    whole = Console(file=StringIO(), width=80)
    table.show(report, whole)
    rest = console.file.getvalue()  # type: ignore[attr-defined]
    assert rest.startswith("layer ")
    assert whole.file.getvalue().endswith(rest)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_reader_that_has_gone_stops_no_measurement(run: Path, tmp_path: Path) -> None:
    command = shlex.join([*CURV, "analyze", str(run), *QUICK, "--no-depths", "-q", "-o", str(tmp_path / "r.json")])
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],  # noqa: S607
        capture_output=True, text=True, timeout=120, check=False, env=variables(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert load_report(tmp_path / "r.json").layers


# --- budget and estimate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["analyze", "track"])
def test_a_budget_that_does_not_do_is_three(run: Path, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = curv(verb, run, *QUICK, "--budget", "0.000001s", "-o", tmp_path / "r.json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].endswith("nothing was measured; raise --budget")
    assert not (tmp_path / "r.json").exists()
    assert curv(verb, run, "--budget", "soon").returncode == 2


@pytest.mark.parametrize("verb", ["analyze", "track"])
def test_an_estimate_is_a_table_or_json(run: Path, verb: str, tmp_path: Path) -> None:
    done = curv(verb, run, *QUICK, "--estimate", "--format", "json", "-q", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["seconds"] > found["seconds_per_product"] > 0
    assert set(found["memory_bytes"]) == {"parameters", "graphs", "basis"}
    assert found.get("checkpoints") == (2 if verb == "track" else None)
    shown = curv(verb, run, *QUICK, "--estimate", "-q", XDG_CACHE_HOME=str(tmp_path)).stdout
    assert re.search(r"^seconds +\d", shown, re.MULTILINE)
    assert re.search(r"^  graphs +[\d.]+ MiB", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("analyze", "--estimate", "-o", "x.json"), "takes no --output"),
        (("analyze", "--estimate", "--plot", "x.png"), "takes no --plot"),
        (("track", "--estimate", "--budget", "9"), "takes no --budget"),
        (("analyze", "--estimate", "--format", "markdown"), "has no --format markdown"),
        (("track", "--estimate", "--format", "csv"), "has no --format csv"),
        (("analyze", "--truncated", "--no-truncated"), "contradict"),
        (("analyze", "--truncated", "--no-depths"), "drop --no-depths, or --truncated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_contradicts_is_refused(run: Path, arguments: tuple[str, ...], said: str) -> None:
    done = curv(arguments[0], run, *arguments[1:])
    assert done.returncode == 2
    assert said in done.stderr
