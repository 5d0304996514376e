"""Weights and moments that no training made: a damaged byte loads without complaint, and is looked for here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

from curvcli.documents import Finding
from curvcli.errors import InputError, counted
from curvcli.optimizers import averages
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.kronecker import rotated

# Largest seen on trained and fresh models: weights 450 times their tensor's median and 1.2, second moments 3.5e5 times
# theirs. A flipped top bit of the exponent multiplies by 2^128. Lesser flips leave numbers that training could have made.
_WEIGHT_RATIO, _WEIGHT = 1e4, 1e3
_MOMENT_RATIO = 1e12
_PIECE = 2**24  # entries looked at at once: a bound on memory


def weight_findings(model: nn.Module) -> list[Finding]:
    """Entries far beyond their tensor's others, and matrices of one value, as 0."""
    found: list[Finding] = []
    flat: list[str] = []
    for name, weight in model.named_parameters():
        # Vectors are norms and biases, which begin as one value and may stay so.
        if not weight.requires_grad or weight.dim() < 2 or not weight.numel():
            continue
        largest, usual = float(weight.detach().abs().max()), _median(weight)
        if float(weight.detach().max()) == float(weight.detach().min()) and weight.numel() > 1:
            flat.append(name)
        elif largest > _WEIGHT and largest > _WEIGHT_RATIO * usual:
            found.append(
                _finding(
                    "absurd-weight",
                    f"{name} holds {largest:.3g} where half of its entries are below {usual:.3g}: a damaged byte looks so, "
                    "and every number here depends on it",
                )
            )
    if flat:
        found.append(
            _finding(
                "constant-weights",
                f"{len(flat)} weight matrices hold one value throughout, first {flat[0]}: blocks still locked by a schedule "
                "look so (0), and damaged files",
            )
        )
    return found


def state_findings(view: OptimizerView, step: int | None, path: object) -> list[Finding]:
    """What optimizer state cannot be, and what it should not be.

    Adam's two moments, as those of every rule with `averages`, are averages of the same gradients. By Cauchy and Schwarz,
    with betas (a, b) after t steps,

        |m| <= sqrt(v) (1 - a) / sqrt(1 - b) sqrt(sum over k < t of (a^2/b)^k)

    holds in every entry, whatever the gradients were. Where it is broken, m and v are not of one tensor, are damaged, or
    were made with other betas.

    Args:
        step: the checkpoint's own count, where it has one.

    Raises:
        InputError: a second moment is negative, the bound is broken, a step is no count, or 0 with moments.
    """
    absurd: list[str] = []
    medians: dict[str, float] = {}
    counts: set[int] = set()
    pairs = averages()
    owners = [(group, name) for group in view.groups for name in group.names if name in view.state]
    for group, name in owners:
        entry = view.state[name]
        count = _step(entry.get("step"), name, path)
        if count is not None:
            counts.add(count)
        first, second = next((keys for keys in pairs if keys[1] in entry), ("", ""))
        v = entry.get(second)
        if not isinstance(v, Tensor) or not v.is_floating_point() or not v.numel():
            continue
        _check_second({second: v}, count, name, path)
        if rotated(entry):
            continue  # averages over several bases, with parts as small as rounding: neither bound is theirs
        largest, medians[name] = float(v.max()), _median(v)
        if largest > _MOMENT_RATIO * medians[name] > 0:
            absurd.append(f"{name} (largest {largest:.3g})")
        m = entry.get(first)
        if isinstance(m, Tensor) and m.shape == v.shape:
            _check_bound({first: m, second: v}, _constant(group, count), name, path)
    middle = median([value for value in medians.values() if value > 0] or [0.0])
    absurd += [f"{name} (median {value:.3g})" for name, value in medians.items() if value > _MOMENT_RATIO * middle > 0]
    found = []
    if absurd:
        found.append(
            _finding(
                "absurd-moment",
                f"{len(absurd)} second moments are 10^12 times their tensor's or the model's median, first {absurd[0]}: a "
                "damaged byte looks so, and those weights count as frozen",
            )
        )
    if len(counts) > 1:
        found.append(
            _finding(
                "uneven-steps",
                f"weights took between {min(counts)} and {max(counts)} steps, and each is corrected by its own: blocks that "
                "joined later look so, and damaged counts",
            )
        )
    # What SOAP counts leaves out the first step, which only makes its basis.
    behind = 1 if any(rotated(entry) for entry in view.state.values()) else 0
    if step is not None and view.step is not None and not step - behind <= view.step <= step:
        found.append(
            _finding(
                "step-mismatch",
                f"the optimizer counts {counted(view.step, 'step')} and the checkpoint {step}: files of two checkpoints, "
                "a damaged count, an optimizer carried over, or steps skipped by loss scaling; bias correction uses the "
                "optimizer's",
            )
        )
    return found


