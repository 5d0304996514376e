"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal, InverseRoot
from curvcli.curvature.precision import wide
from curvcli.curvature.rotated import Rotated, Sides, turned
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, moment, scalar, steps
from curvcli.optimizers.kronecker import MOST_SIDES, basis, matrices, prove

# Options by which a group is SOAP's, and not that of an Adam beside it.
_OWN = frozenset({"shampoo_beta", "precondition_frequency", "max_precond_dim", "max_precondition_dim"})
# Lists of matrices; where none is a tensor they stay lists.
_Q, _GG = (frozenset({key, *(f"{key}_{i}" for i in range(MOST_SIDES))}) for key in ("Q", "GG"))
_SIZED = "it divides each tensor's update by its size, which is no linear map of the gradient"
# How much better squared first moments follow second ones in the basis in which they are stored. In small networks, 3 to 60
# steps old, the correlation of logarithms was 0.35 to 1.0 in the right one and -0.33 to 0.07 in the wrong one.
_CLEAR = 0.2


class SOAP(Rule):
    """Vyas et al., arXiv 2409.11321, algorithm 3, as its authors' file and pytorch_optimizer have it.

    w <- (1 - lr wd) (w - lr P^(-1) m): the decay comes after the step and shrinks it too. P is diagonal in the basis Q that
    the next step uses. Both skip a tensor's first gradient, which makes Q; pytorch_optimizer counts that as a step.

    Parameters of groups that have none of SOAP's options follow Adam, with P and threshold of their own.
    """

    names = frozenset({"SOAP"})
    state = frozenset({"exp_avg", "exp_avg_sq"})
    extra = Adam.extra | {"precondition_frequency", "shampoo_beta", "turned"} | _Q | _GG
    counts = frozenset({"step", "precondition_frequency", "shampoo_beta", "turned", "Q", "GG"})
    unset = Adam.unset
    by_shape = _Q | _GG
    shaped_otherwise = _Q | _GG
    second = "exp_avg_sq"
    options = Adam.options | _OWN | {"merge_dims", "precondition_1d"}
    refusals: Mapping[str, str] = {
        **Rule.refusals,
        "normalize_grads": _SIZED,
        "normalize_gradient": _SIZED,
        "warmup_steps": "a variant's, which corrects its averages as it goes",
    }

    _adam = Adam()

    def name(self, view: OptimizerView) -> str:
        """SOAP, or "SOAP with AdamW" where some parameters follow that."""
        others = [group for group in view.groups if group.names and not rotates(group)]
        if not others:
            return "SOAP"
        return "SOAP with AdamW" if all(self.decoupled(group, None) for group in others) else "SOAP with Adam"

    def matches(self, view: OptimizerView) -> bool:
        """Whether Adam's moments stand beside factors and their eigenbases."""
        return super().matches(view) and bool(view.keys & _Q) and bool(view.keys & _GG)

    def completed(self, view: OptimizerView, parameters: Mapping[str, Tensor]) -> OptimizerView:
        """With the basis in which first moments are stored: `turned` is 1 for Q, 0 for the weights' own, NaN where unknown.

        Raises InputError where a basis does not fit.
        """
        if not view.state or all("turned" in entry for entry in view.state.values()):
            return view
        own = [group for group in view.groups if rotates(group)]
        found = 0.0 if all("max_precondition_dim" in group.options for group in own) else _stored(view)
        state = {name: ChainMap({"turned": found}, entry) for name, entry in view.state.items()}  # type: ignore[arg-type]
        return replace(view, state=state)

    def preconditioner(self, group: Group, state: State) -> InverseRoot:
        """P = Q (1 - b1^t) / sqrt(1 - b2^t) (sqrt(v) + eps) Q^T / (1 - lr wd); without correction the quotient is 1.

        Raises:
            InputError: v, the steps or betas are missing, or a basis does not fit the parameter.
            UnsupportedError: it is not known how the parameter's dimensions were merged.
            UsageError: the decay of one step is more than the weight.
        """
        if not rotates(group):
            return self._adam.preconditioner(group, state)
        if group.flag("amsgrad"):
            raise UnsupportedError("SOAP's option amsgrad is on: a variant's; not supported", hint=NO_OPTIMIZER)
        square, sides = moment(state, "exp_avg_sq"), _sides(group, state)
        factor = 1.0
        # A tensor whose first gradient was skipped has not moved: all of it is idle.
        corrected = all(group.flag(key, True) for key in ("correct_bias", "bias_correction"))
        if corrected and bool(square.any()):
            t = _taken(group, state)
            first, second = (1 - beta**t for beta in group.betas)
            factor = first / math.sqrt(second)
        if group.options.get("lr") is not None and group.lr != 0:
            kept = 1 - group.number("lr") * group.number("weight_decay", 0.0)
            if not kept > 0:
                raise UsageError(
                    f"at learning rate {group.lr:g} the weight decay {group.options.get('weight_decay')} takes more "
                    "than the weight in one step",
                    hint="check --lr and --weight-decay",
                )
            factor /= kept
        entries = (square.sqrt() + group.number("eps", 1e-8)) * factor
        if sides is None:
            return Diagonal.of(entries, square)
        prove(sides)
        shape = merged(tuple(square.shape), sides)
        return Rotated(sides, Diagonal.of(entries.reshape(shape), square.reshape(shape)))

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b1)/(1 + b1). Raises InputError where the betas are missing or not in [0, 1)."""
        return (1 - group.betas[0]) / (1 + group.betas[0])

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always; as Adam's group says for others, and yes where it does not."""
        return rotates(group) or self._adam.decoupled(group, None)

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """The first moment in the weights' own basis, in the parameter's shape; None where its own is not known."""
        stored: Tensor = state["exp_avg"]
        sides = _sides(group, state)
        if sides is None or scalar(state.get("turned")) == 0:
            return stored
        return _turned(stored, sides, back=True) if scalar(state.get("turned")) == 1 else None


