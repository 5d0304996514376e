"""Steps in a subspace: P of what moves along some rows or columns alone, and the state of optimizers that move so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.errors import InputError

# Classes of a name that is another's, by module; what each is called here.
_CALLED = {
    "galore_torch.adamw.AdamW": "GaLoreAdamW",
    "galore_torch.adamw8bit.AdamW8bit": "GaLoreAdamW8bit",
    "galore_torch.adafactor.Adafactor": "GaLoreAdafactor",
    "apollo_torch.adamw.AdamW": "GaLoreAdamW",
    "apollo_torch.adamw8bit.AdamW8bit": "GaLoreAdamW8bit",
    "apollo_torch.adafactor.Adafactor": "GaLoreAdafactor",
    "apollo_torch.apollo.AdamW": "APOLLOAdamW",
    "apollo_torch.q_apollo.AdamW": "QAPOLLOAdamW",
    "c_adamw.AdamW": "CautiousAdamW",
}
_PROJECTORS = frozenset(["galore_torch.galore_projector.GaLoreProjector", "apollo_torch.svd_projector.GaLoreProjector"])
_MOMENTS = frozenset(["exp_avg", "exp_avg_sq"])
SQUARE, LEFT, RIGHT, SCALE = "projected_exp_avg_sq", "projector_left", "projector_right", "projector_scale"
_APART = 0.05  # off orthonormal: bfloat16 leaves 0.01


@dataclass(frozen=True)
class Projected:
    """P^(-1) = L D^(-1) L' (x) R' D^(-1) R: a diagonal in coordinates y = L' x R' of fewer rows, columns or both.

    Attributes:
        left: (rows, r), orthonormal columns; None where rows are as they are.
        right: (r, columns), orthonormal rows; None where columns are as they are.
        inner: P in the coordinates y.
        size: entries of the parameter, a matrix.
    """

    left: Tensor | None
    right: Tensor | None
    inner: Diagonal
    size: int

    @property
    def idle(self) -> int:
        """Dimensions that are projected away, and coordinates that never had a gradient."""
        return self.size - self.inner.entries.numel() + self.inner.idle

    @property
    def positive(self) -> bool:
        """Whether P is finite and above 0 on every coordinate that had a gradient."""
        return self.inner.positive

    def down(self, tensor: Tensor) -> Tensor:
        """L' x R', the coordinates of x."""
        inside = tensor if self.left is None else self.left.T @ tensor
        return inside if self.right is None else inside @ self.right.T

    def up(self, inside: Tensor) -> Tensor:
        """L y R, in the parameter's shape."""
        return raised(inside, self.left, self.right)

    def apply(self, tensor: Tensor) -> Tensor:
        """P^(-1/2) x; 0 along what is projected away."""
        return self.up(self.inner.apply(self.down(tensor)))

    def invert(self, tensor: Tensor) -> Tensor:
        """The pseudo-inverse, P^(1/2) x in the subspace."""
        return self.up(self.inner.invert(self.down(tensor)))

    def solve(self, tensor: Tensor) -> Tensor:
        """P^(-1) x, the step for a momentum x; 0 along what is projected away."""
        return self.up(self.inner.solve(self.down(tensor)))

    def scaled(self, factor: float) -> Projected:
        """P times the factor, in the same subspace."""
        return replace(self, inner=self.inner.scaled(factor))

    def to(self, parameter: Tensor) -> Projected:
        """The same in the parameter's precision, on its device."""
        left, right = (None if part is None else part.to(parameter) for part in (self.left, self.right))
        return replace(self, left=left, right=right, inner=self.inner.to(parameter))


