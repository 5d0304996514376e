"""The published schemas are those of the models, and carry the address that they are published at."""

from __future__ import annotations

import importlib.util
import json

import jsonschema
import pytest
from places import ROOT

from curvcli.documents import SCHEMAS

PUBLISHED = ROOT / "docs" / "reference" / "schemas"


def test_the_files_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("write_schemas", ROOT / "docs" / "write_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert {path.name: path.read_text() for path in PUBLISHED.iterdir()} == writer.schemas(), (
        "run python docs/write_schemas.py"
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_has_its_id_and_is_a_schema(name: str) -> None:
    schema = json.loads((PUBLISHED / f"{name}.json").read_text())
    assert schema["$id"].endswith(f"docs/reference/schemas/{name}.json")
    jsonschema.Draft202012Validator.check_schema(schema)
