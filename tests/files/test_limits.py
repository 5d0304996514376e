"""Documents, configurations and checkpoints that claim too much: refused before memory or time is given to them."""

from __future__ import annotations

import json
import resource
import time
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import in_time
from places import ASSETS, ROOT
from tiny import build, config
from torch import nn

from curvcli.analysis.config import find_config
from curvcli.checkpoints import open_checkpoint
from curvcli.documents import load_report, load_schedule, load_track, schema_of
from curvcli.errors import CurvError, InputError
from curvcli.files import limits, parse
from curvcli.files.limits import check_size
from curvcli.files.parse import parse_json, read_limited, read_toml
from curvcli.files.safe import load_pickle, read_json

SPACE = 2**30


@contextmanager
def little(seconds: float = 10) -> Iterator[None]:
    """At most a GiB of address space more than now, and some seconds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    start = time.perf_counter()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert in_time(time.perf_counter() - start, seconds)


def refused(read: Callable[[], object], words: str = "") -> None:
    with little(), pytest.raises(CurvError, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


TOML = {
    "a dotted key of 20,000 parts": ".".join(["a"] * 20_000) + " = 1",
    "a quoted one": ".".join(['"a"'] * 20_000) + " = 1",
    "a table of as many": "[" + ".".join(["a"] * 20_000) + "]",
    "behind what looks like a string": "# '''\n" + ".".join(["a"] * 20_000) + " = 1\n# '''",
    "brackets": "a = " + "[" * 100_000,
    "tables in each other": "a = " + "{a = " * 5_000,
    "table headers": "[" * 100_000,
    "an integer of 5,000 digits": "tokens = " + "9" * 5_000,
    "not UTF-8": "tokens = \udcff",
    "many deep keys": "\n".join(".".join([f"a{i}", *["a"] * 16]) + " = 1" for i in range(20_000)),
    "an open string": 'data = """' + '"' * 1000 + "\\" * 999,
}


@pytest.mark.parametrize("name", TOML)
def test_toml_without_measure(name: str, tmp_path: Path) -> None:
    (tmp_path / "curv.toml").write_bytes(TOML[name].encode("utf-8", "surrogateescape"))
    refused(lambda: find_config(tmp_path), "not readable TOML")


def test_a_file_of_three_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "curv.toml").open("wb") as stream:
        stream.truncate(3 * 2**30)
    refused(lambda: find_config(tmp_path), "larger than 1 MiB")
    (tmp_path / "curv.toml").rename(tmp_path / "a.json")
    readers: list[Callable[[Path], object]] = [load_report, load_schedule, load_track, schema_of, read_json]
    for read in readers:
        refused(partial(read, tmp_path / "a.json"), "larger than")


def test_a_size_that_the_system_does_not_tell() -> None:
    """Files of /proc have the size 0, and their content goes on."""
    refused(lambda: read_limited(Path("/proc/self/maps"), 10), "larger than")


keys = st.recursive(
    st.sampled_from(["a", "b.c", '"x.y"', "'z'", "1.5"]), lambda k: st.tuples(k, k).map(".".join), max_leaves=6
)
values = st.recursive(
    st.sampled_from(["1", "0.5", '"[[["', "'{{{'", "2020-01-01", '"""\n.....\n"""', "'''\n[[[\n'''", "true", r'"\"[["']),
    lambda v: (
        st.lists(v, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(keys, v).map("{{ {0[0]} = {0[1]} }}".format)
    ),
    max_leaves=12,
)
lines = st.tuples(keys, values).map(" = ".join) | st.sampled_from(["# a 'comment' [[[[", "[t]", "[[u]]", ""])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(lines, max_size=6))
def test_what_tomllib_reads_of_ordinary_depth_is_read_alike(tmp_path: Path, text: list[str]) -> None:
    content = "\n".join(text)
    (tmp_path / "a.toml").write_text(content)
    try:
        expected = tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        with pytest.raises(InputError):
            read_toml(tmp_path / "a.toml")
        return
    assert read_toml(tmp_path / "a.toml") == expected


@pytest.mark.parametrize("unit", ["[],", '{"":0},', "1,", '{"a":{}},'])
def test_json_of_more_values_than_any_document(unit: str) -> None:
    text = b"[" + unit.encode() * (6_000_000 // unit.count(",")) + b"0]"
    with little(), pytest.raises(ValueError, match="more than 5,000,000 values"):
        parse_json(text)


def _documents() -> dict[str, tuple[Any, Callable[[Path], Any]]]:
    reports = sorted(ASSETS.glob("*.report.json"))
    from curvcli.schedules.plan import grow

    return {
        "report": (json.loads(reports[0].read_text()), load_report),
        "schedule": (json.loads(grow(8).to_json()), load_schedule),
    }


HUGE = st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, -(2**31), -1, 10**400, 1e308, -1e308, 5e-324, "x" * 100_000])


