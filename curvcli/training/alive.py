"""Whether blocks do what they should: one that joined comes alive, one that is locked stays still."""

from __future__ import annotations

import torch
from torch import Tensor

from curvcli.curvature.precision import numbers
from curvcli.errors import CurvError, UsageError
from curvcli.training.locks import Lock, local


class DeadBlockError(CurvError):
    """A block that may train and does not: its gradient is zero or its weights stand still."""


class Watch:
    """Sees whether a block that joined comes alive: its outputs move, and a gradient comes through them."""

    def __init__(self, lock: Lock, growing: bool) -> None:
        self.lock, self.updates, self.seen = lock, 0, -1
        here = {n: p for n, p in lock.parameters.items() if local(p).numel()}  # of a sharded block, this rank's part
        training = {n: p for n, p in here.items() if p.requires_grad}
        matrices = {n: p for n, p in training.items() if p.dim() >= 2}
        # A block that was an identity has to move the weights that rested; one that was frozen, any of its matrices.
        outputs = {n: p for n, p, _ in lock.resting if n in here} if growing else matrices or training
        # Matrices, not biases: an output bias gets a gradient even in a dead block, whose matrices are all 0.
        waiting = {n: p for n, p in outputs.items() if p.dim() >= 2} or outputs
        self.before = {n: (p, sample(p)) for n, p in waiting.items()}
        # While outputs are 0 no gradient comes through them; one has to, once they have moved.
        self.inner = [p for n, p in matrices.items() if n not in waiting] if growing else []
        self.learning = not self.inner

    def see_gradients(self) -> None:
        """Note whether a gradient reached the matrices behind the outputs; called before an update."""
        self.learning = self.learning or any(p.grad is not None and bool((local(p.grad) != 0).any()) for p in self.inner)

    def see_update(self, moving: set[int], step: int) -> None:
        """Count an update that may move the outputs, once a step, however many optimizers make it."""
        if self.seen != step and any(id(p) in moving for p, _ in self.before.values()):
            self.updates, self.seen = self.updates + 1, step

    def still(self) -> list[str]:
        """Outputs that have not moved, by kind: of many experts, some may wait for their first token."""
        moved = {_kind(n) for n, (p, before) in self.before.items() if not torch.equal(before, sample(p))}
        return [n for n in self.before if _kind(n) not in moved]

    def alive(self) -> bool:
        """Whether every kind of output has moved, and a gradient has come through them."""
        return self.learning and not self.still()

    def complaint(self) -> str:
        """What is still missing, to go on a message; of a block that is not alive."""
        still = self.still()
        return f"its {still[0]} has not moved" if still else "no gradient has come through its outputs"


class Stillness:
    """Sees whether something moves locked blocks past the hooks: an optimizer that is none of torch's, or a copy."""

    SIZE = 256

    def __init__(self, lock: Lock) -> None:
        self.lock = lock
        self.before = {n: sample(p, self.SIZE) for n, p in lock.parameters.items()}

    def check(self, step: int) -> None:
        """Raises UsageError where a sample of the block's weights is not what it was when the lock closed."""
        moved: list[Tensor] = []
        for name, parameter in self.lock.parameters.items():
            now = sample(parameter, self.SIZE)
            before = self.before[name].to(now)  # the model may have changed its device or precision
            # NaN compares unequal to itself without having moved.
            moved.append((before.float().nan_to_num() != now.float().nan_to_num()).any())
        for name, found in zip(self.lock.parameters, numbers(moved), strict=True):
            if found:
                raise UsageError(
                    f"block {self.lock.index} is locked at step {step}, and its {name} has moved since the step before",
                    hint="load weights before the first warmup.step; an optimizer that is no torch.optim.Optimizer is "
                    "not supported",
                )


def sample(parameter: Tensor, size: int = 65536) -> Tensor:
    """About so many of this rank's values, evenly spaced, copied."""
    # A sample of a large tensor is enough: an update moves every entry that has a gradient.
    flat = local(parameter).reshape(-1)
    return flat[:: max(1, flat.numel() // size)].clone()


def _kind(name: str) -> str:
    """A parameter's name without the indices of experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
