"""Muon beside AdamW, and Lion, in the files of torch.distributed.checkpoint and of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed.checkpoint as dcp
from normalised import Lion, MuonWithAuxAdam, split
from saved import NET
from tiny import STEPS, build, config
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.utils.data import DataLoader

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.mapping import AmbiguousStateError
from curvcli.errors import UnsupportedError
from curvcli.models.base import Architecture
from curvcli.optimizers.preconditioner import live, prepare

pytestmark = pytest.mark.slow
Optimizers = Sequence[torch.optim.Optimizer]
MAKERS: dict[str, Callable[[nn.Module], Optimizers]] = {
    "Lion": lambda m: [Lion(m.parameters(), lr=1e-3)],
    "one": lambda m: [MuonWithAuxAdam(*split(m))],
    "two": lambda m: [torch.optim.AdamW(split(m)[1], lr=3e-3), torch.optim.Muon(split(m)[0], lr=0.02)],
    "other": lambda m: [torch.optim.SGD(split(m)[1], lr=0.1, momentum=0.9), torch.optim.Muon(split(m)[0], lr=0.02)],
}


def trained(kind: str) -> tuple[nn.Module, Optimizers]:
    model = build()
    optimizers, generator = MAKERS[kind](model), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=generator)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def nested(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, tuple(optimizers))}


def torchtitan(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Its container flattens each optimizer and puts all into one."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = {}
    for optimizer in optimizers:
        state |= get_optimizer_state_dict(model, optimizer, options=flat)
    return {**get_model_state_dict(model), "optimizer": state, "train_state": {"step": torch.tensor(STEPS)}}


def apart(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    states = {f"optimizer_{k}": get_optimizer_state_dict(model, optimizer) for k, optimizer in enumerate(optimizers)}
    return {"model": get_model_state_dict(model), **states}


def by_position(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    states = {f"optimizer_{k}": optimizer.state_dict() for k, optimizer in enumerate(optimizers)}
    return {"model": model.state_dict(), **states}


LAYOUTS = (nested, torchtitan, apart, by_position)


def same(path: Path, model: nn.Module, optimizers: Optimizers, network: Architecture | None = None) -> None:
    parameters = dict(model.named_parameters())
    expected = prepare(live(list(optimizers), parameters), parameters)
    checkpoint = open_checkpoint(path, network)
    try:
        view = checkpoint.optimizer.view(checkpoint.model())
    except AmbiguousStateError as error:  # which gradients choose from
        (view,) = error.views
    found = prepare(view, parameters)
    assert (found.name, found.threshold, found.lr, found.ball_lr, found.doubts) == (
        expected.name, expected.threshold, expected.lr, expected.ball_lr, (),
    )  # fmt: skip
    assert found.balls == expected.balls
    torch.testing.assert_close(found.direction, expected.direction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["Lion", "one", "two"])
def test_torch_distributed_checkpoints_are_read_as_the_optimizers_in_memory(
    kind: str, layout: Callable[..., Any], tmp_path: Path
) -> None:
    model, optimizers = trained(kind)
    place = tmp_path / "step-3"
    dcp.save(layout(model, optimizers), checkpoint_id=place)
    config().save_pretrained(place)
    same(place, model, optimizers)


class Lit(lightning.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.automatic_optimization, self.kind, self.net = False, kind, build()

    def training_step(self, ids: Tensor, index: int) -> None:
        found = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.net(input_ids=ids, labels=ids).loss)
        for optimizer in found if isinstance(found, list) else [found]:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return list(MAKERS[self.kind](self.net))


def fitted(kind: str, path: Path) -> Lit:
    module = Lit(kind)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=path.parent, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randint(64, (8, 16)), batch_size=4))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("kind", ["Lion", "one", "two"])
def test_lightnings_files_are_read_as_the_optimizers_in_memory(kind: str, tmp_path: Path) -> None:
    module = fitted(kind, tmp_path / "a.ckpt")
    found = module.optimizers(use_pl_optimizer=False)
    same(tmp_path / "a.ckpt", module.net, found if isinstance(found, list) else [found], NET)


def test_several_that_are_not_muon_and_adam_are_refused_with_their_number(tmp_path: Path) -> None:
    model, optimizers = trained("other")
    dcp.save(apart(model, optimizers), checkpoint_id=tmp_path / "step-3")
    config().save_pretrained(tmp_path / "step-3")
    fitted("other", tmp_path / "a.ckpt")
    for path, network in ((tmp_path / "step-3", None), (tmp_path / "a.ckpt", NET)):
        checkpoint = open_checkpoint(path, network)
        with pytest.raises(UnsupportedError, match="2 optimizers"):
            checkpoint.optimizer.view(checkpoint.model())
