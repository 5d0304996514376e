"""GaLore's AdamW: of its authors' package where that is installed, and in words of its own, whose files look the same.

The package needs bitsandbytes, which is large, for classes that no test uses: it is imported with a stand-in for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = ("std", "reverse_std", "left", "right", "full")


class GaLoreProjector:
    def __init__(self, rank: int, scale: float, kind: str) -> None:
        self.rank, self.scale, self.proj_type = rank, scale, kind
        self.ortho_matrix: Any = None

    def sides(self, shape: torch.Size) -> str:
        tall = shape[0] >= shape[1]
        return {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(
            self.proj_type, self.proj_type
        )

    def down(self, gradient: Tensor) -> Tensor:
        side = self.sides(gradient.shape)
        if self.ortho_matrix is None:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            parts = {"left": u[:, : self.rank], "right": vh[: self.rank]}
            self.ortho_matrix = [parts["left"], parts["right"]] if side == "full" else parts[side]
        if side == "full":
            return self.ortho_matrix[0].T @ gradient @ self.ortho_matrix[1].T
        return gradient @ self.ortho_matrix.T if side == "right" else self.ortho_matrix.T @ gradient

    def up(self, low: Tensor, shape: torch.Size) -> Tensor:
        side = self.sides(shape)
        if side == "full":
            return self.scale * self.ortho_matrix[0] @ low @ self.ortho_matrix[1]
        return self.scale * (low @ self.ortho_matrix if side == "right" else self.ortho_matrix @ low)


class AdamW(torch.optim.Optimizer):
    """arXiv 2403.03507, algorithm 2, with the options and state of the authors' package; a projector is never renewed."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True, **options}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[p], p.grad
                if "rank" in group:
                    made = GaLoreProjector(group["rank"], group["scale"], group["proj_type"])
                    gradient = state.setdefault("projector", made).down(gradient)
                if "step" not in state:
                    state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
                state["step"] += 1
                (a, b), size = group["betas"], group["lr"]
                state["exp_avg"].lerp_(gradient, 1 - a)
                state["exp_avg_sq"].mul_(b).addcmul_(gradient, gradient, value=1 - b)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                if group["correct_bias"]:
                    size *= (1 - b ** state["step"]) ** 0.5 / (1 - a ** state["step"])
                p.sub_(state["projector"].up(update, p.shape) if "rank" in group else update, alpha=size)
                p.mul_(1 - group["lr"] * group["weight_decay"])


_PROJECTOR, _STAND_INS = "galore_torch.galore_projector", ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.functional")


def package(name: str) -> Any:
    """A module of galore-torch or apollo-torch, None where it is not installed."""
    made = {} if importlib.util.find_spec("bitsandbytes") else {m: types.ModuleType(m) for m in _STAND_INS}
    if made:
        made["bitsandbytes"].functional = made["bitsandbytes.functional"]  # type: ignore[attr-defined]
        made["bitsandbytes.optim.optimizer"] = types.ModuleType("bitsandbytes.optim.optimizer")
        made["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer  # type: ignore[attr-defined]
    sys.modules.update(made)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    finally:
        for module in made:
            del sys.modules[module]


def make(params: Iterable[Any], ours: bool, **options: Any) -> torch.optim.Optimizer:
    """The package's optimizer, or ours under its name. Skips the test where the package is wanted and not there."""
    if ours:
        AdamW.__module__, GaLoreProjector.__module__ = "galore_torch.adamw", _PROJECTOR
        return AdamW(params, **options)
    found = package("galore_torch.adamw") or pytest.skip("galore-torch is not installed")
    return found.AdamW(params, no_deprecation_warning=True, **options)


def groups(named: Iterable[tuple[str, Tensor]], kind: str, rank: int = 2, scale: float = 0.25) -> list[dict[str, Any]]:
    """As transformers' Trainer makes them: what is not projected, then the matrices of layers."""
    matrices = {n: p for n, p in named if p.dim() == 2 and "layers" in n}
    rest = [p for n, p in named if n not in matrices]
    options = {"rank": rank, "update_proj_gap": 200, "scale": scale, "proj_type": kind}
    return [{"params": rest}, {"params": list(matrices.values()), **options}]


def save(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Its state_dict as torch.save writes it, of ours as the package's, whether that is installed or not."""
    own = next((s["projector"] for s in optimizer.state.values() if "projector" in s), None)
    before = {name: sys.modules.get(name) for name in ("galore_torch", _PROJECTOR)}
    if isinstance(own, GaLoreProjector):
        for name in before:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[_PROJECTOR].GaLoreProjector = GaLoreProjector  # type: ignore[attr-defined]
    try:
        torch.save(optimizer.state_dict(), path)
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
