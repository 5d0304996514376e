"""Which moments belong to which parameters, by the data: second moments follow squared gradients, entry by entry.

The second moment averages squared gradients, so within a tensor its entries rank as squared gradients on training data
do, whatever the loss is scaled by, gradients are clipped to, or bias correction is left out. The first moment's
cosine with the gradient, the other candidate, is 0.5 after ten steps and -0.2 to 0.2 later
(docs/explanation/security-tests.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.checkpoints.state.mapping import AmbiguousStateError
from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.optimizers import second_moments
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.kronecker import rotated
from curvcli.optimizers.soap import entrywise

_SAMPLE = 2**15  # entries of a tensor: a rank correlation of them is good to 0.01
# On the sample checkpoints, in the right order: two layers against each other are right by 0.16 or more, single
# tensors by -0.52 or more (two alike in one layer), the mean correlation is 0.26 or more.
_LAYERS, _TENSORS, _UNRELATED = -0.1, -0.8, 0.1
# Mean correlation of the others from which on two that fit each other better are swapped: below it gradients are noise, as
# those of a network that has collapsed.
_SOUND = 0.2
# Tensors whose state is swapped fit their own moments as strangers do, by about 0, so that -0.8 takes 0.8 across.
_CROSSED = 0.5
# Four rank correlations over n entries scatter by 2 / sqrt(n) together. Of 80 sound runs with matrices of 16 entries 20 had
# two tensors that fit each other better by 0.8; with 128 and more none of 160 had (docs/explanation/security-tests.md).
_ENTRIES = 128


@dataclass(frozen=True)
class Evidence:
    """Ranks of squared gradients at sampled entries of every parameter.

    Attributes:
        picks: which entries, by parameter; the same ones for parameters of one size.
        ranks: of their mean squared gradients, centred and of unit norm; zeros where all are equal.
    """

    picks: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]

    def fit(self, name: str, moment: Tensor) -> float:
        """Rank correlation of a parameter's squared gradients with a second moment of its shape, -1 to 1."""
        return float(self.ranks[name] @ self.ranked(name, moment))

    def ranked(self, name: str, moment: Tensor) -> Tensor:
        """Ranks of a second moment at the entries picked, as `ranks` has those of the gradients."""
        return _ranks(moment.reshape(-1)[self.picks[name].to(moment.device)])


def gather(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]) -> Evidence:
    """Evidence from a gradient per batch; many small batches say more than few large ones."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # One that is its own: the same picks in every run, and nobody's random numbers moved.
    generator = torch.Generator().manual_seed(0)
    of_size = {
        size: torch.randint(size, (_SAMPLE,), generator=generator) if size > _SAMPLE else torch.arange(size)
        for size in sorted({p.numel() for p in parameters.values()})
    }
    picks = {name: of_size[p.numel()] for name, p in parameters.items()}
    # Where the gradients are, so that nothing is waited for before all of them are added up.
    there = {name: picks[name].to(p.device) for name, p in parameters.items()}
    kinds = {n: torch.float32 if p.device.type == "mps" else torch.float64 for n, p in parameters.items()}
    squares = {n: torch.zeros(len(picks[n]), dtype=kinds[n], device=p.device) for n, p in parameters.items()}

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        def once(gradient: Tensor) -> Tensor:
            squares[name] += gradient.detach().reshape(-1)[there[name]].to(kinds[name]).square()
            return gradient.detach().new_zeros(()).expand(gradient.shape)  # which takes the room of one entry

        return once

    # Each gradient is looked at as it comes: there is no moment at which all of a batch's are held.
    handles = [parameter.register_hook(hook(name)) for name, parameter in parameters.items()]
    try:
        for batch in batches:
            torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return Evidence(picks, {name: _ranks(value) for name, value in squares.items()})


def choose(error: AmbiguousStateError, evidence: Evidence) -> tuple[OptimizerView, Finding]:
    """Of the orders that fit, the one that the gradients single out. Raises the error given where they do not."""
    # Orders share the moments and most of their places: each moment is ranked once a parameter.
    known: dict[tuple[str, int], float] = {}

    def fits(view: OptimizerView) -> dict[int, tuple[str, float]]:
        """Parameter and fit by moment, which several views have in common."""
        found = {}
        for name in view.state:
            if name in evidence.ranks and (v := _second(view, name)) is not None:
                place = (name, id(v))
                known[place] = known[place] if place in known else evidence.fit(name, v)
                found[id(v)] = (name, known[place])
        return found

    every = [fits(view) for view in error.views]
    best = max(range(len(every)), key=lambda i: mean(fit for _, fit in every[i].values()) if every[i] else -1.0)
    leads: list[float] = []
    for other, label in enumerate(error.labels):
        if other == best:
            continue
        pairs = [(mine, every[other][v]) for v, mine in every[best].items() if v in every[other]]
        # Only moments that the two give to different parameters tell between them.
        lead = _significant([mine[1] - theirs[1] for mine, theirs in pairs if mine[0] != theirs[0]])
        leads.append(lead)
        if lead < -_LAYERS:
            raise InputError(
                f"{error.message}; the squared gradients on this shard follow {error.labels[best]} better than "
                f"{label} by a rank correlation of {lead:.2g} only",
                hint=error.hint,
            )
    if not leads:
        return error.views[best], Finding(
            code="order-by-shape",
            severity="warning",
            message=f"{error.message.removesuffix(', which 1 assignments fit')}; {error.labels[best]} is taken, the only "
            "assignment of whole layers that every shape fits",
        )
    return error.views[best], Finding(
        code="order-by-gradient",
        severity="info",
        message=f"optimizer state fits the model in {len(every)} orders; {error.labels[best]} is taken, which the squared "
        f"gradients on this shard follow better by a rank correlation of {min(leads):.2f}",
    )


def contradictions(view: OptimizerView, evidence: Evidence, path: object) -> list[Finding]:
    """Moments that belong to other parameters than they are stored for.

    Raises:
        InputError: two layers, or two tensors, fit each other's moments better, beyond doubt.
    """
    moments = _told(view, evidence)
    if not moments:
        return []
    # Ranked once each, not once a pair of layers: tensors of one shape have the same entries picked.
    ranked = {name: evidence.ranked(name, v) for name, v in moments.items()}
    own = {name: float(evidence.ranks[name] @ mine) for name, mine in ranked.items()}

    def crossed(a: str, b: str) -> float:
        """How well two tensors fit each other's moments, together."""
        return float(evidence.ranks[a] @ ranked[b]) + float(evidence.ranks[b] @ ranked[a])

    worst: tuple[float, str, str] = (0.0, "", "")
    pairs: dict[tuple[str, int, int], list[float]] = {}
    held: dict[tuple[str, int, int], list[str]] = {}
    for (prefix, _), layers in _alike(name for name in own if moments[name].dim() >= 2).items():
        for i, j in combinations(sorted(layers), 2):
            if moments[layers[i]].shape == moments[layers[j]].shape:
                across = crossed(layers[i], layers[j])
                value = own[layers[i]] + own[layers[j]] - across
                pairs.setdefault((prefix, i, j), []).append(value)
                held.setdefault((prefix, i, j), []).extend((layers[i], layers[j]))
                # Where neither fits the other's, nothing is swapped: gradients of a network that has collapsed are noise.
                if moments[layers[i]].numel() >= _ENTRIES and across >= _CROSSED:
                    worst = min(worst, (value, layers[i], layers[j]))
    for (prefix, i, j), margins in pairs.items():
        # Two tensors of a layer may agree by chance.
        beyond = len(margins) >= 3 and -_significant([-value for value in margins]) < _LAYERS
        if beyond and _sound(own, held[prefix, i, j]):
            raise _swapped(f"layers {prefix}.{i} and {prefix}.{j}", mean(margins), path)
    if worst[0] < _TENSORS and _sound(own, worst[1:]):
        raise _swapped(f"{worst[1]} and {worst[2]}", worst[0], path)
    return _unrelated(mean(own.values()))


