"""Lion and Muon from files: alone, beside AdamW in one file or two, with names and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from normalised import Lion, MuonWithAuxAdam, split
from real import curv, refusal
from saved import NET
from tiny import STEPS, build
from transformers import LlamaForCausalLM

import curvcli
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.formats.beside import merged
from curvcli.checkpoints.state.mapping import AmbiguousStateError
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.preconditioner import live, prepare

Optimizers = Sequence[torch.optim.Optimizer]


def trained(make: Callable[[LlamaForCausalLM], Optimizers]) -> tuple[LlamaForCausalLM, Optimizers]:
    model = build()
    optimizers, generator = make(model), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=generator)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def lion(model: LlamaForCausalLM) -> Optimizers:
    return [Lion(model.parameters(), lr=1e-3)]


def aux(model: LlamaForCausalLM) -> Optimizers:
    return [MuonWithAuxAdam(*split(model))]


def pair(model: LlamaForCausalLM) -> Optimizers:
    matrices, others = split(model)
    return [torch.optim.AdamW(others, lr=3e-3), torch.optim.Muon(matrices, lr=0.02)]


def named(optimizer: torch.optim.Optimizer, model: LlamaForCausalLM) -> dict[str, Any]:
    names, state = {id(p): n for n, p in model.named_parameters()}, optimizer.state_dict()
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names[id(p)] for p in own["params"]]
    return state


def in_one_file(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> Path:
    key = "optimizer" if len(optimizers) == 1 else "optimizers"
    states: Any = [o.state_dict() for o in optimizers]
    torch.save({"step": STEPS, "model": model.state_dict(), key: states[0] if len(states) == 1 else states}, path / "a.pt")
    return path / "a.pt"


def with_names(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> Path:
    states = [named(o, model) for o in optimizers]
    torch.save({"step": STEPS, "model": model.state_dict(), "optimizers": states}, path / "a.pt")
    return path / "a.pt"


def beside_weights(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> Path:
    model.save_pretrained(path)
    for k, optimizer in enumerate(optimizers):
        torch.save(optimizer.state_dict(), path / ("optimizer.bin" if k == 0 else f"optimizer_{k}.bin"))
    return path


def ours(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> Path:
    model.save_pretrained(path)
    curvcli.save_optimizer(path, optimizers[0], model)
    return path


@pytest.mark.parametrize(
    ("make", "save"),
    [
        (lion, in_one_file), (lion, beside_weights), (lion, ours),
        (aux, in_one_file), (aux, with_names), (aux, beside_weights), (aux, ours),
        (pair, in_one_file), (pair, with_names), (pair, beside_weights),
    ],
)  # fmt: skip
def test_what_is_read_is_what_was_trained(make: Callable, save: Callable, tmp_path: Path) -> None:
    model, optimizers = trained(make)
    parameters = dict(model.named_parameters())
    expected = prepare(live(list(optimizers), parameters), parameters)
    path = save(tmp_path, model, optimizers)
    checkpoint = open_checkpoint(path, NET if path.is_file() else None)
    assert checkpoint.optimizer is not None
    try:
        view = checkpoint.optimizer.view(checkpoint.model())
    except AmbiguousStateError as error:  # which gradients choose from
        (view,) = error.views
    found = prepare(view, parameters)
    assert (found.name, found.threshold, found.lr, found.ball_lr) == (
        expected.name, expected.threshold, expected.lr, expected.ball_lr,
    )  # fmt: skip
    assert found.balls == expected.balls
    assert found.doubts == ()
    assert found.direction is not None
    assert expected.direction is not None
    for name, direction in expected.direction.items():
        torch.testing.assert_close(found.direction[name], direction)


def test_several_that_are_not_muon_and_adam_stay_refused(tmp_path: Path) -> None:
    def other(model: LlamaForCausalLM) -> Optimizers:
        matrices, others = split(model)
        return [torch.optim.Muon(matrices, lr=0.02), torch.optim.SGD(others, lr=0.1, momentum=0.9)]

    model, optimizers = trained(other)
    for save in (in_one_file, with_names, beside_weights):
        (place := tmp_path / save.__name__).mkdir()
        path = save(place, model, optimizers)
        checkpoint = open_checkpoint(path, NET if path.is_file() else None)
        assert checkpoint.optimizer is not None
        assert checkpoint.optimizer.summary() == {"optimizers": 2}
        with pytest.raises(UnsupportedError, match="2 optimizers"):
            checkpoint.optimizer.view(checkpoint.model())


def test_a_parameter_in_two_optimizers_and_state_in_no_group_are_errors(tmp_path: Path) -> None:
    model, (adam, muon) = trained(pair)
    twice = named(muon, model)
    first = next(iter(twice["param_groups"][0]["param_names"]))
    rest = named(adam, model)
    rest["param_groups"][0]["param_names"][0] = first
    stray = muon.state_dict()
    stray["state"][999] = stray["state"][0]
    joined = merged({"adam": adam.state_dict(), "muon": stray}, tmp_path)
    assert len(joined["state"]) == len(adam.state) + len(stray["state"])
    for states in ([rest, twice], [adam.state_dict(), stray]):
        torch.save({"model": model.state_dict(), "optimizers": states}, tmp_path / "a.pt")
        checkpoint = open_checkpoint(tmp_path / "a.pt", NET)
        assert checkpoint.optimizer is not None
        with pytest.raises((InputError, UnsupportedError)):
            checkpoint.optimizer.view(checkpoint.model())


@pytest.mark.slow
def test_the_command_line_measures_lion_and_explains_why_it_does_not_explain(tmp_path: Path) -> None:
    model, optimizers = trained(lion)
    path = beside_weights(tmp_path / "checkpoint-3", model, optimizers)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    given = ("--data", tmp_path / "ids.npy", "--tokens", 64, "--sequence-length", 16, "--device", "cpu", "-q")
    done = curv("analyze", path, *given, "--no-depths")
    assert done.returncode == 0
    assert "Lion" in done.stdout
    assert "in the max-norm" in " ".join(done.stdout.split())
    assert "Lion has no lambda" in refusal("explain", path, *given)
