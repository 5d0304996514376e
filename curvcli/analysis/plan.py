"""Memory of an analysis before it runs: bytes in, bytes out, and the fastest way that fits a limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from torch import Tensor

from curvcli.curvature import resources
from curvcli.curvature.cross_entropy import CHUNK
from curvcli.curvature.hvp import Mode, graph_bytes
from curvcli.curvature.memory import cut, largest_batch
from curvcli.curvature.problem import Problem
from curvcli.curvature.scratch import Scratch, elsewhere, passed_over
from curvcli.curvature.shards import Shards
from curvcli.errors import UsageError
from curvcli.files.parse import byte_size
from curvcli.models.head import widest

WANTED, LEAST = 16, 8  # vectors of a basis: what most solves end within, and the fewest that are worth a solve
BESIDE = 2.25  # vectors held beside the basis, if not on disk: gradients until the update is done, the full model's, a mask
WORKING = 3  # vectors of a product: the vector times a root, its image, the folds' sum, which may be on disk meanwhile
SEEN = 3  # vectors when it is done: the image, the folds' sum, one of the basis
KEPT_BACK = 0.08  # of the peak: what the C allocator does not give back; 5 and 10 % were measured on two models
GIB = 2**30


class OverLimitError(UsageError):
    """A limit of memory does not do for any way to measure."""


Planned = Literal["kept", "fresh", "differences"]


@dataclass(frozen=True)
class Sizes:
    """What there is, in bytes unless it says otherwise.

    Args:
        held: what the process holds before anything is solved: libraries, model, optimizer state, preconditioner.
        vector: the parameters that are measured: one vector of the eigensolver.
        largest: the largest of these parameters.
        graph: the kept graph of one row of a batch, as `hvp.graph_bytes` measures it.
        logits: of one row, where the loss may go over them in chunks; 0 where they are a part of the graph.
        rows: of the shard, a number.
        itemsize: of an entry.
        gathered: what a product gathers where `held` and `vector` are slices: tangents and images, weights being held, or
            all that is gathered of a block; else 0.
        activations: the graph of one row's loss, which a gradient needs; 0 where differences of gradients are no choice.
        aside: what lies elsewhere lies on disk, also vectors beside the basis.
    """

    held: int
    vector: int
    largest: int
    graph: int
    logits: int
    rows: int
    itemsize: int = 4
    gathered: int = 0
    activations: int = 0
    aside: bool = False


@dataclass(frozen=True)
class Plan:
    """How to measure, and the bytes that its parts take at the peak."""

    mode: Planned
    batch_rows: int
    basis: int
    held: int
    graphs: int
    product: int
    basis_bytes: int
    offloaded: int = 0  # bytes of the basis that lie elsewhere, at most
    place: str = "on disk"
    note: str = ""  # on that

    @property
    def total(self) -> int:
        """Peak of the process, in bytes: the sum of the parts, and what the allocator keeps."""
        return int((self.held + self.graphs + self.product + self.basis_bytes) * (1 + KEPT_BACK))

    def __str__(self) -> str:
        rows = f"{self.batch_rows} row{'s' if self.batch_rows > 1 else ''}"
        place = f" {self.place}, where they take up to {self.offloaded / GIB:.1f} GiB" if self.offloaded else ""
        vectors = f"at most {self.basis} vectors{place}"
        how = "differences of gradients" if self.mode == "differences" else f"{self.mode} graphs"
        note = f" ({self.note})" if self.note else ""
        return f"{how}, batches of {rows}, {vectors}; {self.total / GIB:.2f} GiB expected{note}"


def limit_of(memory: int | str | None) -> int | None:
    """A limit in bytes, of a number or of text such as 8GiB. Raises UsageError."""
    found = byte_size(memory, "--memory") if isinstance(memory, str) else memory
    if found is not None and found <= 0:
        raise UsageError(f"--memory {memory} is no size", hint="as in 500M or 8GiB")
    return found


def fitted(
    problem: Problem, limit: int, mode: Mode | Literal["auto"], most: int, *, sharded: bool = False, aside: bool = False
) -> tuple[Problem, Plan]:
    """The same mean loss in batches that fit a limit, and the plan for them.

    To be called when everything is held but what solving takes: a row's graph is measured here, and free blocks go back
    to the system from now on, in the whole process.

    Args:
        limit: bytes that the process may take at its peak; on a GPU, the tensors there.
        mode: one to insist on, or "auto".
        most: products that a solve may take, and so vectors that it can use.
        sharded: processes divide the vectors.
        aside: those beside the basis lie on disk.

    Raises:
        OverLimitError: nothing fits; it says what the leanest way would need.
    """
    parameters = list(problem.parameters.values())
    device, itemsize = parameters[0].device, parameters[0].element_size()
    if device.type == "cpu":
        # The peak counts: without this the C library keeps what products have freed.
        resources.return_blocks()
    single = cut(problem, 1)
    alone = largest_batch(single) == 1  # where rows depend on each other, a whole batch counts as one
    streamed = problem.streamed
    activations = graph_bytes(single.subset([0]), once=True)
    graph = activations if streamed else graph_bytes(single.subset([0]))
    resources.release(device)
    resources.give_back(device)
    nbytes = [p.nbytes for p in parameters]
    sizes = Sizes(
        held=resources.held_bytes(device),
        vector=-(-sum(nbytes) // problem.ranks.world) if sharded else sum(nbytes),
        largest=max(nbytes),
        graph=graph,
        logits=_ids(single.batches[0]) * widest(problem.model) * itemsize,
        rows=single.shared(problem.ranks).most,  # that one process will have
        itemsize=itemsize,
        # Of a block its weights, their gradients, and these once more as they are sent.
        gathered=3 * streamed.largest if streamed else 2 * sum(nbytes) if sharded else 0,
        activations=activations,
        aside=aside,
    )
    # One plan for all processes, by the largest number that one of them has.
    most_of: dict[str, Any] = {name: int(max(problem.ranks.each(number))) for name, number in asdict(sizes).items()}
    sizes = Sizes(**most_of)
    note = passed_over() if device.type == "cpu" else ""
    try:
        found = plan(sizes, limit, largest_batch(problem) if alone else 1, mode, most, _elsewhere(problem))
    except OverLimitError as error:
        raise OverLimitError(error.message, hint="; ".join(part for part in (error.hint, note) if part)) from error
    found = replace(found, note=note) if device.type == "cpu" else replace(found, place="in main memory")
    return cut(problem, found.batch_rows) if alone else problem, found


def unplanned(problem: Problem, vector: int, free: float, most: int) -> tuple[int, bool]:
    """How many vectors of a basis there is room for where no limit was given, and whether they lie elsewhere.

    Args:
        vector: bytes of one.
        free: bytes of memory that may be planned with.
        most: that are of any use.
    """
    # A quarter: graphs, the gradient and a product's own vectors need the rest (docs/adr/0007-two-eigensolvers.md).
    room, there = int(free / 4 / vector), int(_elsewhere(problem) / vector)
    if room < min(WANTED, most) <= there:
        return min(there, most), True
    return max(room, LEAST), False


def spare(problem: Problem, shards: Shards | None) -> Scratch | None:
    """Where vectors beside the basis lie under a limit of memory: on disk if they are whole, on the CPU, and have room."""
    store = elsewhere(next(iter(problem.parameters.values())).device)
    if not isinstance(store, Scratch) or shards is not None:  # a GPU's main memory is for the basis
        return None
    vector = sum(p.nbytes for p in problem.parameters.values())
    return store if _elsewhere(problem) > (BESIDE + 3) * vector else None  # P, the next update, a sum


def _elsewhere(problem: Problem) -> float:
    """Bytes that vectors of each process may take where its device has no room: on disk, or a GPU's in main memory."""
    store = elsewhere(next(iter(problem.parameters.values())).device)
    return min(problem.ranks.each(store.free / problem.ranks.here if store else 0.0))


