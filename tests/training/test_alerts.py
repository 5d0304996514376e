"""Alerts: when somebody is told, the webhook against a real server, the reaction file, and the trackers of experiments."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from logs import record
from pace import in_time
from warmup_job import Job, batch

from curvcli.documents import Alert, Record
from curvcli.errors import UsageError
from curvcli.judge.level import alert_of
from curvcli.training import CurvatureTracker, alerts, log, read_reaction

BAD, GOOD, HOT = record(10, 2.0), record(11, 0.5), record(12, 1.3, odds=0.5)


def test_a_level_is_told_when_it_rises_and_once_when_it_is_over() -> None:
    told: list[Alert] = []
    seen = alerts.Alerts((told.append,))

    def see(*records: Record) -> list[str]:
        told.clear()
        for one in records:
            seen.see(one)
        return [alert.level for alert in told]

    assert see(GOOD, GOOD) == []
    assert see(HOT, HOT, BAD, BAD, HOT, BAD) == ["WARN", "ERROR"]
    assert see(GOOD, GOOD, BAD) == [], "it is not over yet"
    assert see(GOOD, GOOD, GOOD, GOOD) == ["INFO"]
    assert see(*[BAD] * (alerts.AGAIN + 1)) == ["ERROR", "ERROR"]
    assert see(*[record(5, 99.0, early=True)] * 2) == []


def test_what_an_alarm_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Alert] = []

    def broken(alert: Alert) -> None:
        raise OSError("no network")

    with caplog.at_level(logging.WARNING, "curvcli"):
        alerts.Alerts((broken, told.append)).see(BAD)
    assert [alert.step for alert in told] == [10]
    assert "step 10: rho is 2: unstable" in caplog.text
    assert "an alert could not be given: no network" in caplog.text


@contextmanager
def server(
    status: int = 200, *, delay: float = 0.0, headers: dict[str, str] | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A local server that keeps what was posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
            time.sleep(delay)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            got.append({"path": self.path})

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{made.server_port}/hook/secret", got
        finally:
            made.shutdown()


def test_webhook_posts_json() -> None:
    with server() as (url, got):
        alarm = alerts.webhook(url, headers={"Authorization": "Bearer x"})
        alerts.Alerts((alarm,)).see(BAD)
        alarm.wait()  # type: ignore[attr-defined]
    (post,) = got
    assert Alert.model_validate(post["body"]) == alert_of(BAD)
    assert (post["headers"]["Content-Type"], post["headers"]["Authorization"]) == ("application/json", "Bearer x")


@pytest.mark.parametrize(("status", "more"), [(500, {}), (404, {}), (302, {"Location": "http://127.0.0.1:1/other"})])
def test_webhook_that_is_refused_is_logged_without_its_secret(
    status: int, more: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with server(status, headers=more) as (url, got):
        alarm = alerts.webhook(url)
        alarm(alert_of(BAD))
        alarm.wait()  # type: ignore[attr-defined]
    assert [post["path"] for post in got] == ["/hook/secret"], "redirects are not followed"
    assert "an alert to 127.0.0.1 could not be posted: HTTPError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.slow
def test_webhook_that_never_answers_blocks_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with server(delay=15) as (url, got):
        alarm = alerts.webhook(url, timeout=4)
        started = time.monotonic()
        for _ in range(alerts.WAITING + 3):
            alarm(alert_of(BAD))
        assert time.monotonic() - started < 3.9, "a post that is waited for takes longer"
        assert caplog.text.count("was dropped: 8 are under way") == 3
        alarm.wait()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 12
        while "could not be posted: TimeoutError" not in caplog.text and time.monotonic() - started < 12:
            time.sleep(0.01)
    assert "could not be posted: TimeoutError" in caplog.text
    assert len(got) == alerts.WAITING


@pytest.mark.slow
def test_a_process_ends_after_its_last_alert_and_not_much_later() -> None:
    script = (
        "import sys, time\nfrom logs import record\nfrom curvcli.training.alerts import webhook\n"
        "from curvcli.judge.level import alert_of\nwebhook(sys.argv[1], timeout=0.5)(alert_of(record(3, 9.0)))\n"
    )
    support = str(Path(__file__).parents[1] / "support")
    with server(delay=5) as (url, got):
        made = f"import sys; sys.path.insert(0, {support!r})\n{script}print('end', time.monotonic(), flush=True)"
        done = subprocess.run([sys.executable, "-c", made, url], capture_output=True, text=True, check=True)
        assert in_time(time.monotonic() - float(done.stdout.split()[-1]), 4)
    assert [post["body"]["step"] for post in got] == [3]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "http:///x", "hook", ""])
def test_webhook_takes_http_alone(url: str) -> None:
    with pytest.raises(UsageError, match="must be http"):
        alerts.webhook(url)


def test_the_reaction_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "deep" / "reaction.json"
    assert read_reaction(path) is None
    seen = alerts.Alerts((), path)
    seen.see(BAD)
    said = read_reaction(path)
    assert said == alert_of(BAD)
    assert (said.level, said.action, said.lr) == ("ERROR", "lower the lr", pytest.approx(4e-4))
    assert read_reaction(path, after=9) == said
    assert read_reaction(path, after=10) is None
    seen.see(GOOD)
    assert read_reaction(path).action == "go on"
    assert [p.name for p in path.parent.iterdir()] == ["reaction.json"]
    alerts.Alerts((), path)
    assert not path.exists(), "what a job before said is not obeyed by the next"
    path.write_text("{half")
    assert read_reaction(path) is None
    assert "the reaction file was not read" in caplog.text
    with pytest.raises(UsageError, match="exists and is no reaction file"):
        alerts.Alerts((), path)
    assert path.read_text() == "{half"


def test_a_reaction_file_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    alerts.Alerts((), tmp_path / "taken" / "reaction.json").see(BAD)
    assert "the reaction file could not be given" in caplog.text


def test_a_job_that_reacts(tmp_path: Path) -> None:
    """Learning rate far too high: the file says so, and a job that obeys comes under the edge."""
    job, path = Job().run(range(24)), tmp_path / "reaction.json"
    told: list[Alert] = []
    watcher = CurvatureTracker(
        job.model, job.optimizer, lambda m, ids: m(input_ids=ids, labels=ids).loss,
        probe=[batch(99)], max_hvps=60, alerts=[told.append], reaction=path,
    )  # fmt: skip
    for group in job.optimizer.param_groups:
        group["lr"] = 6.0
    first = watcher.step(24)
    assert first.rho > 1.25
    assert [alert.level for alert in told] == ["ERROR"]
    said = read_reaction(path, after=0)
    assert said.factor is not None
    for group in job.optimizer.param_groups:
        group["lr"] *= said.factor
    after = watcher.step(25)
    assert after.rho < 1
    assert read_reaction(path, after=said.step).action == "go on"


def test_wandb_is_told_where_a_run_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    alerts.wandb(alert_of(BAD))
    run = SimpleNamespace(alert=lambda **call: calls.append(call))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    alerts.wandb(alert_of(BAD))
    assert calls == [
        {"title": "curv ERROR at step 10", "text": "rho is 2: unstable; lower the lr to 0.0004", "level": "ERROR"}
    ]


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with wandb.init(mode="offline", dir=str(tmp_path), project="curv", settings=wandb.Settings(console="off")) as run:
        log.wandb(BAD)
        alerts.wandb(alert_of(BAD))
        assert run.summary["curvature/rho"] == 2.0


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        log.tensorboard(writer)(BAD)
        alerts.tensorboard(writer)(alert_of(BAD))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("curvature/rho")] == [(10, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("curvature/level")] == [(10, 2.0)]
    (text,) = events.Tensors("curvature/alert/text_summary")
    assert b"rho is 2: unstable; lower the lr to 0.0004" in text.tensor_proto.string_val[0]


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with pytest.raises(RuntimeError, match="no active run"):
        log.mlflow()(BAD)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    mlflow.create_experiment("e", artifact_location=str(tmp_path))
    mlflow.set_experiment("e")
    with mlflow.start_run() as run:
        log.mlflow()(BAD)
        alerts.mlflow()(alert_of(BAD))
    mlflow.flush_async_logging()
    data = mlflow.get_run(run.info.run_id).data
    assert (data.metrics["curvature/rho"], data.metrics["curvature/level"]) == (2.0, 2.0)
    assert data.tags["curvature.level"] == "ERROR"
    assert "lower the lr" in data.tags["curvature.alert"]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="curv", embed=False)
    log.trackio(BAD)
    alerts.trackio(alert_of(BAD))
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = SQLiteStorage.get_alerts("curv")
    assert (found["title"], found["level"]) == ("curv ERROR at step 10", "error")


@pytest.mark.parametrize("made_before", [True, False])
def test_alerts_are_of_the_first_rank_alone(made_before: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def second() -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    job, told = Job().run(range(2)), list[Alert]()
    if not made_before:
        second()
        (tmp_path / "r.json").write_text(alert_of(BAD).to_json())
    watcher = CurvatureTracker(
        job.model, job.optimizer, lambda m, ids: m(input_ids=ids, labels=ids).loss,
        probe=[batch(9)], max_overhead=0.9, alerts=[told.append], reaction=tmp_path / "r.json",
    )  # fmt: skip
    second()
    job.model.lm_head.weight.data.fill_(float("nan"))
    assert watcher.step(1) is None, "under a budget the first rank measures alone"
    watcher.budget = None
    assert watcher.step(2).status == "non-finite"
    assert told == []
    assert (tmp_path / "r.json").exists() is not made_before, "nor written, nor taken away: it is the first rank's"