def raised(inside: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L y R of coordinates y: a matrix in the parameter's shape."""
    outside = inside if left is None else left @ inside
    return outside if right is None else outside @ right


def class_name(kind: type) -> str:
    """What an optimizer's class is called here: by its module where it has the name of another's."""
    return _CALLED.get(f"{kind.__module__}.{kind.__name__}", kind.__name__)


def unprojected(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's state with GaLore's projector as plain tensors; any other as it is.

    The first moment is in the parameter's shape then, as `exp_avg`; the second is in the projector's coordinates, as
    `projected_exp_avg_sq`, beside `projector_left` and `projector_right`, whichever there are, and `projector_scale`.

    Raises InputError where the projector is damaged.
    """
    projector = entry.get("projector")
    if projector is None or not set(entry) >= _MOMENTS or _kind(projector) not in _PROJECTORS:
        return entry
    # In memory it has its attributes; of a file, where no such object is made, there is a record of them.
    said = getattr(projector, "attributes", None)
    said = said if isinstance(said, dict) else vars(projector)
    moments = [entry[key] for key in ("exp_avg", "exp_avg_sq")]
    if any(not isinstance(m, Tensor) or m.dim() != 2 or m.shape != moments[0].shape for m in moments):
        raise _damaged("its moments are no matrices of one shape")
    left, right = _sides(said, moments[0].shape)
    return _Lifted(entry, left, right, said.get("scale", 1.0))


class _Lifted(Mapping[str, Any]):
    """State with the first moment in the parameter's shape, made when it is asked for."""

    def __init__(self, entry: Mapping[str, Any], left: Tensor | None, right: Tensor | None, scale: Any) -> None:
        self._first, self._left, self._right = entry["exp_avg"], left, right
        self._own: dict[str, Any] = {k: v for k, v in entry.items() if k not in _MOMENTS | {"projector"}}
        self._own |= {SQUARE: entry["exp_avg_sq"], SCALE: scale}
        self._own |= {key: side for key, side in ((LEFT, left), (RIGHT, right)) if side is not None}

    def __getitem__(self, key: str) -> Any:
        if key == "exp_avg":
            return raised(self._first, self._left, self._right)
        return self._own[key]

    def __iter__(self) -> Iterator[str]:
        yield from ("exp_avg", *self._own)

    def __len__(self) -> int:
        return 1 + len(self._own)


def _kind(projector: Any) -> str:
    said = getattr(type(projector), "name", None)  # of a record of a file's object
    return said if isinstance(said, str) else f"{type(projector).__module__}.{type(projector).__name__}"


def _sides(said: Mapping[Any, Any], low: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """L and R as the projector's type and the shape of the moments tell. Raises InputError."""
    kind, matrix = said.get("proj_type"), said.get("ortho_matrix")
    rows, columns = low
    sides: dict[Any, tuple[bool, bool]] = {
        "std": (rows < columns, rows >= columns),
        "reverse_std": (rows <= columns, rows > columns),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }
    if not isinstance(kind, str) or kind not in sides:
        raise _damaged(f"its projection is of type {str(kind)[:40]!r}")
    wanted = sides[kind]
    found = list(matrix) if kind == "full" and isinstance(matrix, (list, tuple)) else [matrix]
    parts = [p for p in found if isinstance(p, Tensor) and p.dim() == 2 and p.is_floating_point()]
    if len(parts) != sum(wanted):
        raise _damaged("its projector has no matrix")
    left = parts[0] if wanted[0] else None
    right = parts[-1] if wanted[1] else None
    if (left is not None and left.shape[1] != rows) or (right is not None and right.shape[0] != columns):
        raise _damaged(f"its projector has shape {tuple(parts[0].shape)}, its moments {tuple(low)}")
    return left, right


def check_orthonormal(name: str, left: Tensor | None, right: Tensor | None) -> None:
    """Raise InputError where columns of L or rows of R are not orthonormal."""
    for side in (None if left is None else left.T, right):
        if side is None or side.is_meta:
            continue
        side = side.float() if side.dtype in (torch.float16, torch.bfloat16) else side
        off = float((side @ side.T - torch.eye(len(side), dtype=side.dtype, device=side.device)).abs().max())
        if not off < _APART:
            raise _damaged(f"the projector of {name} is {off:.2g} off orthonormal")


def _damaged(what: str) -> InputError:
    return InputError(f"the optimizer state is damaged: {what}", hint="use another checkpoint")
