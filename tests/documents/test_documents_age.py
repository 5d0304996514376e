"""Documents age well: those that older versions wrote are read, and what newer ones add is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from places import ASSETS
from pydantic import ValidationError

from curvcli.documents import (
    SCHEMAS,
    Document,
    Finding,
    json_schema,
    load_alert,
    load_comparison,
    load_explanation,
    load_gate,
    load_records,
    load_report,
    load_schedule,
    load_track,
    load_track_comparison,
)
from curvcli.errors import InputError

LOADERS: dict[str, Callable[[Path], Any]] = {
    "report": load_report,
    "track": load_track,
    "schedule": load_schedule,
    "gate": load_gate,
    "compare": load_comparison,
    "compare-tracks": load_track_comparison,
    "explain": load_explanation,
    "curvature": load_records,
    "alert": load_alert,
}
# By the version that wrote them. The loose ones are older than the oldest of these: one report has no `ends`.
WRITTEN = [*sorted((ASSETS / "documents").rglob("*.json*")), *sorted(ASSETS.glob("*.json"))]
YOUNGER = {"0.1.0": {"explain", "alert", "compare-tracks"}}  # kinds that the version did not have
VERSIONS = sorted((ASSETS / "documents").iterdir())


def kind_of(path: Path) -> str:
    first = path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text()
    return str(json.loads(first)["schema"]).removeprefix("curv.").removesuffix("/1")


def entries(path: Path) -> list[dict[str, Any]]:
    """The documents in a file: of a log one a line."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], place: Path) -> Path:
    """The file with each of its documents changed."""
    made = []
    for entry in entries(path):
        change(entry)
        made.append(json.dumps(entry))
    new = place / path.name
    new.write_text("\n".join(made) + "\n")
    return new


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in plain data whose fields are named by the format; not the free dictionary."""
    if isinstance(value, dict):
        yield value
        for name, inner in value.items():
            if name != "mode_seconds":
                yield from objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_document_of_every_kind_is_there(version: Path) -> None:
    assert set(LOADERS) == set(SCHEMAS)
    assert {kind_of(path) for path in version.iterdir()} == set(LOADERS) - YOUNGER.get(version.name, set())


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: "-".join(path.parts[-2:]))
def test_what_an_older_version_wrote_is_read(path: Path) -> None:
    found = LOADERS[kind_of(path)](path)
    if path.suffix == ".jsonl":
        assert (found.damaged, len(found.records)) == (0, len(entries(path)))
        return
    # What is left out is known by name, and every number comes through as it stands.
    said = json.loads(found.to_json())
    assert dropped(json.loads(path.read_text()), said) <= {"warm_start"}


def dropped(before: Any, after: Any) -> set[str]:
    """Names of fields that are missing in `after`; fails where a value is another."""
    if isinstance(before, dict):
        gone = set(before) - set(after)
        return gone.union(*(dropped(before[name], after[name]) for name in set(before) & set(after)))
    if isinstance(before, list):
        assert len(before) == len(after)
        return set().union(*(dropped(a, b) for a, b in zip(before, after, strict=True)))
    # A lowest eigenvalue without digits was called converged by the oldest ones.
    assert before == after or (before, after) == ("converged", "unconverged")
    return set()


def test_a_track_of_0_1_0_says_what_warm_starts_saved_and_is_read_without() -> None:
    path = ASSETS / "documents" / "0.1.0" / "track.json"
    assert any(point["warm_start"] for point in json.loads(path.read_text())["points"])
    assert all(point.report for point in load_track(path).points)


@pytest.mark.parametrize("path", sorted((ASSETS / "documents").rglob("*.json*")), ids=lambda path: path.name)
def test_what_a_newer_version_adds_is_left_out_at_every_level(path: Path, tmp_path: Path) -> None:
    def add(entry: dict[str, Any]) -> None:
        for found in list(objects(entry)):
            found["added_later"] = {"nested": [1.5]}

    load = LOADERS[kind_of(path)]
    newer = rewritten(path, add, tmp_path)
    if path.suffix == ".jsonl":
        assert load(newer).records == load(path).records
        assert load(newer).damaged == 0
    else:
        assert load(newer) == load(path)


def first_object(entry: dict[str, Any], within: str) -> dict[str, Any]:
    found: Any = entry
    for step in within.split("."):
        found = found[int(step)] if step.isdigit() else found[step]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "where", "key", "value"),
    [
        ("report.json", "full", "hvps", -1),
        ("report.json", "full", "status", "splendid"),
        ("report.json", "full", "rho", "high"),
        ("report.json", "checkpoint", "layers", 1e9),
        ("track.json", "points.0.report.full", "residual", 1e308),
        ("schedule-depth.json", "phases.0", "step", -1),
        ("gate.json", "subject", "rho", [1.0]),
        ("compare.json", "first", "loss", None),
    ],
)
def test_types_and_limits_are_held_all_the_same(name: str, where: str, key: str, value: Any, tmp_path: Path) -> None:
    path = ASSETS / "documents" / "0.1.0" / name

    def damage(entry: dict[str, Any]) -> None:
        entry["added_later"] = 1
        assert key in first_object(entry, where)
        first_object(entry, where)[key] = value

    with pytest.raises(InputError, match=key if value != 1e308 else "residual is out of any range"):
        LOADERS[kind_of(path)](rewritten(path, damage, tmp_path))


@pytest.mark.parametrize("name", ["report.json", "track.json", "schedule-depth.json", "gate.json", "compare.json"])
def test_another_major_version_is_refused(name: str, tmp_path: Path) -> None:
    path = ASSETS / "documents" / "0.1.0" / name
    kind = kind_of(path)
    newer = rewritten(path, lambda entry: entry.update(schema=f"curv.{kind}/2"), tmp_path)
    with pytest.raises(InputError, match=f"Input should be 'curv.{kind}/1'"):
        LOADERS[kind](newer)


def test_a_record_of_another_major_version_is_a_damaged_line(tmp_path: Path) -> None:
    path = ASSETS / "documents" / "0.1.0" / "curvature.jsonl"
    with pytest.raises(InputError, match=r"schema: Input should be 'curv\.curvature/1'"):
        load_records(rewritten(path, lambda entry: entry.update(schema="curv.curvature/2"), tmp_path))


@pytest.mark.parametrize("path", sorted((ASSETS / "documents" / "0.1.0").glob("*.json")), ids=lambda path: path.name)
def test_what_is_written_is_held_to_the_fields_there_are(path: Path) -> None:
    kind: type[Document] = SCHEMAS[kind_of(path)]
    content = json.loads(LOADERS[kind_of(path)](path).to_json())
    assert kind.model_validate(content) is not None
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({**content, "rho_of_everything": 1.0})


def test_a_part_made_in_code_takes_no_unknown_field() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Finding(code="a", severity="info", message="b", hint="c")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schema_allows_what_a_newer_version_adds(kind: str) -> None:
    schema = json_schema(kind)
    parts = [schema, *schema.get("$defs", {}).values()]
    assert all(part["additionalProperties"] is True for part in parts if "properties" in part)
    path = next(p for p in (*VERSIONS[-1].iterdir(), *WRITTEN) if kind_of(p) == kind)
    for entry in entries(path):
        jsonschema.validate({**entry, "added_later": 1}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**entry, "schema": "curv.other/1"}, schema)