def _constant(group: Group, step: int | None) -> float | None:
    """The bound's factor of sqrt(v); None where the group says no betas."""
    if group.options.get("betas") is None:
        return None
    a, b = group.betas
    if b == 0 or step == 0:
        return None
    # The sum is geometric: (r^t - 1) / (r - 1), by expm1 where r^t is near 1, held below what overflows.
    ratio = a * a / b
    if step is None:
        total = 1 / (1 - ratio) if ratio < 1 else math.inf
    else:
        total = float(step) if ratio == 1 else math.expm1(min(step * math.log(ratio), 700.0)) / (ratio - 1) if ratio else 1.0
    return (1 - a) * math.sqrt(total / (1 - b))


def _check_second(moment: dict[str, Tensor], count: int | None, name: str, path: object) -> None:
    """Raises InputError where v is no average of squares, or is one of no gradients."""
    ((key, v),) = moment.items()
    if bool((v < 0).any()):
        raise InputError(
            f"{key} of {name} in {path} has negative entries (least {float(v.min()):.3g})",
            hint="the optimizer state is damaged: use another checkpoint",
        )
    if count == 0 and float(v.max()) > 0:
        raise InputError(
            f"optimizer state in {path} says that {name} took no step, and has its moments",
            hint="the optimizer state is damaged: use another checkpoint",
        )


def _check_bound(moments: dict[str, Tensor], constant: float | None, name: str, path: object) -> None:
    (first_key, m), (second_key, v) = moments.items()
    if constant is None or not math.isfinite(constant):
        return
    # Rounding: an average in float32 drifts by parts in 10^5; in halves its updates round away, up to a factor.
    half = torch.float16 in (m.dtype, v.dtype) or torch.bfloat16 in (m.dtype, v.dtype)
    slack, floor = (2.0, 1e-3) if half else (1.001, 1e-18)
    broken = 0
    for first, second in zip(_pieces(m), _pieces(v), strict=True):
        # Squares below the least float are 0, so a first moment below its root proves nothing.
        broken += int((first.abs().double() > slack * constant * second.double().sqrt() + floor).sum())
    if broken:
        raise InputError(
            f"optimizer state in {path}: {broken} of {v.numel()} entries of {name} have a first moment that no gradients "
            f"with this second moment give (|{first_key}| > {constant:.3g} sqrt({second_key}))",
            hint="the state is damaged, of another tensor, or made with other betas: use another checkpoint or pass --betas",
        )


def _step(value: object, name: str, path: object) -> int | None:
    if value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (number >= 0 and number.is_integer() and number < 2**53):
        raise InputError(
            f"optimizer state in {path} says that {name} took {str(value)[:40]} steps",
            hint="the optimizer state is damaged: use another checkpoint",
        )
    return int(number)


def _median(tensor: Tensor) -> float:
    """Median magnitude of the entries that are not 0, of at most a million of them spread evenly."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 2**20)].abs().float()
    sample = sample[sample > 0]
    return float(sample.median()) if sample.numel() else 0.0


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.reshape(-1).split(_PIECE)


def _finding(code: str, message: str) -> Finding:
    return Finding(code=code, severity="warning", message=message)
