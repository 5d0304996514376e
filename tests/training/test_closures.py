"""Locked blocks under every way to step: weights and optimizer state are those of the run without them, bit by bit.

The reference has no warm-up: a model of two blocks (grow), or locked blocks that require no gradient (freeze).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from schedules import schedule
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from warmup_job import DEPTH, Text, batch, block_of, build, snapshot

from curvcli.training import ArchitectureWarmup
from curvcli.training.transformers import CurvCallback

STEPS, LOCKED = 4, (2, 3)
Snapshots = list[dict[str, Tensor]]


def plan(mode: str) -> Any:
    return schedule(DEPTH, (0, [0, 1]), (STEPS, range(DEPTH)), mode=mode)


def without(mode: str) -> LlamaForCausalLM:
    """The model that the locks promise: the blocks are not there, or do not train."""
    model = build()
    if mode == "grow":
        model.model.layers = model.model.layers[:2]
    else:
        model.model.layers[2:].requires_grad_(False)
    return model


def check(found: Snapshots, expected: Snapshots, start: dict[str, Tensor]) -> None:
    assert len(found) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name, value in one.items():
            if name in other:
                assert torch.equal(value, other[name]), (step, name)
            else:  # grow: the blocks that the reference does not have
                assert block_of(name.split(": ")[0]) in LOCKED, (step, name)
                assert ": " not in name, f"state of a locked weight at step {step}: {name}"
                assert torch.equal(value, start[name]), (step, name)
        assert set(other) <= set(one), step


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "foreach": lambda m: adamw(m, foreach=True),
    "fused": lambda m: adamw(m, fused=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=0.1),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def loss(model: nn.Module, step: int, micro: int = 0) -> Tensor:
    ids = batch(step + 100 * micro)
    return model(input_ids=ids, labels=ids).loss


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss(model, step).backward()
    optimizer.step()


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        return value

    return closure


def by_closure(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    value = optimizer.step(closure_of(model, optimizer, step))
    assert isinstance(value, Tensor)


def by_named_closure(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.step(closure=closure_of(model, optimizer, step))


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The last micro-batch within the closure, as Lightning does it."""
    optimizer.zero_grad()
    loss(model, step).backward()

    def closure() -> Any:
        value = loss(model, step, 1)
        value.backward()
        return value

    optimizer.step(closure)


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(loss(model, step)).backward()
    scaler.step(optimizer)


def scaled_closure(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Which torch says it does not support, and passes on: the closure's own gradients count."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(loss(model, step)).backward()
    scaler.step(optimizer, closure_of(model, optimizer, step))


WAYS = [plainly, by_closure, by_named_closure, accumulated, scaled, scaled_closure]


def run(model: nn.Module, mode: str | None, make: Any, way: Any) -> tuple[Snapshots, dict[str, Tensor]]:
    optimizer = make(model)
    warmup = ArchitectureWarmup(model, optimizer, plan(mode)) if mode else None
    found: Snapshots = []
    for step in range(STEPS):
        if warmup:
            warmup.step(step)
        if step == 0:
            start = snapshot(model, optimizer)
        way(model, optimizer, step)
        found.append(snapshot(model, optimizer))
    return found, start


def compare(mode: str, make: Any, way: Any) -> None:
    found, start = run(build(), mode, make, way)
    expected, _ = run(without(mode), None, make, way)
    if make is OPTIMIZERS["adagrad"]:  # whose state of every parameter is there from its construction
        for each in found:
            assert all(torch.equal(each[n], start[n]) for n in start if block_of(n.split(": ")[0]) in LOCKED)
        names = [n for n in start if ": " in n and block_of(n.split(": ")[0]) in LOCKED]
        found = [{n: v for n, v in each.items() if n not in names} for each in found]
        expected = [{n: v for n, v in each.items() if n not in names} for each in expected]
    check(found, expected, start)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["grow", "freeze"])
def test_every_way_to_step(mode: str, way: Any) -> None:
    compare(mode, OPTIMIZERS["adamw"], way)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_implementation(name: str) -> None:
    compare("grow", OPTIMIZERS[name], by_closure)
    compare("freeze", OPTIMIZERS[name], by_closure)


