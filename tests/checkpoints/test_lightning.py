"""Lightning's checkpoints under FSDP and DeepSpeed, and with OmegaConf's configurations, from files that they wrote."""

from __future__ import annotations

import dataclasses
import enum
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_runs import Lit, fit
from ranks import launch
from real import analyzed, inspected
from saved import NET, is_the_run
from tiny import STEPS, build, config
from torch import Tensor

from curvcli.checkpoints import open_checkpoint
from curvcli.files.foreign import Foreign
from curvcli.files.safe import load_pickle

FEW = ("--tokens", "64", "--sequence-length", "16")


# --- OmegaConf --------------------------------------------------------------------------------


class Kind(enum.Enum):
    SMALL = 1


@dataclasses.dataclass
class Settings:
    """Every kind of entry that OmegaConf types."""

    depth: int = 2
    kind: Kind = Kind.SMALL
    where: Path = Path("/data")
    rate: float | None = None
    either: int | str = 3
    words: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    pair: tuple[int, int] = (1, 2)
    sizes: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})
    raw: bytes = b"x"


def configuration(kind: str) -> Any:
    omegaconf = pytest.importorskip("omegaconf", reason="makes the configurations")
    if kind == "structured":
        return omegaconf.OmegaConf.structured(Settings)
    made = omegaconf.OmegaConf.create(
        {"lr": 1e-2, "model": {"depth": 2, "same": "${lr}", "list": [1, "a", {"x": None}], "day": "${day:1}"}}
    )
    omegaconf.OmegaConf.register_new_resolver("day", lambda n: n + 1, use_cache=True, replace=True)
    assert made.model.day == 2  # an answer that the configuration keeps, and saves
    return made


@pytest.mark.parametrize("kind", ["plain", "structured"])
def test_omegaconf_in_hyperparameters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = configuration(kind)
    for own in (Settings, Kind):  # as of a training script
        monkeypatch.setattr(own, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], own.__name__, own, raising=False)
    path = tmp_path / "epoch=0-step=2.ckpt"
    module = Lit(arguments)
    trainer = fit(module, path)
    assert "omegaconf.dictconfig.DictConfig" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    is_the_run(path, module.net, trainer.optimizers[0])
    found = load_pickle(path)["hyper_parameters"]["arguments"]
    assert isinstance(found, Foreign)
    assert found.name == "omegaconf.dictconfig.DictConfig"
    assert "_content" in found.attributes, "a record of what the file says, and no configuration"


@pytest.mark.slow
def test_omegaconf_by_the_command(tmp_path: Path) -> None:
    fit(Lit(configuration("plain")), tmp_path / "epoch=0-step=2.ckpt")
    config().save_pretrained(tmp_path)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    found = inspected(tmp_path)
    assert (found["format"], found["step"], found["optimizer"]["parameters with state"]) == ("lightning", 2, 21)
    assert analyzed(tmp_path, tmp_path / "ids.npy", *FEW)["optimizer"]["preconditioner"] == "checkpoint"


# --- strategies --------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Weights by name and the optimizer's view."""
    checkpoint = open_checkpoint(path, NET)
    assert checkpoint.step == STEPS
    model = checkpoint.model()
    assert checkpoint.optimizer is not None
    return model.state_dict(), checkpoint.optimizer.view(model)


def same(found: dict[str, Any], expected: dict[str, Any], *, prefix: str = "") -> None:
    assert {prefix + name for name in found} == set(expected)
    for name, value in found.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[prefix + name])), name


def check_groups(view: Any) -> None:
    assert sorted(len(group.names) for group in view.groups) == [5, 16]
    for group in view.groups:
        assert {"norm" in name for name in group.names} == {group.number("weight_decay") == 0}


def by_the_command(path: Path, tmp_path: Path, form: str) -> None:
    found = inspected(path)
    assert (found["format"], found["step"], found["optimizer"]["parameters with state"]) == (form, STEPS, 21)
    config().save_pretrained(tmp_path / "net")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    report = analyzed(path, tmp_path / "ids.npy", "--model", tmp_path / "net", *FEW)
    assert (report["optimizer"]["preconditioner"], report["optimizer"]["step"]) == ("checkpoint", STEPS)


@pytest.mark.slow
def test_fsdp_strategy(tmp_path: Path) -> None:
    """Against torch's gather of the running state, and against what Lightning's own loader gives."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint
    from lightning_strategies import write_fsdp

    launch(write_fsdp, tmp_path, initialize=False)
    full, sharded = (tmp_path / kind / "epoch=0-step=3.ckpt" for kind in ("full", "sharded"))
    assert full.is_file()
    assert {".metadata", "meta.pt"} <= {p.name for p in sharded.iterdir()}
    loaded = _load_distributed_checkpoint(sharded)
    live = torch.load(tmp_path / "live.pt", weights_only=True)
    for path, weights in (
        (sharded, loaded["model"]), (full, torch.load(full, weights_only=True)["state_dict"]),
    ):  # fmt: skip
        found, view = read(path)
        same(found, weights, prefix="net.")
        for name, entry in view.state.items():
            same(dict(entry), live["state"][f"net.{name}"])
        assert len(view.state) == 21
        check_groups(view)
    for name, entry in read(sharded)[1].state.items():
        same(dict(entry), loaded["optimizer_0"]["state"][f"net.{name}"])
    by_the_command(sharded, tmp_path, "dcp")
    by_the_command(full, tmp_path, "lightning")
    assert open_checkpoint(sharded.parent, NET).path == sharded


@pytest.mark.slow
def test_deepspeed_strategy(tmp_path: Path) -> None:
    """Against DeepSpeed's gathers of the running state, and against the conversion that Lightning tells people to run."""
    pytest.importorskip("deepspeed", reason="writes the checkpoints")
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
    from lightning_strategies import write_deepspeed

    launch(write_deepspeed, tmp_path, initialize=False)
    for stage in (2, 3):
        path = tmp_path / f"stage{stage}" / "epoch=0-step=3.ckpt"
        assert {"checkpoint", "latest", "zero_to_fp32.py"} <= {p.name for p in path.iterdir()}
        live = torch.load(path.parent / "live.pt", weights_only=True)
        weights, view = read(path)
        same(weights, {name: entry["fp32"] for name, entry in live.items()})
        for key in ("exp_avg", "exp_avg_sq"):
            same({n: e[key] for n, e in view.state.items()}, {n: e[key] for n, e in live.items()})
        check_groups(view)
        converted = convert_zero_checkpoint_to_fp32_state_dict(path, tmp_path / f"{stage}.ckpt")["state_dict"]
        same(weights, converted, prefix="net.")
        by_the_command(path, tmp_path, "deepspeed")
        alone = open_checkpoint(tmp_path / f"{stage}.ckpt", NET)
        same(alone.model().state_dict(), weights)
        assert alone.format == "lightning"
    assert build().state_dict().keys() == weights.keys()
