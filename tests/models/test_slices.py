"""Weights read straight into slices, on threads in the place of processes: as in the whole model, and no more of them."""

from __future__ import annotations

import gc
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from formats import CHECKPOINTS, master
from safetensors.torch import save_file
from threads import on_ranks
from torch import Tensor, nn

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.formats.dcp_files import Chunk, Entry, Lazy
from curvcli.curvature.ranks import Alone, Processes
from curvcli.errors import InputError, UsageError
from curvcli.files import tensors as tensors_file
from curvcli.files.tensors import TensorInfo, stored
from curvcli.models.slices import Divisible, WholeOnlyError, without_weights

CPU = torch.device("cpu")
PARTS = {
    "transformers Trainer",
    "transformers, sharded",
    "transformers, no optimizer",
    "one .safetensors",
    "optimizer.safetensors",
    "torch.distributed.checkpoint",
    "accelerate",
    "a compiled model's",
}
FAST = {"one .safetensors", "transformers, no optimizer", "torch.distributed.checkpoint", "transformers, pytorch_model.bin"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


class Tied(nn.Module):
    """An embedding that is the head too, a parameter that is no module's of torch, and a buffer that is not stored."""

    kept: Tensor
    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((2, 5), 4.0), requires_grad=False)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("constant", torch.arange(4.0), persistent=False)


def tied(file: Path) -> tuple[Tied, Divisible]:
    torch.manual_seed(1)
    net = Tied()
    net.kept += 1
    weights = {n: t.bfloat16() if n == "scale" else t for n, t in net.state_dict().items() if n != "head.weight"}
    save_file(weights, file)
    infos = tuple(TensorInfo(n, tuple(t.shape), "") for n, t in weights.items())
    return net, Divisible(lambda: Tied().eval(), stored(dict.fromkeys(weights, file)), infos, file)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in CHECKPOINTS])
def test_the_slices_of_each_format_are_those_of_the_whole_model(name: str, root: Path) -> None:
    checkpoint = open_checkpoint(master("checkpoint", name, root))
    assert (checkpoint.divisible is not None) == (name in PARTS)
    if checkpoint.divisible is None:
        return
    whole = checkpoint.model()

    def work(ranks: Processes) -> Any:
        assert checkpoint.divisible is not None
        model, weights = checkpoint.divisible().divided(ranks, CPU)
        assert not model.training
        before = {n: bool(p.isnan().all()) and p.untyped_storage().nbytes() == 4 for n, p in model.named_parameters()}
        with weights.whole():
            return before, {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}

    expected = dict([*whole.named_parameters(), *whole.named_buffers()])
    for before, found in on_ranks(work, 3):
        assert all(before.values())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def test_ties_frozen_parameters_and_buffers_are_as_in_the_whole(tmp_path: Path) -> None:
    net, divisible = tied(tmp_path / "a.safetensors")

    def work(ranks: Processes) -> Any:
        model, weights = divisible.divided(ranks, CPU)
        assert isinstance(model, Tied)
        assert model.head.weight is model.embed.weight
        assert {n: p.requires_grad for n, p in model.named_parameters()} == {
            n: p.requires_grad for n, p in net.named_parameters()
        }
        with weights.whole():
            weights.put("scale", model.scale.detach() + 1)
            assert torch.equal(model.scale, net.scale + 1)
        with weights.whole():
            return [model.embed.weight.clone(), model.scale.clone(), model.kept, model.constant]

    for found in on_ranks(work, 2):
        assert not any(isinstance(part, BaseException) for part in found)
        for left, right in zip(found, [net.embed.weight, net.scale + 1, net.kept, net.constant], strict=True):
            assert torch.equal(left, right)


