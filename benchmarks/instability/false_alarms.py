"""How often a log that is noisy, and no more, is called wrecked, and one that jumps is not.

`python benchmarks/instability/false_alarms.py` draws logs by seed, of 20 to 600 losses that fall as an exponential, holds
them against the rules of curvcli/judge/course.py and writes results/false_alarms.json (half a minute).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from common import HERE
from numpy.typing import NDArray

from curvcli.documents import LossCourse, TrainingStep
from curvcli.judge.course import loss_course

Losses = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Losses]  # of mean 0, to be scaled, one for each loss
WHITE, TAILED = 1500, 1500
CORRELATED, BEGAN = 800, 1000


def told(losses: Losses) -> LossCourse:
    found = loss_course([TrainingStep(step=i + 1, loss=float(v), lr=1e-3) for i, v in enumerate(losses)])
    assert found is not None
    return found


def falling(random: np.random.Generator) -> Losses:
    """A course without noise; with a high pace a plateau."""
    count, start = int(random.integers(20, 601)), random.uniform(0.5, 12.0)
    end, pace = start * random.uniform(0.01, 1.0), random.uniform(0.0, 40.0)
    return np.asarray(end + (start - end) * np.exp(-pace * np.arange(count) / count))


def white(random: np.random.Generator, count: int) -> Losses:
    return random.standard_normal(count)


def tailed(random: np.random.Generator, count: int) -> Losses:
    return random.standard_t(2.5, count)


def exponential(random: np.random.Generator, count: int) -> Losses:
    return np.log(random.exponential(size=count) + 1e-6)


def correlated(random: np.random.Generator, count: int) -> Losses:
    """Over 2 to 33 lines, of standard deviation 1."""
    keep = np.exp(-1 / random.uniform(2, 33))
    found = random.standard_normal(count)
    for i in range(1, count):
        found[i] = keep * found[i - 1] + np.sqrt(1 - keep**2) * found[i]
    return found


def noisy(noise: Noise, sizes: tuple[float, float], tries: int) -> list[LossCourse]:
    """What is said of so many logs, the noise of a size between the two, of a loss's logarithm."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(tries):
        losses = falling(random)
        found.append(told(losses * np.exp(random.uniform(*sizes) * noise(random, len(losses)))))
    return found


def wrecked(found: list[LossCourse]) -> dict[str, int]:
    return {"logs": len(found), "wrecked": sum(f.name == "wrecked" for f in found)}


def began(found: list[LossCourse]) -> dict[str, int]:
    """By the rule for runs without frequencies alone: where it stands it began."""
    return {"logs": len(found), "wrecked": sum(f.name == "wrecked" and f.reason.endswith("where it began") for f in found)}


def jumped(tries: int) -> dict[str, int]:
    """A jump for good by one to eight times the best loss and a nat, at a third to four fifths, with noise of up to 10 %."""
    random = np.random.default_rng(1)
    found = []
    while len(found) < tries:
        losses = falling(random)
        if len(losses) < 40:
            continue
        losses = losses * np.exp(random.uniform(0, 0.1) * white(random, len(losses)))
        at = round(random.uniform(0.3, 0.8) * len(losses))
        losses[at:] += random.uniform(1, 8) * losses[:at].min() + 1
        found.append(told(losses))
    return wrecked(found)


def measured() -> dict[str, Any]:
    return {
        "white, up to 30 %": wrecked(noisy(white, (0.0, 0.3), WHITE)),
        "Student's t of 2.5 degrees, up to 30 %": wrecked(noisy(tailed, (0.0, 0.3), TAILED)),
        "a jump that stays": jumped(WHITE),
        **{
            f"correlated, {low:.0%} to {high:.0%}": wrecked(noisy(correlated, (low, high), CORRELATED))
            for low, high in ((0.0, 0.03), (0.03, 0.06), (0.06, 0.1))
        },
        "where it began: white, up to 30 %": began(noisy(white, (0.0, 0.3), BEGAN)),
        "where it began: white, up to 100 %": began(noisy(white, (0.3, 1.0), BEGAN)),
        "where it began: exponential": began(noisy(exponential, (1.0, 1.0), BEGAN)),
        "where it began: correlated, 30 %": began(noisy(correlated, (0.3, 0.3), BEGAN)),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = measured()
    (HERE / "results" / "false_alarms.json").write_text(json.dumps(found, indent=1) + "\n")
    for kind, counts in found.items():
        print(f"{kind:45} {counts['wrecked']:5} of {counts['logs']}")


if __name__ == "__main__":
    main()
