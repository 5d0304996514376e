"""GaLore: Adam on the coordinates of projected gradients, whose steps stay in the projector's subspace."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, scalar
from curvcli.optimizers.projected import LEFT, RIGHT, SCALE, SQUARE, Projected, check_orthonormal

_ADAM = Adam()


class GaLoreAdamW(Rule):
    """Zhao et al., arXiv 2403.03507, as the package galore-torch has it: threshold (2/lr - wd)(1 + b)/(1 - b).

    Of a matrix of gradients G only L' G R' is seen, of orthonormal L and R (one of them, or both), and the step is
    L (m / d) R times a scale. lambda is over the subspace of such steps; everything else does not move. The projector is
    made anew every `update_proj_gap` steps, and the moments stay as they are: lambda is that of now. Decay comes after the
    step and shrinks that too: the threshold is over 1 - lr wd besides.
    """

    names = frozenset({"GaLoreAdamW"})
    state = frozenset({"step", "exp_avg"})
    extra = frozenset({"exp_avg_sq", SQUARE, LEFT, RIGHT, SCALE})
    counts = frozenset({"step", SCALE})
    by_shape = extra
    shaped_otherwise = frozenset({SQUARE, LEFT, RIGHT})
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "correct_bias", "rank", "update_proj_gap", "scale", "proj_type"}
    )

    def needed(self, group: Group, state: State) -> frozenset[str]:
        """Either of the two second moments besides."""
        return self.state | {SQUARE if SQUARE in state else "exp_avg_sq"}

    def matches(self, view: OptimizerView) -> bool:
        """Whether some parameter's second moment is of projected gradients."""
        return SQUARE in view.keys

    def completed(self, view: OptimizerView, parameters: Mapping[str, Tensor]) -> OptimizerView:
        """As it is. Raises InputError where a projector does not fit its parameter, or is not orthonormal."""
        for name, entry in view.state.items():
            if name in parameters and SQUARE in entry:
                _check(name, entry, parameters[name])
        return view

    def preconditioner(self, group: Group, state: State) -> Diagonal | Projected:
        """Adam's P with eps added before the correction; of a projected parameter in its coordinates, over the scale.

        Raises as Adam's.
        """
        if SQUARE not in state:
            return _ADAM.preconditioner(group, state)
        inner = _ADAM.preconditioner(group, {"exp_avg_sq": state[SQUARE], "step": state.get("step")})
        size = state["exp_avg"].numel()
        return Projected(state.get(LEFT), state.get(RIGHT), inner.scaled(1 / scalar(state.get(SCALE))), size)

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b)/(1 + b). Raises InputError where the betas are missing or not in [0, 1)."""
        return _ADAM.transfer(group, state)

    def edge(self, lr: float, decay: float, transfer: float) -> float:
        """(2/lr - wd) / ((1 - lr wd) g(-1)), wd the weight decay; no more than 0 where the decay alone diverges."""
        kept = 1 - lr * decay
        return super().edge(lr, decay, transfer) / kept if kept > 0 else 0.0

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always."""
        return True

    def momentum(self, group: Group, state: State) -> Tensor:
        """The first moment, in the parameter's shape."""
        return state["exp_avg"]  # type: ignore[no-any-return]

    def findings(self, view: OptimizerView) -> list[Finding]:
        """`projected-updates`: in how many dimensions of how many matrices the optimizer moves, and for how long."""
        own = [entry for entry in view.state.values() if SQUARE in entry]
        gaps = {str(g.options["update_proj_gap"])[:20] for g in view.groups if g.options.get("update_proj_gap") is not None}
        kept, whole = (sum(entry[key].numel() for entry in own) for key in (SQUARE, "exp_avg"))
        return [
            Finding(
                code="projected-updates",
                severity="info",
                message=f"{len(own)} matrices move in {kept:,} of their {whole:,} dimensions alone, chosen anew "
                f"every {' or '.join(sorted(gaps)) or 'few'} steps: curvature is that in those of now",
            )
        ]


def _check(name: str, entry: State, parameter: Tensor) -> None:
    left, right, square = entry.get(LEFT), entry.get(RIGHT), entry[SQUARE]
    scale = scalar(entry.get(SCALE))
    if not 0 < scale < float("inf"):
        raise InputError(
            f"the projector of {name} scales by {str(entry.get(SCALE))[:40]}",
            hint=f"use another checkpoint, or {NO_OPTIMIZER}",
        )
    low = _shape(square)
    rows, r = (low[0], low[0]) if left is None else _shape(left)
    s, columns = (low[1], low[1]) if right is None else _shape(right)
    if (left is None and right is None) or (r, s) != low or (rows, columns) != tuple(parameter.shape):
        raise InputError(
            f"the projector of {name} and its second moment fit a {rows} x {columns} matrix, not {tuple(parameter.shape)}",
            hint="the state belongs to another model or another order of parameters",
        )
    check_orthonormal(name, left, right)


def _shape(part: object) -> tuple[int, int]:
    """Of a matrix; of what is none one that nothing has."""
    return (part.shape[0], part.shape[1]) if isinstance(part, Tensor) and part.dim() == 2 else (-1, -1)
