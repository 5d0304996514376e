"""Whole analyses on a GPU: the CPU's numbers, whatever the caller has set, within the memory that there is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gpu
import normalised
import published
import pytest
import torch
from gpu import DEVICE, agree, copied, document, ended, llama, moved, say, started, tokens, trained
from places import SAMPLES
from torch import Tensor, nn

import curvcli
from curvcli import analyze
from curvcli.data.tasks import causal_loss
from curvcli.errors import OutOfMemoryError
from curvcli.models.blocks import find_blocks

pytestmark = gpu.there
HOT = SAMPLES / "hot" / "checkpoint-60"
GIB = 2**30


def parts(report: Any) -> dict[str, Any]:
    return report.model_dump(mode="json") if hasattr(report, "model_dump") else report


def test_a_checkpoints_report_is_the_cpus(tmp_path: Path) -> None:
    options = ["--tokens", 2048, "--max-hvps", 200, "--quiet"]
    both = [
        started("analyze", HOT, "--device", device, "-o", tmp_path / f"{name}.json", *options)
        for name, device in (("here", DEVICE), ("there", "cpu"))
    ]
    for process in both:
        ended(process)
    here, there = (document(tmp_path / f"{name}.json") for name in ("here", "there"))
    for name, found in (("device", here), ("cpu", there)):
        cost = found["cost"]
        say(f"hot/60, {name}: {cost['seconds']:.1f} s, {cost['hvps']} products, {cost['peak_memory_bytes'] / 2**20:.0f} MiB")
    assert here["cost"]["device"].startswith(DEVICE.type)
    assert here["verdict"] == there["verdict"], (here["verdict"], there["verdict"])
    agree(here, there)
    assert here["data"]["loss"] == pytest.approx(there["data"]["loss"], rel=1e-5)
    assert here["update"]["critical_lr"] == pytest.approx(there["update"]["critical_lr"], rel=1e-2)
    codes = [{f["code"] for f in found["findings"]} for found in (here, there)]
    assert codes[0] == codes[1], codes[0] ^ codes[1]
    if gpu.REAL:  # the tensors', and not the process'
        peak, weights = here["cost"]["peak_memory_bytes"], 4 * here["checkpoint"]["parameters"]
        assert 4 * weights < peak < GIB, f"{peak:,} bytes of {weights:,} of weights"


def adam(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **how)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    inside = {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    return normalised.MuonWithAuxAdam(
        [p for p in model.parameters() if id(p) in inside], [p for p in model.parameters() if id(p) not in inside]
    )


FAMILIES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": adam,
    "AdamW fused": lambda model: adam(model, fused=True),
    "AdamW foreach": lambda model: adam(model, foreach=True),
    "AdamW capturable": lambda model: adam(model, capturable=gpu.REAL, amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "SOAP": lambda model: published.SOAP(model.parameters(), lr=1e-3),
    "Lion": lambda model: normalised.Lion(model.parameters(), lr=1e-3),
    "Muon": muon,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimizer_in_memory_is_measured_as_on_the_cpu(family: str) -> None:
    """Trained on the device; then weights and state are copied, so that both measure the same."""
    model, batches, make = llama().to(DEVICE), moved(tokens()), FAMILIES[family]
    optimizer = make(model)
    trained(model, optimizer, batches)
    before = [p.detach().clone() for p in model.parameters()]
    options: dict[str, Any] = {"depths": False, "max_hvps": 60}
    here = analyze(model, causal_loss, batches, optimizer, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "weights were changed"
    other, state = copied(model, optimizer, FAMILIES["AdamW"] if family.startswith("AdamW") else make)
    if family == "AdamW capturable":
        state.param_groups[0]["amsgrad"] = True
    there = analyze(other, causal_loss, tokens(), state, **options)
    agree(parts(here), parts(there))
    if here.steepest is not None:
        assert there.steepest is not None
        pair = here.steepest.sharpness, there.steepest.sharpness
        assert pair[0] == pytest.approx(pair[1], rel=5e-2), pair  # a lower bound, from starts that rounding can part
        assert here.steepest.dual_norm == pytest.approx(there.steepest.dual_norm, rel=1e-3)


WIDE: dict[str, Any] = {"width": 256, "layers": 1}


@contextmanager
def restoring(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
        assert get() == value, f"the caller's setting is {get()}, not {value}, afterwards"
    finally:
        put(before)


def old_switch() -> AbstractContextManager[None]:
    matmul = torch.backends.cuda.matmul
    return restoring(lambda: matmul.allow_tf32, lambda value: setattr(matmul, "allow_tf32", value), True)


def new_switch() -> AbstractContextManager[None]:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return nullcontext()
    return restoring(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), "tf32")


def precision() -> AbstractContextManager[None]:
    return restoring(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high")


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "precision": precision,
    "old switch": old_switch,
    "new switch": new_switch,
    "autocast": lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: restoring(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
}


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, list[Tensor], float]:
    model, batches = llama(**WIDE).to(DEVICE), moved(tokens(length=65))
    return model, batches, analyze(model, causal_loss, batches, depths=False).full.eigenvalue


@pytest.mark.parametrize("name", AROUND)
def test_what_a_caller_has_set_moves_nothing(name: str, plain: tuple[nn.Module, list[Tensor], float]) -> None:
    model, batches, truth = plain
    with AROUND[name]():
        found = analyze(model, causal_loss, batches, depths=False).full.eigenvalue
    assert found == pytest.approx(truth, rel=1e-5), f"{found} under {name}, {truth} without"


@gpu.real
def test_tf32_would_have_moved_it() -> None:
    """So that what is held still above is worth it."""
    x = torch.randn(512, 512, device=DEVICE)
    exact = x.double() @ x.double()
    with precision():
        tf32 = float(((x @ x).double() - exact).norm() / exact.norm())
    ieee = float(((x @ x).double() - exact).norm() / exact.norm())
    assert tf32 > 1e-4 > 1e-6 > ieee, (tf32, ieee)


@pytest.mark.parametrize("how", ["loss in autocast", "bfloat16", "compiled"])
def test_what_the_model_does_itself_moves_nothing(how: str, plain: tuple[nn.Module, list[Tensor], float]) -> None:
    model, batches, truth = plain

    def autocasting(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return causal_loss(module, batch)

    loss = autocasting if how == "loss in autocast" else causal_loss
    measured: Any = model
    if how == "bfloat16":
        measured = copy.deepcopy(model).bfloat16()
        truth = analyze(copy.deepcopy(measured).float(), causal_loss, batches, depths=False).full.eigenvalue
    elif how == "compiled":
        measured = torch.compile(copy.deepcopy(model), backend="aot_eager")
        with torch.no_grad():
            measured(batches[0][:, :-1])
    found = analyze(measured, loss, batches, depths=False)
    assert found.full.eigenvalue == pytest.approx(truth, rel=1e-5), (found.full.eigenvalue, truth)
    if how == "bfloat16":
        assert {p.dtype for p in measured.parameters()} == {torch.bfloat16}


def big() -> tuple[nn.Module, list[Tensor]]:
    """21 M parameters, and graphs some times as large."""
    model = llama(width=512, layers=6, vocabulary=4096, length=256).to(DEVICE)
    return model, moved(tokens(batches=2, rows=16, length=129, vocabulary=4096))


@gpu.real
def test_a_limit_of_memory_is_kept_and_nearly_used() -> None:
    model, batches = big()
    optimizer = adam(model)
    trained(model, optimizer, batches, steps=2)
    optimizer.zero_grad()
    torch.cuda.empty_cache()
    for limit in (3 * GIB, 6 * GIB):
        torch.cuda.reset_peak_memory_stats()
        report = analyze(model, causal_loss, batches, optimizer, depths=False, memory=limit, max_hvps=20)
        peak = torch.cuda.max_memory_allocated()
        said = next(f.message for f in report.findings if f.code == "memory-plan")
        expected = float(re.search(r"([\d.]+) GiB expected", said)[1]) * GIB
        say(f"--memory {limit / GIB:g} GiB: {expected / GIB:.2f} expected, peak {peak / GIB:.2f}; {said}")
        assert peak <= limit, f"{peak / GIB:.2f} GiB of {limit / GIB:.2f}: {said}"
        assert expected == pytest.approx(peak, rel=0.2), f"{expected / GIB:.2f} expected, {peak / GIB:.2f} taken: {said}"
        assert report.cost.peak_memory_bytes == peak


@gpu.real
def test_memory_that_runs_out_leads_to_a_leaner_plan() -> None:
    """A quarter of what the first plan took is all there is: the number is the same, or the error says what is missing."""
    model, batches = big()
    torch.cuda.reset_peak_memory_stats()
    truth = analyze(model, causal_loss, batches, depths=False, max_hvps=12, mode="kept")
    peak, base = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    seen = []
    for share in (0.6, 0.35):
        torch.cuda.set_per_process_memory_fraction((base + share * (peak - base)) / total)
        try:
            found = analyze(model, causal_loss, batches, depths=False, max_hvps=12)
        except OutOfMemoryError as error:
            seen.append(f"{share}: {error}")
        else:
            codes = [f.code for f in found.findings]
            seen.append(f"{share}: {found.cost.mode}, {'cut' if 'cut-batches' in codes else 'whole'} batches")
            assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-2), seen
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() <= base + 2**24, f"{torch.cuda.memory_allocated() - base:,} bytes stay: {seen}"
    say(f"of a peak of {peak / GIB:.2f} GiB, {base / GIB:.2f} before: {'; '.join(seen)}")
    assert "fresh" in seen[0], seen
    again = analyze(model, causal_loss, batches, depths=False, max_hvps=12)
    assert again.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-2)


@gpu.real
def test_no_memory_at_all_is_one_line_and_exit_code_2() -> None:
    few = "import torch; torch.cuda.set_per_process_memory_fraction(2**20 / torch.cuda.mem_get_info()[1])"
    out, err = ended(started("analyze", HOT, "--device", "cuda", "--quiet", before=few), code=2)
    said = err.strip()
    say(f"no memory: {said[-300:]}")
    assert "out of memory" in said.lower(), said
    assert "Traceback" not in out + err


@gpu.real
def test_a_jobs_own_peak_is_left_alone() -> None:
    torch.cuda.reset_peak_memory_stats()
    torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    peak = torch.cuda.max_memory_allocated()
    model = llama().to(DEVICE)
    analyze(model, causal_loss, moved(tokens()), depths=False, max_hvps=5)
    assert torch.cuda.max_memory_allocated() >= peak >= GIB, (torch.cuda.max_memory_allocated(), peak)


def test_layers_and_depths_of_a_model_in_memory(plain: tuple[nn.Module, list[Tensor], float]) -> None:
    model, batches = llama(layers=3), tokens()
    assert find_blocks(model) is not None
    options: dict[str, Any] = {"max_hvps": 100, "truncated": True}
    there = analyze(copy.deepcopy(model), causal_loss, batches, **options)
    agree(parts(analyze(model.to(DEVICE), causal_loss, moved(batches), **options)), parts(there))


def test_an_explanation_is_the_cpus() -> None:
    here, there = (curvcli.explain(HOT, tokens=1024, device=str(device)) for device in (DEVICE, "cpu"))
    assert here.verdict == there.verdict
    assert here.estimate.eigenvalue == pytest.approx(there.estimate.eigenvalue, rel=5e-3)
    assert here.per == there.per == "prediction", (here.per, [f.message for f in here.findings])
    assert here.sum == pytest.approx(here.estimate.eigenvalue, rel=1e-2), (here.sum, here.estimate.eigenvalue)
    masses = [{m.name: m.mass for m in found.parts} for found in (here, there)]
    assert masses[0] == pytest.approx(masses[1], abs=0.03), masses
    assert here.sequences[0].sequence == there.sequences[0].sequence
    assert [r.verdict for r in here.removals] == [r.verdict for r in there.removals]


def test_an_analysis_with_its_vectors_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = llama().to(DEVICE), moved(tokens())
    truth = analyze(model, causal_loss, batches, depths=False)
    monkeypatch.setattr("curvcli.analysis.solve.unplanned", lambda *given: (50, True))
    found = analyze(model, causal_loss, batches, depths=False)
    agree(parts(found), parts(truth))
    assert found.generalisation.rho_low == truth.generalisation.rho_low  # there is no optimizer
