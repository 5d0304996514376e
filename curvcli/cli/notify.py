"""Telling somebody: a command of the user's, or a webhook."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

from curvcli.errors import UsageError, plain

_SECONDS = 30.0


def check(target: str) -> None:
    """Raises UsageError where a target is neither a webhook's address nor a command."""
    if "://" in target and not _is_webhook(target):
        raise UsageError(f"--notify {target!r:.80} is no webhook", hint="an http or https address, or a command")
    try:
        words = shlex.split(target)
    except ValueError as error:
        raise UsageError(f"--notify {target!r:.80}: {error}", hint="quote it as a shell would") from error
    if not words:
        raise UsageError("--notify is empty", hint="an http or https address, or a command")


def notify(target: str, told: Mapping[str, Any]) -> str | None:
    """Tell: POST the event as JSON, or run the command, with the JSON on its stdin and CURV_EVENT and CURV_MESSAGE set.

    No shell sees the event: names in a run are anybody's text.

    Returns:
        None, or why it could not be told.
    """
    body = json.dumps(told).encode()
    # Of several targets: which. A webhook's path is its secret.
    name = f"--notify {plain(str(urlsplit(target).hostname) if _is_webhook(target) else shlex.split(target)[0]):.80}"
    try:
        if _is_webhook(target):
            # "text" is what chat services show.
            content = json.dumps({"text": told["message"], **told}).encode()
            request = Request(target, content, {"Content-Type": "application/json", "User-Agent": "curv"}, method="POST")  # noqa: S310
            from curvcli.training.alerts import Straight  # torch along with it, which who measures has imported

            with build_opener(Straight).open(request, timeout=_SECONDS):
                return None
        # The command may print these on a terminal: no control characters.
        words = {"CURV_EVENT": str(told["event"]), "CURV_MESSAGE": plain(str(told["message"]))}
        done = subprocess.run(  # noqa: S603  (the user's own command)
            shlex.split(target), input=body, env={**os.environ, **words}, timeout=_SECONDS, check=False,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{name} took longer than {_SECONDS:g} s"
    except (OSError, URLError, ValueError) as error:
        return f"{name} failed: {plain(str(error))[:200]}"
    return f"{name} ended with exit code {done.returncode}" if done.returncode else None


def _is_webhook(target: str) -> bool:
    parts = urlsplit(target)
    return parts.scheme in ("http", "https") and bool(parts.netloc)