def predicted(sizes: Sizes, mode: Planned, batch_rows: int, basis: int, *, offload: bool = False) -> Plan:
    """The peak of an analysis by one mode.

    The double backward of a batch takes, beside its graph, half of it for what it computes on the way, two of the largest
    parameter (gradients of a tied embedding that are added up), and three chunks of logits. A gradient has no graph but the
    loss's, and differences of gradients a moved copy of the weights.

    Args:
        batch_rows: rows of one batch.
        basis: vectors of the eigensolver's basis.
        offload: they lie elsewhere, and one at a time is where it is used, but not while a product is made.
    """
    batch_rows = min(batch_rows, sizes.rows)
    once = mode == "differences"
    graph = (sizes.activations if once else sizes.graph) * batch_rows
    working = graph // 2 + 2 * sizes.largest + 3 * min(sizes.logits * batch_rows, CHUNK * sizes.itemsize)
    working += sizes.gathered + (0 if mode == "kept" else graph)
    # What lies in main memory is copied to where it is used, and read once for two images.
    vectors = WORKING + once + (-1 if sizes.aside else 2 if offload else 0)
    return Plan(
        mode=mode,
        batch_rows=batch_rows,
        basis=basis,
        held=sizes.held + (0 if sizes.aside else int(BESIDE * sizes.vector)),
        graphs=sizes.graph * sizes.rows if mode == "kept" else 0,
        product=max(vectors * sizes.vector + working, SEEN * sizes.vector),
        basis_bytes=0 if offload else basis * sizes.vector,
        offloaded=basis * sizes.vector if offload else 0,
    )


