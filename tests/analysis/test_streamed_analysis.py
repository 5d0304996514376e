"""`analyze` with blocks gathered one at a time, on gloo processes: numbers are those of one process, and near exact ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import models
import pytest
import tiny
import torch
from equal_reports import OPTIMIZERS, same
from ranks import launch

from curvcli import analyze
from curvcli.analysis import dividing
from curvcli.analysis.api import Estimated, Shard
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.curvature.hvp import Mode
from curvcli.curvature.ranks import Processes, within
from curvcli.data.tasks import causal_loss

pytestmark = pytest.mark.slow
RATIOS = ("gradient_ratio", "batch_ratio")


def _measured(name: str, shard: Shard | None, mode: Mode | Literal["auto"], *, depths: bool, **how: Any) -> dict[str, Any]:
    batches, model = models.data(), models.Net(**how)
    optimizer = OPTIMIZERS[name](model)
    if optimizer is not None:
        models.train(model, optimizer, batches)
    said: Any = optimizer or Estimated({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    report = analyze(
        model, models.loss, batches, said, weights=models.weights(batches), tolerance=1e-3, max_hvps=200, mode=mode,
        shard=shard, depths=depths, truncated=depths or None,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.to_json())
    return found


def _work(rank: int, path: Path) -> None:
    with within(Processes()) as ranks, ranks.together():
        names = ["AdamW", "estimated", "SOAP", "Muon"] if ranks.world == 2 else ["AdamW"]
        found = {n: _measured(n, "all", "differences", depths=ranks.world == 2 and n == "AdamW") for n in names}
    (path / f"{rank}.json").write_text(json.dumps(found))


def _numbers(report: dict[str, Any]) -> list[dict[str, Any]]:
    curves = [entry for curve in report["cumulative"].values() for entry in curve]
    return [part for part in (report["full"], report["ends"], report["body"], *report["layers"], *curves) if part]


@pytest.mark.parametrize("world", [2, 4])
def test_a_report_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    launch(_work, tmp_path, world=world)
    every = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name in every[0]:
        depths = world == 2 and name == "AdamW"
        one, exact = (_measured(name, None, mode, depths=depths) for mode in ("differences", "fresh"))  # type: ignore[arg-type]
        for found in (reports[name] for reports in every):
            assert found["cost"]["ranks"] == world
            assert sum("one block at a time" in f["message"] for f in found["findings"]) == 1
            found["findings"] = [f for f in found["findings"] if f["code"] != "blocks-gathered"]
            # On slices nobody knows how long gradients are beside the moments.
            one["optimizer"] |= dict.fromkeys(RATIOS) if one["optimizer"] else {}
            same(one, found)
            same(every[0][name], found)
            for left, right in zip(_numbers(exact), _numbers(found), strict=True):
                assert left["status"] == right["status"] == "converged"
                least = right["eigenvalue"] - right["residual"]
                assert least <= left["eigenvalue"] <= (right["ceiling"] or left["eigenvalue"]) * (1 + 1e-9)
                assert right["eigenvalue"] == pytest.approx(left["eigenvalue"], rel=1e-3)


def _short(rank: int, path: Path) -> None:
    given = Options(data=path / "data" / "shard.bin", sequence_length=16, tokens=128, shard=True, mode="differences")
    calls = 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank != 1 or calls > 1:
            return causal_loss(model, batch)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: torch.empty(2**50))
        try:
            return causal_loss(model, batch)
        finally:
            handle.remove()

    with within(Processes()) as ranks, ranks.together():
        opened = open_for_analysis(path / "run" / "checkpoint-3", given)
        ready = replace(opened, loss=loss).ready()
    assert ready.divided is not None
    (path / f"{rank}.json").write_text(str(calls))


def test_memory_that_runs_out_in_the_first_pass_of_one_rank_is_no_end(tmp_path: Path) -> None:
    """Smaller batches may do; the others are told where they wait for the next block."""
    tiny.run_of(tmp_path, 3)
    launch(_short, tmp_path)
    assert all(int((tmp_path / f"{rank}.json").read_text()) > 1 for rank in range(2))


def _chosen(rank: int, path: Path) -> None:
    dividing._room = lambda *_: 100.0  # type: ignore[assignment]
    with within(Processes()) as ranks, ranks.together():
        found = {"auto": _measured("AdamW", "all", "auto", depths=False)}
        found["fresh"] = _measured("AdamW", "all", "fresh", depths=False)
        dividing._room = lambda *_: 1e9  # type: ignore[assignment]
        found["roomy"] = _measured("AdamW", "all", "auto", depths=False)
    if rank == 0:
        (path / "0.json").write_text(json.dumps(found))


def test_differences_are_taken_where_nothing_else_fits(tmp_path: Path) -> None:
    launch(_chosen, tmp_path)
    found = json.loads((tmp_path / "0.json").read_text())
    assert [report["cost"]["mode"] for report in found.values()] == ["differences", "fresh", "fresh"]
    said = [[f["message"] for f in report["findings"] if f["code"] == "blocks-gathered"] for report in found.values()]
    assert [len(messages) for messages in said] == [1, 0, 0]
    assert re.search(r"exact ones need [\d.]+e-06 GiB of each rank", said[0][0])
    assert "of which 9.31e-08 are free" in said[0][0]
