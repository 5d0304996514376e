"""What a warm start saves from checkpoint to checkpoint: `python benchmarks/warm_start.py` (about 15 minutes on two cores).

Trains the calm sample's model once more and saves it every 10 steps from 100 to 200, then analyses each checkpoint
without its curves over depth, from a random start and from the eigenvectors of the checkpoint before. Writes
results/warm_start.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from curvcli.analysis.api import Analysis
from curvcli.analysis.checkpoint import Options, open_for_analysis

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent / "sample_checkpoints"
TOKENS = 512


def train(place: Path) -> list[Path]:
    """The run's checkpoints in step order."""
    sys.path.insert(0, str(SAMPLES))
    import build  # the module that made the samples

    build.SAVE_AT, build.STEPS = tuple(range(100, 201, 10)), 200
    os.chdir(place)
    build.train("calm", np.frombuffer((SAMPLES / "data" / "moby_dick.txt").read_bytes(), dtype=np.uint8))
    return [place / "calm" / f"checkpoint-{step}" for step in build.SAVE_AT]


def products(analysis: Analysis) -> dict[str, int]:
    report = analysis.report
    again = analysis.warm_start.cold_hvps if analysis.warm_start else 0  # the solve made twice to know what is saved
    return {"total": report.cost.hvps - again, "layers": sum(layer.hvps for layer in report.layers)}


def compare(checkpoints: list[Path]) -> list[dict[str, object]]:
    """One row per checkpoint after the first: products cold and warm, and how far the two lambdas lie apart."""
    options = Options(data=SAMPLES / "data" / "shard.bin", sequence_length=64, tokens=TOKENS, depths=False)
    rows: list[dict[str, object]] = []
    start = None
    for path in checkpoints:
        opened = open_for_analysis(path, options)
        cold = opened.measure()
        if start is not None:
            warm = opened.measure(start=start)
            first, second = cold.report.full.eigenvalue, warm.report.full.eigenvalue
            assert first is not None
            assert second is not None
            assert warm.warm_start is not None
            rows.append(
                {
                    "step": cold.report.checkpoint.step,
                    "cold": products(cold),
                    "warm": products(warm),
                    "first solve": [warm.warm_start.cold_hvps, warm.warm_start.hvps],
                    "lambda apart": abs(second - first) / first,
                }
            )
            print(rows[-1], flush=True)
        start = cold.directions
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        dense = compare(train(Path(place)))
    samples = {run: compare([SAMPLES / run / f"checkpoint-{step}" for step in (10, 60, 600)]) for run in ("calm", "hot")}
    text = json.dumps({"tokens": TOKENS, "every 10 steps": dense, **samples}, indent=1)
    (HERE / "results" / "warm_start.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
