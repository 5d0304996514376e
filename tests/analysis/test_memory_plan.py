"""Memory predicted against the peak of a process that measures, and what is chosen for a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.plan import LEAST, Sizes, plan, predicted
from curvcli.errors import CurvError

GIB = 2**30
SIZES = Sizes(
    process=GIB // 2, model=GIB // 2, vector=GIB // 2, largest=GIB // 8, state=GIB, graph=GIB // 4, logits=GIB // 16, rows=16
)


def test_what_fits_is_the_fastest_that_does() -> None:
    roomy = plan(SIZES, 1000 * GIB, 8)
    assert (roomy.mode, roomy.batch_rows, roomy.basis) == ("kept", 8, 24)
    last = roomy
    for limit in (38, 33, 29, 25, 21, 18, 16, 15):
        found = plan(SIZES, limit * GIB, 8)
        assert found.total <= limit * GIB
        assert found.basis <= last.basis or (last.mode, found.mode) == ("kept", "fresh")
        assert not (last.mode == "fresh" and found.mode == "kept" and found.basis >= 12)
        last = found
    assert last.mode == "fresh"
    assert last.batch_rows < 8
    assert LEAST <= last.basis < 12


def test_no_choice_leaves_room_for_a_better_one() -> None:
    for tenths in range(160, 450, 7):
        found = plan(SIZES, tenths / 10 * GIB, 8)
        if found.basis < 24 and found.basis != 11:
            assert predicted(SIZES, found.mode, found.batch_rows, found.basis + 1).total > tenths / 10 * GIB  # type: ignore[arg-type]
        if found.mode == "fresh" and found.basis >= 12:
            assert predicted(SIZES, "kept", 1, 12).total > tenths / 10 * GIB


def test_a_mode_that_is_insisted_on() -> None:
    assert plan(SIZES, 1000 * GIB, 8, "fresh").mode == "fresh"
    with pytest.raises(CurvError, match=r"needs .* GiB"):
        plan(replace(SIZES, rows=1000), 100 * GIB, 8, "kept")
    assert plan(replace(SIZES, rows=1000), 100 * GIB, 8).mode == "fresh"


def test_where_nothing_fits_it_says_what_would() -> None:
    with pytest.raises(CurvError, match=r"needs (\d+\.\d) GiB of memory at least, the limit is 4.0 GiB") as error:
        plan(SIZES, 4 * GIB, 8)
    needed = float(str(error.value).split("needs ")[1].split()[0])
    assert plan(SIZES, (needed + 0.1) * GIB, 8).basis == LEAST
    with pytest.raises(CurvError):
        plan(SIZES, (needed - 0.1) * GIB, 8)


def test_a_large_model_has_its_free_blocks_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):  # noqa: N818
        pass

    def told() -> bool:
        raise Told

    monkeypatch.setattr("curvcli.curvature.resources.return_blocks", told)
    monkeypatch.setattr("curvcli.analysis.checkpoint.LARGE", 2**10)
    sample = Path(__file__).parents[2] / "sample_checkpoints" / "calm" / "checkpoint-60"
    with pytest.raises(Told):
        open_for_analysis(sample, Options(tokens=256)).measure()


MEASURE = """
import json, sys
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.plan import Sizes, predicted
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import build, graph_bytes
from curvcli.curvature.inverse_root import Diagonal, ModelRoot
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Problem
from curvcli.data.tasks import causal_loss

def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

kind, mode, rows, length, basis = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
torch.manual_seed(0)
causal_loss(torch.nn.Embedding(8, 8), torch.zeros(1, 3, dtype=torch.int64))  # what is loaded at first use
process = memory("VmRSS")
if kind == "gpt2":
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32768, n_positions=256, n_embd=384, n_layer=2, n_head=6))
else:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16384, hidden_size=448, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=7))
vocabulary = model.config.vocab_size
batches = torch.randint(vocabulary, (rows, length + 1)).split(1)
problem = Problem.create(model, causal_loss, batches)
parameters = problem.parameters
bytes_of = {n: p.numel() * 4 for n, p in parameters.items()}
sizes = Sizes(
    process=process, model=sum(bytes_of.values()), vector=sum(bytes_of.values()), largest=max(bytes_of.values()),
    state=sum(bytes_of.values()), graph=graph_bytes(problem), logits=length * vocabulary * 4, rows=rows)
Path("/proc/self/clear_refs").write_text("5")  # what planning took does not count
root = ModelRoot({n: Diagonal(torch.ones_like(p)) for n, p in parameters.items()}, parameters)
operator = PreconditionedHessian(build(problem, mode), root)
Davidson(basis=basis, max_products=basis + 1).extremes(operator)  # one restart
told = predicted(sizes, mode, 1, basis)
print(json.dumps({"told": told.total, "peak": memory("VmHWM"), "parts": vars(told)}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "mode", "rows", "length", "basis"),
    [("gpt2", "fresh", 1, 64, 6), pytest.param("llama", "kept", 3, 96, 6, marks=pytest.mark.slow)],
)
def test_the_peak_is_within_a_fifth_of_the_prediction(kind: str, mode: str, rows: int, length: int, basis: int) -> None:
    command = [sys.executable, "-c", MEASURE, kind, mode, str(rows), str(length), str(basis)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["told"] == pytest.approx(found["peak"], rel=0.2), found
