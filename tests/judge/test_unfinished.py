"""Why parts of an analysis are not there: each cause has its own words, and its own remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvcli.documents import BodyEstimate, load_report
from curvcli.errors import FullDiskError
from curvcli.judge.findings import explain
from curvcli.judge.unfinished import remedy, unfinished
from curvcli.render.advice import advice

HOT = Path(__file__).parents[1] / "assets" / "hot-60.json"

FULL = FullDiskError("cannot keep 1.00 GiB of vectors in /there: No space left on device", hint="set TMPDIR")


def test_a_full_disk_is_said_whatever_it_kept_from_being_measured() -> None:
    (said,) = unfinished(["layer 1", "layer 2"], 5, FULL)
    assert (said.code, said.severity) == ("disk-full", "warning")
    assert said.message == (
        f"the disk was full: {FULL.message}; 2 of 5 layers and depths were not measured, layer 1 the first; set TMPDIR"
    )
    (said,) = unfinished([], 0, FULL)
    assert said.message == f"the disk was full: {FULL.message}; set TMPDIR"


def test_a_budget_that_ran_out_is_said_where_something_is_missing() -> None:
    (said,) = unfinished(["layer 1"], 5, None)
    assert (said.code, said.message) == (
        "out-of-time", "the time budget ran out before 1 of 5 layers and depths, layer 1 the first; raise --budget",
    )  # fmt: skip
    assert unfinished([], 5, None) == []


def test_more_products_are_no_remedy_for_what_something_else_ended() -> None:
    assert remedy(skipped=True, full_disk=FULL, further="--max-hvps") == "the disk was full: set TMPDIR"
    assert remedy(skipped=True, full_disk=None, further="--max-hvps") == "raise --budget"
    assert remedy(skipped=False, full_disk=None, further="--max-hvps") == "raise --max-hvps"


@pytest.mark.parametrize(
    ("full", "code", "hint"), [(FULL, "unresolved-disk", "set TMPDIR"), (None, "unresolved-budget", "--budget")]
)
def test_a_verdict_that_was_not_reached_says_what_ended_it(full: FullDiskError | None, code: str, hint: str) -> None:
    report = load_report(HOT)
    numbers = dict.fromkeys(BodyEstimate.model_fields)
    body = BodyEstimate.model_validate({**numbers, "status": "skipped", "hvps": 0, "rows": 1})
    given = report.model_copy(update={"body": body, "verdict": "unresolved"})
    first = explain(given, idle=0, left_out=0, notes={}, full_disk=full)[0]
    assert first.code == code
    assert first.message.endswith(f"no verdict; raise {hint}" if full is None else f"no verdict; {hint}")


@pytest.mark.parametrize(("full", "said"), [(FULL, "TMPDIR"), (None, "--budget")])
def test_what_to_do_next_is_of_what_ended_the_analysis(full: FullDiskError | None, said: str) -> None:
    """Not more products for a solve that was cut short by something else."""
    report = load_report(HOT)
    weak = report.full.model_copy(update={"status": "unconverged"})
    layers = [layer.model_copy(update={"status": "skipped"}) for layer in report.layers]
    given = report.model_copy(update={"full": weak, "layers": layers, "verdict": "unresolved"})
    given = given.model_copy(update={"findings": explain(given, idle=0, left_out=0, notes={}, full_disk=full)})
    steps = advice(given)
    assert said in steps[0].text
    assert not any("--max-hvps" in (step.command or "") for step in steps)
