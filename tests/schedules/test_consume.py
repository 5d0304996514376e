"""A schedule says by itself what a job has to do: the example that has no curv does what ours does, to the bit."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT, SAMPLES
from real import curv
from schedules import schedule
from tiny import build
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from curvcli.documents import LockRule, Resting, Schedule
from curvcli.documents.resting import BLOCK_PATTERN, OUTPUT_PATTERN, OUTPUTS
from curvcli.errors import CurvError, UsageError
from curvcli.models.blocks import find_blocks
from curvcli.schedules.plan import grow
from curvcli.training import ArchitectureWarmup
from curvcli.training.locks import find_locks
from curvcli.training.naming import with_names
from curvcli.training.verify import problems


def example() -> Any:
    spec = importlib.util.spec_from_file_location("consume_schedule", ROOT / "examples" / "consume_schedule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(model: torch.nn.Module, before: Callable[[int], object], between: Callable[[int], object]) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for step in range(6):
        before(step)
        ids = torch.randint(61, (2, 9), generator=draw)
        model(input_ids=ids, labels=ids).loss.backward()
        between(step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def ours(model: torch.nn.Module, plan: Schedule) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    warmup = ArchitectureWarmup(model, optimizer, plan)
    draw = torch.Generator().manual_seed(0)
    for step in range(6):
        warmup.step(step)
        ids = torch.randint(61, (2, 9), generator=draw)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", ["grow", "freeze"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "by rule"])
def test_the_example_is_bit_equal_to_ours(mode: str, named: bool, tmp_path: Path) -> None:
    plan = schedule(2, (0, [0]), (3, [0, 1]), mode=mode).model_copy(update={"rule": LockRule()})
    if named:
        plan = with_names(plan, build())
    (tmp_path / "s.json").write_text(plan.to_json())
    model, plain = build(), build()
    locks = example().Locks(tmp_path / "s.json", model)
    theirs = trained(model, locks.begin, locks.drop_gradients)
    for a, b in zip(theirs, ours(build(), plan), strict=True):
        assert torch.equal(a, b)
    free = trained(plain, lambda step: None, lambda step: None)
    assert not all(torch.equal(a, b) for a, b in zip(theirs, free, strict=True)), "the schedule did nothing"


def test_the_example_imports_no_curv() -> None:
    text = (ROOT / "examples" / "consume_schedule.py").read_text()
    assert re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE) == ["json", "re", "pathlib", "torch"]


@pytest.mark.parametrize("name", CASES)
def test_names_are_what_our_locks_hold(name: str) -> None:
    """Of every architecture: by name what `find_locks` has by object; by rule the same, but for norms that rest."""
    model = CASES[name]().build()
    blocks = find_blocks(model)
    try:
        locks = find_locks(blocks)
    except CurvError:
        locks = []
    if len(locks) < 2:
        pytest.skip("its output projections are not known, or it has one block: it cannot grow")
    plan = grow(len(locks), start=1)
    names = {id(p): n for n, p in model.named_parameters()}
    held = {(lock.index, names[id(p)], value) for lock in locks for _, p, value in lock.resting}
    found = with_names(plan, model)
    assert {(r.block, r.name, r.value) for r in found.resting} == held
    assert found.blocks == [f"{blocks.prefix}.{i}" for i in range(len(locks))]
    for r in found.resting:
        stack, index, within = re.search(BLOCK_PATTERN, r.name).groups()
        assert (stack, int(index)) == (blocks.prefix, r.block)
        assert bool(re.search(OUTPUT_PATTERN, within)) or "norm" in within


def _by_parts(path: str) -> bool:
    """What the pattern says, in words of its own."""
    parts = path.split(".")
    if parts[-1] in ("weight", "bias"):
        parts.pop()
    last = parts[-1].removesuffix("_bias") if parts else ""
    return last in OUTPUTS or (last == "dense" and any("attention" in p or "attn" in p for p in parts[:-1]))


PARTS = st.sampled_from(
    [*OUTPUTS, "dense", "attention", "self_attn", "mlp", "weight", "q_proj", "dense_bias", "wo_bias", "0"]
)


@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from(["", ".weight", ".bias"]))
def test_the_pattern_is_the_rule(parts: list[str], end: str) -> None:
    path = ".".join(parts) + end
    if parts[-1] != "weight":
        assert bool(re.search(OUTPUT_PATTERN, path)) == _by_parts(path), path


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("model.layers.3.mlp.experts.0.w1", ("model.layers", "3", "mlp.experts.0.w1")),
        ("0.mlp.1.weight", (None, "0", "mlp.1.weight")),
        ("layer3.2.weight", ("layer3", "2", "weight")),
    ],
)
def test_the_first_whole_number_counts_blocks(name: str, groups: tuple[str | None, ...]) -> None:
    assert re.search(BLOCK_PATTERN, name).groups() == groups


@pytest.mark.parametrize(
    ("change", "said"),
    [({"lock": "residual-gate", "rule": None}, "residual gates"), ({"rule": None}, "no rule"), ({"rule": ...}, "no rule")],
)
def test_what_the_example_cannot_obey_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    plan = {**json.loads(grow(2, start=1).to_json()), **change}
    (tmp_path / "s.json").write_text(json.dumps({key: value for key, value in plan.items() if value is not ...}))
    with pytest.raises(ValueError, match=said):
        example().Locks(tmp_path / "s.json", build())


def test_norms_that_rest_are_not_guessed(tmp_path: Path) -> None:
    model = CASES["gemma2"]().build()
    depth = len(find_blocks(model).modules)
    (tmp_path / "s.json").write_text(grow(depth, start=1).to_json())
    with pytest.raises(ValueError, match="name the tensors"):
        example().Locks(tmp_path / "s.json", model)
    named = with_names(grow(depth, start=1), model)
    assert {rest.value for rest in named.resting} == {-1.0}
    (tmp_path / "s.json").write_text(named.to_json())
    assert example().Locks(tmp_path / "s.json", model).resting


def test_the_command_names_the_tensors_and_verify_looks_at_them(tmp_path: Path) -> None:
    plan = tmp_path / "s.json"
    done = curv("schedule", "--depth", 8, "--for", SAMPLES / "hot", "-o", plan)
    assert done.returncode == 0, done.stderr
    said = json.loads(plan.read_text())
    assert said["blocks"][0] == "model.layers.0"
    assert {"name": "model.layers.7.mlp.down_proj.weight", "block": 7, "value": 0.0} in said["resting"]
    loaded = Schedule.read(plan.read_text())
    assert problems(loaded, SAMPLES / "hot") == []
    other = [rest.model_copy(update={"name": rest.name.replace("down", "up")}) for rest in loaded.resting]
    (found,) = problems(loaded.model_copy(update={"resting": other}), SAMPLES / "hot")
    assert found.code == "other-resting"


def test_names_are_those_of_the_model_inside_its_wrappers() -> None:
    """A schedule is made for the plain model and obeyed by a job that checkpoints activations."""
    plain, wrapped = build(), build()
    plan = with_names(grow(len(find_blocks(plain).modules), start=1), plain)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, type(find_blocks(plain).modules[0])))
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert (with_names(plan, wrapped).resting, with_names(plan, wrapped).blocks) == (plan.resting, plan.blocks)


def test_another_depth_is_refused() -> None:
    with pytest.raises(UsageError, match="depth 8, the model has 2"):
        with_names(grow(8), build())


def test_what_rests_belongs_to_every_block() -> None:
    plan = grow(4)
    with pytest.raises(ValueError, match="not of the 4 blocks"):
        Schedule.model_validate({**dict(plan), "resting": [Resting(name="a", block=0, value=0.0)]})
