"""One rule and one line make an optimizer known everywhere: a toy whose P is a matrix for each tensor is added so."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tiny
import torch
from places import ROOT
from real import refusal
from torch import Tensor
from toy_optimizer import Whiten, WhitenRule

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import CurvError, InputError, UnsupportedError, UsageError
from curvcli.optimizers import RULES, optimizer_names, rules
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.optimizers.refused import REFUSED, Refused, refuse
from curvcli.training import CurvatureTracker

SUPPORT, DOCS = ROOT / "tests" / "support", ROOT / "docs"
LINE = ("toy_optimizer:WhitenRule", ("Whiten",))  # all that is added to the package


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, *LINE)


def dense(net: models.Net, optimizer: Whiten, batches: list[Any]) -> float:
    """lambda from a dense Hessian, and P as the optimizer's own step has it."""
    blocks = []
    for p in net.parameters():
        state, eps = optimizer.state[p], optimizer.param_groups[0]["eps"]
        values, vectors = torch.linalg.eigh(state["outer"])
        root = vectors @ torch.diag((values.clamp_min(0).sqrt() + eps) ** -0.5) @ vectors.T
        blocks.append(torch.kron(root, torch.eye(p.numel() // p.shape[0], dtype=p.dtype)))
    scale = torch.block_diag(*blocks)
    return models.top(scale @ models.dense_hessian(net, batches, [n for n, _ in net.named_parameters()]) @ scale)


def trained() -> tuple[models.Net, Whiten, list[Any]]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    optimizer = Whiten(net.parameters())
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


@pytest.mark.usefixtures("registered")
def test_a_live_optimizer_is_analysed() -> None:
    net, optimizer, batches = trained()
    report = curvcli.analyze(net, models.loss, batches, optimizer, weights=models.weights(batches), tolerance=1e-4)
    assert report.optimizer.name == "Whiten"
    assert report.optimizer.preconditioner == "checkpoint"
    assert report.full.eigenvalue == pytest.approx(dense(net, optimizer, batches), rel=1e-5)
    assert report.optimizer.threshold == pytest.approx(2 / 0.01 * 1.9 / 0.1)
    assert report.update.ratio is not None


@pytest.mark.usefixtures("registered")
def test_the_tracker_follows_it() -> None:
    net, optimizer, batches = trained()
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches), max_hvps=60)
    for step in range(3):
        models.train(net, optimizer, batches, steps=1)
        record = tracker.step(step)
        assert record is not None
        assert record.status == "converged", record.message
        truth = dense(net, optimizer, batches)
        assert record.eigenvalue == pytest.approx(truth, rel=1e-3)
        assert record.rho == pytest.approx(truth / (2 / 0.01 * 1.9 / 0.1), rel=1e-3)


def causal(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def by_us(path: Path, optimizer: Whiten, model: torch.nn.Module) -> None:
    curvcli.save_optimizer(path, optimizer, model)


def by_torch(path: Path, optimizer: Whiten, model: torch.nn.Module) -> None:
    torch.save(optimizer.state_dict(), path / "optimizer.pt")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("save", "name"), [(by_us, None), (by_torch, None), (by_torch, "whiten")])
def test_saved_state_is_analysed(save: Callable, name: str | None, tmp_path: Path) -> None:
    """With names and the class in the file, and by position without either, where no factor fits a parameter's shape."""
    model = tiny.build()
    optimizer = Whiten(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        causal(model, torch.randint(64, (4, 16), generator=generator)).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    save(tmp_path, optimizer, model)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(
        data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, optimizer=name, device="cpu",
        mode="kept",
    )  # fmt: skip
    report = analyze_checkpoint(tmp_path, options)
    assert report.optimizer.name == "Whiten"
    assert report.optimizer.step == tiny.STEPS
    assert report.full.eigenvalue > 0
    parameters = dict(model.named_parameters())
    again = prepare(live(optimizer, parameters), parameters)
    assert report.optimizer.threshold == pytest.approx(again.threshold)
    read = open_checkpoint(tmp_path)
    assert read.optimizer is not None
    found = prepare(read.optimizer.view(read.model()), parameters)
    vector = torch.randn(again.root.space.size, generator=generator)
    lifted = found.root.lift(vector)
    for key, expected in again.root.lift(vector).items():
        torch.testing.assert_close(lifted[key], expected)
    with pytest.raises(UsageError, match="has no momentum"):
        analyze_checkpoint(tmp_path, Options(**{**vars(options), "momentum": 0.9}))
    for file in tmp_path.glob("optimizer.*"):
        file.unlink()
    with pytest.raises(InputError, match=r"Whiten's cannot be estimated"):
        analyze_checkpoint(tmp_path, Options(**{**vars(options), "optimizer": "whiten"}))


def test_without_its_line_it_is_not_known() -> None:
    net, optimizer, batches = trained()
    with pytest.raises(UnsupportedError, match="no rule for optimizer Whiten") as caught:
        curvcli.analyze(net, models.loss, batches, optimizer, weights=models.weights(batches))
    assert ", ".join(optimizer_names()) in str(caught.value.hint)


def test_help_lists_it() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); sys.argv = ['curv', 'analyze', '--help']\n"
        f"from curvcli.optimizers import RULES\nRULES[{LINE[0]!r}] = {LINE[1]!r}\n"
        "from curvcli.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert f"{', '.join(optimizer_names())}, Whiten, " in re.sub(r"[\s│]+", " ", done.stdout)


@pytest.mark.usefixtures("registered")
def test_a_name_that_is_none_is_told_of_it(samples: Path) -> None:
    said = refusal("analyze", samples / "calm", "--optimizer", "adamx", "--tokens", 64, "-q")
    assert f"{', '.join(optimizer_names())}, " in said
    assert "Whiten" in optimizer_names()


def test_a_refused_family_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    view = OptimizerView((Group(("w",), {"lr": 0.1, "warp": 3}),), {"w": {"exp_avg": torch.ones(2)}}, "Warped")
    monkeypatch.setattr("curvcli.optimizers.refused.REFUSED", [])
    refuse(view)
    line = Refused("Warp", ("warped",), lambda s: "warp" in s.options, "it warps; not supported")
    monkeypatch.setattr("curvcli.optimizers.refused.REFUSED", [line])
    for name in ("Warped", None):
        with pytest.raises(UnsupportedError, match="the optimizer is Warp: it warps; not supported"):
            refuse(OptimizerView(view.groups, view.state, name))


def test_the_name_of_a_known_class_is_not_taken_apart() -> None:
    """A class of whose name a refused family's is a part, as SAM's of Sample."""
    view = OptimizerView((Group(("w",), {"lr": 0.1}),), {"w": {}}, "Sample")
    with pytest.raises(UnsupportedError, match="SAM"):
        refuse(view)
    refuse(view, known={"Sample"})


@pytest.mark.parametrize("place", RULES)
def test_a_rule_declares_what_the_package_asks_of_it(place: str) -> None:
    rule = rules()[list(RULES).index(place)]
    known = rule.state | rule.extra
    assert set(RULES[place]) <= rule.names
    assert rule.unset <= known
    assert rule.counts - {"step"} <= known
    assert rule.shaped_otherwise <= known
    assert {*(rule.averages or ()), *([rule.second] if rule.second else [])} <= rule.state
    assert "lr" in rule.options
    assert "caution" not in rule.options
    assert ("use_muon" in rule.options) == ("Muon" in rule.names)


def test_rules_do_not_share_a_name() -> None:
    names = [name for rule in rules() for name in rule.names]
    assert len(names) == len(set(names))
    assert len(optimizer_names()) == len({name.lower() for name in optimizer_names()})


def test_the_documentation_has_every_rule_and_refused_family() -> None:
    """The table of thresholds: a row for each name that may be given; of those refused, each that has no threshold."""
    tables = [text for file in sorted(DOCS.rglob("*.md")) if "| optimizer | threshold | $P$ |" in (text := file.read_text())]
    assert len(tables) == 1
    rows = re.search(r"\| optimizer [^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", tables[0])
    assert rows is not None
    cells = [row.split("|")[1] for row in rows[1].splitlines()]
    measured = " ".join(cell for cell, row in zip(cells, rows[1].splitlines(), strict=True) if "refused" not in row)
    refused = " ".join(cell for cell, row in zip(cells, rows[1].splitlines(), strict=True) if "refused" in row)
    assert {name for name in optimizer_names() if not re.search(rf"\b{name}\b", measured)} == set()
    without = [each.family for each in REFUSED if "no Euclidean" in each.reason]
    assert [family for family in without if family not in refused] == []
    assert not [name for name in optimizer_names() if re.search(rf"\b{name}\b", refused.replace("8-bit Adam", ""))]


def test_state_that_belongs_to_no_rule_stays_an_error() -> None:
    parameters = {"w": torch.ones(2, 3)}
    state = {"step": 3, "exp_avg": torch.zeros(2, 3), "outer": torch.eye(2)}
    view = OptimizerView((Group(("w",), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.1}),), {"w": state}, "Whiten")
    with pytest.raises(CurvError, match="no rule"):
        prepare(view, parameters)


@pytest.mark.usefixtures("registered")
def test_a_factor_may_have_its_own_shape_and_a_moment_not() -> None:
    parameters = {"w": torch.ones(2, 3)}
    group = Group(("w",), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.1})
    state = {"step": 3, "exp_avg": torch.zeros(2, 3), "outer": torch.eye(2)}
    found = prepare(OptimizerView((group,), {"w": state}, "Whiten"), parameters)
    ones = torch.ones(2, 3)
    torch.testing.assert_close(found.root["w"].apply(ones), ones / 1.1**0.5)
    with pytest.raises(InputError, match=r"'exp_avg' of w has shape \(2, 2\)"):
        prepare(OptimizerView((group,), {"w": {**state, "exp_avg": torch.zeros(2, 2)}}, "Whiten"), parameters)
    assert WhitenRule().name(OptimizerView((group,), {})) == "Whiten"