def test_a_process_reads_its_slices_and_for_comparison_those_of_the_next(tmp_path: Path, monkeypatch: Any) -> None:
    _, divisible = tied(tmp_path / "a.safetensors")
    read: list[int] = []
    fill = tensors_file._fill

    def counted(stream: Any, into: Any) -> int:
        read.append(fill(stream, into))
        return read[-1]

    monkeypatch.setattr(tensors_file, "_fill", counted)
    on_ranks(lambda ranks: divisible.divided(ranks, CPU), 4)
    floats = 7 * 3 * 4 + 7 * 4 + 2 * 5 * 2
    assert sum(read) == 2 * floats + 4 * 3 * 8  # in four processes together, and the buffer in each
    assert max(read) <= max(-(-21 // 4) * 4, 24)


def test_other_weights_on_one_rank_are_seen_and_numbers_that_are_none(tmp_path: Path) -> None:
    _, divisible = tied(tmp_path / "a.safetensors")
    torch.manual_seed(2)
    for change in ("other", "nan"):
        weights = {n: t.clone() for n, t in dict(divisible.stored).items()}  # type: ignore[call-overload]
        weights["head.bias"][4] = float("nan") if change == "nan" else 3.0
        file = tmp_path / f"{change}.safetensors"
        save_file(weights, file)
        changed = Divisible(divisible.build, stored(dict.fromkeys(weights, file)), divisible.tensors, file)

        def work(ranks: Processes, changed: Divisible = changed, all_: bool = change == "nan") -> None:
            with ranks.together():
                (changed if all_ or ranks.rank == 1 else divisible).divided(ranks, CPU)

        found = on_ranks(work, 3)
        if change == "other":
            assert all(type(error) is UsageError for error in found)
            assert "rank 2 of 3 has other weights than rank 1" in str(found[0]) or "rank 1 of 3" in str(found[0])
        else:
            assert any("head.bias holds 1 NaN or inf in the slice of rank 1" in str(error) for error in found)


def test_while_it_reads_a_process_holds_its_slices_and_one_more(tmp_path: Path, monkeypatch: Any) -> None:
    file, net = tmp_path / "a.safetensors", models.Net(width=64, vocab=99)
    save_file(net.state_dict(), file)
    infos = tuple(TensorInfo(n, tuple(t.shape), "F64") for n, t in net.state_dict().items())
    held: list[int] = []
    fill = tensors_file._fill

    def weighed(stream: Any, into: Any) -> int:
        ours = [o for o in gc.get_objects() if isinstance(o, Tensor) and id(o) not in before]
        held.append(
            sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ours if not t.is_meta}.values())
        )
        return fill(stream, into)

    class Third(Alone):
        rank, world = 2, 4

        def each(self, number: float) -> list[float]:
            return [0.0] * 4  # whatever the others would say

    monkeypatch.setattr(tensors_file, "_fill", weighed)
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, Tensor)}
    build = lambda: models.Net(width=64, vocab=99)  # noqa: E731
    Divisible(build, stored(dict.fromkeys(net.state_dict(), file)), infos, file).divided(Third(), CPU)
    sizes = [p.numel() for p in net.parameters()]
    slices = sum(-(-n // 4) for n in sizes) * 8
    assert 0.9 * slices < max(held) <= slices + 2 * -(-max(sizes) // 4) * 8 + 4096  # small tensors of the tests' own


@pytest.mark.parametrize(
    ("build", "names", "why"),
    [
        (lambda: nn.Linear(3, 2), {"weight": (2, 3)}, "1 weight of the model is not stored, first bias"),
        (lambda: nn.Linear(3, 2), {"weight": (3, 2), "bias": (2,)}, "weight has shape (3, 2), the model's weight (2, 3)"),
        (lambda: nn.Linear(2, int(nn.Linear(1, 1).weight.item() * 0) + 1), {}, "does not come without numbers"),
    ],
)
def test_what_does_not_fit_is_left_to_the_whole_reading(build: Any, names: Any, why: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({n: torch.ones(shape) for n, shape in names.items()}, file)
    infos = tuple(TensorInfo(n, shape, "F32") for n, shape in names.items())
    for error in on_ranks(
        lambda ranks: Divisible(build, stored(dict.fromkeys(names, file)), infos, file).divided(ranks, CPU), 2
    ):
        assert type(error) is WholeOnlyError
        assert why in str(error)


def test_a_network_without_weights_takes_no_memory_for_them() -> None:
    with without_weights():
        net = models.Net(width=64, vocab=99)
    assert all(p.is_meta for p in net.parameters())
    assert not any(p.is_meta for p in models.Net().parameters())


def test_pieces_that_cut_rows_and_columns_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(5, 2, 2)
    chunks, data = [], b""
    for rows, columns in ((slice(0, 3), slice(0, 1)), (slice(0, 3), slice(1, 2)), (slice(3, 5), slice(0, 2))):
        stream, piece = io.BytesIO(), whole[rows, columns].clone()
        torch.save(piece, stream)
        place = Chunk(tmp_path / "a", len(data), len(stream.getvalue()), (rows.start, columns.start, 0), tuple(piece.shape))
        chunks.append(place)
        data += stream.getvalue()
    (tmp_path / "a").write_bytes(data)
    entry = Entry("a", ("a",), (5, 2, 2), torch.float32, tuple(chunks))
    lazy = Lazy({"a": entry})
    assert torch.equal(lazy["a"], whole)
    for begin in (0, 1, 7, 12, 20):
        for end in {begin, min(begin + 1, 20), max(begin, 13), 20}:
            assert torch.equal(lazy.entries("a", begin, end), whole.reshape(-1)[begin:end])
    twice = Lazy({"a": replace(entry, chunks=(chunks[0], replace(chunks[1], start=(0, 0, 0)), chunks[2]))})
    with pytest.raises(InputError, match="overlap"):
        twice.entries("a", 1, 2)
    assert torch.equal(twice.entries("a", 12, 20), whole.reshape(-1)[12:])  # of other pieces
    with pytest.raises(InputError, match="overlap"):  # in a row that has all of its values
        Lazy({"a": replace(entry, chunks=(*chunks[:2], replace(chunks[2], start=(2, 0, 0))))}).entries("a", 8, 16)
    with pytest.raises(InputError, match="overlap"):  # elsewhere, which leaves a row without
        Lazy({"a": replace(entry, chunks=(*chunks[:2], replace(chunks[2], start=(2, 0, 0))))}).entries("a", 16, 20)
