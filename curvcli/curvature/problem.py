"""The frozen function whose curvature is measured: a model, a loss and weighted batches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import unwrap
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvcli.curvature.precision import Lifted, all_finite, exact, lift, uses
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.curvature.streaming import Streamed
from curvcli.curvature.untouched import restored
from curvcli.errors import UnsupportedError, UsageError, exhausted

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Blocks:
    """The stack of layers of a model: `parent.<attribute>` holds `modules` in order of depth.

    `prefix` is the stack's dotted module path, without the wrappers' `_orig_mod.` and `module.`. `truncation` is how the
    network is cut short: by a shorter list; by identities in the place of blocks that the model asks for by index; or
    not at all, where neither gives a network that runs.
    """

    parent: nn.Module
    attribute: str
    modules: tuple[nn.Module, ...]
    prefix: str
    truncation: Literal["list", "identities"] | None = "list"

    @contextmanager
    def truncated(self, depth: int) -> Iterator[None]:
        """Within the context the model has its first `depth` blocks only; the rest are identities.

        The list is shortened rather than its members replaced where that runs: models read attributes of their
        blocks while they loop, and blocks differ in what they return.
        """
        stack = getattr(self.parent, self.attribute)
        kept = self.modules[:depth]
        if self.truncation == "identities":
            kept = (*kept, *(Skip() for _ in self.modules[depth:]))
        setattr(self.parent, self.attribute, _container(stack, kept))
        try:
            yield
        finally:
            setattr(self.parent, self.attribute, stack)


def _container(stack: nn.Module, kept: Sequence[nn.Module]) -> nn.Module:
    """The same kind of container, of fewer modules."""
    if isinstance(stack, nn.ModuleDict):  # torchtitan's, of layers by their number
        return nn.ModuleDict(dict(zip(stack, kept, strict=False)))
    # A Sequential is called as a whole, and a ModuleList cannot be.
    return type(stack)(*kept) if isinstance(stack, nn.Sequential) else nn.ModuleList(kept)


class Skip(nn.Module):
    """In the place of a block that maps hidden states to hidden states: gives them back."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states, of any shape; whatever else a block is called with is not looked at."""
        return hidden


