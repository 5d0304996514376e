"""Optimizers of fewer parameters than the model, or of groups of their own: one assignment is proved, or none is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from saved import NET
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.evidence import Evidence, choose, contradictions, gather
from curvcli.checkpoints.state.mapping import AmbiguousStateError
from curvcli.checkpoints.state.partial import MOST, assignments
from curvcli.errors import InputError
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import live

Model = TypeVar("Model", bound=nn.Module)
IDS = torch.randint(64, (20, 33), generator=torch.Generator().manual_seed(0)) ** 2 % 61


def build(width: int = 16, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 40) -> torch.optim.Optimizer:
    for step in range(steps):
        ids = IDS[step % 20 : step % 20 + 4]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def frozen_below() -> LlamaForCausalLM:
    """The user's own factory: requires_grad as it was trained."""
    return freeze(build(), "model.embed_tokens", "model.layers.0.")


def freeze(model: Model, *prefixes: str) -> Model:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return model


def by_dimension(model: nn.Module) -> list[dict]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if (p.dim() >= 2) is matrix]} for matrix in (True, False)]


def a_group_a_layer(model: nn.Module, *, split: bool = False) -> list[dict]:
    """Layer-wise rates as BEiT's recipe and its heirs set them: from the head down, also matrices and vectors apart."""

    def key(name: str, parameter: nn.Parameter) -> tuple[int, bool]:
        depth = -int(name.split(".")[2]) if ".layers." in name else -9 if "embed" in name else -2
        return -depth, split and parameter.dim() < 2

    keys = sorted({key(n, p) for n, p in model.named_parameters()})
    return [{"params": [p for n, p in model.named_parameters() if key(n, p) == k], "lr": 1e-2 * 0.8 ** k[0]} for k in keys]


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[nn.Module], list[dict]]]] = {
    "embedding and first layer": (("model.embed_tokens", "model.layers.0."), by_dimension),
    "all but the last layer and head": (("model.embed_tokens", "model.layers.0.", "model.layers.1."), by_dimension),
    "the last layer": (("model.layers.2.",), by_dimension),
    "a group a layer": ((), a_group_a_layer),
    "a group a layer, matrices apart": ((), lambda model: a_group_a_layer(model, split=True)),
}


def evidence(model: nn.Module) -> Evidence:
    return gather(model, lambda m, ids: m(input_ids=ids, labels=ids).loss, list(IDS.split(2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_one_assignment_is_found(layout: str, tmp_path: Path) -> None:
    prefixes, groups = LAYOUTS[layout]
    model = freeze(build(), *prefixes)
    optimizer = train(model, torch.optim.AdamW(groups(model), lr=1e-2))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.model()
    with pytest.raises(AmbiguousStateError) as caught:
        checkpoint.optimizer.view(found)
    view, finding = choose(caught.value, evidence(found))
    right = live(optimizer, dict(model.named_parameters()))
    assert [group.names for group in view.groups] == [group.names for group in right.groups]
    for name, entry in right.state.items():
        assert torch.equal(view.state[name]["exp_avg_sq"], entry["exp_avg_sq"])
    for prefix in prefixes:
        assert prefix.removesuffix(".") in finding.message


def test_shapes_alone_suffice_where_every_layer_differs(tmp_path: Path) -> None:
    """A net of one layer: what is frozen is told by its shape."""
    model = freeze(build(layers=1), "model.layers.0.")
    optimizer = train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 3)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    report = analyze_checkpoint(tmp_path, options)
    found = {finding.code: finding for finding in report.findings}
    assert found["order-by-shape"].severity == "warning"
    assert "has 3 of the model's 12 parameters" in found["order-by-shape"].message
    assert "model.layers.0 frozen" in found["order-by-shape"].message


def test_where_gradients_do_not_tell_nothing_is_taken(tmp_path: Path) -> None:
    """Moments of noise follow no layer; the remedies of the message then work."""
    model = frozen_below()
    optimizer = train(model, torch.optim.AdamW(by_dimension(model), lr=1e-2), 3)
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"].copy_(torch.rand(entry["exp_avg_sq"].shape))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    with pytest.raises(
        InputError, match=r"has 20 of the model's 30 parameters.*frozen parameters are the likely reason.*--model"
    ):
        analyze_checkpoint(tmp_path, options)
    view = open_checkpoint(tmp_path, replace(NET, build=frozen_below)).optimizer.view(frozen_below())
    assert "model.layers.0.self_attn.q_proj.weight" not in view.state
    assert len(view.state) == 20
    curvcli.save_optimizer(tmp_path, optimizer, model)
    report = analyze_checkpoint(tmp_path, options)
    assert report.optimizer.preconditioner == "checkpoint"
    assert "unread-optimizer" in {finding.code for finding in report.findings}


@pytest.mark.slow
def test_the_factory_of_the_remedy(tmp_path: Path) -> None:
    model = frozen_below()
    train(model, optimizer := torch.optim.AdamW(by_dimension(model), lr=1e-2), 10)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    options = Options(
        data=tmp_path / "ids.npy",
        tokens=64,
        sequence_length=16,
        max_hvps=4,
        depths=False,
        mode="kept",
        model="test_frozen:frozen_below",
    )
    by_hand = analyze_checkpoint(tmp_path, options)
    curvcli.save_optimizer(tmp_path, optimizer, model)
    by_name = analyze_checkpoint(tmp_path, replace(options, model=None))
    assert by_hand.full.rho == pytest.approx(by_name.full.rho, rel=1e-4)


def test_a_larger_optimizer_is_another_models(tmp_path: Path) -> None:
    optimizer = train(other := build(layers=4), torch.optim.AdamW(other.parameters(), lr=1e-2), 1)
    build().save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"of 39 parameters, does not fit the model of 30 .*another model"):
        checkpoint.optimizer.view(checkpoint.model())


def test_too_many_assignments_are_none() -> None:
    """Six of twelve equal layers frozen: 924 ways."""
    parameters = {f"layers.{i}.weight": torch.zeros(2, 2) for i in range(12)}
    assert assignments([[(2, 2)] * 6], parameters) == []
    few = assignments([[(2, 2)] * 11], parameters)
    assert len(few) == 12 <= MOST
    assert assignments([[(2, 2)] * 13], parameters) == []


def test_a_hostile_search_ends() -> None:
    parameters = {f"p{i}": torch.zeros(2, 2) for i in range(400)}
    assert assignments([[(2, 2)]] * 200, parameters) == []


@pytest.mark.parametrize(("entries", "refused"), [(16, False), (100, False), (256, True)])
def test_tensors_of_few_entries_prove_no_swap(entries: int, refused: bool) -> None:
    """Two tensors that fit each other's moments alone: by chance where there are few entries."""
    names = [f"layers.{i}.k_proj.weight" for i in range(2)]
    squares = [torch.rand(entries, 1, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def centred(values: torch.Tensor) -> torch.Tensor:
        ranks = values.flatten().argsort().argsort().double() - (entries - 1) / 2
        return ranks / ranks.norm()

    found = Evidence({n: torch.arange(entries) for n in names}, {n: centred(v) for n, v in zip(names, squares, strict=True)})
    view = OptimizerView((), {names[0]: {"exp_avg_sq": squares[1]}, names[1]: {"exp_avg_sq": squares[0]}})
    if refused:
        with pytest.raises(InputError, match="fit each other's second moments"):
            contradictions(view, found, "here")
    else:
        contradictions(view, found, "here")
