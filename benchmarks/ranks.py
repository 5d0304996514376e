"""An analysis on 1, 2 and 4 ranks: time, work and memory of each, and how far its numbers are apart.

`python benchmarks/ranks.py`, and `--shard` for the same of a Llama of 3 million weights that it makes, with and without
weights, moments and vectors divided over the ranks (results/shard.json). One thread a rank. Wall time says little where
there are fewer cores than ranks; a rank's CPU seconds are its work, whatever the others do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from common import HERE, SAMPLES, save

import curvcli
from curvcli.analysis.checkpoint import analyze_checkpoint
from curvcli.analysis.launch import joined, leave
from curvcli.analysis.options import Options
from curvcli.curvature import resources

WORLDS = (1, 2, 4)
PARAMETERS = 3_380_352


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SAMPLES / "hot" / "checkpoint-60")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shard", action="store_true", help="compare dividing tensors with dividing the data alone")
    parser.add_argument("--draw", action="store_true", help="draw results/shard.json again")
    parser.add_argument("--divided", action="store_true", help="of a rank: divide")
    parser.add_argument("--into", type=Path, help="be a rank, and write what it took into this directory")
    options = parser.parse_args()
    if options.into is not None:
        be_a_rank(options)
        return
    if options.draw:
        draw()
        return
    if options.shard:
        shard(options)
        return
    rows = [measured(options, world) for world in WORLDS]
    one = rows[0].pop("numbers")
    for row in rows:
        numbers = row.pop("numbers", one)
        row["largest_difference"] = max(abs(a - b) / abs(b) for a, b in zip(numbers, one, strict=True))
    said = {"checkpoint": "/".join(options.checkpoint.parts[-2:]), "tokens": options.tokens, "cores": os.cpu_count()}
    save("ranks", {**said, "torch": torch.__version__, "mode": "fresh, no depths", "ranks": rows})


def shard(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        options.checkpoint, options.tokens = made(Path(place)), 128
        rows = [measured(options, world, divided=divided) for world in WORLDS for divided in (False, True)]
    one = rows[0]["numbers"]
    for row in rows:
        row["largest_difference"] = max(abs(a - b) / abs(b) for a, b in zip(row.pop("numbers"), one, strict=True))
    said = {"parameters": PARAMETERS, "tokens": 128, "cores": os.cpu_count(), "torch": torch.__version__}
    save("shard", {**said, "mode": "fresh, no depths, at most 12 products a solve", "ranks": rows})
    draw()


def draw() -> None:
    """Of results/shard.json: memory and work of a rank, against how many there are."""
    from matplotlib.figure import Figure  # here: ranks are weighed

    rows = json.loads((HERE / "results" / "shard.json").read_text())["ranks"]
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    memory, work = figure.subplots(1, 2)
    for axes, title in ((memory, "memory of a rank that measuring adds (GiB)"), (work, "CPU seconds of the busiest rank")):
        for divided, label, colour in ((False, "data divided", "#8a8f98"), (True, "--shard", "#1f5fae")):
            own = [row for row in rows if row["shard"] is divided]
            values = [max(r["held_GiB_of_each"]) if axes is memory else r["cpu_seconds_of_the_busiest"] for r in own]
            places = [i + 0.2 * (1 if divided else -1) for i in range(len(own))]
            for place, bar in zip(places, axes.bar(places, values, 0.36, color=colour, label=label), strict=True):
                axes.text(place, bar.get_height(), f"{bar.get_height():.3g}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(WORLDS)), [f"{world} rank{'s' * (world > 1)}" for world in WORLDS])
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(HERE / "results" / "shard.png", dpi=150)


def made(place: Path) -> Path:
    """A checkpoint of a Llama after three steps of AdamW, with its data beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=384, intermediate_size=1056, num_hidden_layers=1, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(2048, (2048,), generator=torch.Generator().manual_seed(1))
    for start in (0, 256, 512):
        ids = tokens[start : start + 256].view(4, 64)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    curvcli.save_optimizer(place, optimizer, model)
    tokens.numpy().astype("uint16").tofile(place / "train.bin")
    (place / "curv.toml").write_text('data = "train.bin"\n')
    return place


def measured(options: argparse.Namespace, world: int, *, divided: bool = False) -> dict[str, Any]:
    """What all ranks took. CPU seconds and products are of the measurement; memory is of the process."""
    given = ["--checkpoint", str(options.checkpoint), "--tokens", str(options.tokens), *(["--divided"] if divided else [])]
    if options.shard:
        given.append("--shard")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        subprocess.run([*command, *given, "--into", place], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603
        each = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(world)]
    return {
        "ranks": world,
        **({"shard": divided, "held_GiB_of_each": [rank["held"] for rank in each]} if options.shard else {}),
        "wall_seconds": each[0]["wall"],
        "cpu_seconds_of_each": [rank["cpu"] for rank in each],
        "cpu_seconds_of_the_busiest": max(rank["cpu"] for rank in each),
        "peak_GiB_of_each": [rank["peak"] for rank in each],
        "products": each[0]["hvps"],
        "numbers": each[0]["numbers"],
    }


def be_a_rank(options: argparse.Namespace) -> None:
    import_module("transformers.models.llama.modeling_llama")  # what it takes is no matter of ranks
    cpu = torch.device("cpu")
    how: dict[str, Any] = {"tokens": options.tokens, "mode": "fresh", "depths": False, "shard": options.divided}
    if options.shard:
        resources.return_blocks()
        how |= {"max_hvps": 12, "batch_size": 1, "sequence_length": 32}
    with joined():
        before, wall, cpu_time = resources.held_bytes(cpu), time.perf_counter(), time.process_time()
        report = analyze_checkpoint(options.checkpoint, Options(**how))
        wall, cpu_time = time.perf_counter() - wall, time.process_time() - cpu_time
        spread = report.generalisation
        numbers = [part.eigenvalue for part in (report.full, *report.layers)] + [spread.rho_low, spread.rho_high]
        numbers = [number for number in numbers if number is not None]  # no bracket where products ran out
        found = {
            "wall": round(wall, 1),
            "cpu": round(cpu_time, 1),
            "peak": round(resources.peak_bytes(cpu) / 2**30, 2),
            "held": round((resources.peak_bytes(cpu) - before) / 2**30, 3),
            "hvps": report.cost.hvps,
            "numbers": numbers,
        }
        (options.into / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
