"""What a measurement will cost, from one product: seconds and memory, before the minutes of work."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from curvcli.analysis.api import prepared
from curvcli.analysis.cache import Cache
from curvcli.analysis.checkpoint import Options, architecture_of, open_for_analysis
from curvcli.analysis.plan import WANTED
from curvcli.analysis.scale import DEVICES, scale
from curvcli.analysis.solve import Measurement
from curvcli.analysis.stages import Progress
from curvcli.analysis.track import key_of, the_last
from curvcli.checkpoints import fetched, find_checkpoints, open_checkpoint
from curvcli.curvature.hvp import graph_bytes, random_direction, timed
from curvcli.curvature.lanczos import Lanczos
from curvcli.errors import CurvError, memory_named


def estimate_checkpoint(path: Path, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """What `analyze_checkpoint` will take, of which nothing is measured but how long a product takes.

    Products are counted as the progress counts them, by what the samples take: a spectrum of its own takes others.

    With `shard` in the options nothing is computed, and only headers are read: see `sharded`.

    Returns:
        seconds: as a report's cost has them, reading left out.
        products: of the full model, which all work is counted in.
        seconds_per_product: of the whole shard.
        mode, device: how and where products are made.
        memory_bytes: parameters; graphs, that are kept or of one batch; basis, the eigensolver's vectors.
        plan: under a limit of memory, what was chosen and the peak that is expected.

    Raises:
        CurvError: the checkpoint cannot be read or measured, or not within a limit of memory.
    """
    say = progress or (lambda stage, done: None)
    say("reading", 0.0)
    if options.shard:
        return sharded(path, options.model)
    opened = open_for_analysis(path, options)
    options = opened.options
    with memory_named(f"while {opened.checkpoint.path} is looked at"):
        ready = opened.ready()
        solver = Lanczos(options.tolerance, max_products=options.max_hvps, seed=options.seed or 0)
        found = prepared(
            ready.model, opened.loss, ready.batches, ready.optimizer,
            lambda work, notes: {**forecast(work), **({"plan": notes["memory-plan"]} if "memory-plan" in notes else {})},
            weights=ready.weights, mode=options.mode, solver=solver,
            progress=lambda stage, done: say(stage, 0.0), depths=options.depths, truncated=options.truncated,
            unigram=ready.provenance.unigram, memory=options.memory,
        )  # fmt: skip
    return {"checkpoint": str(opened.checkpoint.path), **found}


def estimate_run(
    path: Path, options: Options, cache: Cache, *, last: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """What `track` will take: the newest checkpoint's cost for each that is not in the cache.

    Returns:
        As `estimate_checkpoint`, `seconds` and `products` being those of the run; and the numbers of its checkpoints and of
        those that are kept.

    Raises:
        CurvError: there is no checkpoint, or the newest one cannot be read or measured.
    """
    options = replace(options, depths=False)  # as a track measures, or no key would be found
    if options.shard:
        return sharded(the_last(find_checkpoints(path), last, options)[-1], options.model)
    found = the_last(find_checkpoints(path), last, options)
    kept = 0
    for checkpoint in found:
        with suppress(CurvError):  # that cannot be read is a point that says so, and takes no time
            kept += cache.get(key_of(open_for_analysis(fetched(checkpoint), options))) is not None
    one = estimate_checkpoint(found[-1], options, progress)
    more = len(found) - kept
    run = {"checkpoints": len(found), "kept": kept}
    return {**one, **run, "seconds": more * one["seconds"], "products": more * one["products"]}


def sharded(path: Path, model: str | None = None) -> dict[str, Any]:
    """What `--shard` takes of each of 1, 8 and 64 devices, in bytes, from the shapes in a checkpoint's headers.

    Returns:
        parameters: numbers of all stored weights, all of which are taken to train.
        devices: for each number of devices what `scale.Scale` has, and the peaks.

    Raises:
        CurvError: the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(path, architecture_of(model))
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    found = [scale(shapes, devices) for devices in DEVICES]
    return {
        "checkpoint": str(checkpoint.path),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "devices": [
            {
                **asdict(one),
                "peak": one.peak,
                "peak_by_block": one.peak_by_block,
                "least_by_block": one.least_by_block,
            }
            for one in found
        ],
    }


def forecast(work: Measurement) -> dict[str, Any]:
    """Of a measurement that is set up: one product is made, and the others are counted."""
    work.stages.enter("one product")
    problem, mode = work.problem, work.choice.mode
    engine = work.build(problem)
    names = list(problem.parameters)
    ready = time.perf_counter() - work.started
    # Of differences a product that looks for its own step takes more than one of a solve, which has found it.
    with work.step.of(1e-3) if work.step else nullcontext():
        _, product = timed(engine, names, random_direction(problem))
    count = work.stages.total
    parameters = list(problem.parameters.values())
    size = sum(p.numel() * p.element_size() for p in parameters)
    moving = sum(problem.parameters[n].numel() * problem.parameters[n].element_size() for n in work.names)
    del engine  # its graphs, before a graph is made to be weighed
    return {
        "seconds": ready + (count - 1) * product,  # choosing how to multiply is done
        "products": count,
        "seconds_per_product": product,
        "mode": mode,
        "device": str(work.device),
        "memory_bytes": {
            "parameters": size,
            "graphs": graph_bytes(problem, once=mode == "differences") * (len(problem.batches) if mode == "kept" else 1),
            "basis": WANTED * moving,
        },
    }