def _sound(own: Mapping[str, float], swapped: Sequence[str]) -> bool:
    """Whether the moments of others than the swapped ones follow their gradients."""
    rest = [value for name, value in own.items() if name not in swapped]
    return not rest or mean(rest) >= _SOUND


def _told(view: OptimizerView, evidence: Evidence) -> dict[str, Tensor]:
    """Second moments of parameters whose gradients say something."""
    moments = {name: _second(view, name) for name in view.state if name in evidence.ranks}
    return {n: v for n, v in moments.items() if v is not None and v.numel() > 1 and bool(evidence.ranks[n].any())}


def _unrelated(overall: float) -> list[Finding]:
    if overall >= _UNRELATED:
        return []
    message = (
        f"the second moments do not follow the squared gradients on this shard (mean rank correlation {overall:.2f}, 0.26 "
        "and more in sound runs): state of another run or model, or data of another kind"
    )
    return [Finding(code="moments-contradict-gradient", severity="warning", message=message)]


def _alike(names: Iterable[str]) -> dict[tuple[str, str], dict[int, str]]:
    """Tensors that differ in the number of their layer alone: by what stands before and behind it, each by its number."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if parts := re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name):
            found.setdefault((parts[1], parts[3]), {})[int(parts[2])] = name
    return found


def _significant(values: list[float]) -> float:
    """Mean of the values, or 0 where it lies within two standard errors of 0."""
    if len(values) < 2:
        return 0.0
    error = stdev(values) / math.sqrt(len(values))
    return mean(values) if abs(mean(values)) > 2 * error else 0.0


def _swapped(what: str, margin: float, path: object) -> InputError:
    return InputError(
        f"optimizer state in {path}: {what} fit each other's second moments better than their own (rank correlation with "
        f"squared gradients lower by {-margin:.2f})",
        hint="their state is swapped, or of another model: use another checkpoint, or pass --optimizer none",
    )


def _second(view: OptimizerView, name: str) -> Tensor | None:
    entry = view.state[name]
    if rotated(entry):
        return entrywise(next(group for group in view.groups if name in group.names), entry)
    return next((entry[k] for k in second_moments() if isinstance(entry.get(k), Tensor) and entry[k].dim()), None)


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal ones shared, centred and of unit norm."""
    _, inverse, counts = torch.unique(values.cpu().double(), return_inverse=True, return_counts=True)
    # Spearman's correlation with ties: the product of mean ranks, centred and of unit norm.
    ranks = (counts.cumsum(0).double() - counts.double() / 2)[inverse]
    ranks -= ranks.mean()
    norm = ranks.norm()
    return ranks / norm if norm > 0 else torch.zeros_like(ranks)
