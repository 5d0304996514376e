"""The eigensolver where products are differences of gradients: of a length that suits them, and held against another.

Rounding and truncation are no part of an operator that Lanczos knows of: its residual is what its recurrence leaves over. So
the vector found is multiplied once more, at two lengths. How far they lie apart counts in the residual and in the ceiling,
and no value is converged that they leave in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import inf, isfinite

import torch
from torch import Tensor

from curvcli.curvature.differences import ENOUGH, FACTOR, Step, length_at, reach_at, settled
from curvcli.curvature.hvp import Mode
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import Folded, Operator
from curvcli.curvature.ritz import Extremes, Ritz, Status

POWER = 3  # products by which a random vector comes near the sharpest directions
HIDDEN = 8.0  # times the image of a random vector, at least, is that of the sharpest
TIGHTER = 0.7  # of the tolerance is left to the recurrence, the rest to the differences


@dataclass(frozen=True)
class Stepped(Lanczos):
    """Lanczos on products by differences.

    Args:
        step: how far these move the weights; the same object that the engine has.
    """

    step: Step = field(default_factory=Step)

    def extremes(
        self, operator: Operator, warm: Tensor | None = None, share: float = 0.1, support: Tensor | None = None
    ) -> Extremes:
        """As `Lanczos.extremes`, with what differences leave in doubt; once more with another step where that is much."""
        paced = _Paced(operator, self.step, support)
        if self.step.reach is None:
            start = operator.space.random(torch.Generator().manual_seed(self.seed))
            paced.calibrate(start, late=bool(operator.space.agree(self.expired)[0]))
        doubt = 0.0
        inner = replace(self, tolerance=TIGHTER * self.tolerance, margin=TIGHTER * self.margin)
        for again in (True, False):
            paced.restart()
            found = Lanczos.extremes(inner, paced, warm, share, support)
            if found.full_disk is not None:  # what differences leave in doubt takes products of its own
                raise found.full_disk
            if found.vector is None or found.top is None:
                break
            found, doubt = self._certified(paced, found)
            good = doubt <= (1 - TIGHTER) * self.tolerance * abs(found.top.value) if found.top else True
            # What is certified, doubt and all, stands, and nothing more is begun once the time is up.
            good = bool(operator.space.agree(good or found.status == "converged" or self.expired)[0])
            if good or not again or found.vector is None or not paced.refined(found.vector):
                break
        if found.top is not None and found.top.value:
            self.step.floor = max(self.step.floor or 0.0, doubt / abs(found.top.value))
        return replace(found, products=paced.products)

    def _certified(self, paced: _Paced, found: Extremes) -> tuple[Extremes, float]:
        """With a residual that is measured, and how far images of two lengths lie apart."""
        top, bottom, vector, space = found.top, found.bottom, found.vector, paced.space
        if top is None or bottom is None or vector is None or found.status == "asymmetric":
            return found, 0.0
        length = paced.length
        if length is None:  # all images were 0
            return found, 0.0
        here, longer = paced.image(vector, length), paced.image(vector, 2 * length)
        doubt, left = space.norm(here - longer), space.norm(here - top.value * vector)
        if not isfinite(doubt + left):
            return replace(found, top=None, bottom=None, vector=None, status="non-finite"), inf
        top = Ritz(top.value, left + doubt)
        ceiling, second = found.ceiling + doubt, found.second + doubt
        near = top.residual <= self.tolerance * abs(top.value) and ceiling - top.value <= self.margin * abs(top.value)
        bottom = Ritz(bottom.value, bottom.residual + doubt)
        known = bottom.residual <= 0.1 * abs(bottom.value)
        near = bool(space.agree(near)[0])
        status: Status = "converged" if near else "max-hvps"
        found = replace(found, top=top, bottom=bottom, ceiling=ceiling, second=second)
        return replace(found, status=status, bottom_converged=known), doubt


def suited(solver: Lanczos, mode: Mode) -> tuple[Lanczos, Step | None]:
    """The solver for products of a mode, with the same settings; and their step, where they are differences."""
    if mode != "differences":
        return solver, None
    step = Step()
    return Stepped(**{f.name: getattr(solver, f.name) for f in fields(Lanczos)}, step=step), step


class _Paced:
    """An operator each of whose products is of a length that suits the largest image seen so far."""

    def __init__(self, operator: Operator, step: Step, support: Tensor | None) -> None:
        self.operator, self.step, self.support = operator, step, support
        self.space = operator.space
        self.products = 0
        self.largest = 0.0

    def restart(self) -> None:
        """Before another solve of the same operator."""
        self.largest = 0.0
        if isinstance(self.operator, Folded):
            self.operator.forget(0)

    @property
    def scale(self) -> float:
        """Norm that an image of a unit vector may have."""
        return self.largest or self.step.scale or 0.0

    @property
    def length(self) -> float | None:
        """The step of a unit vector now; None, by which each product looks for its own, where nothing is known yet."""
        return length_at(self.step.reach, self.scale) if self.scale and self.step.reach else None

    def matvec(self, vector: Tensor) -> Tensor:
        """The image of a unit vector; made once more where it shows that the step was far too long, or too short."""
        before = self.length
        image = self._made(vector, before)
        size = self.space.agree(self.space.norm(image))[0]
        if not isfinite(size):
            return image
        # A random vector has but a small part in the sharpest directions, which come next.
        self.largest = max(self.largest, size if self.largest else HIDDEN * size)
        self.step.scale = self.largest
        now = self.length
        if before and now and not before / FACTOR <= now <= before * FACTOR:
            if isinstance(self.operator, Folded):
                self.operator.forget(len(self.operator.vectors) - 1)
            image = self._made(vector, now)
        return image

    def image(self, vector: Tensor, length: float | None) -> Tensor:
        """The image at a length, of which nobody else is told."""
        found = self._made(vector, length)
        if isinstance(self.operator, Folded):
            self.operator.forget(len(self.operator.vectors) - 1)
        return found if self.support is None else found * self.support

    def calibrate(self, start: Tensor, *, late: bool) -> None:
        """Finds the step, at a vector near the sharpest directions; takes a usual one where the time is up."""
        vector = start if self.support is None else start * self.support
        vector = vector / self.space.norm(vector)
        self.step.reach = torch.finfo(vector.dtype).eps ** (2 / 3) / 240  # 1e-7 in float32
        for _ in range(0 if late else POWER):
            image = self.image(vector, self.length)
            size = self.space.agree(self.space.norm(image))[0]
            if not 0 < size < inf:
                return
            self.largest = max(self.largest, size if self.largest else HIDDEN * size)
            vector = image / size
        if not late:
            self.refined(vector)

    def refined(self, vector: Tensor) -> bool:
        """Finds a better step at a unit vector; whether there is one."""
        before, start = self.step.reach, self.length
        if before is None or start is None:
            return False

        def distance(one: Tensor, other: Tensor) -> float:
            return self.space.agree(self.space.norm(one - other) / self.scale)[0]

        length, _, _ = settled(lambda length: self.image(vector, length), distance, start * FACTOR, ENOUGH / 10)
        self.step.reach = reach_at(length, self.scale)
        return not before / FACTOR < self.step.reach < before * FACTOR

    def _made(self, vector: Tensor, length: float | None) -> Tensor:
        self.products += 1
        with self.step.of(length):
            return self.operator.matvec(vector)
