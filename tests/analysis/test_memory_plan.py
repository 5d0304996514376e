"""Memory predicted against the peak of a process that measures, and what is chosen for a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from normalised import Lion
from torch import Tensor, nn

from curvcli import Estimated, analyze
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.plan import LEAST, WANTED, Plan, Sizes, fitted, limit_of, plan, predicted, unplanned
from curvcli.analysis.track import key_of
from curvcli.curvature import resources
from curvcli.curvature.problem import Problem
from curvcli.curvature.scratch import Scratch
from curvcli.documents import Report
from curvcli.errors import InputError, UsageError
from curvcli.optimizers.preconditioner import live

GIB = 2**30
SIZES = Sizes(held=2 * GIB, vector=GIB // 2, largest=GIB // 8, graph=GIB // 4, logits=GIB // 16, rows=16)


def test_what_fits_is_the_fastest_that_does() -> None:
    roomy = plan(SIZES, 1000 * GIB, 8)
    assert (roomy.mode, roomy.batch_rows, roomy.basis) == ("kept", 8, 32)
    last = roomy
    for tenths in range(300, 105, -5):
        found = plan(SIZES, tenths / 10 * GIB, 8)
        assert found.total <= tenths / 10 * GIB
        assert (
            found.basis <= last.basis or found.batch_rows < last.batch_rows or (last.mode, found.mode) == ("kept", "fresh")
        )
        assert not (last.mode == "fresh" and found.mode == "kept" and found.basis >= WANTED)
        last = found
    assert last.mode == "fresh"
    assert last.batch_rows < 8
    assert LEAST <= last.basis < WANTED


def test_no_choice_leaves_room_for_a_better_one() -> None:
    for tenths in range(110, 300, 7):
        found = plan(SIZES, tenths / 10 * GIB, 8)
        if found.basis < 32:
            assert predicted(SIZES, found.mode, found.batch_rows, found.basis + 1).total > tenths / 10 * GIB
        if found.mode == "fresh" and found.basis >= WANTED:
            assert predicted(SIZES, "kept", 1, WANTED).total > tenths / 10 * GIB


def test_a_mode_that_is_insisted_on() -> None:
    assert plan(SIZES, 1000 * GIB, 8, "fresh").mode == "fresh"
    with pytest.raises(UsageError, match=r"needs .* GiB"):
        plan(replace(SIZES, rows=1000), 100 * GIB, 8, "kept")
    assert plan(replace(SIZES, rows=1000), 100 * GIB, 8).mode == "fresh"


def test_where_nothing_fits_it_says_what_would() -> None:
    for more in range(5):  # what is told is rounded upward, and is enough as it stands
        sizes = replace(SIZES, held=SIZES.held + more * GIB // 500)
        with pytest.raises(UsageError, match=r"needs (\d+\.\d+) GiB of memory at least, the limit is 4.00 GiB") as error:
            plan(sizes, 4 * GIB, 8)
        needed = str(error.value).split("needs ")[1].split()[0]
        assert plan(sizes, limit_of(f"{needed}GiB") or 0, 8).basis == LEAST
        with pytest.raises(UsageError):
            plan(sizes, (float(needed) - 0.01) * GIB, 8)


def _first_below_wanted() -> Plan:
    plans = (plan(SIZES, tenths / 10 * GIB, 8) for tenths in range(300, 0, -1))
    return next(found for found in plans if found.basis < WANTED)


def test_a_basis_that_memory_has_no_room_for_lies_on_disk() -> None:
    limit = _first_below_wanted().total
    found = plan(SIZES, limit, 8, most=100, store=40 * GIB)
    assert (found.basis, found.offloaded) == (80, 40 * GIB)
    assert found.total <= limit
    assert found.mode == "kept", "there is room for graphs, where the basis takes that of one vector"
    assert "at most 80 vectors on disk, where they take up to 40.0 GiB; " in str(found)
    assert plan(SIZES, limit, 8, most=100, store=WANTED * GIB / 2 - 1) == plan(SIZES, limit, 8, most=100)
    assert plan(SIZES, 1000 * GIB, 8, store=1000 * GIB).offloaded == 0
    lean = plan(SIZES, 8 * GIB, 8, store=1000 * GIB)
    with pytest.raises(UsageError):
        plan(SIZES, lean.total, 8)


def test_without_a_limit_it_is_by_what_is_free(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scratch, "free", 1000)
    assert unplanned(problem, 10, 640.0, 100) == (16, False)
    assert unplanned(problem, 10, 600.0, 100) == (100, True)
    assert unplanned(problem, 50, 600.0, 100) == (20, True)
    assert unplanned(problem, 100, 600.0, 100) == (LEAST, False)
    assert unplanned(problem, 50, 600.0, 3) == (LEAST, False), "no more are of use"


def test_the_leanest_way_has_its_vectors_on_disk() -> None:
    aside = replace(SIZES, aside=True)
    with pytest.raises(UsageError, match=r"a basis on disk 0\.00, a product") as error:
        plan(aside, GIB, 8, store=100 * GIB)
    needed = float(str(error.value).split("needs ")[1].split()[0])
    found = plan(aside, (needed + 0.01) * GIB, 8, store=100 * GIB)
    assert (found.basis, found.offloaded > 0, found.batch_rows) == (32, True, 1)
    without = predicted(SIZES, "fresh", 1, 32, offload=True)
    assert without.total - found.total == pytest.approx((2.25 + 3) * GIB / 2 * 1.08, rel=0.01), "of a GPU, in main memory"


@pytest.mark.parametrize("estimated", [False, True])
def test_what_is_needed_once_lies_on_disk_and_gives_the_same_numbers(
    estimated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    batches, placed = models.data(), []
    told: list[Report] = []
    theirs = Scratch.put

    def put(self: Scratch, tensors: Sequence[Tensor]) -> list[Tensor]:
        placed.append(sum(t.numel() for t in tensors))
        return theirs(self, tensors)

    monkeypatch.setattr(Scratch, "put", put)

    def measured(memory: str | None) -> Report:
        torch.manual_seed(0)
        net = models.Net(blocks=1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for batch in batches:
            models.loss(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        known = Estimated() if estimated else live(optimizer, dict(net.named_parameters()))
        weights = models.weights(batches)
        found = analyze(
            net, models.loss, batches, known, weights=weights, lr=1e-3, mode="fresh", depths=False, memory=memory,
            on_verdict=told.append,
        )  # fmt: skip
        assert isinstance(known, Estimated) or bool(known.state) == (memory is None), "read, its state makes room"
        return found

    free = measured(None)
    assert not placed
    tight = measured("64GiB")
    size = sum(p.numel() for p in models.Net(blocks=1).parameters())
    assert tight.body is not None
    # P, the gradient, the top eigenvector, the mask of rare rows; of known moments the next update; sums of folds; where the
    # full model's solve waited for the one without these rows, its vector until then.
    waited = told[-1].full.status == "unconverged"
    assert placed.count(size) == (4 if estimated else 5) + waited + tight.full.hvps + tight.body.hvps
    assert tight.full.eigenvalue == pytest.approx(free.full.eigenvalue, rel=1e-9)
    assert tight.update == free.update or tight.update.ratio == pytest.approx(free.update.ratio, rel=1e-9)
    beside = [{k: v for k, v in r.companions.model_dump().items() if v is not None} for r in (tight, free) if r.companions]
    assert beside[0] == pytest.approx(beside[1], rel=1e-9)
    assert [part.mass for part in tight.attribution] == pytest.approx([part.mass for part in free.attribution], rel=1e-6)
    assert [e.eigenvalue for e in tight.layers] == pytest.approx([e.eigenvalue for e in free.layers], rel=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("clip", [None, 0.5])
def test_emptied_state_is_no_state_that_was_never_there(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    batches = models.data()
    net = models.Net(blocks=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    models.loss(net, batches[0]).backward()
    optimizer.step()
    known = live(optimizer, dict(net.named_parameters()))
    said: Any = {"weights": models.weights(batches), "mode": "fresh", "depths": False}
    found = analyze(net, models.loss, batches, known, memory="64GiB", clip=clip, **said)
    assert found.update.status != "unavailable"
    assert not known.state
    with pytest.raises(UsageError, match="emptied by an analysis"):
        analyze(net, models.loss, batches, known, **said)
    again = analyze(net, models.loss, batches, optimizer, memory="64GiB", clip=clip, **said)
    assert again.update.status == found.update.status, "an optimizer in memory keeps what it has"


def test_a_model_without_a_preconditioner_is_measured_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    batches = models.data()
    found = []
    for memory in (None, "64GiB"):
        net = models.Net(blocks=1)
        optimizer = Lion(net.parameters(), lr=1e-3)
        models.loss(net, batches[0]).backward()
        optimizer.step()
        report = analyze(net, models.loss, batches, optimizer, weights=models.weights(batches), depths=False, memory=memory)
        found.append(report.steepest)
    free, tight = found
    assert free is not None
    assert tight is not None
    assert tight.sharpness == pytest.approx(free.sharpness, rel=1e-9)


@pytest.mark.slow
def test_an_analysis_on_disk_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = models.data()

    def measured() -> Report:
        net = models.Net(blocks=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return analyze(net, models.loss, batches, optimizer, weights=models.weights(batches), mode="fresh")

    free = measured()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rooms: list[int] = []
    theirs = Scratch.empty

    def empty(self: Scratch, *shape: int, dtype: Any) -> Tensor:
        rooms.append(shape[0])
        return theirs(self, *shape, dtype=dtype)

    monkeypatch.setattr(Scratch, "empty", empty)
    monkeypatch.setattr("curvcli.analysis.solve.unplanned", lambda problem, *rest: (50, True))
    disk = measured()
    assert set(rooms) == {1}
    assert list(tmp_path.iterdir()) == []
    assert disk.full.eigenvalue == pytest.approx(free.full.eigenvalue, rel=1e-9)
    assert disk.generalisation.rho_low == pytest.approx(free.generalisation.rho_low, rel=1e-6)
    pairs = zip([*disk.layers, *disk.cumulative.restricted], [*free.layers, *free.cumulative.restricted], strict=True)
    for one, other in pairs:
        assert (one.status, other.status) == ("converged", "converged")
        assert one.eigenvalue == pytest.approx(other.eigenvalue, rel=1e-2)


def test_limits_are_bytes_or_said_as_people_do() -> None:
    assert limit_of(None) is None
    assert limit_of("8GiB") == limit_of("8G") == limit_of(8 * GIB) == 8 * GIB
    # What a refusal tells has decimals: it can be passed as it stands.
    assert limit_of("0.42GiB") == int(0.42 * GIB)
    assert limit_of("1.5T") == 1536 * GIB
    for wrong in ("much", "0", -1, 0, "0.42", "1.G", ".5G", "1e9G"):
        with pytest.raises(UsageError, match="no size"):
            limit_of(wrong)


@pytest.fixture
def problem() -> Problem:
    batches = [(ids[:8], targets[:8]) for ids, targets in models.data()]
    return Problem.create(models.Net(), models.loss, batches, [8.0, 8.0])


def test_batches_are_cut_and_the_loss_is_the_same(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    monkeypatch.setattr(resources, "held_bytes", lambda device: 0)
    roomy, best = fitted(problem, GIB, "auto", 32)
    assert (roomy, best.mode, best.batch_rows, best.basis) == (problem, "kept", 8, 32)
    vector = sum(p.nbytes for p in problem.parameters.values())
    sizes = Sizes(0, vector, max(p.nbytes for p in problem.parameters.values()), best.graphs // 16, 0, 16, 8)
    limit = predicted(sizes, "fresh", 2, WANTED).total
    assert predicted(sizes, "kept", 1, WANTED).total > limit
    part, lean = fitted(problem, limit, "auto", 20)
    assert (lean.mode, lean.batch_rows, lean.basis) == ("fresh", 2, WANTED)
    assert [len(ids) for ids, _ in part.batches] == [2] * 8
    assert part.mean_loss() == pytest.approx(problem.mean_loss(), rel=1e-12)


def test_rows_that_depend_on_each_other_stay_together(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)

    def together(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return models.loss(model, batch) * batch[0].float().std(correction=0)

    whole = replace(problem, loss=together)
    found, best = fitted(whole, 10 * GIB, "auto", 32)
    assert found is whole
    assert best.batch_rows == 1  # a batch of eight


def test_an_analysis_within_a_limit_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(resources, "return_blocks", lambda: told.append("told"))
    batches = models.data()

    def measured(memory: int | str | None) -> Report:
        weights = models.weights(batches)
        return analyze(models.Net(blocks=1), models.loss, batches, weights=weights, mode="kept", depths=False, memory=memory)

    free = measured(None)
    assert not told
    tight = measured("64GiB")
    assert told
    assert tight.full.eigenvalue == pytest.approx(free.full.eigenvalue, rel=1e-9)
    (said,) = (f.message for f in tight.findings if f.code == "memory-plan")
    assert said.startswith("of 64.00 GiB: kept graphs, batches of 32 rows, at most 100 vectors; ")
    with pytest.raises(UsageError, match="memory at least, the limit is"):
        measured(2**20)


def test_solves_end_where_the_basis_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "curvcli.analysis.api.fitted", lambda problem, *rest, **how: (problem, predicted(SIZES, "kept", 1, 9))
    )
    batches = models.data()
    found = analyze(models.Net(), models.loss, batches, weights=models.weights(batches), tolerance=1e-9, memory=GIB)
    assert (found.full.hvps, found.full.status) == (9, "unconverged")


@pytest.mark.parametrize("memory", ["1T", None])
def test_free_blocks_go_back_or_are_kept_from_before_the_model_is_read(
    run: Path, memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def model() -> nn.Module:
        raise InputError("read")

    monkeypatch.setattr(resources, "return_blocks", lambda: told.append("return"))
    monkeypatch.setattr(resources, "keep_blocks", lambda: told.append("keep"))
    opened = open_for_analysis(run, Options(tokens=64, sequence_length=16, memory=memory, device="cpu"))
    with pytest.raises(InputError, match="read"):
        replace(opened, checkpoint=replace(opened.checkpoint, model=model)).measure()
    assert told == ["return" if memory else "keep"]


def test_limits_are_a_part_of_what_reports_are_kept_under(run: Path) -> None:
    def key(memory: int | str | None) -> str:
        return key_of(open_for_analysis(run, Options(tokens=64, sequence_length=16, memory=memory)))

    assert len({key(None), key("1G"), key(2**31)}) == 3
    assert key("2GiB") == key(2**31)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from curvcli import analyze
from curvcli.analysis import api
from curvcli.data.tasks import causal_loss

def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

kind, mode, memory_limit, rows, length = *sys.argv[1:4], *map(int, sys.argv[4:])
torch.set_num_threads(1)
torch.manual_seed(0)
if kind == "gpt2":
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16384, n_positions=256, n_embd=256, n_layer=2, n_head=4))
else:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16384, hidden_size=448, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=7))
batches = torch.randint(model.config.vocab_size, (rows, length + 1)).split(1)
plans, fitted = [], api.fitted

def kept(*arguments, **more):
    global before
    plans.append(fitted(*arguments, **more))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # what planning took does not count
    return plans[0]

api.fitted = kept
report = analyze(
    model, causal_loss, batches, tolerance=1e-9, mode=mode, max_hvps=8, depths=False, memory=memory_limit,
    on_verdict=lambda report: print(json.dumps({
        "told": plans[0][1].total, "peak": memory("VmHWM"), "before": before, "parts": vars(plans[0][1]),
        "hvps": report.full.hvps})) or sys.stdout.flush() or __import__("os")._exit(0))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "limit", "rows", "length"),
    [("gpt2", "fresh", "64GiB", 2, 48), ("llama", "kept", "64GiB", 3, 96), ("gpt2", "fresh", "650MiB", 2, 48)],
)
def test_the_peak_is_within_a_fifth_of_the_prediction(kind: str, mode: str, limit: str, rows: int, length: int) -> None:
    command = [sys.executable, "-c", MEASURE, kind, mode, limit, str(rows), str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hvps"] == 8
    assert (found["parts"]["offloaded"] > 0) == (limit != "64GiB")
    assert found["told"] == pytest.approx(found["peak"], rel=0.2), found
    # What the process holds before is no prediction, and hides much of what is.
    assert found["told"] - found["before"] == pytest.approx(found["peak"] - found["before"], rel=0.35), found