@dataclass(frozen=True)
class Problem:
    """Mean loss over a frozen shard, as a function of the model's parameters.

    Args:
        model: in evaluation mode; its parameters are read in place and never changed.
        loss: `loss(model, batch)` is the mean loss over that batch (a scalar tensor).
        batches: the shard, cut into what one forward pass takes.
        weights: share of each batch in the mean, summing to 1: its token count over the shard's.
        scope: entered around each forward pass, to cut the network short.
        ranks: the processes that measure it together.
        owners: the rank that computes each batch; none where each process computes all.
        origins: the batch, as they were given, that each is a part of; none where each is a whole one.
        gathered: within it the parameters are there, where processes divide them; all of these have to come to it.
        names: of the parameters that it is a function of; None of all that are trained.
        streamed: the weights, where processes divide them and gather one block at a time.
    """

    model: nn.Module
    loss: Loss
    batches: Sequence[Any]
    weights: Sequence[float]
    scope: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)
    ranks: Ranks = field(default=ALONE, repr=False)
    owners: Sequence[int] = ()
    origins: Sequence[int] = ()
    gathered: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)
    names: frozenset[str] | None = None
    streamed: Streamed | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        gathered: bool = False,
    ) -> Problem:
        """Freeze dropout and check the weights.

        Args:
            gathered: what shards the model does nothing here, and its modules hold whole copies of their parameters.

        Raises:
            UsageError: the weights of the batches cannot be told.
            UnsupportedError: the model is sharded.
        """
        if not gathered and sharded(model):
            # Between two steps its parameters may look whole, and differentiating twice then ends the process.
            raise UnsupportedError(
                "a model under fully_shard has no second derivatives", hint="analyze its checkpoints instead"
            )
        if not batches:
            raise UsageError("no batches were given", hint="pass at least one batch of data")
        _check_devices(model)
        if weights is None:
            if len({tuple(_shapes(batch)) for batch in batches}) > 1:
                raise UsageError(
                    "batches differ in size and no weights were given",
                    hint="pass weights=[number of predictions in each batch]",
                )
            weights = [1.0] * len(batches)
        if len(weights) != len(batches) or min(weights) <= 0:
            raise UsageError(
                f"{len(weights)} weights for {len(batches)} batches", hint="give each batch one positive weight"
            )
        total = float(sum(weights))
        for module in model.modules():
            # Dropout makes two products of the same vector differ by more than half. Not by eval(), which some
            # modules take for the moment to merge an adapter into their weights.
            module.training = False
        return cls(model, loss, list(batches), [float(w) / total for w in weights])

    @cached_property  # asked for once a layer and name, and every time a walk over all of the modules
    def parameters(self) -> dict[str, Tensor]:
        """Name to parameter, tied ones once, in `named_parameters` order; only those that are trained when first asked."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: p for n, p in trained.items() if self.names is None or n in self.names}

    @property
    def own(self) -> list[int]:
        """Indices of the batches that this process computes: what it adds to a sum over the shard."""
        mine = self.ranks.rank
        return [i for i in range(len(self.batches)) if not self.owners or self.owners[i] == mine]

    @property
    def shares(self) -> list[tuple[int, float]]:
        """Of each pass that this process makes, which batch it is over and what that weighs in the mean.

        Where blocks are gathered one at a time all make equally many: those who have no more batches go through the first
        one, which weighs nothing then.
        """
        own = [(i, self.weights[i]) for i in self.own]
        return own + [(0, 0.0)] * (self.most - len(own)) if self.streamed else own

    @property
    def most(self) -> int:
        """How many batches the process computes that has most of them."""
        return max(Counter(self.owners).values()) if self.owners else len(self.batches)

    @property
    def given(self) -> list[list[int]]:
        """Indices of the parts of each batch as they were given: of one that is whole, its own."""
        found: dict[int, list[int]] = {}
        for index, origin in enumerate(self.origins or range(len(self.batches))):
            found.setdefault(origin, []).append(index)
        return list(found.values())

    def shared(self, ranks: Ranks) -> Problem:
        """With each batch given to one of these processes, of which each has about as much of the weight."""
        load = [0.0] * ranks.world
        owners = [0] * len(self.batches)
        # Heaviest first, each to the least loaded: at most a third above the best split (Graham, SIAM J. Appl. Math.
        # 17, 1969), and every rank finds the same split without communication.
        for index in sorted(range(len(owners)), key=lambda i: -self.weights[i]):
            owners[index] = load.index(min(load))
            load[owners[index]] += self.weights[index]
        return replace(self, ranks=ranks, owners=owners)

    def alone(self) -> Problem:
        """The same function, which each process computes as a whole for itself."""
        return replace(self, ranks=ALONE, owners=())

    @property
    def rows(self) -> int:
        """First dimensions of the batches, added up: examples, where nobody said how many predictions."""
        return sum(next(_shapes(batch), (1,))[0] for batch in self.batches)

    def batch_loss(self, index: int) -> Tensor:
        """Mean loss of one batch, differentiable twice."""
        # Fused attention kernels have no second derivative; MATH is only needed around the forward.
        try:
            with self.scope(), sdpa_kernel(SDPBackend.MATH):
                value = self.loss(self.model, self.batches[index])
        except RuntimeError as error:
            if "same device" not in str(error):
                raise
            raise UsageError(
                f"model and batches lie on different devices: {str(error).splitlines()[0][:200]}",
                hint="move the batches to the model's device",
            ) from error
        if value.dim() != 0:
            raise UsageError(
                f"the loss returned a tensor of shape {tuple(value.shape)}", hint="return the mean loss, a scalar"
            )
        return value

    def mean_loss(self, after: Callable[[float], object] = lambda share: None) -> float:
        """Mean loss over the shard.

        Args:
            after: called after each forward pass, with what its batch weighs.
        """
        mine = 0.0
        with torch.no_grad(), self.gathered():
            for index, share in self.shares:
                value = float(self.batch_loss(index))
                mine += share * value if share else 0.0
                after(share)
        if self.ranks.world == 1:
            return mine
        total = torch.tensor([mine], dtype=torch.float64)
        self.ranks.sum_([total])
        return float(total)

    def subset(self, indices: Sequence[int]) -> Problem:
        """The same function on some of the batches, weights renormalised."""
        weights = [self.weights[i] for i in indices]
        total = sum(weights)
        return replace(
            self,
            batches=[self.batches[i] for i in indices],
            weights=[w / total for w in weights],
            owners=[self.owners[i] for i in indices] if self.owners else (),
            origins=[self.origins[i] for i in indices] if self.origins else (),
        )

    def lean(self, share: float) -> Problem:
        """As a function of its smallest parameters alone, which are such a share of all entries at most; one at least."""
        found: list[str] = []
        room = share * sum(p.numel() for p in self.parameters.values())
        for name, parameter in sorted(self.parameters.items(), key=lambda item: item[1].numel()):
            room -= parameter.numel()
            if found and room < 0:
                break
            found.append(name)
        return replace(self, names=frozenset(found))

    def negated(self) -> Problem:
        """Minus the function: what an optimizer that maximises descends."""
        return replace(self, loss=lambda model, batch: -self.loss(model, batch))

    def truncated(self, blocks: Blocks, depth: int) -> Problem:
        """The network whose blocks from `depth` on are identities (docs/explanation/method.md: truncated)."""
        return replace(self, scope=lambda: blocks.truncated(depth))


@contextmanager
def measurable(model: nn.Module, *, gather: bool = False) -> Iterator[Lifted]:
    """No gradient checkpointing, no padding rows and no half precision within; afterwards the modules are as they were.

    Within it parameters in half precision are others, float32 copies: what knows them by identity has to be asked before.

    An embedding's `padding_idx` zeroes one row of the gradient and leaves the loss as it is. Such a gradient is that of
    no function: its derivative is not symmetric, and double backward and forward mode give products that differ.
    """
    with exact(), restored(model):
        # A sharded model that is not to be gathered is left as it is, and `Problem.create` refuses it.
        lifted = Lifted() if sharded(model) and not gather else lift(model, gather=gather)
        for module in model.modules():
            # functional_call, as the mode "forward" has it, is silently wrong under it (hvp.py).
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]
            if isinstance(module, nn.Embedding) and _only_masks(module):
                module.padding_idx = None
        yield lifted


def _only_masks(embedding: nn.Embedding) -> bool:
    """Whether `padding_idx` does no more than zero a gradient: a subclass may compute positions from it."""
    forward = unwrap(type(embedding).forward)
    # From the names in the byte code, since the source may not be available; without either, assume that it is used.
    names = getattr(getattr(forward, "__code__", None), "co_names", ("padding_idx",))
    return forward is nn.Embedding.forward or "padding_idx" not in names


def check_lifted(problem: Problem, lifted: Lifted) -> None:
    """That the loss is one of the copies in float32, by a forward pass of the first batch where there are any.

    Raises UnsupportedError where it does not run on them, or uses the originals past the modules.
    """
    if not lifted.originals:
        return
    copy = "measure a copy in float32: copy.deepcopy(model).float()"
    try:
        value = problem.batch_loss(0)
    # A cast to half precision inside the model or the loss fails on float32 weights with one of these.
    except (RuntimeError, TypeError, ValueError) as error:
        if exhausted(error):
            raise
        raise UnsupportedError(
            f"weights are in {_kinds(lifted)}, and the loss does not run on copies in float32: {str(error)[:200]}",
            hint=f"leave casts to half precision out of model and loss, or {copy}",
        ) from error
    if uses(value, lifted.originals):
        raise UnsupportedError(f"the loss uses weights in {_kinds(lifted)} past the modules that hold them", hint=copy)


def _kinds(lifted: Lifted) -> str:
    return " and ".join([*lifted.dtypes, *["shards"][: lifted.whole]]) or "inference mode"


def gradient(
    problem: Problem, names: Sequence[str], see: Callable[[int, Sequence[Tensor]], None] = lambda index, parts: None
) -> list[Tensor]:
    """Gradient of the mean loss for the named parameters, in their shapes (zeros where unused).

    Args:
        see: called with each batch that this process has, and its gradient for the parameters that it uses.
    """
    parameters = problem.parameters
    chosen = [parameters[n] for n in names]
    total = [torch.zeros_like(p) for p in chosen]
    with problem.gathered():
        for i in problem.own:
            parts = torch.autograd.grad(problem.batch_loss(i), chosen, allow_unused=True)
            see(i, [part for part in parts if part is not None])
            for accumulated, part in zip(total, parts, strict=True):
                if part is not None:
                    accumulated.add_(part, alpha=problem.weights[i])
    # Checked before the sum, after which every rank has the NaN and none knows whose it was.
    bad = problem.ranks.each(float(not all_finite(total)))
    problem.ranks.sum_(total)
    # Parts that are finite can still overflow in the sum.
    if any(bad) or (len(bad) > 1 and not all_finite(total)):
        where = ", ".join(str(rank) for rank, found in enumerate(bad) if found)
        raise UnsupportedError(
            "the gradient of the loss is not finite on this data"
            + (f", in the batches of rank {where}" if where and len(bad) > 1 else ""),
            hint="check the data and the weights: a run in this state has already diverged",
        )
    return total


def _check_devices(model: nn.Module) -> None:
    """Raises UnsupportedError where what trains lies on several devices (device_map), or on none (meta)."""
    devices = sorted({str(p.device) for p in model.parameters() if p.requires_grad})
    if len(devices) > 1:
        raise UnsupportedError(
            f"the weights that train lie on {' and '.join(devices)}: vectors lie on one device, and so must they",
            hint="load the model without device_map, on a device that holds it",
        )
    if devices == ["meta"]:
        raise UnsupportedError("the weights are on the meta device, where they have no numbers", hint="load them first")


def sharded(model: nn.Module) -> bool:
    """Whether fully_shard, FullyShardedDataParallel or tensor parallelism holds parameters of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody has used it
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    # A DTensor is recognised by its method, without importing its class.
    return any(isinstance(m, kinds) for m in model.modules()) or any(hasattr(p, "to_local") for p in model.parameters())


def _shapes(batch: Any) -> Iterator[tuple[int, ...]]:
    """Of the tensors of a batch: where all are equal, two batches have as many predictions but for labels of -100."""
    if isinstance(batch, Tensor):
        yield tuple(batch.shape) or (1,)
    # Mappings, not dicts alone: a tokenizer's BatchEncoding is none.
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _shapes(part)
