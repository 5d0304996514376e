"""The course of the loss: what is wrecked or collapsed alarms, and nothing that a healthy run does."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracks import asset

from curvcli.documents import LossCourse, TrainingStep, VerdictName
from curvcli.judge.course import LEAST, WINDOWS, course_findings, doubted, loss_course


def logged(losses: list[float], every: int = 1, lr: list[float] | None = None) -> list[TrainingStep]:
    rates = lr or [1e-3] * len(losses)
    return [
        TrainingStep(step=every * (i + 1), loss=loss, lr=rate)
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True))
    ]


def course(losses: list[float], **given: object) -> LossCourse:
    found = loss_course(logged(losses), **given)  # type: ignore[arg-type]
    assert found is not None
    return found


def falling(count: int, start: float, end: float, pace: float) -> np.ndarray:
    """From start to end as an exponential, `pace` times over the length of the log: at a high one there is a plateau."""
    return end + (start - end) * np.exp(-pace * np.arange(count) / count)


HEALTHY = {
    "count": st.integers(LEAST, 400),
    "start": st.floats(0.5, 12.0),
    "share": st.floats(0.01, 1.0),
    "pace": st.floats(0.0, 40.0),
    "noise": st.floats(0.0, 0.5),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=300, deadline=None)
@given(**HEALTHY)
def test_a_healthy_run_with_noise_never_alarms(
    count: int, start: float, share: float, pace: float, noise: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    losses = falling(count, start, share * start, pace) * np.exp(noise * random.standard_normal(count))
    found = course(losses.tolist())
    assert found.name == "healthy", found


@settings(max_examples=300, deadline=None)
@given(**{**HEALTHY, "noise": st.floats(0.0, 0.1)}, jump=st.floats(1.0, 8.0), place=st.floats(0.3, 0.8))
def test_a_jump_that_stays_always_alarms(
    count: int, start: float, share: float, pace: float, noise: float, seed: int, jump: float, place: float
) -> None:
    count = max(count, 40)
    losses = falling(count, start, share * start, pace) * np.exp(noise * np.random.default_rng(seed).standard_normal(count))
    at = round(place * count)
    # Far over what the run had reached, whatever the noise: a jump over its own best by as much, and by a nat.
    losses[at:] += jump * losses[:at].min() + 1.0
    found = course(losses.tolist())
    assert found.name == "wrecked", found
    assert found.step is not None
    assert abs(found.step - (at + 1)) <= WINDOWS[0]
    assert found.best_step is not None
    assert found.best_step <= at


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_spike_that_comes_back_is_told_and_is_no_wreck(length: int) -> None:
    losses = falling(200, 6.0, 2.0, 8.0)
    losses[120 : 120 + length] += 5.0
    found = course(losses.tolist())
    assert (found.name, found.spikes) == ("healthy", [121])


def test_a_jump_at_the_very_end_is_not_yet_one_that_stays() -> None:
    losses = falling(200, 6.0, 2.0, 8.0)
    losses[-12:] += 5.0
    found = course(losses.tolist())
    # The newest median is past the limit, and those of a window before it are not.
    assert found.window == 20
    assert found.loss is not None
    assert found.loss > 6.0
    assert found.name == "healthy"
    losses[-30:-12] += 5.0
    assert course(losses.tolist()).name == "wrecked"


def test_numbers_of_a_wreck() -> None:
    """Closed form: 4 down to 1 in a line, then 3 for good; of 100 losses a median is over ten."""
    found = course([*np.linspace(4, 1, 60).tolist(), *[3.0] * 40])
    assert (found.name, found.window, found.loss, found.step) == ("wrecked", 10, 3.0, 61)
    assert found.best == pytest.approx(np.median(np.linspace(4, 1, 60)[-10:]))
    assert found.best is not None
    assert found.rise == pytest.approx(100 * (3 / found.best - 1))
    assert "since step 61" in found.reason


def test_losses_that_are_no_numbers() -> None:
    fine = logged(falling(100, 6.0, 2.0, 8.0).tolist())

    def lost(*steps: int) -> list[TrainingStep]:
        return [
            e.model_copy(update={"loss": None, "non_finite": True}) if e.step in steps else e for e in fine
        ]  # fmt: skip

    scattered = loss_course(lost(3, 50, 51, 52, 53, 100))
    assert scattered is not None
    assert scattered.name == "healthy"
    found = loss_course(lost(98, 99, 100))
    assert found is not None
    assert (found.name, found.step) == ("wrecked", 98)
    assert "no number since step 98" in found.reason


def test_short_logs_and_none_say_nothing() -> None:
    assert loss_course([]) is None
    assert course([2.0, 9.0, 9.0, 9.0]).name == "short"
    assert course([*[2.0] * 10, *[9.0] * (LEAST - 11)]).name == "short"


def test_lines_of_evaluation_and_a_restart() -> None:
    """Lines without a loss between the others; a run that went back to step 60 after it had broken, and did well."""
    losses = falling(100, 6.0, 2.0, 8.0).tolist()
    broken = [*losses[:80], *[9.0] * 20]
    entries = logged(broken)
    assert getattr(loss_course(entries), "name", None) == "wrecked"
    again = [*entries, *logged(losses)[60:]]
    with_others = [line for e in again for line in (e, TrainingStep(step=e.step, loss=None, lr=None))]
    found = loss_course(with_others)
    assert found is not None
    assert (found.name, found.spikes, found.best_step) == ("healthy", [], 100)


def test_a_warm_restart_of_the_learning_rate_may_raise_the_loss() -> None:
    one = falling(100, 6.0, 2.0, 8.0).tolist()
    losses = [*one, *[2.4] * 50]
    rates = [*np.linspace(1e-3, 1e-5, 100).tolist(), *[1e-3] * 50]
    found = loss_course(logged(losses, lr=rates))
    assert found is not None
    assert found.name == "healthy"
    # The same with a rate that never fell is a wreck.
    assert course(losses).name == "wrecked"


def test_units_of_steps_do_not_matter() -> None:
    losses = [*falling(60, 4.0, 1.0, 8.0).tolist(), *[3.0] * 40]
    found = loss_course(logged(losses, every=500))
    assert found is not None
    assert (found.name, found.step) == ("wrecked", 61 * 500)


def test_a_long_log_is_thinned_and_says_the_same() -> None:
    losses = falling(50_000, 6.0, 2.0, 8.0) + 0.05 * np.random.default_rng(0).standard_normal(50_000)
    losses[30_000:] += 2.0
    found = course(losses.tolist())
    assert found.name == "wrecked"
    assert found.step is not None
    assert abs(found.step - 30_000) <= 100


def test_no_better_than_token_frequencies() -> None:
    random, entropy = np.random.default_rng(0), log(64)
    flat = np.concatenate([np.linspace(5.0, entropy, 20), np.full(380, entropy)]) + 0.02 * random.standard_normal(400)
    given = {"shard_loss": entropy, "unigram": entropy}
    found = course(flat.tolist(), **given, step=400)
    assert found.name == "collapsed"
    assert found.step is not None
    assert found.step < 80
    assert "4.16" in found.reason
    # The same so early that any run looks so, and with a loss on the shard that context must have made.
    assert course(flat[:100].tolist(), **given, step=100).name == "healthy"
    assert course(flat.tolist(), shard_loss=0.9 * entropy, unigram=entropy, step=400).name == "healthy"
    # A learning rate that has decayed will not mend it: half of the steps are enough.
    rates = [1e-3 * exp(-i / 30) for i in range(100)]
    decayed = loss_course(logged(flat[:100].tolist(), lr=rates), **given, step=100)  # type: ignore[arg-type]
    assert decayed is not None
    assert decayed.name == "collapsed"


def test_a_shard_unlike_the_log_is_no_collapse() -> None:
    """A shard of another kind of text, on which a network that uses context elsewhere does no better than frequencies."""
    given = {"shard_loss": 3.33, "unigram": 3.30, "step": 400}
    for level, name in ((3.3, "collapsed"), (3.3 * 63 / 64, "collapsed"), (2.95, "healthy")):
        losses = np.concatenate([np.linspace(5.4, level, 20), np.full(380, level)])
        assert course(losses.tolist(), **given).name == name, level
    report = asset("hot")
    found = course(losses.tolist(), **given)
    data = report.data.model_copy(update={"loss": 3.33, "unigram_loss": 3.30})
    (said,) = [
        f for f in course_findings(report.model_copy(update={"course": found, "data": data})) if f.severity == "warning"
    ]
    assert said.code == "shard-unlike"
    assert all(number in said.message for number in ("3.33", "3.3,", "2.95"))
    data = data.model_copy(update={"loss": 3.0})
    assert not [
        f for f in course_findings(report.model_copy(update={"course": found, "data": data})) if f.severity == "warning"
    ]


def test_a_loss_that_rose_far_over_its_start_is_a_wreck_while_it_falls_back() -> None:
    """As GPT-2 at a learning rate of 1: 5.4, then 55, then falling to 4.1 as the rate decays, its own best."""
    losses = [5.4, 5.5, 8.0, *np.linspace(20.0, 55.0, 20).tolist(), *np.geomspace(50.0, 4.1, 100).tolist()]
    found = course(losses, shard_loss=4.1, unigram=3.3, step=123)
    assert (found.name, found.step, found.spikes) == ("wrecked", 4, [])
    assert all(number in found.reason for number in ("from 5.4 to 4", "4.1 on the shard", "3.3"))
    assert course(losses, shard_loss=2.5, unigram=3.3, step=123).name == "healthy", "it came back"
    assert course([*losses, *[2.5] * 40], shard_loss=3.3, unigram=3.3, step=163).name == "healthy", "elsewhere it did"
    assert course([min(loss, 10.0) for loss in losses], shard_loss=4.1, unigram=3.3, step=123).name == "healthy"


def classifier(then: float, noise: float = 0.02) -> list[float]:
    """It learns for 15 steps, leaps, and stands at `then` for the rest of 400: too short for its medians of 40 to see."""
    random = np.random.default_rng(0)
    losses = [log(10), log(10), 2.25, 2.2, *np.linspace(2.1, 0.5, 15), 5.5, 10.0, 26.0, 7.6, 6.0, 5.0]
    return [*losses, *(then + noise * random.standard_normal(400 - len(losses)))]


def test_a_loss_that_leapt_and_stands_where_it_began_is_a_wreck_without_an_entropy() -> None:
    found = course(classifier(log(10)))
    assert (found.name, found.step) == ("wrecked", 20)
    assert "rose from 2.3 to 26 from step 20 on, and is 2.3 now: where it began" in found.reason
    # It came back, or it never leapt.
    assert course(classifier(2.1)).name == "healthy"
    assert course([log(10)] * 19 + classifier(log(10))[25:]).name == "healthy"
    # An entropy that its loss lies below says more than where it began.
    assert course(classifier(log(10)), unigram=3.0, shard_loss=log(10)).name == "healthy"
    # A loss that wanders may come to stand above its first values: that alone says nothing.
    assert course([1.0] * 3 + [3.0] * 6 + [1.4] * 91).name == "healthy"
    # No logarithm is taken of a loss of 0.
    assert course([*classifier(log(10))[:-1], 0.0]).name == "healthy"


@pytest.mark.parametrize("seed", [30, 123, 197])  # in these draws a median of five comes to twice the first values
def test_noise_that_leaps_is_not_taken_for_it(seed: int) -> None:
    losses = np.random.default_rng(seed).exponential(size=100) + 1e-6
    assert course(losses.tolist()).name == "healthy"


def test_a_run_that_still_gets_better_is_not_collapsed() -> None:
    losses = np.linspace(7.0, 4.2, 600).tolist()
    assert course(losses, shard_loss=4.2, unigram=4.16, step=600).name == "healthy"


@pytest.mark.parametrize(("step", "name"), [(0, "short"), (999, "short"), (1000, "collapsed")])
def test_without_a_log_only_many_steps_tell(step: int, name: str) -> None:
    found = loss_course([], shard_loss=4.16, unigram=4.16, step=step)
    assert found is not None
    assert found.name == name


def test_losses_that_are_negative() -> None:
    """A loss of the user's own: no percent is said of one, and a rise is one all the same."""
    found = course([*np.linspace(0, -5, 60).tolist(), *[-1.0] * 40])
    assert (found.name, found.rise) == ("wrecked", None)


@pytest.mark.parametrize(
    ("verdict", "lost"),
    [("stable", "unresolved"), ("edge", "unresolved"), ("unstable", "unstable"), ("unresolved", "unresolved")],
)
def test_a_lost_network_is_not_called_stable(verdict: VerdictName, lost: str) -> None:
    for name in ("wrecked", "collapsed"):
        assert doubted(verdict, LossCourse.model_validate({"name": name})) == lost
    for name in ("healthy", "short"):
        assert doubted(verdict, LossCourse.model_validate({"name": name})) == verdict
    assert doubted(verdict, None) == verdict
