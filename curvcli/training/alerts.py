"""Who is told when a record's level rises: the trackers of experiments, a webhook, and a file that the job may react to."""

from __future__ import annotations

import atexit
import json
import logging
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from curvcli.documents import Alert, LevelName, Record, load_alert, write_whole
from curvcli.errors import InputError, UsageError
from curvcli.judge.level import alert_of
from curvcli.training.log import active_run

logger = logging.getLogger("curvcli")

Alarm = Callable[[Alert], None]
LEVELS: tuple[LevelName, ...] = ("INFO", "WARN", "ERROR")
CALM = 3  # records at INFO in a row after which an alert is over, and the next one is told anew
AGAIN = 25  # records of a level that lasts after which it is told again
WAITING = 8  # posts under way at once, at most


class Alerts:
    """Tells of a level when it rises, while it lasts every `AGAIN` records, and once when it is over.

    Args:
        alarms: called with each alert. What one raises is logged and ends nothing.
        reaction: file that holds the newest record's alert, whatever its level, replaced whole.

    Raises:
        UsageError: the reaction file exists and holds something else.
    """

    def __init__(self, alarms: tuple[Alarm, ...] = (), reaction: Path | None = None) -> None:
        self.alarms, self.reaction = alarms, reaction
        self._told: LevelName = "INFO"
        self._calm = self._since = 0
        if reaction is not None and reaction.exists():
            # What it says is of the job before. A file of another kind is somebody's.
            try:
                load_alert(reaction)
            except InputError as error:
                raise UsageError(
                    f"{reaction} exists and is no reaction file", hint="name another: a tracker replaces it at each record"
                ) from error
            reaction.unlink(missing_ok=True)

    def see(self, record: Record) -> Alert:
        """A new record; its alert, whether or not anybody is told."""
        alert = alert_of(record)
        if self.reaction is not None:
            # First, since an alarm may be slow, and the job reads this file at its next step.
            self._try("the reaction file", lambda: _write(self.reaction, alert))
        if self._worth(alert.level):
            (logger.error if alert.level == "ERROR" else logger.warning if alert.level == "WARN" else logger.info)(
                "step %d: %s", alert.step, alert.text
            )
            for alarm in self.alarms:
                self._try("an alert", lambda alarm=alarm: alarm(alert))  # type: ignore[misc]
        return alert

    def _worth(self, level: LevelName) -> bool:
        """Whether this level is told, after those before."""
        if level == "INFO":
            self._calm += 1
            # Not at the first calm record: a rho that hovers about a limit would alert every time.
            if self._told != "INFO" and self._calm >= CALM:
                self._told, self._since = "INFO", 0
                return True
            return False
        self._calm = 0
        self._since += 1
        # Above the highest level told so far: ERROR, WARN, ERROR is one alert.
        if LEVELS.index(level) > LEVELS.index(self._told) or self._since >= AGAIN:
            self._told, self._since = level, 0
            return True
        return False

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever somebody's server or library does, the job goes on
            logger.warning("%s could not be given: %s", what, error)


def read_reaction(path: Path | str, *, after: int = -1) -> Alert | None:
    """What the reaction file says, for a job to read at a step boundary; None where it says nothing new.

        said = read_reaction("run/reaction.json", after=obeyed)
        if said is not None and said.factor is not None:
            obeyed = said.step
            for group in optimizer.param_groups:
                group["lr"] *= said.factor

    The file is replaced whole at each record, so that it is never half written. Whether to obey is the job's own affair: the
    tracker changes nothing. On several ranks read it on one, and broadcast what it says.

    Args:
        after: step of the last alert that was obeyed, or the step at which the job began: what is not newer is None.
    """
    try:
        alert = load_alert(Path(path))
    except InputError as error:
        if Path(path).exists():
            logger.warning("the reaction file was not read: %s", error)
        return None
    return alert if alert.step > after else None


