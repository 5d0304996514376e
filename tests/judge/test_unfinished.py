"""Why parts of an analysis are not there: each cause has its own words, and its own remedy."""

from __future__ import annotations

from curvcli.errors import FullDiskError
from curvcli.judge.unfinished import remedy, unfinished

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
