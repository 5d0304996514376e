"""Adam-mini: Adam with one second moment for each block of a tensor, the mean over the block."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.errors import InputError
from curvcli.optimizers.base import Group, OptimizerView, Rule, State, moment, scalar, steps

_MEANS = ("vmean", "v_mean")  # of its authors' package and of pytorch_optimizer


class AdamMini(Rule):
    """Zhang et al., arXiv 2406.16793, as its authors and pytorch_optimizer have it: threshold (2/lr - wd)(1 + b)/(1 - b).

    A block is a head of a query or key, a row of other matrices or a whole tensor, as the shapes of its state say: `m`
    has the blocks in its first dimensions, and the mean one number for each. Biases have Adam's `v`.
    """

    names = frozenset({"AdamMini", "Adam_mini"})
    state = frozenset({"m", "step"})
    extra = frozenset({"v", *_MEANS, "head_per_gpu", "neuron_per_gpu", "block_numel", "reduced", "head", "dimension"})
    by_shape = extra
    counts = frozenset({"step", "head_per_gpu", "neuron_per_gpu", "block_numel", "reduced", "head", "dimension"})
    shaped_otherwise = frozenset({"m", *_MEANS})
    options = frozenset({"lr", "beta1", "beta2", "betas", "eps", "weight_decay", "parameter_per_head"})

    def name(self, view: OptimizerView) -> str:
        """Always AdamMini."""
        return "AdamMini"

    def matches(self, view: OptimizerView) -> bool:
        """Whether some parameter has a mean of squares beside `m`."""
        return "m" in view.keys and not view.keys.isdisjoint(_MEANS)

    def completed(self, view: OptimizerView, parameters: Mapping[str, Tensor]) -> OptimizerView:
        """With `m`, and the mean of each block on all of its entries as `v`, in the parameters' shapes.

        A parameter that never had a gradient has state in some layouts, of step 0: it is left out. Raises InputError
        where blocks do not fit their parameter.
        """
        state = {
            name: _completed(name, entry, parameters[name]) if name in parameters else entry
            for name, entry in view.state.items()
            if not _never(entry)
        }
        return replace(view, state=state)

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps), v the mean of the entry's block, in the parameter's shape.

        Raises InputError where the steps, the betas or v are missing, or v has negative entries.
        """
        square = moment(state, "v")
        first, second = (1 - beta ** steps(state) for beta in _betas(group))
        return Diagonal.of(((square / second).sqrt() + group.number("eps", 1e-8)) * first, square)

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b)/(1 + b), b the first beta. Raises InputError where the betas are missing or not in [0, 1)."""
        return (1 - _betas(group)[0]) / (1 + _betas(group)[0])

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always."""
        return True

    def momentum(self, group: Group, state: State) -> Tensor:
        """The first moment in the parameter's shape; P holds its bias correction."""
        return state["m"]  # type: ignore[no-any-return]


def _betas(group: Group) -> tuple[float, float]:
    """Of one option, as pytorch_optimizer has them, or of two."""
    if group.options.get("betas") is not None:
        return group.betas
    if missing := [key for key in ("beta1", "beta2") if group.options.get(key) is None]:
        raise InputError(f"optimizer option {missing[0]!r} is missing", hint="the file is damaged: use another checkpoint")
    return group.fraction("beta1"), group.fraction("beta2")


def _never(entry: State) -> bool:
    m = entry.get("m")
    return scalar(entry.get("step")) == 0 and isinstance(m, Tensor) and not bool(m.any())


def _completed(name: str, entry: State, parameter: Tensor) -> State:
    m, key = entry.get("m"), next((key for key in _MEANS if key in entry), None)
    if not isinstance(m, Tensor):
        raise InputError(f"optimizer state of {name} has no 'm'", hint="it is damaged: use another checkpoint")
    shaped: dict[str, Any] = {"m": _fit(name, "m", m, m.shape, parameter)}
    if "v" not in entry:
        if key is None:
            raise InputError(
                f"optimizer state of {name} has no second moment ({', '.join(_MEANS)} or v)",
                hint="it is damaged: use another checkpoint",
            )
        mean = entry[key]
        if not isinstance(mean, Tensor):  # of a whole tensor, where a file keeps it as a number
            mean = torch.tensor(scalar(mean))
        shaped["v"] = _fit(name, key, mean.reshape(*mean.shape, *[1] * (m.dim() - mean.dim())), m.shape, parameter)
    return ChainMap(shaped, entry)  # type: ignore[arg-type]


def _fit(name: str, key: str, value: Tensor, shape: torch.Size, parameter: Tensor) -> Tensor:
    """The value on all of its blocks, in the parameter's shape. Raises InputError."""
    try:
        return value.expand(shape).reshape(parameter.shape)
    except RuntimeError:
        raise InputError(
            f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, in blocks of {tuple(shape)}, which are none "
            f"of the parameter's {tuple(parameter.shape)}",
            hint="the state belongs to another model or another order of parameters",
        ) from None
