"""How often a step's loss leaves the run's range, by how the run ended: `python benchmarks/instability/loss_sigmas.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from math import nan
from pathlib import Path

from labels import label

from curvcli.training.outliers import LossWatch

RUNS = Path(__file__).parent.parent / "results" / "instability.jsonl"
LIMITS = (3, 4, 5, 6, 7, 8)


def main() -> None:
    """Print, for each kind of run, how many came to each number of standard deviations."""
    rows = [json.loads(line) for line in RUNS.read_text().splitlines()]
    found = defaultdict[str, list[float]](list)
    for row, said in zip(rows, label(rows), strict=True):
        watch = LossWatch()
        for loss in row["losses"]:
            watch.see(nan if loss is None else loss)
        ramp = "ramp that broke" if said["break"] is not None else "ramp that did not"
        kind = (
            ramp if row["protocol"] == "ramp" else "ends badly" if said["badly"] else "spikes" if said["spikes"] else "quiet"
        )
        found[kind].append(watch.told()["loss_sigmas"] or 0.0)
    print(f"{'sigma above':20} {'runs':>5} " + " ".join(f"{limit:>5}" for limit in LIMITS))
    for kind, most in found.items():
        print(f"{kind:20} {len(most):5} " + " ".join(f"{sum(m > limit for m in most):5}" for limit in LIMITS))


if __name__ == "__main__":
    main()
