"""People and terminals: completion in a real bash, colours, narrow terminals, pipes, Ctrl-C, and how fast verbs start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import typer
from places import ASSETS, ROOT
from real import CURV, curv
from rich.console import Console
from schedules import schedule
from terminal import Terminal
from tracks import course

from curvcli.cli.app import exit_codes
from curvcli.documents import Finding, load_report
from curvcli.errors import InputError
from curvcli.render import schedule_table, table
from curvcli.render.facts import show_facts

REPORT, CALM = ASSETS / "hot-60.gate.report.json", ASSETS / "calm-60.gate.report.json"
LOG = (
    '{"schema":"curv.curvature/1","step":5,"loss":3.2,"lr":0.001,"eigenvalue":9000.0,"rho":1.5,"residual":12.0,'
    '"update_ratio":null,"active_depth":4,"hvps":12,"seconds":1.5,"status":"converged","message":null}\n'
)
COLOUR = re.compile(rb"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|4[0-7]|38|48)[;m]")
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\].*?\x07)")

SLOW = pytest.mark.slow  # a process each, of which the fast tests have some
# Verbs that print something for people, and the exit code of each.
SHOWN = {
    "analyze --help": 0,
    "gate --help": 0,
    "gate {report} --max-rho 1 --max-layer-rho 0.8 --max-surge 2 --baseline {calm} --min-tokens 10": 1,
    "gate --explain --max-rho 1 --baseline {calm}": 0,
    "schedule --depth 48 --lr 0.003 --lr-schedule cosine --total-steps 20000": 0,
    "schedule --from {report} --lr 0.003 --lr-schedule cosine --warmup-steps 100 --total-steps 600": 0,
    "inspect {samples}/hot": 0,
    "watch {log} --once": 0,
}


@pytest.fixture
def words(samples: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "log.jsonl").write_text(LOG.replace(',"message":null', ""))
    return {"report": REPORT, "calm": CALM, "samples": samples, "log": tmp_path / "log.jsonl"}


def filled(line: str, words: dict[str, Path]) -> list[str]:
    return [word.format(**words) for word in line.split()]


@pytest.mark.parametrize("line", SHOWN)
def test_a_file_gets_no_escapes(line: str, words: dict[str, Path]) -> None:
    done = curv(*filled(line, words), TERM="xterm-256color")
    assert done.returncode == SHOWN[line], done.stderr
    assert len(done.stdout.splitlines()) > 1
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


NARROW = [*SHOWN][2:6:2] + [*SHOWN][-1:]


@pytest.mark.parametrize("line", [line if line in NARROW else pytest.param(line, marks=SLOW) for line in SHOWN])
def test_a_narrow_terminal_without_colour(line: str, words: dict[str, Path]) -> None:
    terminal = Terminal(60, 200, *filled(line, words), NO_COLOR="1")
    assert terminal.finish() == SHOWN[line]
    assert not COLOUR.search(terminal.raw)
    text = ESCAPE.sub("", terminal.raw.decode())
    assert max(len(part.rstrip("\r")) for part in text.split("\n")) <= 60
    assert "…" not in text


def test_a_terminal_gets_colour(words: dict[str, Path]) -> None:
    terminal = Terminal(80, 60, *filled("gate {report} --max-rho 1", words))
    assert terminal.finish() == 1
    assert COLOUR.search(terminal.raw)


@pytest.mark.parametrize("columns", [50, 79, 80, 140])
def test_help_names_options_whole_at_any_width(columns: int) -> None:
    text = curv("schedule", "--help", COLUMNS=str(columns)).stdout
    for option in ("--lr-schedule", "--warmup-steps", "--total-steps", "--min-lr-ratio", "--decay-steps", "--output"):
        assert re.search(rf"{option}\b", text), option
    assert max(map(len, text.splitlines())) <= columns
    assert ("╭" in text) == (columns >= 80)


def test_control_characters_of_a_document_do_not_reach_the_terminal() -> None:
    evil = "a\x1b]0;owned\x07\x1b[2Jb\rc [red]d[/red]"
    report = load_report(REPORT)
    layers = [layer.model_copy(update={"name": evil}) for layer in report.layers]
    finding = Finding(code=evil, severity="info", message=evil)
    checkpoint = report.checkpoint.model_copy(update={"path": evil})
    plan = schedule(4, (0, [0, 1]), (5, range(4)))
    source = plan.provenance.model_copy(update={"checkpoint": evil})
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    table.show(report.model_copy(update={"layers": layers, "findings": [finding], "checkpoint": checkpoint}), console)
    schedule_table.show(plan.model_copy(update={"findings": [finding], "provenance": source}), console)
    show_facts({evil: {evil: evil}}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not {"\x1b", "\x07", "\r"} & set(re.sub(r"\x1b\[\d*(;\d+)*m", "", text))
    assert text.count("d[/red]") >= 13


# --- pipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("gate {report} --max-rho 1", 1),
        ("gate {report} --max-rho 3 --format json", 0),
        ("schedule --depth 8 --format json", 0),
        ("report {report}", 0),
        pytest.param("inspect {samples}/hot", 0, marks=SLOW),
        *(pytest.param(line, code, marks=SLOW) for line, code in SHOWN.items() if not line.startswith(("watch", "inspect"))),
        pytest.param("--version", 0, marks=SLOW),
        pytest.param("gate {report} --max-rho 3", 0, marks=SLOW),
        pytest.param("gate {report} --max-rho 1 --format json", 1, marks=SLOW),
        pytest.param("schema report", 0, marks=SLOW),
    ],
)
def test_a_reader_that_has_gone_changes_no_exit_code(line: str, code: int, words: dict[str, Path]) -> None:
    """rich and typer would end with 1, which says that a gate's rule is broken."""
    command = shlex.join([*CURV, *filled(line, words)])
    # `true` has gone long before the first word is printed.
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],  # noqa: S607
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.slow
def test_verify_does_not_pass_what_nobody_reads(samples: Path, tmp_path: Path) -> None:
    plan = tmp_path / "s.json"
    assert curv("schedule", "--depth", 12, "-o", plan).returncode == 0
    command = shlex.join([*CURV, "schedule", "verify", str(plan), str(samples / "calm")])
    done = subprocess.run(["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], timeout=120, check=False)  # noqa: S607
    assert done.returncode == 1


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_a_terminal(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = ["--tokens", "8192", "-o", str(out / "r.json"), "--plot", str(out / "p.png")]
    terminal = Terminal(80, 24, "analyze", str(samples / "hot"), *options)
    terminal.until("%")
    terminal.type("\x03")
    assert terminal.finish() == 130
    assert "curv: interrupted" in "\n".join(terminal.screen.display)
    assert "Traceback" not in terminal.raw.decode()
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l"), "the cursor is back"
    assert "━" not in "\n".join(terminal.screen.display), "the bar is gone"
    assert not list(out.iterdir())


@pytest.mark.parametrize("wrong", [ImportError("numpy is half imported"), InputError("x", hint="y"), RuntimeError("C")])
def test_ctrl_c_that_a_library_turned_into_an_error_is_130(
    wrong: Exception, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # A test run in the background has it ignored, which is kept (the test below).
    before, ours = signal.default_int_handler, signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))

    def loading() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise wrong from None

    with pytest.raises(typer.Exit) as ended, exit_codes():
        loading()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "curv: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(typer.Exit) as ended, exit_codes():
        raise wrong
    assert ended.value.exit_code == 2


def test_a_job_in_the_background_keeps_ignoring_it(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom curvcli.cli.app import exit_codes\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with exit_codes():\n    os.kill(os.getpid(), signal.SIGINT)\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")


# --- starting --------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy")


# A page has pictures, and matplotlib draws them; nothing that reads a document imports torch. The light ones first, for all
# are asked in one process.
LIGHT = (
    "--help", "gate --help", "gate {report} --max-rho 3", "gate {report} --max-rho 3 --format junit", "schedule --depth 12",
    "schedule --from {report} --lr 0.003 --warmup-steps 10 --total-steps 600", "schema track", "watch {log} --once",
)  # fmt: skip
DRAWN = ("report {report}", "report {track}")


def test_what_reads_documents_starts_light(words: dict[str, Path], tmp_path: Path) -> None:
    (track := tmp_path / "track.json").write_text(course().to_json())
    lines = {line: filled(line, {**words, "track": track}) for line in (*LIGHT, *DRAWN)}
    script = (
        "import sys\nfrom curvcli.cli import main\n"
        f"for line, arguments in {lines!r}.items():\n"
        "    sys.argv = ['curv', *arguments]\n"
        "    try: main()\n    except SystemExit as end: assert not end.code, (line, end.code)\n"
        f"    print(line, sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    expected = [f"{line} []" for line in LIGHT] + [f"{line} ['matplotlib', 'numpy']" for line in DRAWN]
    assert (done.returncode, done.stderr.splitlines()) == (0, expected)


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Terminal:
    """An interactive bash with a home of its own and `curv` on its PATH."""
    if not shutil.which("bash"):
        pytest.skip("no bash is installed: completion was not tried in one")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "curv"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(CURV)} "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".bashrc").write_text("PS1='> '\n")
    environment = {
        "HOME": str(tmp_path), "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "INPUTRC": "/dev/null",
    }  # fmt: skip
    terminal = Terminal(100, 40, "--noprofile", "-i", command=["bash"], **environment)
    terminal.until("> ")
    return terminal


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=SLOW) for how in ("source <(curv --show-completion bash)", "curv --install-completion")]
)
def test_completion_in_bash(shell: Terminal, how: str) -> None:
    shell.type(f"{how}; echo do''ne\n")
    shell.until("done")
    if "install" in how:
        shell.type("exec bash --noprofile -i\n")
        shell.type("echo re''started\n")
        shell.until("restarted")
    shell.type("curv ana\t")
    shell.until("curv analyze ")
    shell.type("x --max-h\t")
    shell.until("curv analyze x --max-hvps ")
    shell.type("3 --format mark\t")
    shell.until("--max-hvps 3 --format markdown ")
    shell.type("\x15curv schedule ver\t")
    shell.until("curv schedule verify ")
    shell.type("\x15exit\n")
    assert shell.finish() == 0
