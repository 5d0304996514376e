"""Second moments of parameters that no optimizer has moved yet, so that their curvature can be foreseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.problem import Problem, gradient
from curvcli.errors import UnsupportedError


class Shadow:
    """Adam's second moment of locked parameters, from gradients on the probe.

    A locked block has no optimizer state, so how its optimizer would scale it is not in any file. The
    shadow averages squared probe gradients over measurements, as Adam would over steps; it is noisy
    while young and then sees too much curvature rather than too little.
    """

    DECAY, YOUNG = 0.9, 5

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.count = 0

    def scale(self, optimizer: torch.optim.Optimizer, problem: Problem, names: Sequence[str]) -> dict[str, Tensor] | None:
        """P^(-1/2) of the named parameters, or None until enough gradients were seen.

        Raises UnsupportedError for an optimizer without Adam's moments.
        """
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        group: Mapping[str, Any] = groups.get(id(problem.parameters[names[0]]), {}) if names else {}
        if "betas" not in group:
            raise UnsupportedError(
                f"{type(optimizer).__name__} has no second moments to foresee", hint="adaptive mode needs Adam or AdamW"
            )
        if set(names) != set(self.moments):
            self.moments, self.count = {n: torch.zeros_like(problem.parameters[n]) for n in names}, 0
        self.count += 1
        for name, part in zip(names, gradient(problem, names), strict=True):
            self.moments[name].mul_(self.DECAY).add_(part.square(), alpha=1 - self.DECAY)
        if self.count < self.YOUNG:
            return None
        correction = 1 - self.DECAY**self.count
        roots = {n: (v / correction).sqrt() for n, v in self.moments.items()}
        eps = float(group["eps"])
        return {n: torch.where(r > 0, (r + eps).rsqrt(), torch.zeros_like(r)) for n, r in roots.items() if bool(r.any())}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": dict(self.moments), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.moments = {n: t.to(device) for n, t in state["moments"].items()}
        self.count = int(state["count"])
