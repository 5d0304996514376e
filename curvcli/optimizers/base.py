"""What every optimizer rule provides, and the form in which optimizer state arrives here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from curvcli.errors import InputError

Options = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One parameter group: its parameters by name and its hyperparameters."""

    names: tuple[str, ...]
    options: Options

    def number(self, key: str, default: float | None = None) -> float:
        """A hyperparameter as a float. Raises InputError where it is missing or no finite number."""
        value = self.options.get(key, default)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"optimizer option {key!r} is {value!r}, not a number", hint=_override(key)) from error
        if number != number or abs(number) == float("inf"):
            raise InputError(f"optimizer option {key!r} is {number}", hint=_override(key))
        return number

    @property
    def betas(self) -> tuple[float, float]:
        """beta1, beta2, each in [0, 1)."""
        betas = self.options.get("betas")
        try:
            first, second = (float(b) for b in betas)  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer option 'betas' is {betas!r}", hint="pass --betas B1,B2") from error
        if not (0 <= first < 1 and 0 <= second < 1):
            raise InputError(f"optimizer option 'betas' is {betas!r}", hint="pass --betas B1,B2, each in [0, 1)")
        return first, second


@dataclass(frozen=True)
class OptimizerView:
    """Optimizer state by parameter name. `name` is the class where it is known, as in torch.optim."""

    groups: tuple[Group, ...]
    state: Mapping[str, State]
    name: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Names of the state entries that parameters carry."""
        return frozenset(key for entry in self.state.values() for key in entry)

    @property
    def step(self) -> int | None:
        """Steps taken, or None where the optimizer does not count them."""
        steps = [int(entry["step"]) for entry in self.state.values() if entry.get("step") is not None]
        return max(steps) if steps else None


class Rule(Protocol):
    """How one family of optimizers turns curvature into stability; formulas in docs/method.md."""

    def name(self, view: OptimizerView) -> str:
        """The optimizer's name in torch.optim."""
        ...

    def matches(self, view: OptimizerView) -> bool:
        """Whether this state and these options are of this family."""
        ...

    def preconditioner(self, group: Group, state: State) -> Tensor | None:
        """P of one parameter, in its shape, positive; None for the identity."""
        ...

    def gain(self, group: Group, state: State) -> float:
        """Momentum filter's transfer function at z = -1, g(-1)."""
        ...

    def rate(self, group: Group, state: State) -> float:
        """Learning rate that multiplies P^(-1) at this step."""
        ...

    def decoupled(self, group: Group) -> bool:
        """Whether weight decay acts on the weights alone rather than as part of the gradient."""
        ...

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """m such that the update is -rate P^(-1) m; None where the gradient itself is used."""
        ...


def moment(state: State, key: str) -> Tensor:
    """A second moment as stored, at least in float32. Raises InputError where negative entries make it none."""
    value = state[key]
    value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if bool((value < 0).any()):
        raise InputError(
            f"second moment {key!r} has negative entries (least {float(value.min()):.3g})",
            hint="the optimizer state is damaged: use another checkpoint",
        )
    return value  # type: ignore[no-any-return]


def _override(key: str) -> str:
    return f"pass --{key.replace('_', '-')} to override it"
