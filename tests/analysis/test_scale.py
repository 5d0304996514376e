"""What `--shard` takes of a device, by shapes; and what it refuses."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from places import ROOT, SAMPLES

from curvcli import analyze
from curvcli.analysis.cache import NoCache
from curvcli.analysis.checkpoint import Options
from curvcli.analysis.estimate import estimate_checkpoint, estimate_run
from curvcli.analysis.plan import BESIDE, WANTED, WORKING, Sizes, predicted
from curvcli.analysis.scale import block_of, scale
from curvcli.errors import UsageError

SHAPES = {"embed.weight": (1000, 8), "layers.0.up.weight": (2, 4), "layers.0.up.bias": (8,)}
VECTORS = 1 + 2 + BESIDE + WORKING + WANTED


def test_bytes_of_a_device() -> None:
    one, many = scale(SHAPES, 1), scale(SHAPES, 8)
    assert (one.slices, one.gathered, one.moved) == (int(VECTORS * 8016 * 4), 0, 0)
    assert one.peak == one.slices
    assert many.slices == int(VECTORS * 1002 * 4)
    assert many.gathered == 3 * 8016 * 4
    assert many.moved == 4 * 7 * 1002 * 4  # weights and tangents once, images twice as a sum in a ring
    assert many.moved_full == 18 * 7 * 1002 * 4
    assert scale({"bias": (3,)}, 8).slices == int(VECTORS * 4)  # a slice is of one entry at least


def test_bytes_of_a_device_that_gathers_a_block_at_a_time() -> None:
    one, many = scale(SHAPES, 1), scale(SHAPES, 8)
    assert (one.block, one.moved_by_block) == (0, 0)
    assert many.block == 3 * 8000 * 4  # the embedding; a layer is its matrix and its bias
    assert many.peak_by_block == many.slices + many.block
    assert many.least_by_block == many.peak_by_block - 15 * 1002 * 4
    assert many.moved_by_block == 2 * 4 * 7 * 1002 * 4  # two sides: weights forward and backward, gradients in a ring
    assert many.moved_full_by_block == 8 * many.moved_by_block
    names = {"model.layers.3.mlp.experts.1.up.weight": "model.layers.3", "0.weight": "0", "lm_head.weight": "lm_head"}
    assert {name: block_of(name) for name in names} == names


def test_an_estimate_is_made_of_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvcli.checkpoints.base.Checkpoint.model", None, raising=False)
    monkeypatch.setattr("curvcli.analysis.estimate.open_for_analysis", lambda *_: pytest.fail("it was read"))
    found = estimate_checkpoint(SAMPLES / "hot" / "checkpoint-60", Options(shard=True))
    assert found["parameters"] == 123_424
    assert [row["devices"] for row in found["devices"]] == [1, 8, 64]
    assert found["devices"][0]["peak"] == int(VECTORS * 123_424 * 4)
    assert estimate_run(SAMPLES / "hot", Options(shard=True), NoCache())["devices"] == found["devices"]


@pytest.mark.slow
def test_the_table_is_as_the_estimate_is() -> None:
    spec = importlib.util.spec_from_file_location("write_scale", ROOT / "docs" / "write_scale.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = Path(writer.PAGE).read_text()
    assert writer.written(page) == page, "run python docs/write_scale.py"


def test_a_plan_counts_what_a_product_gathers() -> None:
    sizes = Sizes(held=0, vector=250, largest=100, graph=10, logits=0, rows=4)
    more = replace(sizes, gathered=2000)
    assert predicted(more, "fresh", 1, 8).product == predicted(sizes, "fresh", 1, 8).product + 2000


def _measured(**how: Any) -> None:
    batches, model = models.data(), models.Net(blocks=1, width=2)
    analyze(model, models.loss, batches, how.pop("optimizer", None), weights=models.weights(batches), **how)


def test_gathering_is_left_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that gather in several threads at once wait for each other's wrong word, and for ever."""
    used: list[int] = []

    def watched(tasks: Any, use: Any) -> None:
        used.append(len(tasks))
        for index, task in enumerate(tasks):
            use(index, task())

    for place in ("hvp", "operator"):
        monkeypatch.setattr(f"curvcli.curvature.{place}.in_order", watched)
    _measured(depths=False)
    assert used, "kept graphs of one process are walked in threads"
    used.clear()
    _measured(depths=False, shard="vectors")
    assert not used


def test_kept_graphs_are_refused_where_weights_are_divided() -> None:
    with pytest.raises(UsageError, match="kept graphs hold the whole weights"):
        _measured(shard="all", mode="kept")
