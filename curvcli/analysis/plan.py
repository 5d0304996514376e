"""Memory of an analysis before it runs: bytes in, bytes out, and the fastest way that fits a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from curvcli.curvature.cross_entropy import CHUNK
from curvcli.curvature.hvp import Mode
from curvcli.errors import UsageError

BASIS, SMALL, LEAST = 24, 12, 6  # vectors: what is wanted, what restarts often, and the fewest that the eigensolver takes
KEPT_BACK = 0.08  # of the peak: what the C allocator does not give back; 5 and 10 % were measured on two models
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """What there is, in bytes unless it says otherwise.

    Args:
        process: what the process holds without a model: the interpreter and its libraries.
        model: all weights and buffers.
        vector: the parameters that are measured: one vector of the eigensolver.
        largest: the largest of these parameters.
        state: optimizer state and preconditioner.
        graph: the kept graph of one row of a batch, as `hvp.graph_bytes` measures it, over the rows of that batch.
        logits: of one row, where the loss goes over them in chunks; 0 where they are a part of the graph.
        rows: of the shard, a number.
        itemsize: of an entry.
        vectors: that are held beside the basis, a number: both Ritz vectors, and the wanted one once more with its residual,
            that normalised, and a start vector.
    """

    process: int
    model: int
    vector: int
    largest: int
    state: int
    graph: int
    logits: int
    rows: int
    itemsize: int = 4
    vectors: int = 6


@dataclass(frozen=True)
class Plan:
    """How to measure, and the bytes that its parts take at the peak."""

    mode: Mode
    batch_rows: int
    basis: int
    held: int
    graphs: int
    product: int
    basis_bytes: int

    @property
    def total(self) -> int:
        """Peak of the process, in bytes: the sum of the parts, and what the allocator keeps."""
        return int((self.held + self.graphs + self.product + self.basis_bytes) * (1 + KEPT_BACK))


def predicted(sizes: Sizes, mode: Literal["kept", "fresh"], batch_rows: int, basis: int) -> Plan:
    """The peak of an analysis by one mode.

    The double backward of a batch takes, beside its graph, half of it for what it computes on the way, two of the largest
    parameter (gradients of a tied embedding that are added up), and three chunks of logits. A product has its tangents,
    its image and the image as a flat vector; a restart of the eigensolver copies half of a basis. The two do not meet.

    Args:
        batch_rows: rows of one batch.
        basis: vectors of the eigensolver's basis, of which each has an image.
    """
    batch_rows = min(batch_rows, sizes.rows)
    graph = sizes.graph * batch_rows
    working = graph // 2 + 2 * sizes.largest + 3 * min(sizes.logits * batch_rows, CHUNK * sizes.itemsize)
    product = 3 * sizes.vector + working + (graph if mode == "fresh" else 0)
    restart = (basis // 2 + 1) * sizes.vector
    return Plan(
        mode=mode,
        batch_rows=batch_rows,
        basis=basis,
        held=sizes.process + sizes.model + sizes.state + sizes.vectors * sizes.vector,
        graphs=sizes.graph * sizes.rows if mode == "kept" else 0,
        product=max(product, restart),
        basis_bytes=2 * basis * sizes.vector,
    )


def plan(sizes: Sizes, limit: float, batch_rows: int, mode: Mode | Literal["auto"] = "auto") -> Plan:
    """The way to measure that is expected to be the fastest of those that fit.

    A basis of 12 vectors at least comes before all, since a smaller one costs products of any kind. Then kept graphs
    come before fresh ones, which cost up to half as much again (benchmarks/hvp_cost.py), large batches before small ones,
    and a large basis before a small one.

    Args:
        limit: bytes that the process may take at its peak.
        batch_rows: rows of a batch that are wanted; halved where they do not fit.
        mode: one to insist on. Of "forward", which keeps no graph either, fresh's memory is taken.

    Raises:
        UsageError: nothing fits; it says what the leanest way would need.
    """
    modes: tuple[Literal["kept", "fresh"], ...] = (
        ("kept", "fresh") if mode == "auto" else ("kept",) if mode == "kept" else ("fresh",)
    )
    for least, most in ((SMALL, BASIS), (LEAST, SMALL - 1)):
        for candidate in modes:
            for rows in _halved(batch_rows):
                for basis in range(most, least - 1, -1):
                    if (found := predicted(sizes, candidate, rows, basis)).total <= limit:
                        return found
    lean = min((predicted(sizes, candidate, 1, LEAST) for candidate in modes), key=lambda p: p.total)
    raise UsageError(
        f"this analysis needs {lean.total / GIB:.1f} GiB of memory at least, the limit is {limit / GIB:.1f} GiB: "
        f"weights and state {lean.held / GIB:.1f}, {LEAST} vectors and their images {lean.basis_bytes / GIB:.1f}, "
        f"a product {(lean.product + lean.graphs) / GIB:.1f}",
        hint="give it more memory, shorter sequences (--sequence-length), or fewer tokens (--tokens)",
    )


def _halved(rows: int) -> Iterator[int]:
    while rows > 1:
        yield rows
        rows = (rows + 1) // 2
    yield 1
