"""How a process knows that it is one of several ranks, and what it does alone."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
import typer

from curvcli.analysis import launch
from curvcli.analysis.checkpoint import _device
from curvcli.cli.app import exit_codes
from curvcli.curvature.ranks import Alone, within
from curvcli.errors import CurvError, UsageError


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 1 of 2."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


def test_one_process_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launch.launched()
    assert (launch.leads(), launch.rank(), launch.agreed_code(3), launch.speaking(), launch.decides()) == (
        True,
        "",
        3,
        False,
        True,
    )
    with launch.joined() as ranks, launch.apart(), launch.together():
        assert ranks is None


@pytest.mark.slow
def test_ranks_that_do_not_come_are_one_line(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch, "COME", 1)
    with pytest.raises(CurvError, match=r"not all 2 ranks came within 1 s.*unset RANK and WORLD_SIZE"), launch.joined():
        pass


def test_an_error_of_one_rank_alone_is_printed_there_and_one_that_all_know_by_rank_0(
    second: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for known in (False, True):
        error = CurvError("no good")
        if known:
            error.said_by_ranks = True  # type: ignore[attr-defined]
        with pytest.raises(typer.Exit), exit_codes():
            raise error
        said = capsys.readouterr().err
        assert said == ("" if known else "curv: error: rank 1 of 2: no good\n")


def test_without_ranks_nothing_of_torch_is_imported() -> None:
    code = "import sys, curvcli.cli, curvcli.analysis.launch as l\nwith l.joined(): assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rank_takes_its_own_gpu_and_more_ranks_than_gpus_are_refused(
    second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    pair = Alone()
    monkeypatch.setattr(pair, "world", 2, raising=False)
    monkeypatch.setattr(pair, "here", 2, raising=False)
    with within(pair):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert str(_device("cuda")) == "cuda:1"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(UsageError, match="2 ranks on this machine, and 1 GPUs"):
            _device("cuda")


def test_progress_is_of_rank_0(second: None) -> None:
    from curvcli.cli.progress import Told, reporting

    with reporting(quiet=False, verbose=True) as told:
        assert type(told) is Told
