"""The callbacks in the real Trainers: two lines, killed and resumed to the bit, adaptive decisions repeated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from schedules import schedule
from torch import nn
from transformers import Trainer, TrainingArguments
from warmup_job import DEPTH, GROW, Text, batch, block_of, build, same

from curvcli.documents import Record
from curvcli.errors import UsageError
from curvcli.training.transformers import CurvCallback

TOTAL = 12
ADAPTIVE = schedule(DEPTH, (0, [0, 1]), (3, [0, 1, 2]), (8, range(DEPTH)), window=4, margin=5.0)


def probe() -> list[dict[str, torch.Tensor]]:
    rows = torch.stack([Text()[i]["input_ids"] for i in range(100, 108)])
    return [{"input_ids": rows, "labels": rows}]


def trainer(path: Path, callback: CurvCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=TOTAL, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=3,
        lr_scheduler_type="cosine", weight_decay=0.1, save_steps=4, logging_steps=1, report_to=[], use_cpu=True, seed=0,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=build(), args=arguments, train_dataset=Text(), callbacks=[callback])


def states(trained: Trainer) -> set[int | None]:
    optimizer = trained.optimizer.optimizer  # type: ignore[attr-defined]
    return {block_of(n) for n, p in trained.model.named_parameters() if optimizer.state[p]}


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow)], ids=["plain", "accumulation"]
)
def test_trainer_killed_across_an_unlock(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", CurvCallback(GROW), **options)
    whole.train()
    assert states(whole) == {None, *range(DEPTH)}
    stopped = trainer(tmp_path / "killed", CurvCallback(GROW), **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    stopped.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert same(whole.model, stopped.model)


def test_trainer_locks_what_the_schedule_says(tmp_path: Path) -> None:
    locked = schedule(DEPTH, (0, [0, 1]), (100, range(DEPTH)))
    trained = trainer(tmp_path, CurvCallback(locked))
    trained.train()
    assert states(trained) == {None, 0, 1}
    assert not trained.model.model.layers[3].mlp.down_proj.weight.any()


def test_trainer_with_the_tracker_trains_the_same(tmp_path: Path) -> None:
    log = tmp_path / "curvature.jsonl"
    watched = trainer(tmp_path / "a", CurvCallback(GROW, probe=probe(), every=2, log=log))
    watched.train()
    alone = trainer(tmp_path / "b", CurvCallback(GROW))
    alone.train()
    assert same(watched.model, alone.model)
    assert [h.get("grad_norm") for h in watched.state.log_history] == [h.get("grad_norm") for h in alone.state.log_history]
    records = [Record.model_validate_json(line) for line in log.read_text().splitlines()]
    assert [r.step for r in records] == [2, 4, 6, 8, 10, 12]
    assert [r.active_depth for r in records] == [2, 2, 3, 3, 4, 4]
    assert records[-1].lr == 0
    assert all(r.status in ("converged", "unconverged") for r in records[:-1])
    assert records[1].loss == watched.state.log_history[2]["loss"]


@pytest.mark.slow
def test_trainer_repeats_adaptive_decisions(tmp_path: Path) -> None:
    options = {"probe": probe(), "every": 1, "adaptive": True}
    first, second = (CurvCallback(ADAPTIVE, **options) for _ in range(2))
    whole = trainer(tmp_path / "whole", first)
    whole.train()
    decided = first.callbacks.warmup.started
    assert decided[0] == 0
    assert 3 < decided[1] < 7  # by measurement: neither the earliest step nor the latest
    assert 8 <= decided[2] <= 12
    again = trainer(tmp_path / "killed", second)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert second.callbacks.warmup.started == decided
    assert same(whole.model, again.model)
    (tmp_path / "killed" / "checkpoint-4" / "curv.pt").unlink()
    third = trainer(tmp_path / "killed", CurvCallback(ADAPTIVE, **options))
    with pytest.raises(UsageError, match=r"adaptive mode resumes at step 4, and .*curv\.pt is missing"):
        third.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))


def test_a_callback_without_work_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to do"):
        CurvCallback()
    with pytest.raises(UsageError, match="adaptive mode needs a schedule and a probe"):
        CurvCallback(GROW, adaptive=True)


@pytest.mark.slow
def test_lightning_killed_across_an_unlock(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install 'curvcli[lightning]'")
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    from curvcli.training.lightning import CurvCallback as LightningCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build()

        def training_step(self, _: torch.Tensor, index: int) -> torch.Tensor:
            # Data by the global step: a plain loader starts again where Lightning resumes.
            ids = batch(self.global_step)
            return self.network(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss(module: nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return module.network(**rows).loss

    def fit(steps: int, **options: Any) -> tuple[Module, LightningTrainer]:
        module = Module()
        fitter = LightningTrainer(
            max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[LightningCallback(GROW, probe=probe(), loss=loss, every=2, log=tmp_path / "c.jsonl")],
        )  # fmt: skip
        fitter.fit(module, torch.utils.data.DataLoader(torch.arange(100)), **options)  # type: ignore[arg-type]
        return module, fitter

    whole, _ = fit(TOTAL)
    _, half = fit(6)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(TOTAL, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(whole, resumed)
    records = [Record.model_validate_json(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [r.step for r in records] == [2, 4, 6, 8, 10, 12, 2, 4, 6, 8, 10, 12]
    first, second = records[3:6], records[9:]
    assert [(r.rho, r.active_depth) for r in first] == [(r.rho, r.active_depth) for r in second]
