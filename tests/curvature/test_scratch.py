"""Vectors on disk: the numbers of those in memory, files without a name, and a disk that is full."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from curvcli.curvature import lanczos, precision
from curvcli.curvature import scratch as module
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import DenseOperator, Folded
from curvcli.curvature.scratch import Scratch, let_go, passed_over, scratch
from curvcli.errors import FullDiskError, InputError
from curvcli.optimizers import update


def _matrix(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(90, 90, generator=generator, dtype=torch.float64)
    return half + half.T


@pytest.mark.parametrize("support", [False, True])
def test_a_basis_on_disk_gives_the_numbers_of_one_in_memory(support: bool, tmp_path: Path) -> None:
    mask = torch.arange(90) % 7 != 0 if support else None
    results, folds = [], []
    for place in (None, Scratch(tmp_path)):
        operator = Folded([(0.25, DenseOperator(_matrix(1))), (0.75, DenseOperator(_matrix(2)))])
        found = Lanczos(bottom_tolerance=0.1, store=place).extremes(operator, support=mask)
        assert found.vector is not None
        results.append(found)
        folds.append(operator.projected())
    memory, disk = results
    assert memory.products > 8, "more than are taken from memory at once"
    assert (memory.status, memory.products) == (disk.status, disk.products)
    assert memory.top is not None and disk.top is not None and memory.vector is not None  # noqa: PT018
    assert disk.top.value == pytest.approx(memory.top.value, rel=1e-12)
    assert disk.ceiling == pytest.approx(memory.ceiling, rel=1e-9)
    torch.testing.assert_close(disk.vector, memory.vector, rtol=0, atol=1e-9)
    torch.testing.assert_close(*folds)


def test_a_basis_that_memory_was_planned_for_is_not_left_where_products_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large vectors are kept as products give them, and these may have been summed on disk."""
    monkeypatch.setattr(lanczos, "ALONE", 0)
    operator = Folded([(0.5, DenseOperator(_matrix(1))), (0.5, DenseOperator(_matrix(2)))], put=Scratch(tmp_path).put)
    solver = Lanczos()
    walk = solver.begin(operator)
    assert solver.finish(walk).status == "converged"
    assert len(walk.blocks) == walk.products > 1
    assert not [block for block in walk.blocks if block.untyped_storage().data_ptr() in module._maps]


