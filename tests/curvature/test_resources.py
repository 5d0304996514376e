"""Memory that goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest
import torch
from torch import Tensor

from curvcli.curvature import operator, resources
from curvcli.curvature.inverse_root import ModelRoot, Multiple
from curvcli.curvature.operator import PreconditionedHessian


@pytest.mark.skipif(resources._malloc_trim() is None, reason="glibc alone can be told")
def test_memory_of_small_tensors_goes_back() -> None:
    tensors = [torch.ones(2**13) for _ in range(4000)]  # 32 KiB each, 125 MiB in all
    last = torch.ones(2**13)  # what lies behind the others keeps the heap from shrinking by itself
    held = psutil.Process().memory_info().rss
    del tensors
    resources.give_back(torch.device("cpu"))
    assert psutil.Process().memory_info().rss < held - 90 * 2**20
    assert last.sum() == 2**13


def test_of_other_systems_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    resources._malloc_trim.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert resources._malloc_trim() is None
        resources.give_back(torch.device("cpu"))
    resources._malloc_trim.cache_clear()


BLOCKS = """
import sys, psutil, torch
from curvcli.curvature import resources
told = sys.argv[1] == "told" and resources.return_blocks()
del (first := [torch.ones(2**22)])[:]  # freeing 16 MiB raises the limit of glibc's own accord
tensors = [torch.ones(2**19) for _ in range(100)]  # 2 MiB each
last = torch.ones(2**10)
held = psutil.Process().memory_info().rss
del tensors
print(told, (held - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(resources._malloc_trim() is None, reason="glibc alone can be told")
def test_blocks_go_back_as_they_are_freed() -> None:
    # As glibc is where it has raised its limits by itself, which it does or not by what was freed before.
    raised = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}

    def freed(word: str) -> list[str]:
        run = subprocess.run([sys.executable, "-c", BLOCKS, word], check=True, capture_output=True, text=True, env=raised)
        return run.stdout.split()

    told, mebibytes = freed("told")
    assert told == "True"
    assert int(mebibytes) > 190
    assert int(freed("not")[1]) < 100  # so that it is worth telling


KEPT = """
import sys, psutil, torch
from curvcli.curvature import resources
told = sys.argv[1] == "told" and resources.keep_blocks()
del (first := [torch.ones(2**22)])[:]
tensors = [torch.ones(2**19) for _ in range(50)]  # 2 MiB each
held = psutil.Process().memory_info().rss
del tensors
print(told, (held - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(resources._malloc_trim() is None, reason="glibc alone can be told")
def test_blocks_that_are_kept_are_there_for_the_next_product() -> None:
    run = subprocess.run([sys.executable, "-c", KEPT, "told"], check=True, capture_output=True, text=True)
    told, freed = run.stdout.split()  # not told it is 95, where nothing happens to lie behind the last tensor
    assert told == "True"
    assert int(freed) < 10


def test_both_limits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resources, "_told", lambda *pair: not told.append(pair))
    assert resources.keep_blocks()
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX of malloc.h
    assert told == [(-3, 32 * 2**20), (-1, 256 * 2**20), (-8, 1)]


@pytest.mark.parametrize(("large", "asked"), [(17, 0), (16, 2)])  # after the product, and once its parts are written down
def test_only_products_of_large_models_ask(large: int, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice:
        def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
            return [2 * t for t in tangents]

        def part(self) -> Twice:
            return self

        def subset(self, indices: Sequence[int]) -> Twice:
            return self

    calls: list[torch.device] = []
    monkeypatch.setattr(operator, "LARGE", large)
    monkeypatch.setattr(resources, "give_back", calls.append)
    root = ModelRoot({"w": Multiple(4.0)}, {"w": torch.zeros(4)})
    image = PreconditionedHessian(Twice(), root, {"w": 1.0}).matvec(torch.ones(4))
    assert torch.equal(image, torch.full((4,), 0.75))  # (2 + 1) / 4
    assert len(calls) == asked
