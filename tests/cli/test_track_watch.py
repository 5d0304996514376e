"""`curv track --watch`: lines as checkpoints appear, documents written anew, commands and webhooks told."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from real import refusal
from terminal import Terminal
from tiny import run_of
from tracks import course_of

from curvcli.analysis.follow import Event, Look
from curvcli.cli.following import watched
from curvcli.cli.notify import check, notify
from curvcli.cli.progress import Told
from curvcli.cli.track import _write
from curvcli.documents import load_track
from curvcli.errors import UsageError

TOLD: dict[str, Any] = {"event": "gate", "message": "run, step 5: the gate is broken", "step": 5}


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response({"/broken": 500, "/moved": 302}.get(self.path, 204))
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            got.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", got
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_a_webhook_gets_the_event(server: tuple[str, list[Any]]) -> None:
    address, got = server
    assert notify(f"{address}/hook", TOLD) is None
    assert got == [{"text": TOLD["message"], **TOLD}]
    assert "500" in notify(f"{address}/broken", TOLD)
    assert "302" in notify(f"{address}/moved", TOLD), "a POST that is redirected would be a GET, and nobody told"
    assert "/elsewhere" not in got
    assert "failed" in notify("http://127.0.0.1:9/", TOLD)


def test_a_command_gets_it_on_stdin_and_in_words_and_no_shell_sees_it(tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "said = [json.load(sys.stdin), os.environ['CURV_EVENT'], os.environ['CURV_MESSAGE']]\n"
        "Path(sys.argv[1]).write_text(json.dumps(said))\n"
    )
    evil = {**TOLD, "message": f"$(touch {tmp_path}/owned); `id`\n\x1b[2J"}
    assert notify(f"{sys.executable} {script} '{tmp_path}/it is here.json'", evil) is None
    said, event, message = json.loads((tmp_path / "it is here.json").read_text())
    assert (said, event) == (evil, "gate")
    assert "\x1b" not in message
    assert not (tmp_path / "owned").exists()
    assert notify("false", TOLD) == "--notify false ended with exit code 1"
    assert "failed" in notify("/no/such/program", TOLD)


@pytest.mark.parametrize("target", ["", "ftp://a/b", "file:///etc/passwd", "it 'is open", "http://"])
def test_what_is_no_target_is_refused_before_the_work(target: str) -> None:
    with pytest.raises(UsageError, match="--notify"):
        check(target)


def test_lines_documents_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = course_of([1.0]), course_of([1.0, 1.1])
    looks = [
        Look(one), Look(None, trouble="it is gone"), Look(two, events=[Event("verdict", "run: hot now", "stable", "hot")])
    ]  # fmt: skip
    watched(iter(looks), ["false"], tmp_path / "t.json", tmp_path / "t.svg", _write, Told())
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 3, "a point is told once"
    assert lines[-1] == "! run: hot now"
    assert said.err.splitlines() == [
        "curv: it is gone; still watching", "curv: --notify false ended with exit code 1; still watching"
    ]  # fmt: skip
    assert load_track(tmp_path / "t.json") == two
    assert (tmp_path / "t.svg").exists()


def test_a_document_that_cannot_be_written_does_not_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    looks = [Look(course_of([1.0])), Look(course_of([1.0, 1.1]))]
    watched(iter(looks), [], tmp_path / "taken" / "t.json", None, _write, Told())
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert [line.endswith("; still watching") for line in said.err.splitlines()] == [True, True]
    assert "cannot write" in said.err


@pytest.mark.parametrize(
    "words", ["--watch --budget 2m", "--watch --estimate", "--watch --format csv", "--notify true", "--interval 3"]
)
def test_options_that_do_not_go_together(words: str) -> None:
    assert "--watch" in refusal("track", "run", *words.split())


@pytest.mark.slow
def test_in_a_terminal_until_it_is_interrupted(tmp_path: Path) -> None:
    run = run_of(tmp_path, 3)
    terminal = Terminal(
        80, 24, "track", str(run), "--watch", "--interval", "0.2", "--tokens", "64", "--max-hvps", "3", "--mode", "kept",
        "--device", "cpu", "-o", str(tmp_path / "t.json"), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    shown = terminal.until("step 3: verdict", seconds=40)
    assert "\nstep 3: verdict" in f"\n{shown}", "it begins a line of its own"
    assert terminal.interrupt(signal.SIGINT) == 130
    assert [p.step for p in load_track(tmp_path / "t.json").points] == [3]
