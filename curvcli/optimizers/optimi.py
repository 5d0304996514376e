"""torch-optimi's Adam and AdamW as torch has them: the same steps, from averages that are corrected as they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvcli.documents import Finding

# Options that every group of the package has, and those of its Adam, AdamW and RAdam.
PACKAGE = frozenset({"decouple_lr", "gradient_release"})
_ADAMS = PACKAGE | {"beta1", "beta2", "decouple_wd"}
ASSUMED = Finding(
    code="class-assumed",
    severity="warning",
    message="the file is of torch-optimi's AdamW, or of its RAdam with decoupled weight decay, which keeps the same: it is "
    "taken for AdamW's",
)
_DROPPED = _ADAMS | {"triton", "setup"}


def are_adams(options: Mapping[str, Any], keys: frozenset[str], name: str | None) -> bool:
    """Whether a group is that of its Adam or AdamW.

    RAdam's looks like Adam's, and decays within the gradient unless told otherwise, as AdamW never does; Ranger's has k.

    Args:
        keys: of the state.
        name: the class, where it is known.
    """
    if not options.keys() >= _ADAMS or "k" in options or keys & {"la_param", "eps_sq", "group"}:
        return False
    numbers = [options["beta1"], options["beta2"], *([options.get("max_lr")] if options["decouple_lr"] else [])]
    if not all(isinstance(number, float) and 0 < number < math.inf for number in numbers):
        return False
    return name in ("Adam", "AdamW") or (name is None and options["decouple_wd"] is True)


def as_torch_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as those of torch's Adam; fully decoupled decay by its share of the largest learning rate."""
    found = {key: value for key, value in options.items() if key not in _DROPPED}
    # amsgrad is what Adam's files have and RAdam's have not.
    found |= {"betas": (options["beta1"], options["beta2"]), "amsgrad": False}
    found |= {"decoupled_weight_decay": bool(options["decouple_wd"] or options["decouple_lr"])}
    if options["decouple_lr"] and options.get("weight_decay"):
        # The step takes lr / max_lr of it, where torch's takes lr.
        found["weight_decay"] = options["weight_decay"] / options["max_lr"]
    return found


class Uncorrected(Mapping[str, Any]):
    """A parameter's state with torch's moments, made when they are asked for: times 1 - b1^t and 1 - b2^t.

    The steps are those of the group. Kahan's compensation of halves is left out, whose steps it makes exact.
    """

    def __init__(self, entry: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._entry, self._betas = entry, dict(zip(("exp_avg", "exp_avg_sq"), options["betas"], strict=True))
        self._step = entry.get("step", options.get("step"))
        self._keys = ["step", *(key for key in entry if key not in ("kahan_comp", "step"))]

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        if key == "step":
            return self._step
        value = self._entry[key]
        beta = self._betas.get(key)
        if beta is None or not isinstance(value, Tensor):
            return value
        try:
            share = 1 - beta ** float(self._step)
        except (TypeError, ValueError, RuntimeError):
            return value  # whose steps are missed wherever it is used
        return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value) * share

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
