"""Sharpness in the norm that the optimizer's step is steepest in: of the model, its parts, and over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from curvcli.analysis.measured import InNorm, Ongoing
from curvcli.curvature.balls import MaxNorm
from curvcli.curvature.hvp import HVP
from curvcli.curvature.steepest import FrankWolfe, Sharpest, distance, joint_dual
from curvcli.documents import ModelSteepest, Optimizer, Steepest, SteepestStatus
from curvcli.errors import OutOfTime
from curvcli.judge.calibration import too_early
from curvcli.judge.steepest import read
from curvcli.optimizers.preconditioner import Preconditioner

PART, DEPTH = 5, 3  # products of a part alone, and of a depth, which starts from the whole's direction

Tensors = Mapping[str, Tensor]
S = TypeVar("S", bound=Steepest)


class Steep:
    """The measurements, of one model at one gradient; made, it has measured the whole.

    Args:
        preconditioner: that has balls.
        hvp: products with the Hessian of the mean loss.
        gradients: of the mean loss, by name, of the parameters that have a ball at least.
        solver: of the whole; parts take fewer products.
        seed: of the random start.
    """

    def __init__(
        self, preconditioner: Preconditioner, hvp: HVP, gradients: Tensors, solver: FrankWolfe, *, seed: int = 0
    ) -> None:
        self.preconditioner, self.hvp, self.gradients, self.solver = preconditioner, hvp, gradients, solver
        self.balls, self.seed = preconditioner.balls, seed
        self.names = [n for n in gradients if n in self.balls]
        self.outer: Sequence[str] = ()
        self.inner: list[Sequence[str]] = []  # layers that were measured
        self.found = InNorm(self.whole())

    @classmethod
    def of(cls, work: Ongoing, hvp: HVP, gradients: Sequence[Tensor]) -> Steep | None:
        """Of a measurement whose gradients are for `work.moving`; None where no parameter has a ball. Raises OutOfTime.

        Args:
            hvp: that counts.
        """
        if not work.preconditioner.balls:
            return None
        work.stages.enter("sharpness in the optimizer's norm")
        work.in_time()
        holders = work.preconditioner.root.holders
        solver = FrankWolfe(work.solver.tolerance, deadline=work.solver.deadline, holders=holders)
        named = dict(zip(work.moving, gradients, strict=True))
        return cls(work.preconditioner, hvp, named, solver, seed=work.solver.seed)

    def whole(self) -> ModelSteepest:
        """Of all parameters that have a ball, from the gradient's steepest vertex, the momentum's and a random one's."""
        generator = torch.Generator().manual_seed(self.seed)
        step = self.preconditioner.direction
        starts = {
            "gradient": self._of(self.gradients, self.names),
            **({"momentum": self._of(step, self.names)} if step is not None else {}),
            "random": [self._random(n, generator) for n in self.names],
        }
        found = self._solved(self.names, self.solver, starts)
        self.direction: Tensors = dict(zip(self.names, found.direction or (), strict=False))
        signs = any(isinstance(ball, MaxNorm) for ball in self.balls.values())
        entry = self._entry(found, self.names)
        return ModelSteepest(
            **entry.model_dump(),
            norm="max" if signs else "spectral",
            lr=self.preconditioner.ball_lr,
            tensors=len(self.names),
            parameters=sum(self._shape(n).numel() for n in self.names),
            rest=self.preconditioner.root.space.size,
            starts=list(found.starts.items()),
            spread=found.spread,
            improvement=found.improvement,
            reading=read(entry.z, entry.status),
        )

    def ends(self, names: Sequence[str]) -> None:
        """Of the parameters outside the layers alone, from the gradient's vertex. Raises OutOfTime."""
        self.outer = names
        self.found.ends = self._part(names, self.gradients, PART)

    def layer(self, names: Sequence[str]) -> None:
        """Of the next layer alone, from the gradient's vertex. Raises OutOfTime."""
        self.found.layers.append(self._part(names, self.gradients, PART))
        self.inner.append(names)

    def depth(self, depth: int) -> None:
        """Of embedding, head and the first layers, which were measured, from the whole's direction. Raises OutOfTime."""
        # No direction is there where a product of the whole was not finite.
        self.found.restricted[depth] = self._part(self._upto(depth), self.direction or self.gradients, DEPTH)

    def settle(self) -> None:
        """Brings what lies below one of its parts up to it, from embedding and head alone to the whole.

        A part's direction, with 0 elsewhere, is of the whole's ball at the same value: it bounds the whole from below too.
        """
        found, parts = self.found, [self.found.ends]
        for depth, entry in sorted(found.restricted.items()):
            parts += found.layers[depth - 1 : depth]
            found.restricted[depth] = entry and self._raised(entry, parts, self._upto(depth))
            parts.append(found.restricted[depth])
        found.full = self._raised(found.full, [*parts, *found.layers], self.names)

    def _raised(self, entry: S, parts: Sequence[Steepest | None], names: Sequence[str]) -> S:
        most = max((p.sharpness for p in parts if p is not None and p.sharpness is not None), default=0.0)
        if entry.sharpness is None or most <= entry.sharpness:
            return entry
        z = self._z(most, [n for n in self.names if n in set(names)])
        # What a part alone reaches, and by more than a step's improvement, was missed: the whole had not settled.
        missed = most > (1 + self.solver.tolerance) * entry.sharpness
        status: SteepestStatus = "unsettled" if missed else entry.status
        update: dict[str, object] = {"sharpness": most, "z": z, "status": status}
        if isinstance(entry, ModelSteepest):
            update["reading"] = read(z, status)
        return entry.model_copy(update=update)

    def _upto(self, depth: int) -> list[str]:
        return [*self.outer, *(n for names in self.inner[:depth] for n in names)]

    def _part(self, names: Sequence[str], starts: Tensors, most: int) -> Steepest | None:
        own = [n for n in self.names if n in set(names)]
        if not own:
            return None
        if self.solver.expired:
            raise OutOfTime
        found = self._solved(own, replace(self.solver, max_products=most), {"one": self._of(starts, own)})
        return self._entry(found, own)

    def _solved(self, names: Sequence[str], solver: FrankWolfe, starts: Mapping[str, Sequence[Tensor]]) -> Sharpest:
        balls = [self.balls[n] for n in names]
        return solver.sharpest(lambda d: self.hvp.product(names, d), balls, starts)

    def _shape(self, name: str) -> torch.Size:
        """Of the whole parameter."""
        shards = self.preconditioner.root.shards
        return self.gradients[name].shape if shards is None else shards.shapes[name]

    def _random(self, name: str, generator: torch.Generator) -> Tensor:
        """What is held here of a random tensor: as the eigensolver's start the same in every precision, on every device."""
        shards, like = self.preconditioner.root.shards, self.gradients[name]
        drawn = torch.randn(self._shape(name), generator=generator, dtype=torch.float64)
        own = drawn if shards is None else shards.part(name, drawn)
        return own.to(like.dtype).to(like.device)  # in this order: MPS has no float64

    def _of(self, tensors: Tensors, names: Sequence[str]) -> list[Tensor]:
        return [tensors[n].detach().to(self.gradients[n]) for n in names]

    def _dual(self, names: Sequence[str]) -> float:
        return joint_dual([self.balls[n] for n in names], [self.gradients[n] for n in names])

    def _z(self, sharpness: float | None, names: Sequence[str]) -> float | None:
        lr = self.preconditioner.ball_lr
        known = lr is not None and sharpness is not None and sharpness > 0
        return distance(lr or 0.0, sharpness or 0.0, self._dual(names)) if known else None

    def _entry(self, found: Sharpest, names: Sequence[str]) -> Steepest:
        dual = self._dual(names)
        # Z is a quotient by the dual norm.
        nothing = dual == 0 and found.status in ("settled", "unsettled")
        return Steepest(
            sharpness=found.value,
            dual_norm=dual,
            z=self._z(found.value, names),
            hvps=found.products,
            status="no-gradient" if nothing else found.status,
        )


