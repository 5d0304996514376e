"""The notebook of the docs runs from top to bottom, and shows what it showed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import ROOT


def _writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_notebook", ROOT / "docs" / "write_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shown(notebook: Any) -> list[list[str]]:
    """What each cell shows as text, numbers cut to where machines agree."""
    found = []
    for cell in notebook["cells"]:
        texts = []
        for output in cell.get("outputs", []):
            text = output.get("text") or output["data"]["text/plain"]
            texts.append(re.sub(r"[\d.]+", "N", "".join(text)))
        found.append(texts)
    return found


def test_its_cells_are_those_of_the_script() -> None:
    kept = json.loads((ROOT / "docs" / "notebooks" / "first_report.ipynb").read_text())
    text = (ROOT / "docs" / "write_notebook.py").read_text()
    for cell in kept["cells"]:
        source = "".join(cell["source"])
        assert source in text, "run python docs/write_notebook.py"
        assert cell["cell_type"] == "markdown" or cell["outputs"], "it was not run"
    assert len(json.dumps(kept)) < 200_000


@pytest.mark.slow
def test_it_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient and ipykernel are of the extra `test`")
    pytest.importorskip("ipykernel")
    writer = _writer()
    kept = json.loads(writer.NOTEBOOK.read_text())
    assert _shown(writer.executed()) == _shown(kept)
