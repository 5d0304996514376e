"""What an eigensolver finds: values at both ends of a spectrum, each with its certificate."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from torch import Tensor

Status = Literal["converged", "max-hvps", "non-finite", "asymmetric"]


@dataclass(frozen=True)
class Ritz:
    """An approximate eigenvalue with its certificate: some eigenvalue lies within `residual` of `value`.

    At the top `value` is a lower bound of the largest eigenvalue, at the bottom an upper bound of the smallest.
    """

    value: float
    residual: float


@dataclass(frozen=True)
class Extremes:
    """Result of a solve. `top`, `bottom` and `vector` are None where status is "non-finite"; status is the top's.

    `vector` is the top's, of norm 1; None too where nobody needs it any more. No eigenvalue lies above `ceiling`, at the
    solver's confidence; it is infinite where nothing is known.
    """

    top: Ritz | None
    bottom: Ritz | None
    vector: Tensor | None  # (n,)
    status: Status
    products: int
    bottom_converged: bool = False
    ceiling: float = inf