def webhook(url: str, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None) -> Alarm:
    """Posts each alert as JSON (curv.alert/1) to a URL, from a thread of its own.

    The job never waits for it: where `WAITING` posts are under way the alert is dropped, and what fails is logged, by the
    host's name alone, as a webhook's path is often its secret. Redirects are not followed. The end of the process waits for
    what is under way, `timeout` seconds in all.

    Args:
        timeout: seconds that a connection may take, and each wait for an answer.
        headers: more of them, as {"Authorization": "Bearer ..."}.

    Raises:
        UsageError: the URL is neither http nor https, or names no host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("a webhook's URL must be http:// or https:// and name a host", hint="it is posted to as it stands")
    return _Webhook(url, parts.hostname, timeout, {"Content-Type": "application/json", **(headers or {})})


class _Webhook:
    def __init__(self, url: str, host: str, timeout: float, headers: dict[str, str]) -> None:
        self.url, self.host, self.timeout, self.headers = url, host, timeout, headers
        self._threads: list[threading.Thread] = []
        atexit.register(self.wait)

    def __call__(self, alert: Alert) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= WAITING:
            logger.warning("an alert to %s was dropped: %d are under way", self.host, WAITING)
            return
        body = json.dumps(json.loads(alert.to_json())).encode()  # without a document's indentation
        # A daemon: a server that never answers may not hold up the end of the process.
        thread = threading.Thread(target=self._post, args=(body,), name="curv-webhook", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Until what is under way has ended, or `timeout` seconds have passed."""
        until = time.monotonic() + self.timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _post(self, body: bytes) -> None:
        try:
            request = urllib.request.Request(self.url, data=body, headers=self.headers, method="POST")  # noqa: S310
            with urllib.request.build_opener(Straight).open(request, timeout=self.timeout):
                pass
        except Exception as error:  # a thread's traceback on the job's terminal helps nobody
            # The class alone: an error's own words may have the URL in them.
            logger.warning("an alert to %s could not be posted: %s", self.host, type(error).__name__)


class Straight(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a POST would become a GET, somewhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None, which makes an error of it."""
        return


def wandb(alert: Alert) -> None:
    """An alert of the active Weights & Biases run, where the job has one; wandb is not imported for it."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.alert(title=_title(alert), text=_text(alert), level=alert.level)


def tensorboard(writer: Any) -> Alarm:
    """A text under curvature/alert, and the level as a scalar (0, 1, 2), to a torch.utils.tensorboard.SummaryWriter."""

    def tell(alert: Alert) -> None:
        writer.add_text("curvature/alert", f"**{_title(alert)}**: {_text(alert)}", alert.step)
        writer.add_scalar("curvature/level", LEVELS.index(alert.level), alert.step)

    return tell


def mlflow(run_id: str | None = None) -> Alarm:
    """Tags curvature.level and curvature.alert of a run, and the level as a metric (0, 1, 2); MLflow knows no alerts.

    Args:
        run_id: the active run's by default.
    """

    def tell(alert: Alert) -> None:
        import mlflow

        run = active_run(mlflow, run_id)
        client = mlflow.MlflowClient()
        for key, said in (("curvature.level", alert.level), ("curvature.alert", f"{_title(alert)}: {_text(alert)}")):
            client.set_tag(run, key, said, synchronous=False)
        mlflow.log_metric("curvature/level", LEVELS.index(alert.level), step=alert.step, run_id=run, synchronous=False)

    return tell


def trackio(alert: Alert) -> None:
    """An alert of the active trackio run."""
    import trackio

    trackio.alert(title=_title(alert), text=_text(alert), level=trackio.AlertLevel[alert.level])


def _title(alert: Alert) -> str:
    return f"curv {alert.level} at step {alert.step}"


def _text(alert: Alert) -> str:
    lower = "" if alert.lr is None else f" to {alert.lr:.2g}"
    return f"{alert.text}; {alert.action}{lower}"


def _write(path: Path | None, alert: Alert) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, alert.to_json().encode())
