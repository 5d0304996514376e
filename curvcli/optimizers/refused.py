"""Optimizers for which no number is given, and why."""

from __future__ import annotations

from collections.abc import Callable

from curvcli.errors import UnsupportedError
from curvcli.optimizers.base import OptimizerView

_NO_THRESHOLD = "its update is no linear map of the gradient, so no Euclidean stability threshold exists"

# Name of the family, how its state looks, and the reason. The first that fits speaks.
_REFUSED: tuple[tuple[str, Callable[[OptimizerView], bool], str], ...] = (
    ("Muon", lambda v: v.name == "Muon" or any("ns_steps" in g.options for g in v.groups), _NO_THRESHOLD),
    ("Lion", lambda v: v.name == "Lion" or (v.name is None and v.keys == {"exp_avg"}), _NO_THRESHOLD),
    ("Rprop", lambda v: v.name == "Rprop" or "prev" in v.keys, _NO_THRESHOLD),
    (
        "Adafactor",
        lambda v: v.name == "Adafactor" or bool(v.keys & {"exp_avg_sq_row", "row_var"}),
        "its second moment is factored and its learning rate depends on the state; not supported",
    ),
    (
        "SOAP or Shampoo",
        lambda v: v.name in ("SOAP", "Shampoo") or bool(v.keys & {"Q", "GG", "precond", "inv_precond"}),
        "its preconditioner is not diagonal; not supported",
    ),
    (
        "8-bit Adam",
        lambda v: bool(v.keys & {"state1", "state2", "absmax1"}),
        "its moments are quantised in blocks; not supported",
    ),
    (
        "RAdam",
        lambda v: (
            v.name == "RAdam"
            or (
                v.name is None
                and "exp_avg_sq" in v.keys
                and "mu_product" not in v.keys
                and all("amsgrad" not in g.options and "foreach" in g.options for g in v.groups)
            )
        ),
        "its update is rectified by a factor that depends on the step; not supported",
    ),
    (
        "Adadelta",
        lambda v: v.name == "Adadelta" or "acc_delta" in v.keys,
        "its learning rate depends on the state; not supported",
    ),
    (
        "Adamax",
        lambda v: v.name == "Adamax" or "exp_inf" in v.keys,
        "its preconditioner is a running maximum; not supported",
    ),
)


def refuse(view: OptimizerView) -> None:
    """Raise UnsupportedError, with the reason, for an optimizer that no rule may measure."""
    for family, looks_like, reason in _REFUSED:
        if looks_like(view):
            raise UnsupportedError(
                f"the optimizer is {family}: {reason}",
                hint="pass --optimizer none for the curvature of the loss itself, without rho",
            )
    if any(g.options.get("maximize") for g in view.groups):
        raise UnsupportedError("the optimizer maximises its objective", hint="only minimisation is measured")
