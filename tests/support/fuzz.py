"""Prints what became of many damages of every format: `python tests/support/fuzz.py 2000`, or of those named after it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from damage import damaged_checkpoint, damaged_data, damages
from formats import CHECKPOINTS, DATA, RANKED


def main(count: int, chosen: list[str]) -> None:
    """Prints the table of docs/explanation/security-tests.md: what became of `count` damages of each format chosen."""
    every = [("checkpoint", n) for n in (*CHECKPOINTS, *RANKED)] + [("data", n) for n in DATA]
    with tempfile.TemporaryDirectory() as scratch:
        root, target = Path(scratch) / "masters", Path(scratch) / "copy"
        rows: list[tuple[str, Counter[str]]] = []
        by_damage: dict[str, Counter[str]] = {}
        for kind, name in [(kind, name) for kind, name in every if not chosen or name in chosen]:
            outcomes: Counter[str] = Counter()
            damaged = damaged_checkpoint if kind == "checkpoint" else damaged_data
            for number in range(count):
                try:
                    label, outcome = damaged(name, number, number, root, target)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    names = damages(name)
                    label, outcome = names[number % len(names)][0], "FAILED"
                    print(f"{name}, damage {number} ({label}): {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                outcomes[outcome] += 1
                by_damage.setdefault(label, Counter())[outcome] += 1
            rows.append((name, outcomes))
            shutil.rmtree(target, ignore_errors=True)
    for heading, table in (("format", rows), ("damage", list(by_damage.items()))):
        columns = ("refused", "a finding", "read", "unnoticed", "FAILED")
        print(f"\n| {heading} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
        for name, counts in table:
            print(f"| {name} | {' | '.join(str(counts[c]) for c in columns)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:])