def test_what_is_let_go_is_there_when_it_is_asked_for_again_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[int] = []

    class Told(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            advised.append(option)
            super().madvise(option, *rest)

    monkeypatch.setattr(mmap, "mmap", Told)
    row = Scratch(tmp_path).empty(1, 5000, dtype=torch.float32)
    row[0] = torch.arange(5000)
    let_go(row[0])
    let_go(torch.zeros(3))  # of memory, which nobody minds
    assert advised == [mmap.MADV_DONTNEED]
    assert torch.equal(row[0], torch.arange(5000).float())
    assert list(tmp_path.iterdir()) == []
    assert row.data_ptr() in module._maps
    del row
    assert not [address for address, mapped in module._maps.items() if isinstance(mapped, Told)]


def test_tensors_are_put_into_one_file_and_let_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []

    class Told(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            advised.append(len(self))
            super().madvise(option, *rest)

    monkeypatch.setattr(mmap, "mmap", Told)
    given = [torch.randn(7, 5), torch.zeros(0), torch.randn(3)]
    found = Scratch(tmp_path).put(given)
    for one, other in zip(found, given, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr() or not one.numel()
    assert advised == [4 * 38] * 3, "no more than one of them is in memory at a time"
    let_go(found[2])
    assert advised == [4 * 38] * 4
    mask = torch.tensor([True, False])
    assert torch.equal(Scratch(tmp_path).put([mask])[0], mask)
    assert Scratch(tmp_path).put([]) == []


def test_a_full_disk_is_an_error_with_a_remedy_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FullDiskError, match=r"cannot keep 1\.00 GiB of vectors in .*No space left.*TMPDIR"):
        Scratch(tmp_path).empty(2**28, dtype=torch.float32)


def test_where_the_system_cannot_reserve_room_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    size = 2**20 + 5
    found = Scratch(tmp_path).put([torch.ones(size, dtype=torch.uint8)])[0]
    assert found.sum(dtype=torch.int64) == size


@pytest.mark.parametrize("what", ["gone", "file", "locked"])
def test_a_tmpdir_that_is_of_no_use_is_passed_over(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, theirs = tmp_path / what, os.access
    if what == "file":
        place.touch()
    elif what == "locked":  # root may write anywhere
        place.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and theirs(path, mode))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(module, "in_memory", lambda folder: False)
    found = scratch()
    assert found is not None
    assert found.folder not in (place, Path())
    assert found.free > 0
    assert passed_over() == ""


def test_tmpdir_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_memory", lambda folder: False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = scratch()
    assert found is not None
    assert (found.folder, passed_over()) == (tmp_path, "")
    assert found.free > 0
    monkeypatch.delenv("TMPDIR")
    found = scratch()
    assert found is not None
    assert found.folder.is_dir()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_tmpdir_in_memory_is_no_disk(elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_memory", lambda folder: folder == tmp_path or not elsewhere)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = scratch()
    assert (found and str(found.folder)) == ("/var/tmp" if elsewhere else None)  # noqa: S108
    where = "may lie in /var/tmp" if elsewhere else "have no disk"
    assert passed_over() == f"TMPDIR={tmp_path} lies in memory, vectors {where}"
    monkeypatch.delenv("TMPDIR")
    assert passed_over() == ""


@pytest.mark.skipif(not module.MOUNTS.exists(), reason="Linux says what kind a file system is")
def test_a_file_system_in_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.split() for line in module.MOUNTS.read_text().splitlines()]
    kinds = {fields[4]: fields[fields.index("-", 6) + 1] for fields in lines}
    if kinds.get("/dev/shm") == "tmpfs":  # noqa: S108
        assert module.in_memory(Path("/dev/shm"))  # noqa: S108
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for said, memory in {
        f"25 24 {number} / /a rw - tmpfs tmpfs rw": True,
        f"25 24 {number} / /a rw shared:3 master:1 - tmpfs - rw": True,
        f"25 24 {number} / /a rw shared:3 - ext4 /dev/tmpfs rw": False,
        "25 24 0:9999 / /a rw - tmpfs tmpfs rw": False,
        f"25 24 {number}": False,
    }.items():
        monkeypatch.setattr(module, "MOUNTS", tmp_path / "mountinfo")
        module.MOUNTS.write_text(said)
        assert module.in_memory(tmp_path) == memory, said
    module.MOUNTS.unlink()
    assert not module.in_memory(tmp_path)


def test_a_limit_to_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        Scratch(tmp_path).empty(2**18, dtype=torch.float32)
        with pytest.raises(FullDiskError, match=r"cannot keep 2,097,152 bytes of vectors in .*; set TMPDIR to a folder on"):
            Scratch(tmp_path).empty(2**19, dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_takes_no_file_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as error:
        Scratch(tmp_path / "gone").empty(5, dtype=torch.float32)
    assert not isinstance(error.value, FullDiskError)


def _resident(folder: Path) -> int:
    """Bytes in memory of files without a name in a folder that this process has mapped."""
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            within = str(folder) in line
        elif within and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux's")
def test_of_vectors_on_disk_an_inner_product_holds_a_tensor_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, counted = 2**18, 8
    left, right = (Scratch(tmp_path).put([torch.ones(size)] * counted) for _ in range(2))
    seen: list[int] = []
    theirs = precision.inner

    def inner(rows: Tensor, vector: Tensor) -> Tensor:
        found = theirs(rows, vector)
        seen.append(_resident(tmp_path))
        return found

    monkeypatch.setattr(precision, "inner", inner)
    assert update.inner(left, right) == size * counted
    assert 2 * 4 * size <= max(seen) < 4 * 4 * size
