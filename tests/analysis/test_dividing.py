"""Which way divided weights are put together: the way back from exact products that turn out not to fit."""

from __future__ import annotations

from typing import Any

import models
import pytest
from streamed import problem_of
from threads import on_ranks

from curvcli.analysis.dividing import divided
from curvcli.analysis.plan import OverLimitError
from curvcli.curvature.gathering import Weights
from curvcli.errors import OutOfMemoryError


@pytest.mark.parametrize("kind", [OverLimitError, OutOfMemoryError])
def test_where_exact_products_prove_too_large_blocks_are_gathered_one_at_a_time(kind: type[Any]) -> None:
    def work(ranks: Any) -> Any:
        problem = problem_of(models.Net()).shared(ranks)
        weights = Weights(problem.model, ranks)
        tried: list[tuple[str, bool]] = []
        notes: dict[str, str] = {}

        def measure(part: Any, mode: str) -> str:
            tried.append((mode, part.streamed is not None))
            if mode != "differences":
                raise kind("it needs 3 GiB, the limit is 2 GiB")
            return "measured"

        return divided(problem, weights, "auto", None, notes, measure), tried, notes

    for found, tried, notes in on_ranks(work, 2):
        assert found == "measured"
        assert tried[0] == ("fresh", False)
        assert tried[-1] == ("differences", True)
        assert [mode for mode, _ in tried].count("differences") == 1
        assert "it needs 3 GiB, the limit is 2 GiB" in notes["blocks-gathered"]


def test_a_mode_that_is_insisted_on_has_no_way_back() -> None:
    def work(ranks: Any) -> Any:
        problem = problem_of(models.Net()).shared(ranks)

        def measure(part: Any, mode: str) -> str:
            if mode != "fresh":
                return "differences would do"
            raise OverLimitError("it needs 3 GiB")

        with pytest.raises(OverLimitError, match="it needs 3 GiB"):
            divided(problem, Weights(problem.model, ranks), "fresh", None, {}, measure)
        return True

    assert on_ranks(work, 2) == [True, True]