def plan(
    sizes: Sizes, limit: float, batch_rows: int, mode: Mode | Literal["auto"] = "auto", most: int = 32, store: float = 0.0
) -> Plan:
    """The way to measure that is expected to be the fastest of those that fit.

    A basis of 16 vectors at least comes before all, since a solve that runs out of vectors ends without a number: in memory,
    else elsewhere, where reading it takes time with every product, and only then a smaller one in memory. Among these
    kept graphs come before fresh ones, which cost up to half as much again (benchmarks/hvp_cost.py), large batches before
    small ones, and a large basis before a small one. Differences of gradients, which are not exact, come after all.

    Args:
        limit: bytes that the process may take at its peak.
        batch_rows: rows of a batch that are wanted; halved where they do not fit.
        mode: one to insist on. Of "forward", which keeps no graph either, fresh's memory is taken.
        most: vectors of a basis that are of any use.
        store: bytes that vectors may take elsewhere.

    Raises:
        OverLimitError: nothing fits; it says what the leanest way would need.
    """
    exact: tuple[Planned, ...] = ("kept", "fresh")
    exact = exact if mode == "auto" else ("kept",) if mode == "kept" else ("fresh",)
    rough: tuple[Planned, ...] = ("differences",) if mode == "differences" or (mode == "auto" and sizes.activations) else ()
    ways = [rough] if mode == "differences" else [exact, rough]
    least = min(LEAST, most)
    wanted, there = min(WANTED, most), min(most, int(store / sizes.vector)) if sizes.vector else 0
    # A large enough basis first, with whatever mode and rows leave room for it; only then a smaller one.
    bases = ((wanted, False), (there, True), (least, False))
    for modes, (size, offload) in product(ways, bases):
        for candidate in modes if size >= (wanted if offload else least) else ():
            for rows in _halved(batch_rows):
                lean = predicted(sizes, candidate, rows, size, offload=offload)
                if lean.total <= limit:
                    return lean if offload else _widened(sizes, lean, limit, most)
    places = [False, True] if there >= wanted else [False]
    lean = min(
        (predicted(sizes, candidate, 1, least, offload=where) for modes in ways for candidate in modes for where in places),
        key=lambda found: found.total,
    )
    vectors = f"a basis {'on disk' if sizes.aside else 'elsewhere'}" if lean.offloaded else f"a basis of {least} vectors"
    raise OverLimitError(
        f"this analysis needs {lean.total / GIB:.2f} GiB of memory at least, the limit is {limit / GIB:.2f} GiB: "
        f"libraries, weights, preconditioner and vectors beside {lean.held / GIB:.2f}, {vectors} "
        f"{lean.basis_bytes / GIB:.2f}, a product {(lean.product + lean.graphs) / GIB:.2f}",
        hint="give it more memory, shorter sequences (--sequence-length), or fewer tokens (--tokens)",
    )


def _widened(sizes: Sizes, lean: Plan, limit: float, most: int) -> Plan:
    """With the largest basis that fits."""
    room = int((limit - lean.total) / (sizes.vector * (1 + KEPT_BACK))) if sizes.vector else most
    return predicted(sizes, lean.mode, lean.batch_rows, min(most, lean.basis + room))


def _halved(rows: int) -> Iterator[int]:
    while rows > 1:
        yield rows
        rows = (rows + 1) // 2
    yield 1


def _ids(batch: Any) -> int:
    """Entries of the first tensor of whole numbers in a batch: token ids, of which each may have logits; else 0."""
    # One-dimensional integers are the labels of a classification, whose logits are few.
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((v.numel() for v in values if isinstance(v, Tensor) and not v.is_floating_point() and v.dim() > 1), 0)
