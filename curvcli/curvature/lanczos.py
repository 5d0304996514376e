"""Both ends of a symmetric operator's spectrum by Lanczos from a random start, with a bound from above.

A Ritz value is a lower bound of the largest eigenvalue, and its residual says that *some* eigenvalue is near: neither says
that nothing lies above. What does is the start. The k-th Lanczos vector is p_k(G) v_1 and has norm 1, so an eigenvector u of
an eigenvalue mu has |p_k(mu)| |u.v_1| <= 1. A random start is not nearly orthogonal to u but by bad luck:
|u.v_1| >= e = delta sqrt(pi / (2 n)) but for a probability of delta (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl.
13, 1992). p_k grows beyond the Ritz values, so with that confidence mu is at most the root of p_k(t) = 1 / e: the ceiling
(van Dorsselaer, Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2001). No gap in the spectrum is assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, pi, sqrt

import torch
from torch import Tensor

from curvcli.curvature.operator import Operator
from curvcli.curvature.precision import numbers
from curvcli.curvature.ranks import current
from curvcli.curvature.ritz import Extremes, Ritz, Status, agreed
from curvcli.curvature.scratch import Store, let_go, resident
from curvcli.errors import FullDiskError

EXTRA = 4  # products at most for telling the two largest eigenvalues apart
LOOKS = (0.25, 0.05)  # residuals over the top's value at which a solve that may be paused asks
ALONE = 2**25  # bytes of a vector from which on it is kept where it lies: glibc takes memory of that size anew each time


@dataclass(frozen=True)
class Lanczos:
    """Settings of the eigensolver.

    Args:
        tolerance: residual over |eigenvalue| at which the top pair counts as converged, if the ceiling is near too.
        margin: how far the ceiling may lie above the top's value, over |value|, for it to count as converged.
        doubt: probability that an eigenvalue lies above the ceiling after all.
        bottom_tolerance: residual of the smallest eigenvalue that is waited for, over itself or half the top, whichever
            is larger; infinite waits for nothing. It counts as converged only within a tenth of itself.
        apart: share of the top below which the second eigenvalue has to lie for a few products more, which bound it.
        max_products: stop after this many products.
        basis: vectors there is room for; one product each.
        store: where these lie, if not beside the operator's vectors.
        asymmetry: |u.Gv - v.Gu| over the norm of G, at most, before the products are called wrong. Rounding of float32 alone
            came to 2e-3 where a young second moment spans many orders (docs/explanation/accuracy.md).
        seed: of the random start.
        deadline: instant of `time.monotonic()` at which to stop with what there is.
    """

    tolerance: float = 1e-2
    margin: float = 3e-2
    doubt: float = 1e-3
    bottom_tolerance: float = inf
    apart: float = 0.0
    max_products: int = 200
    basis: int = 200
    store: Store | None = None
    asymmetry: float = 1e-2
    seed: int = 0
    deadline: float = inf

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def extremes(
        self, operator: Operator, warm: Tensor | None = None, share: float = 0.1, support: Tensor | None = None
    ) -> Extremes:
        """Largest and smallest algebraic eigenvalue of `operator`.

        Args:
            support: boolean vector of the operator's space, of shape (n,): restrict it to the coordinates where it is true.
            warm: a vector of the operator's space, of shape (n,), thought to be near the top eigenvector.
            share: norm of the random part of a start beside a warm one of norm sqrt(1 - share^2). The ceiling holds as it
                does for a random start, with e times `share`: adding a fixed vector to a random one makes none of its
                components less likely to be away from 0.

        Returns:
            What the solve came to when it was done or had to end, also where a disk was full after its first product.

        Raises:
            FullDiskError: before that, or where several processes measure together.
        """
        return self.finish(self.begin(operator, warm, share, support))

    def begin(
        self, operator: Operator, warm: Tensor | None = None, share: float = 0.1, support: Tensor | None = None
    ) -> Walk:
        """A solve that `finish` makes the products of; arguments as those of `extremes`."""
        size = operator.space.size if support is None else operator.space.count(support)
        start, random_part = self._start(operator, warm, share, support)
        # e of the module's docstring, for a start of which only a part may be random.
        evidence = self.doubt * sqrt(pi / (2 * size)) * random_part
        return Walk(operator, start, support, size, self.store, -log(evidence))

    def finish(self, walk: Walk, pause: Callable[[Walk], bool] | None = None) -> Extremes:
        """Products until both ends are known; a solve that was paused goes on where it was.

        Args:
            pause: asked, with the top's residual below a quarter and a twentieth of its value, whether to leave the rest for
                later. The result is what is known so far then, as "max-hvps", and `walk.paused` is true.
        """
        walk.paused = False
        most, looks = min(self.basis, self.max_products), list(LOOKS) if pause else []
        last: float = inf  # product of a solve that is done, but for what tells the second eigenvalue from the top
        while walk.step():
            top, bottom = walk.pair(-1), walk.pair(0)
            ceiling = walk.ceiling(walk.enough)
            second = min(walk.second(walk.enough), ceiling)
            near = top.residual <= self.tolerance * abs(top.value) and ceiling - top.value <= self.margin * abs(top.value)
            # The smallest eigenvalue of a positive G is mostly rounding, and would never converge relative to itself.
            waiting = bottom.residual > self.bottom_tolerance * max(abs(bottom.value), abs(top.value) / 2)
            done = near and not waiting
            if done:
                below = (1 + self.margin) * abs(float(walk.values[-2:][0]))
                last = min(last, walk.products + (EXTRA if below < self.apart * top.value else 0))
                done = walk.products >= last or second <= below
            over = done or walk.complete or walk.products >= most or walk.full_disk is not None or self.expired
            near, over = map(bool, walk.space.agree(near, over))
            if pause and not over and looks and top.residual <= looks[0] * abs(top.value):
                looks = [look for look in looks[1:] if top.residual > look * abs(top.value)]
                walk.paused = pause(walk)
            if over or walk.paused:
                walk.left = walk.left if walk.paused else None  # no product follows
                # Only now: the first few Ritz values know little of the norm that the skew is held against.
                crooked = not walk.paused and walk.skew > self.asymmetry * walk.norm
                status: Status = "asymmetric" if crooked else "converged" if near else "max-hvps"
                known = bottom.residual <= 0.1 * abs(bottom.value)
                short = None if near else walk.full_disk
                found = Extremes(top, bottom, walk.vector(-1), status, walk.products, known, ceiling, second, short)
                if walk.paused:
                    walk.wait()
                return agreed(found, walk.space.agree)
        return Extremes(None, None, None, "non-finite", walk.products)

    def _start(self, operator: Operator, warm: Tensor | None, share: float, support: Tensor | None) -> tuple[Tensor, float]:
        """The first vector, of norm 1, and the norm of its random part."""
        space = operator.space
        start = space.random(torch.Generator().manual_seed(self.seed))
        start = start if support is None else start.mul_(support)
        start.div_(space.norm(start))
        if warm is None or not 0 < (norm := space.norm(warm)) < inf:
            return start, 1.0
        mixed = sqrt(1 - share**2) / norm * warm + share * start
        # The two parts need not be orthogonal, so the sum is not of norm 1 yet.
        return mixed / (size := space.norm(mixed)), share / size


class Walk:
    """A solve on its way: Lanczos vectors, orthonormal to rounding, and the tridiagonal matrix that G is on them.

    Attributes:
        enough: -log e of the module's docstring.
        paused: whether products were left for later.
    """

    def __init__(
        self, operator: Operator, start: Tensor, support: Tensor | None, size: int, store: Store | None, enough: float
    ) -> None:
        self.enough, self.paused = enough, False
        # Rows of memory taken at once: most solves end within 16 vectors, and may take hundreds. Elsewhere each comes and
        # goes by itself, so that one at a time is where the operator's vectors are.
        self.store, self.rows = store, 8 if store is None and start.nbytes < ALONE else 1
        self.held, self.dtype = len(start), start.dtype
        self.operator, self.space = operator, operator.space
        self.support, self.size = support, size  # (n,), and its true entries
        self.blocks: list[Tensor] = []  # each (rows, n); the vectors, filled in order
        self.diagonal: list[float] = []
        self.beside: list[float] = []  # one entry more than the matrix has beside its diagonal: the norm of what is left
        self.skew = self.norm = 0.0
        self.scale = 0.0  # log (beta_1 ... beta_k)
        self.rounding = 30 * torch.finfo(start.dtype).eps  # over |G|: what is left below it has no direction
        self.complete = False
        self.left: Tensor | None = None  # the next vector of the basis but for its norm
        self.full_disk: FullDiskError | None = None  # what there was no room for
        self._add(start)

    @property
    def products(self) -> int:
        """Products made so far."""
        return len(self.diagonal)

    def step(self) -> bool:
        """One product, or none where a disk has no room for it. False where it is not finite."""
        k = self.products
        try:
            if self.left is not None:  # not before it is needed: there may be no room for a vector behind the last product
                self._add(self.left, self.beside[-1])
                self.left = None
            left = self.operator.matvec(self._row(k))
        except FullDiskError as error:
            self._ended(error)
            return True
        let_go(self._row(k))
        if self.support is not None:
            left.mul_(self.support)
            let_go(self.support)
        if not self.space.finite(left):
            return False
        # Of a symmetric G what is left of an image by the last two vectors is orthogonal to all: of those before them it
        # has rounding alone, and one pass over the basis takes that away ("twice is enough": Parlett, The Symmetric
        # Eigenvalue Problem, section 6.9; the first time is that of the last two).
        last = range(max(k - 1, 0), k + 1)
        local = dict(zip(last, numbers([self.space.inner(self._here(i)[None], left)[0] for i in last]), strict=True))
        for i, part in local.items():
            left.sub_(self._here(i), alpha=part)  # in place: one vector less at a time
            let_go(self._row(i))
        found = self._without(left, k + 1)
        rest = self.space.norm(left)
        if k:  # inner products that a symmetric G would not have, or not so
            self.skew = max(self.skew, abs(local[k - 1] - self.beside[-1]), float(found[:k].abs().max()))
        self.diagonal.append(local[k] + float(found[k]))
        self.beside.append(rest)
        # Dense, (k, k): an eigenproblem of some dozen numbers costs nothing beside a product.
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        for i, value in enumerate(self.beside[:-1]):
            matrix[i, i + 1] = matrix[i + 1, i] = value
        self.values, self.vectors = torch.linalg.eigh(matrix)
        self.norm = float(self.values.abs().max())
        self.scale += log(rest) if rest > 0 else -inf
        # No start but one without a part in some eigenvector ends before the space does: all eigenvalues are found.
        self.complete = k + 1 >= self.size or rest <= self.rounding * self.norm
        self.left = None if self.complete else left
        return True

    def wait(self) -> None:
        """Puts the next vector where the basis lies: other solves need the room that it takes beside."""
        if self.left is not None:
            try:
                self._add(self.left, self.beside[-1])
                self.left = None
            except FullDiskError as error:
                self._ended(error)

    def _ended(self, error: FullDiskError) -> None:
        """No product is made any more. Raises the error where none was made yet, or others are waiting for the next."""
        if not self.products or current().world > 1:
            raise error
        self.full_disk = error.with_traceback(None)  # whose frames hold vectors

    def pair(self, index: int) -> Ritz:
        """Ritz value by rank, -1 the top, 0 the bottom; a residual never counts for less than rounding."""
        # The norm of Gv - theta v without forming v: beta_k times the last entry of the small vector (Parlett, chapter 13).
        residual = self.beside[-1] * abs(float(self.vectors[-1, index]))
        exact = self.products == 1 and self.complete
        return Ritz(float(self.values[index]), residual if exact else max(residual, self.rounding / 30 * self.norm))

    def vector(self, index: int) -> Tensor:
        """The vector of a Ritz value, of norm 1."""
        found, done = self.space.empty(1)[0].zero_(), 0
        for block in self.blocks:  # added up as they come: all of them would be as many vectors more as there are blocks
            used = min(len(block), self.products - done)
            self._add_to(found, self.vectors[done : done + used, index], self.space.here(block[:used]))
            let_go(block)
            done += used
        return found

    def ceiling(self, evidence: float) -> float:
        """The t above the top at which log |p_k(t)| is `evidence`."""
        top = float(self.values[-1])
        if self.complete:
            return top
        reach = self.rounding * max(self.norm, abs(top)) or 1.0
        # Ends: beyond all Ritz values p_k grows like t^k.
        while self._growth(top + reach) < evidence:
            reach *= 2
        return self._crossing(top + reach, top + reach / 2, evidence)

    def second(self, evidence: float) -> float:
        """The t between the two largest Ritz values, nearest to the second, at which log |p_k(t)| is `evidence`.

        Infinite where it is nowhere so large.
        """
        if self.products < 2:
            return inf
        low, top = map(float, self.values[-2:])
        if self.products >= self.size:
            return low
        # Between two of its roots the logarithm of a polynomial with real roots alone is concave.
        left, right = low, top
        for _ in range(40):
            third = (right - left) / 3
            if self._growth(left + third) < self._growth(right - third):
                left += third
            else:
                right -= third
        return self._crossing(left, low, evidence) if self._growth(left) >= evidence else inf

    def _crossing(self, above: float, below: float, evidence: float) -> float:
        """Between a t at which log |p_k(t)| is at least `evidence` and one at which it is less, on the side of the first."""
        for _ in range(20):  # to a millionth of their distance, of which two digits would do
            middle = (above + below) / 2
            above, below = (above, middle) if self._growth(middle) < evidence else (middle, below)
        return above

    def _growth(self, t: float) -> float:
        """log |p_k(t)|: its roots are the Ritz values, its leading coefficient is 1 / (beta_1 ... beta_k)."""
        away = (t - self.values).abs()
        return float(away.log().sum()) - self.scale

    def _add(self, vector: Tensor, norm: float = 1.0) -> None:
        if self.rows == 1 and self.store is None:
            # A product whose sum was kept on disk is not to take the basis there: memory was planned for it.
            self.blocks.append(resident(vector).div_(norm)[None])
            return
        block, row = divmod(self.products, self.rows)
        if block == len(self.blocks):
            self.blocks.append(self._room(min(self.rows, self.space.size)))
        place = self.blocks[block][row]
        if place.device == vector.device:
            torch.div(vector, norm, out=place)
        else:
            place.copy_(vector / norm)
        let_go(place)

    def _room(self, rows: int) -> Tensor:
        return self.space.empty(rows) if self.store is None else self.store.empty(rows, self.held, dtype=self.dtype)

    def _row(self, index: int) -> Tensor:
        block, row = divmod(index, self.rows)
        return self.blocks[block][row]

    def _here(self, index: int) -> Tensor:
        """A vector where the operator's are."""
        return self.space.here(self._row(index))

    def _add_to(self, vector: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        if len(rows) == 1:  # as of a basis elsewhere, or of large vectors
            vector.add_(rows[0], alpha=float(coefficients[0]))
        else:  # in place: a sum of its own would be written and read once more, to memory that is new each time
            vector.addmv_(rows.T, coefficients.to(vector))

    def _without(self, vector: Tensor, count: int) -> Tensor:
        """Takes the first `count` of the basis from a vector, in place; its products with them, in float64 on the CPU."""
        found = []
        # Block by block, so that each is read once: of a basis that lies elsewhere this is what takes the time.
        for i, block in enumerate(self.blocks):
            rows = self.space.here(block[: count - i * self.rows])
            found.append(self.space.inner(rows, vector))
            self._add_to(vector, -found[-1], rows)
            let_go(block)
        return torch.cat(found).cpu().double()
