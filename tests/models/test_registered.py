"""The task of a class of transformers, read from its name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from architectures import CASES
from torch import nn

from curvcli.errors import CurvError
from curvcli.models.architecture import named


def test_tasks_read_from_names_are_transformers_own() -> None:
    """Every class that transformers' tables list for a task is read as of that task, or as one that lists it too."""
    from transformers.models.auto import modeling_auto

    from curvcli.models.registered import _CLASSES, _task

    listed: dict[str, set[str]] = {}
    for task, tables in _CLASSES.items():
        for _, table in tables:
            for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
                for name in (names,) if isinstance(names, str) else names:
                    listed.setdefault(name, set()).add(task)
    encoder_decoder = {name for name, tasks in listed.items() if "seq2seq" in tasks}
    wrong = {n: t for n, t in listed.items() if _task(n, encoder_decoder=n in encoder_decoder) not in t}
    assert len(listed) > 300
    assert wrong == {}


def test_config_of_an_unnamed_class(tmp_path: Path) -> None:
    """Without architectures a Llama is a language model; a BERT may be any of several."""
    for kind, fine in (("llama", True), ("bert", False)):
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps({"model_type": kind, **CASES[kind]().options}))
        if fine:
            assert isinstance(named(str(file)).build(), nn.Module)
        else:
            with pytest.raises(CurvError, match="no loss is known"):
                named(str(file)).build()


def test_a_notebooks_progress_bars_and_reports_stay_as_they_were(tmp_path: Path) -> None:
    from transformers import logging as reports

    file = tmp_path / "llama.json"
    file.write_text(json.dumps({"model_type": "llama", **CASES["llama"]().options}))
    was, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    try:
        reports.enable_progress_bar()
        reports.set_verbosity_info()
        named(str(file)).build()
        assert reports.is_progress_bar_enabled()
        assert reports.get_verbosity() == logging.INFO
    finally:
        reports.set_verbosity(was)
        if not bars:
            reports.disable_progress_bar()
