"""Shampoo: an inverse root of accumulated outer products on each side of a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal, InverseRoot, Multiple
from curvcli.curvature.rotated import Rotated
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State
from curvcli.optimizers.kronecker import MOST_SIDES, eigenbasis, matrices

# Accumulated outer products and their inverse roots: of pytorch_optimizer, and of torch_optimizer.
_NAMES = (("pre_cond", "inv_pre_cond"), ("precond", "inv_precond"))
_SIDES = frozenset(f"{key}_{i}" for pair in _NAMES for key in pair for i in range(MOST_SIDES))
# A direction that never had a gradient, as an embedding row of a token not seen yet, keeps the eps that the sums begin with.
_UNTOUCHED = 1 + 1e-4


class Shampoo(Rule):
    """Gupta et al., arXiv 1802.09568, algorithm 2, as pytorch_optimizer and torch_optimizer have it.

    u = P^(-1) ((1 - b) g + b u_before), w <- w - lr u, and P^(-1) is the Kronecker product of a stored matrix for each side.
    The momentum b goes through P again at each step, so that an eigenvector that flips sign has (P + b) u = (1 - b) g: P + b
    is what is given as P, and 1 - b the filter. Where P is not above b the momentum grows by itself, whatever the loss.
    """

    names = frozenset({"Shampoo"})
    state = frozenset({"momentum_buffer"})  # the last update, which both keep without momentum too
    extra = frozenset({"step"}) | _SIDES
    by_shape = _SIDES
    shaped_otherwise = _SIDES
    options = frozenset({"lr", "momentum", "weight_decay", "weight_decouple", "matrix_eps", "epsilon", "update_freq"})
    refusals: Mapping[str, str] = {**Rule.refusals, "fixed_decay": "its decay does not go with the learning rate"}

    def name(self, view: OptimizerView) -> str:
        """Always Shampoo."""
        return "Shampoo"

    def matches(self, view: OptimizerView) -> bool:
        """Whether last updates stand beside sums of outer products and their inverse roots."""
        return super().matches(view) and any({f"{key}_0" for key in pair} <= view.keys for pair in _NAMES)

    def preconditioner(self, group: Group, state: State) -> InverseRoot:
        """P + b, P the Kronecker product of the inverses of what is stored for each side.

        Raises:
            InputError: a matrix is missing or damaged, eps is no number, or P is not above b.
            UnsupportedError: momentum with coupled weight decay.
        """
        b, shape = group.fraction("momentum"), tuple(state["momentum_buffer"].shape)
        if b and group.number("weight_decay", 0.0) and not self.decoupled(group, None):
            raise UnsupportedError(
                "Shampoo's momentum and its coupled weight decay are both on: it weighs the gradient by 1 - momentum and "
                "the decay by 1; not supported",
                hint=NO_OPTIMIZER,
            )
        sums, roots = _sides(state, shape)
        if not shape:
            return Multiple(1 + b)
        least = group.number("matrix_eps" if "matrix_eps" in group.options else "epsilon", least=0.0)
        bases: list[Tensor] = []
        inverse, untouched = (
            torch.ones((), device=roots[0].device),
            torch.zeros((), dtype=torch.bool, device=roots[0].device),
        )
        for sum_, root in zip(sums, roots, strict=True):
            basis, values = eigenbasis(root)
            quotients = (basis * (sum_.to(basis) @ basis)).sum(0)
            inverse = inverse.to(values)[..., None] * values
            untouched = untouched[..., None] | (quotients <= _UNTOUCHED * least) | (values == 0)
            bases.append(basis)
        p = 1 / inverse
        if b and not bool(((p > b) | untouched).all()):
            raise InputError(
                f"Shampoo's momentum {b:g} goes through its preconditioner, which is as small as {float(p.min()):.3g}: its "
                "update grows by itself, whatever the loss",
                hint="train without its momentum, or use a later checkpoint",
            )
        return Rotated(tuple(bases), Diagonal(p + b, untouched if bool(untouched.any()) else None))

    def transfer(self, group: Group, state: State) -> float:
        """1 - b. Raises InputError where it is not in [0, 1)."""
        return 1 - group.fraction("momentum")

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Where the group says so (pytorch_optimizer's `weight_decouple`)."""
        return group.flag("weight_decouple")


def _sides(state: State, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums and inverse roots for every dimension, in order. Raises InputError where they do not fit the shape."""
    keys = next((pair for pair in _NAMES if matrices(state, pair[1])), _NAMES[0])
    found = [matrices(state, key) for key in keys]
    for key, known in zip(keys, found, strict=True):
        sizes = [tuple(known[i].shape) if i in known else () for i in range(max(len(shape), *known, 0))]
        if sizes != [(n, n) for n in shape] or len(known) != len(shape):
            raise InputError(
                f"optimizer state has {key!r} of shapes {sizes}, the parameter {shape}",
                hint="the state is damaged, or belongs to another model or another order of parameters",
            )
    sums, roots = ([known[i] for i in range(len(shape))] for known in found)
    return sums, roots
