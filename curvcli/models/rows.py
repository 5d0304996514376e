"""Which weight matrices have a row per token or per position: by what they are used for, never by their shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvcli.curvature.gathering import Across
from curvcli.curvature.inverse_root import InverseRoot
from curvcli.curvature.problem import Problem

RowKind = Literal["tokens", "positions"]
# Columns of a batch whose numbers are looked up, too, and are no tokens.
_NO_TOKENS = frozenset({"labels", "attention_mask", "position_ids", "token_type_ids"})


def row_kinds(problem: Problem) -> dict[int, RowKind]:
    """What the rows of embeddings and heads are, by `id` of the weight; one forward pass of the first batch.

    Rows are tokens in the embedding that a transformers model names as its input's or output's, in one that looks the
    batch's own ids up, and in the layer that makes logits of as many for each. They are positions where numbers are looked
    up that go on by one along each row, but where it begins anew, as packed documents do, or is padded. Of no other matrix
    is anything said.
    """
    used = _used(problem)
    given = [ids for ids in _tensors(problem.batches[0]) if not ids.is_floating_point() and ids.dim()]
    found: dict[int, RowKind] = {}
    for module, ids in used.lookups:
        if any(_begins(batch, ids) for batch in given):
            found[id(module.weight)] = "tokens"
        elif _kind(ids) == "positions":
            # One matrix may be asked for the batch's ids and for consecutive numbers: then its rows are tokens.
            found.setdefault(id(module.weight), "positions")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        if (own := embedding_named(problem.model, name)) is not None:
            found[id(own.weight)] = "tokens"
    # A head that no method names: it gives as many logits for each token as there are rows, and the model returns them.
    shapes = {(*ids.shape, m.num_embeddings) for m, ids in used.lookups if found.get(id(m.weight)) == "tokens"}
    for head, output in used.last_linear:
        if tuple(output.shape) in shapes and any(output is tensor for tensor in used.returned):
            found[id(head.weight)] = "tokens"
    return found


def embedding_named(model: nn.Module, method: str) -> nn.Embedding | nn.Linear | None:
    """What get_input_embeddings or get_output_embeddings of a transformers model gives; None where it has no such thing."""
    try:
        found = getattr(model, method, lambda: None)()
    except NotImplementedError:  # of networks for images (ResNet, ConvNeXt), which look nothing up
        return None
    return found if isinstance(found, (nn.Embedding, nn.Linear)) else None


@dataclass(frozen=True)
class Lookups:
    """How often each row of an embedding was looked up; not of positions, which are in every window."""

    counts: dict[int, Tensor]  # by `id` of the weight: (rows,)

    def rare(self, weight: Tensor, most: int) -> Tensor | None:
        """True on rows, of shape (rows,), looked up fewer than `most` times, if at all; None for other weights."""
        counts = self.counts.get(id(weight))
        if counts is None:
            return None
        # A weight that is tied to a larger head has rows past the tokens that its embedding knows of: none looks them up.
        short = weight.shape[0] - len(counts)
        return (functional.pad(counts, (0, short)) if short > 0 else counts) < most


def apart(root: InverseRoot | Across, weight: Tensor, rows: Tensor) -> bool:
    """Whether P keeps some rows of a weight apart from the others; where it mixes them, to cut a vector holds none still.

    Args:
        rows: boolean, of shape (rows,).
    """
    probe = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    probe[rows.to(weight.device)] = 0
    return not bool(root.apply(probe)[rows.to(weight.device)].any())


def outside(parameter: Tensor, rare: Tensor | None) -> Tensor:
    """True on the entries of a parameter, flat, that are in no rare row."""
    if rare is None:
        return torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
    return (~rare).to(parameter.device)[:, None].expand(parameter.shape[0], parameter[0].numel()).reshape(-1)


def lookups(problem: Problem) -> tuple[float, Lookups]:
    """The mean loss over the shard, and what its forward passes look up."""
    # By `id` of the weight: lookups of each row, and last how many passes looked up tokens, and positions. (rows + 2,)
    counts: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}  # in one forward pass

    def add(share: float) -> None:
        for key, found in seen.items() if share else ():
            counts[key] = counts.get(key, 0) + found
        seen.clear()

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, nn.Embedding) or not arguments:
            return
        ids = arguments[0]
        if isinstance(ids, Tensor):
            # One matrix may be asked for tokens and for consecutive numbers: these are in every window.
            counted = ids.new_empty(0) if _consecutive(ids) else ids.reshape(-1)
            found = torch.bincount(counted.to(torch.int64), minlength=module.num_embeddings).cpu()
            kind = _kind(ids)
            found = torch.cat([found, torch.tensor([kind == "tokens", kind == "positions"]).to(found)])
            seen[id(module.weight)] = seen.get(id(module.weight), 0) + found

    handles = [m.register_forward_hook(hook) for m in problem.model.modules() if isinstance(m, nn.Embedding)]
    try:
        loss = problem.mean_loss(add)
    finally:
        for handle in handles:
            handle.remove()
    if problem.ranks.world > 1:  # each process has seen its own batches
        embeddings = {id(m.weight): m.num_embeddings for m in problem.model.modules() if isinstance(m, nn.Embedding)}
        counts = {key: counts.get(key, torch.zeros(rows + 2, dtype=torch.int64)) for key, rows in embeddings.items()}
        problem.ranks.sum_(list(counts.values()))
    # Positions may look like none in a single row, and tokens like positions: the whole shard says what a matrix has.
    told = {key: found[:-2] for key, found in counts.items() if found[-2] > 0 or found[-1] == 0}
    return loss, Lookups({key: found for key, found in told.items() if bool(found.any())})


@dataclass
class _Used:
    """What a forward pass looked up, the last linear layer with its output, and what the model returned."""

    lookups: list[tuple[nn.Embedding, Tensor]] = field(default_factory=list)
    last_linear: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)


def _used(problem: Problem) -> _Used:
    used = _Used()

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Embedding) and arguments and isinstance(arguments[0], Tensor):
            used.lookups.append((module, arguments[0]))
        elif isinstance(module, nn.Linear):
            used.last_linear[:] = [(module, output)]
        if module is problem.model:
            used.returned.extend(_tensors(output))

    handles = [m.register_forward_hook(hook) for m in problem.model.modules()]
    try:
        with torch.no_grad(), problem.gathered():
            problem.batch_loss(0)
    finally:
        for handle in handles:
            handle.remove()
    return used


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (x for name, part in value.items() if name not in _NO_TOKENS for x in _tensors(part))
    elif isinstance(value, (list, tuple)):
        yield from (x for part in value for x in _tensors(part))


def _kind(ids: Tensor) -> RowKind | None:
    """What numbers look like, as they are looked up: positions, or tokens; None where they do not move along a row."""
    if _consecutive(ids):
        return "positions"
    if not ids.dim():
        return None
    after, steps = ids[..., 1:], ids.diff(dim=-1)
    still = after[steps == 0]
    if len(still) == steps.numel():
        return None
    # Padding repeats one number. A document that begins anew does so at the smallest.
    fill = still[0] if len(still) else ids.min()
    runs = (steps == 1) | (after == fill) | (after == ids.min())
    return "positions" if bool((steps == 1).any()) and bool(runs.all()) and bool((still == fill).all()) else "tokens"


def _consecutive(ids: Tensor) -> bool:
    return ids.shape[-1:] > (1,) and bool((ids.diff(dim=-1) == 1).all())


def _begins(batch: Tensor, ids: Tensor) -> bool:
    """Whether ids are the batch's, or its windows without their last token."""
    if ids.shape[:-1] != batch.shape[:-1] or ids.shape[-1] > batch.shape[-1]:
        return False
    return torch.equal(ids, batch[..., : ids.shape[-1]].to(ids))