def _numbers(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all numbers, or of an empty list."""
    if isinstance(document, (dict, list)):
        items = document.items() if isinstance(document, dict) else list(enumerate(document))[:3]
        return [place for key, value in items for place in _numbers(value, (*path, key))]
    return [path] if isinstance(document, (int, float)) else []


@pytest.mark.parametrize("kind", ["report", "schedule"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_number_of_any_size_in_a_document(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Refused, or shown in every form in little memory and time."""
    from curvcli.render import TEXT
    from curvcli.render.html import page

    document, load = _documents()[kind]
    place = data.draw(st.sampled_from(_numbers(document)))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(HUGE)
    file = tmp_path / "document.json"
    file.write_text(json.dumps(document))
    with little():
        try:
            loaded = load(file)
        except CurvError:
            return
        page(file)
        if kind == "report":
            for render in TEXT.values():
                render(loaded)
        else:
            from curvcli.render.series import schedule_series

            schedule_series(loaded)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("full", "rho"), 5e-324),
        (("full", "rho"), 0.0),
        (("full", "rho"), -1.0),
        (("optimizer", "lr"), 0.0),
        (("cumulative", "restricted", 1, "depth"), 2**53),
    ],
)
def test_numbers_that_overflow_what_is_derived_of_them(tmp_path: Path, place: tuple[Any, ...], value: float) -> None:
    """A rho next to nothing, under a learning rate that advice is reckoned from, is shown or refused."""
    from curvcli.render import TEXT

    document, load = _documents()["report"]
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file = tmp_path / "document.json"
    file.write_text(json.dumps(document))
    if place[-1] == "depth":
        refused(lambda: load(file), "less than or equal to 100000")
    else:
        for render in TEXT.values():
            assert "inf" not in render(load(file)).replace("info", "")


def test_a_schedule_of_two_billion_blocks(tmp_path: Path) -> None:
    document, load = _documents()["schedule"]
    (tmp_path / "s.json").write_text(json.dumps({**document, "depth": 2**31}))
    refused(lambda: load(tmp_path / "s.json"), "depth: Input should be less than or equal to 10000")
    document["phases"][0]["active"] *= 1000
    (tmp_path / "s.json").write_text(json.dumps(document))
    refused(lambda: load(tmp_path / "s.json"), "names a block twice")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build().save_pretrained(folder)
    return folder


COUNTS = [k for k, v in config().to_dict().items() if isinstance(v, int) and not isinstance(v, bool)]
OTHERS = ["num_labels", "num_classes", "num_local_experts", "n_positions", "num_return_sequences", "chunk_size_feed_forward"]


@pytest.mark.parametrize("key", [*COUNTS, *OTHERS])
@pytest.mark.parametrize("value", [10**9, -(10**9), 2**53])
def test_an_integer_of_any_size_in_a_configuration(key: str, value: int, saved: Path, tmp_path: Path) -> None:
    """Refused, or without a meaning for the network; nothing of that size is made."""
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    said = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, key: value}))
    with little(20):
        try:
            model = open_checkpoint(tmp_path).model()
        except CurvError:
            return
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build().parameters())


def test_modules_without_weights_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of no width: no limit of weights would ever be met."""

    def endless() -> nn.Module:
        outer = nn.ModuleList()
        while True:
            outer.append(nn.Identity())

    monkeypatch.setattr(limits, "_MODULES", 1000)
    refused(lambda: check_size(endless, values=100, where="c"), "asks for a model")


def _torch_file(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("name", ["items", "keys", "values", "update", "get"])
def test_a_dictionary_whose_methods_a_file_replaces(name: str, tmp_path: Path) -> None:
    weights = OrderedDict(a=torch.ones(2))
    weights.__dict__["x" * len(name)] = 5  # torch.save itself would stumble
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes().replace(b"x" * len(name), name.encode()))
    refused(lambda: load_pickle(tmp_path / "w.pt"), "with an attribute")


@pytest.mark.parametrize("name", ["numel", "float", "dim"])
def test_a_tensor_whose_methods_a_file_replaces(name: str, tmp_path: Path) -> None:
    tensor = nn.Parameter(torch.ones(2))
    tensor.__dict__[name] = 5
    refused(lambda: load_pickle(_torch_file(tmp_path / "w.pt", {"a": tensor})), "with an attribute")


def test_attributes_that_replace_nothing_are_read(tmp_path: Path) -> None:
    weights = nn.Linear(2, 2).state_dict()
    assert vars(weights)["_metadata"]
    weights["weight"].tensor_model_parallel = True  # as Megatron-LM marks its own
    assert set(load_pickle(_torch_file(tmp_path / "w.pt", weights))) == {"weight", "bias"}


def test_limits_are_those_that_are_documented() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "five million values" in text
    assert parse._VALUES == 5_000_000
