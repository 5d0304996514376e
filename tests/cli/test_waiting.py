"""How torch's threads wait for each other in a process of curv's own."""

from __future__ import annotations

import os

import pytest

from curvcli import cli


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")  # so that it is put back
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen: list[str | None] = []
    monkeypatch.setattr(cli, "app", lambda prog_name: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.setattr(cli, "launched", lambda: False)
    cli.main()
    assert seen == [given or "passive"]