def rotates(group: Group) -> bool:
    """Whether a group's options say that it is SOAP's."""
    return not _OWN.isdisjoint(group.options)


def _taken(group: Group, state: State) -> float:
    """Steps that moved the weights, of which pytorch_optimizer's group counts one more."""
    return steps({"step": steps(state) - 1}) if group.options.get("step") is not None else steps(state)


def _sides(group: Group, state: State) -> Sides | None:
    """The basis, None where it is the weights' own. Raises as `SOAP.preconditioner`."""
    known = matrices(state, "Q")
    if without := sorted(matrices(state, "GG").keys() - known.keys()):
        raise InputError(
            f"optimizer state has factor 'GG_{without[0]}' and no basis 'Q_{without[0]}'",
            hint="it is damaged: use another checkpoint",
        )
    if not known:
        return None
    if group.flag("merge_dims") and state["exp_avg_sq"].dim() > 3:
        raise UnsupportedError(
            "SOAP merged the dimensions of a convolution's weight (merge_dims), and whether its channels came first or last "
            "(data_format) is in no file; not supported",
            hint=NO_OPTIMIZER,
        )
    return basis(known, tuple(state["exp_avg_sq"].shape))


def merged(shape: tuple[int, ...], sides: Sides) -> tuple[int, ...]:
    """The shape that sides are of: the tensor's, with neighbours multiplied where one side is for several.

    A side without a matrix is of one dimension alone, which was too large for one. Raises InputError where they do not fit.
    """
    left = [size for size in shape if size != 1]
    found = []
    for side in sides:
        size = (left.pop(0) if left else 1) if side is None else 1
        while side is not None and size < len(side) and left:
            size *= left.pop(0)
        if side is not None and size != len(side):
            break
        found.append(size)
    if left or len(found) < len(sides):
        sizes = ["any" if side is None else len(side) for side in sides]
        raise InputError(
            f"optimizer state has bases of sizes {sizes}, which no dimensions of a parameter of shape {shape} have",
            hint="the state belongs to another model or another order of parameters",
        )
    return tuple(found)


def _turned(tensor: Tensor, sides: Sides, *, back: bool = False) -> Tensor:
    sides = tuple(None if s is None else (s.T if back else s).to(tensor) for s in sides)
    return turned(tensor.reshape(merged(tuple(tensor.shape), sides)), sides).reshape(tensor.shape)


def _stored(view: OptimizerView) -> float:
    """Whether first moments are stored in the basis of the second, as the authors' later releases do and earlier did not.

    Entry by entry the square of the one follows the other, if both are of the same parts of the gradients.
    """
    totals, count = [0.0, 0.0], 0
    groups = {name: group for group in view.groups for name in group.names}
    for name, entry in view.state.items():
        m = entry.get("exp_avg")
        if name not in groups or not isinstance(m, Tensor) or not m.is_floating_point():
            continue
        v = moment(entry, "exp_avg_sq")
        if m.shape != v.shape or (sides := _sides(groups[name], entry)) is None:
            continue
        count += v.numel()
        for place, value in enumerate((m, _turned(m.to(v), sides))):
            totals[place] += v.numel() * _following(value, v)
    own, turned_first = (total / max(count, 1) for total in totals)
    return 1.0 if own > turned_first + _CLEAR else 0.0 if turned_first > own + _CLEAR else math.nan


def _following(first: Tensor, second: Tensor) -> float:
    """Correlation of log m^2 with log v over the entries that have both, 0 where they do not differ."""
    both = (first != 0) & (second > 0)
    pair = torch.stack([wide(first[both].abs()).log(), wide(second[both]).log()])
    if pair.shape[1] < 2 or not bool((pair.amax(1) > pair.amin(1)).all()):
        return 0.0
    return float(torch.corrcoef(pair)[0, 1])


def entrywise(group: Group, state: State) -> Tensor | None:
    """The second moment of each entry in the weights' own basis, as that in the basis Q gives it; None where there is none.

    With gradients whose parts along Q do not correlate it is exact: sum over k and l of A[i, k]^2 v[k, l] B[j, l]^2.
    """
    if not isinstance(state.get("exp_avg_sq"), Tensor):
        return None
    square = moment(state, "exp_avg_sq")
    sides = _sides(group, state)
    if sides is None:
        return square
    squared = tuple(None if s is None else s.to(torch.promote_types(s.dtype, torch.float32)).square() for s in sides)
    return _turned(square, squared, back=True)