def test_fused_under_a_scaler_and_a_closure() -> None:
    compare("grow", OPTIMIZERS["fused"], scaled)
    compare("freeze", OPTIMIZERS["fused"], scaled_closure)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_calls_its_closure_many_times(search: str | None) -> None:
    """Its state is one vector over all parameters, so the reference is the run with locked blocks frozen."""
    calls = 0

    def way(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        def closure() -> Any:
            nonlocal calls
            calls += 1
            return closure_of(model, optimizer, step)()

        optimizer.step(closure)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)

    found, start = run(build(), "freeze", make, way)
    assert calls > 2 * STEPS
    expected, _ = run(without("freeze"), None, make, way)
    check(found, expected, start)


def test_a_block_that_joins_learns_by_closure() -> None:
    model = build()
    optimizer = adamw(model)
    warmup = ArchitectureWarmup(model, optimizer, plan("grow"), patience=3)
    for step in range(STEPS + 5):
        warmup.step(step)
        by_closure(model, optimizer, step)
    assert all(lock.moved() for lock in warmup.locks)
    assert all(optimizer.state[p] for p in model.parameters())
    assert warmup._watches == []


@pytest.mark.slow
def test_compiled_models_step_by_closure() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(build(attn_implementation="eager"), backend="eager")
    found, start = run(compiled, "freeze", adamw, by_closure)
    locked = [n for n in start if block_of(n.removeprefix("_orig_mod.")) in LOCKED]
    assert locked
    for each in found:
        assert all(torch.equal(each[n], start[n]) for n in locked)
        assert not [n for n in each if ": " in n and n.split(": ")[0] in locked]


class Spy(TrainerCallback):
    def __init__(self) -> None:
        self.found: Snapshots = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(snapshot(kwargs["model"], kwargs["optimizer"].optimizer))


SLOW = [pytest.param(o, marks=pytest.mark.slow) for o in ({"gradient_accumulation_steps": 2}, {"optim": "adagrad"})]


@pytest.mark.parametrize("options", [{}, *SLOW], ids=str)
def test_transformers_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    def train(model: LlamaForCausalLM, *callbacks: TrainerCallback) -> Snapshots:
        spy = Spy()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
            max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, seed=0, disable_tqdm=True, **options,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Text(), callbacks=[*callbacks, spy]).train()
        return spy.found

    found = train(build(), CurvCallback(plan("grow")))
    if options.get("optim") == "adagrad":
        found = [{n: v for n, v in f.items() if ": " not in n or block_of(n.split(": ")[0]) not in LOCKED} for f in found]
    start = dict(build().named_parameters())
    check(found, train(without("grow")), {n: torch.zeros_like(p) if output(n) else p for n, p in start.items()})


def output(name: str) -> bool:
    return block_of(name) in LOCKED and ("o_proj" in name or "down_proj" in name)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("mode", ["grow", "freeze"])
def test_lightning_automatic_optimization(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="pip install 'curvcli[lightning]'")
    from curvcli.training.lightning import CurvCallback as LightningCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.network = model
            self.found: Snapshots = []

        def training_step(self, rows: Tensor, index: int) -> Tensor:
            return loss(self.network, index)

        def configure_optimizers(self) -> Any:
            return adamw(self)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step > len(self.found):
                self.found.append(snapshot(self.network, self.trainer.optimizers[0]))

    def fit(model: nn.Module, *callbacks: Any) -> Snapshots:
        module = Module(model)
        rows: Any = torch.arange(20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks), **options,
            ).fit(module, torch.utils.data.DataLoader(rows))  # fmt: skip
        return module.found

    callback = LightningCallback(plan(mode))
    found = fit(build(), callback)
    start = {n: torch.zeros_like(p) if output(n) and mode == "grow" else p for n, p in build().named_parameters()}
    check(found, fit(without(mode)), start)
    assert callback.callbacks.warmup is not None
    assert callback.callbacks.warmup.locked == frozenset(), "locks end with the training"
