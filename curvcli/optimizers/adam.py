"""Adam, AdamW and NAdam: a momentum filter over gradients divided by a root mean square."""

from __future__ import annotations

from torch import Tensor

from curvcli.optimizers.base import Group, OptimizerView, State, moment


def _root(group: Group, state: State) -> Tensor:
    """sqrt(v / (1 - b2^t)) + eps, with the running maximum of v under amsgrad."""
    key = "max_exp_avg_sq" if group.options.get("amsgrad") else "exp_avg_sq"
    correction = 1 - group.betas[1] ** float(state["step"])
    root: Tensor = (moment(state, key) / correction).sqrt() + group.number("eps", 1e-8)
    return root


class Adam:
    """Cohen et al., arXiv 2207.14484: threshold (2/lr - wd)(1 + b1)/(1 - b1)."""

    def matches(self, view: OptimizerView) -> bool:
        known = view.name in (None, "Adam", "AdamW")
        return known and {"exp_avg", "exp_avg_sq", "step"} <= view.keys and "mu_product" not in view.keys

    def name(self, view: OptimizerView) -> str:
        return view.name or ("AdamW" if all(self.decoupled(g) for g in view.groups) else "Adam")

    def preconditioner(self, group: Group, state: State) -> Tensor:
        corrected: Tensor = _root(group, state) * (1 - group.betas[0] ** float(state["step"]))
        return corrected

    def gain(self, group: Group, state: State) -> float:
        return (1 - group.betas[0]) / (1 + group.betas[0])

    def rate(self, group: Group, state: State) -> float:
        return group.number("lr")

    def decoupled(self, group: Group) -> bool:
        # Files from before torch 2.8 do not say; AdamW is what trainers of Transformers use.
        return bool(group.options.get("decoupled_weight_decay", True))

    def momentum(self, group: Group, state: State) -> Tensor:
        return state["exp_avg"]  # type: ignore[no-any-return]


class NAdam(Adam):
    """torch/optim/nadam.py: -lr [(1 - mu_t)/(1 - M_t) g + mu_t+1/(1 - M_t mu_t+1) m] / (sqrt(v) + eps).

    M_t is the running product of mu. With m = (1 - b1) z/(z - b1) g, the filter at z = -1 is
    (1 - mu_t)/(1 - M_t) + mu_t+1/(1 - M_t mu_t+1) (1 - b1)/(1 + b1).
    """

    def matches(self, view: OptimizerView) -> bool:
        return view.name in (None, "NAdam") and "mu_product" in view.keys

    def name(self, view: OptimizerView) -> str:
        return "NAdam"

    def preconditioner(self, group: Group, state: State) -> Tensor:
        return _root(group, state)

    def gain(self, group: Group, state: State) -> float:
        now, ahead = self._coefficients(group, state)
        return now + ahead * super().gain(group, state)

    def decoupled(self, group: Group) -> bool:
        return bool(group.options.get("decoupled_weight_decay", False))

    def momentum(self, group: Group, state: State) -> Tensor:
        # The share of the gradient itself is taken from m too: the next gradient is not known.
        now, ahead = self._coefficients(group, state)
        return state["exp_avg"] * (now + ahead)  # type: ignore[no-any-return]

    def _coefficients(self, group: Group, state: State) -> tuple[float, float]:
        beta, decay, step = group.betas[0], group.number("momentum_decay", 4e-3), float(state["step"])
        mu, mu_next = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
        product = float(state["mu_product"])
        return (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
