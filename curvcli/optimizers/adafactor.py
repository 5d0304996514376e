"""Adafactor: a second moment from the means of its rows and columns, and a learning rate that goes with the weights."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.errors import InputError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, moment, steps

# Of torch.optim and of transformers (fairseq's is the same): rows, columns, and what is not factored.
_TORCH, _TRANSFORMERS = ("row_var", "col_var", "variance"), ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")


class Adafactor(Rule):
    """Shazeer and Stern, arXiv 1804.04235, as torch.optim and transformers have it: threshold (2/lr - wd)(1 + b)/(1 - b).

    lr is the one in force for each tensor: min(lr, 1/sqrt(t)) in torch.optim, min(0.01, 1/sqrt(t)) with transformers'
    `relative_step`, times the root mean square of the weights where these scale it. The clipping of updates by their size
    (`d`, `clip_threshold`) caps steps that are large already, as that of gradients does, and is not in it.
    """

    names = frozenset({"Adafactor"})
    state = frozenset({"step"})
    extra = frozenset({*_TORCH, *_TRANSFORMERS, "exp_avg", "RMS"})
    by_shape = frozenset({*_TORCH, *_TRANSFORMERS})
    counts = frozenset({"step", "RMS"})
    shaped_otherwise = frozenset({*_TORCH[:2], *_TRANSFORMERS[:2]})
    options = frozenset(
        {"lr", "eps", "weight_decay", "maximize", "beta2_decay", "d"}
        | {"clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"}
    )

    def matches(self, view: OptimizerView) -> bool:
        """Whether some parameter's second moment is factored, as of either package."""
        return bool(view.keys & self.shaped_otherwise)

    def completed(self, view: OptimizerView, parameters: Mapping[str, Tensor]) -> OptimizerView:
        """With the size of the weights in the state, and the learning rate of relative steps in the groups.

        Raises InputError where factors do not fit their parameter.
        """
        known = {name: entry for name, entry in view.state.items() if name in parameters}
        for name, entry in known.items():
            _check(name, parameters[name], entry)
        state = {name: ChainMap({"RMS": _rms(parameters[name])}, entry) for name, entry in known.items()}  # type: ignore[arg-type]
        groups = tuple(_relative(group, view.state) for group in view.groups)
        return replace(view, groups=groups, state={**view.state, **state})

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v), v = row column / mean(row) where it is factored, in the parameter's shape.

        torch.optim holds mean(row) at eps_1 or above and v at eps_1^2. Raises InputError where a moment is missing.
        """
        row, column, plain = _keys(state)
        least = _eps(group, state)
        if row not in state:
            square = moment(state, plain)
            # transformers adds eps_1 to squared gradients: what is no more than that never had one.
            seen = square > (0.0 if plain == "variance" else 1.5 * least)
        else:
            rows, columns = moment(state, row), moment(state, column)
            if row == "row_var":
                square = (rows @ columns) / rows.mean(dim=-2, keepdim=True).clamp_min(least)
                seen = (rows > 0) & (columns > 0)
            else:
                rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
                square = rows / rows.mean(dim=-2, keepdim=True) * columns
                seen = (rows > 1.5 * least) & (columns > 1.5 * least)
        square = square.clamp_min(least**2) if plain == "variance" else square
        return Diagonal.of(square.sqrt(), seen)

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b)/(1 + b), b transformers' `beta1`; 1 without. Raises InputError where it is not in [0, 1)."""
        b = group.fraction("beta1") if group.options.get("beta1") is not None else 0.0
        return (1 - b) / (1 + b)

    def lr(self, group: Group, state: State) -> float:
        """The rate of one tensor as the class has it. Raises InputError where lr, the step or eps is missing."""
        rate = group.number("lr")
        if _keys(state) == _TORCH:
            rate = min(rate, 1 / math.sqrt(steps(state)))
        elif not group.flag("scale_parameter", True):
            return rate
        size: float = max(_pair(group)[1], float(state["RMS"]))
        return rate * size

    def decay(self, group: Group, state: State) -> float:
        """Decay that goes with the rate of `lr`: torch.optim's goes with the group's."""
        decay = group.number("weight_decay", 0.0)
        if not decay or _keys(state) != _TORCH:
            return decay
        return decay * group.number("lr") / self.lr(group, state)

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always."""
        return True

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """The average of updates times P over lr, in the parameter's shape; None without `beta1`."""
        if (average := state.get("exp_avg")) is None or group.options.get("lr") is None:
            return None
        return average * self.preconditioner(group, state).entries / self.lr(group, state)  # type: ignore[no-any-return]


def _keys(state: State) -> tuple[str, str, str]:
    return _TORCH if "row_var" in state or "variance" in state else _TRANSFORMERS


def _pair(group: Group) -> tuple[float | None, float]:
    eps = group.options.get("eps")
    try:
        first, second = eps  # type: ignore[misc]
        first, second = None if first is None else float(first), float(second)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"optimizer option 'eps' is {str(eps)[:40]}, not Adafactor's two",
            hint=f"use another checkpoint, or {NO_OPTIMIZER}",
        ) from error
    if not 0 <= (first or 0.0) < float("inf") or not 0 <= second < float("inf"):
        raise InputError(f"optimizer option 'eps' is {eps}", hint=f"use another checkpoint, or {NO_OPTIMIZER}")
    return first, second


def _eps(group: Group, state: State) -> float:
    """eps_1; torch.optim's default is the precision of the numbers."""
    first = _pair(group)[0]
    if first is not None:
        return first
    kept = next((state[key] for key in _keys(state) if isinstance(state.get(key), Tensor)), None)
    precision: float = torch.finfo(kept.dtype if kept is not None and kept.is_floating_point() else torch.float32).eps
    return precision


def _rms(weight: Tensor) -> float:
    return float(weight.detach().norm(2)) / math.sqrt(max(1, weight.numel()))


def _relative(group: Group, state: Mapping[str, State]) -> Group:
    """With the learning rate that transformers takes where its group has none (`relative_step`)."""
    if group.options.get("relative_step") is None or not group.flag("relative_step"):
        return group
    taken = [steps(state[name]) for name in group.names if name in state]
    if not taken:
        return group
    most = 1e-6 * max(taken) if group.flag("warmup_init") else 1e-2
    # Said, so that a second look does not take it for another's.
    options: dict[str, Any] = {**group.options, "lr": min(most, max(taken) ** -0.5), "relative_step": False}
    return Group(group.names, options)


def _check(name: str, parameter: Tensor, entry: State) -> None:
    row, column, _ = _keys(entry)
    if row not in entry and column not in entry:
        return
    shape = tuple(parameter.shape)
    keep = row == "row_var"
    expected = {
        row: (*shape[:-1], 1) if keep else shape[:-1],
        column: (*shape[:-2], 1, *shape[-1:]) if keep else (*shape[:-2], *shape[-1:]),
    }
    for key, wanted in expected.items():
        value = entry.get(key)
        if not isinstance(value, Tensor) or len(shape) < 2 or tuple(value.shape) != wanted:
            found = tuple(value.shape) if isinstance(value, Tensor) else str(value)[:40]
            raise InputError(
                f"optimizer state {key!r} of {name} has shape {found}, which is no factor of the parameter's {shape}",
                hint="the state belongs to another model or another order of parameters",
            )
