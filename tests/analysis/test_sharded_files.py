"""`--shard` on files: weights in slices where the format says where each tensor lies, else whole; the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.files import safe

pytestmark = pytest.mark.slow


def test_a_report_says_what_was_read_whole_and_numbers_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.run_of(tmp_path, 3) / "checkpoint-3"
    loaded: list[Any] = []
    load = safe._load

    def told(source: Any, *given: Any, **settings: Any) -> Any:
        loaded.append((source.name, settings["map_location"], settings["mmap"]))
        return load(source, *given, **settings)

    monkeypatch.setattr(safe, "_load", told)
    how: dict[str, Any] = {"tokens": 128, "depths": False, "mode": "fresh", "device": "cpu"}
    one = analyze_checkpoint(checkpoint, Options(**how))
    assert ("optimizer.pt", "cpu", None) in loaded
    loaded.clear()
    sliced = analyze_checkpoint(checkpoint, Options(**how, shard=True))
    assert {mapped for name, _, mapped in loaded if name == "optimizer.pt"} == {True}
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    whole = analyze_checkpoint(checkpoint, Options(**how, shard=True))
    for report in (sliced, whole):
        assert report.full.eigenvalue == pytest.approx(one.full.eigenvalue, rel=1e-5)
        assert report.participation == pytest.approx(one.participation, rel=1e-4)
        assert report.verdict == one.verdict
    said = [[f.message for f in report.findings if f.code == "weights-read-whole"] for report in (one, sliced, whole)]
    assert said[:2] == [[], []]
    (message,) = said[2]
    assert message.endswith("before it divided them: their format does not say where one tensor lies")
