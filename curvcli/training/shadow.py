"""Second moments of parameters that no optimizer has moved yet, so that their curvature can be foreseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import InverseRoot
from curvcli.curvature.problem import Problem, gradient
from curvcli.errors import UnsupportedError
from curvcli.optimizers import rule_for
from curvcli.optimizers.base import OptimizerView


class Shadow:
    """Second moments of locked parameters, from gradients on the probe.

    A locked block has no optimizer state, so how its optimizer would scale it is not in any file. The
    shadow averages squared probe gradients over measurements, as the optimizer would over steps; it is noisy
    while young and then sees too much curvature rather than too little.
    """

    DECAY, YOUNG = 0.9, 5  # over measurements, not steps: of some ten, from the fifth on

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.count = 0

    def roots(self, view: OptimizerView, problem: Problem, names: Sequence[str]) -> dict[str, InverseRoot] | None:
        """P^(-1/2) of those of the named parameters that got a gradient, or None until enough of them were seen.

        Raises UnsupportedError for an optimizer whose state gradients alone do not tell.
        """
        rule, groups = rule_for(view), {name: group for group in view.groups for name in group.names}
        # Probed with empty moments: can the rule build its state from gradients alone?
        nothing = torch.zeros(())
        if not names or any(n not in groups for n in names) or rule.expected(nothing, nothing) is None:
            raise UnsupportedError(f"{view.name} has no second moments to foresee", hint="adaptive mode needs Adam or AdamW")
        # Another group of blocks joins next: what was averaged is of other parameters.
        if set(names) != set(self.moments):
            self.moments, self.count = {n: torch.zeros_like(problem.parameters[n]) for n in names}, 0
        self.count += 1
        for name, part in zip(names, gradient(problem, names), strict=True):
            self.moments[name].mul_(self.DECAY).add_(part.square(), alpha=1 - self.DECAY)
        if self.count < self.YOUNG:
            return None
        correction = 1 - self.DECAY**self.count  # as Adam's (arXiv 1412.6980, section 3)
        roots: dict[str, InverseRoot] = {}
        for name, moment in self.moments.items():
            state = rule.expected(torch.zeros_like(moment), moment / correction)
            root = rule.preconditioner(groups[name], state or {}).to(moment)
            if root.idle < moment.numel():
                roots[name] = root
        return roots

    def state_dict(self) -> dict[str, Any]:
        """The averages of squared gradients, not bias-corrected, in the parameters' shapes, and how many measurements."""
        return {"moments": dict(self.moments), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave, its tensors to the given device."""
        self.moments = {n: t.to(device) for n, t in state["moments"].items()}
        self.count = int(state["count"])
