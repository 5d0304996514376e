"""What an eigensolver finds: values at both ends of a spectrum, each with its certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, get_args

from torch import Tensor

from curvcli.errors import FullDiskError

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
    solver's confidence, and none but the top one above `second`; they are infinite where nothing is known. `full_disk` says
    what ended a solve that was not done.
    """

    top: Ritz | None
    bottom: Ritz | None
    vector: Tensor | None  # (n,)
    status: Status
    products: int
    bottom_converged: bool = False
    ceiling: float = inf
    second: float = inf
    full_disk: FullDiskError | None = None


def agreed(found: Extremes, agree: Callable[..., list[float]]) -> Extremes:
    """A result whose numbers and status are the same in all processes of a space; each keeps its own vector."""
    if found.top is None or found.bottom is None:
        return found
    # Processes exchange numbers only: a status is sent as its index.
    kinds: tuple[Status, ...] = get_args(Status)
    top, above, bottom, below, ceiling, second, kind, known = agree(
        found.top.value, found.top.residual, found.bottom.value, found.bottom.residual, found.ceiling,
        found.second, kinds.index(found.status), found.bottom_converged,
    )  # fmt: skip
    return replace(
        found,
        top=Ritz(top, above),
        bottom=Ritz(bottom, below),
        ceiling=ceiling,
        second=second,
        status=kinds[int(kind)],
        bottom_converged=bool(known),
    )