def _skipped(preconditioner: Preconditioner, sizes: Mapping[str, int]) -> ModelSteepest:
    """In place of a whole that was not measured."""
    signs = any(isinstance(ball, MaxNorm) for ball in preconditioner.balls.values())
    return ModelSteepest(
        sharpness=None, dual_norm=None, z=None, hvps=0, status="skipped", norm="max" if signs else "spectral",
        lr=preconditioner.ball_lr, tensors=len(preconditioner.balls), parameters=sum(sizes[n] for n in preconditioner.balls),
        rest=preconditioner.root.space.size, spread=None, improvement=None, reading="unresolved",
    )  # fmt: skip


class Norms:
    """What was measured in the optimizer's norm as the report's entries have it: "skipped" where it was not reached.

    Args:
        found: None where nothing was measured.
        sizes: entries of what moves, by name.
        step: of the checkpoint.
    """

    def __init__(
        self,
        found: InNorm | None,
        preconditioner: Preconditioner,
        optimizer: Optimizer,
        *,
        sizes: Mapping[str, int],
        step: int | None,
    ) -> None:
        self.found, self.balls = found, preconditioner.balls
        self.model = found.full if found else _skipped(preconditioner, sizes) if self.balls else None
        if self.model and preconditioner.doubts:
            self.model = self.model.model_copy(update={"reading": "unresolved"})
        elif self.model and too_early(step, optimizer.step, optimizer.betas, optimizer.momentum):
            self.model = self.model.model_copy(update={"reading": read(self.model.z, self.model.status, early=True)})

    @property
    def full(self) -> Steepest | None:
        """Of the whole model, without the details that the report has once."""
        return self.model and Steepest(**{name: getattr(self.model, name) for name in Steepest.model_fields})

    def ends(self, names: Sequence[str]) -> Steepest | None:
        """Of the parameters outside the layers."""
        return self._or_skipped(self.found.ends if self.found else None, names)

    def layer(self, index: int, names: Sequence[str]) -> Steepest | None:
        """Of a layer."""
        layers = self.found.layers if self.found else []
        return self._or_skipped(layers[index] if index < len(layers) else None, names)

    def depth(self, depth: int, last: int) -> Steepest | None:
        """Of embedding, head and the first layers; of all of them the whole's."""
        if self.found is None or depth == last:
            return self.full
        return self.found.ends if depth == 0 else self.found.restricted.get(depth)

    def _or_skipped(self, entry: Steepest | None, names: Sequence[str]) -> Steepest | None:
        if entry is not None or not any(n in self.balls for n in names):
            return entry
        return Steepest(sharpness=None, dual_norm=None, z=None, hvps=0, status="skipped")
