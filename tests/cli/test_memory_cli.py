"""A command that runs out of memory says so, with a remedy, in one line and exit code 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from real import curv
from tiny import run_of
from torch import Tensor, nn

from curvcli.analysis.checkpoint import open_for_analysis
from curvcli.analysis.options import Options
from curvcli.cli.app import exit_codes
from curvcli.data.tasks import causal_loss
from curvcli.errors import OutOfMemoryError
from curvcli.models.registered import build


def ask() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_allocators_error_is_no_internal_one(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as raised, exit_codes():
        raise error
    assert raised.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("curv: error: out of memory: ")
    assert "--batch-size" in said
    assert said.count("\n") == 1


def test_a_limit_that_does_not_do_is_said_before_anything_is_solved(run: Path) -> None:
    done = curv("analyze", run, "--tokens", "64", "--sequence-length", "16", "--memory", "64MiB", "--quiet")
    assert done.returncode == 2
    assert "GiB of memory at least, the limit is 0.06 GiB" in done.stderr
    assert "--sequence-length" in done.stderr
    assert curv("gate", run, "--memory", "much", "--max-rho", "1").returncode == 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of two narrow blocks in place of the sample's eight."""
    return run_of(tmp_path, 3) / "checkpoint-3"


@pytest.fixture
def options() -> Options:
    return Options(tokens=64, sequence_length=16, max_hvps=3, depths=False, batch_size=4)


@pytest.mark.slow
def test_a_checkpoint_whose_forward_pass_does_not_fit_is_measured_in_smaller_batches(run: Path, options: Options) -> None:
    opened = open_for_analysis(run, options)

    def limited(model: nn.Module, batch: Any) -> Tensor:
        if len(batch) > 2:
            ask()
        return causal_loss(model, batch)

    report = replace(opened, loss=limited).measure()
    assert "cut-batches" in {finding.code for finding in report.findings}
    assert report.data.loss == pytest.approx(opened.measure().data.loss, rel=1e-6)


def test_a_checkpoint_for_which_nothing_fits_is_an_error_of_its_own(run: Path, options: Options) -> None:
    """Not an allocator's: a track goes on with the checkpoints after it."""

    def never(model: nn.Module, batch: Any) -> Tensor:
        ask()
        return causal_loss(model, batch)

    with pytest.raises(OutOfMemoryError, match="out of memory"):
        replace(open_for_analysis(run, options), loss=never).measure()


def test_a_model_that_does_not_fit_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *words, **given: ask())
    with pytest.raises(OutOfMemoryError, match=r"while the model in .* is built"):
        build(run, "causal-lm")
