"""Whole analyses of models of real shapes, random weights, within a limit of memory: `python benchmarks/shapes.py gpt2`.

A checkpoint as the transformers Trainer leaves one is written to a temporary folder by three AdamW steps on tokens of Zipf's
law, whose peak is kept for comparison, and then analyzed in a process of its own on one thread. `plan` as the shape makes
nothing of that size: it says what the shapes would need, by the plan of `--memory`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import HERE, save
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.plan import LEAST, WANTED, Sizes, predicted
from curvcli.curvature.hvp import graph_bytes
from curvcli.curvature.problem import Problem
from curvcli.data.tasks import causal_loss

GIB = 2**30
STEPS = 3
PROCESS = 0.6  # GiB that torch and transformers take once they are imported


# vocabulary, width, of the MLP, layers, heads of queries, of keys
LLAMAS = {
    "smollm2": (49152, 576, 1536, 30, 9, 3),
    "llama-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama-3b": (128256, 3072, 8192, 28, 24, 8),
    "tiny": (512, 64, 128, 2, 4, 2),  # of no model: to see that a script runs
}


def network(shape: str, vocabulary: int | None = None, layers: int | None = None) -> PreTrainedModel:
    """Random weights in the shape of a model that people train, of less vocabulary or fewer layers where they are given."""
    torch.manual_seed(0)
    if shape == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary or 50257, n_layer=layers or 12, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        )
    tokens, width, inner, depth, heads, keys = LLAMAS[shape]
    config = LlamaConfig(
        vocab_size=vocabulary or tokens, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def needed(shape: str, rows: int, length: int) -> dict[str, Any]:
    """What an analysis of a Trainer's checkpoint needs by plan; a row's graph is measured with one layer and with two."""

    def graph(layers: int) -> int:
        model = network(shape, 256, layers)
        return graph_bytes(Problem.create(model, causal_loss, [torch.randint(256, (1, length + 1))]))

    one, two = graph(1), graph(2)
    with torch.device("meta"):
        model = network(shape)
    vocabulary, layers = model.config.vocab_size, model.config.num_hidden_layers
    nbytes = [p.nbytes for p in model.parameters()]
    sizes = Sizes(
        held=int(PROCESS * GIB) + sum(nbytes),  # weights: P and the next update are on disk, moments go once they are read
        aside=True,
        vector=sum(nbytes),
        largest=max(nbytes),
        graph=one + (layers - 1) * (two - one),
        logits=length * vocabulary * 4,
        rows=rows,
    )
    basis = {"8 vectors": LEAST, "16 vectors": WANTED, "32 vectors": 32}
    plans = {name: round(predicted(sizes, "fresh", 1, size).total / GIB, 1) for name, size in basis.items()}
    plans["on disk"] = round(predicted(sizes, "fresh", 1, 32, offload=True).total / GIB, 1)
    said = {"shape": shape, "parameters": sum(nbytes) // 4, "rows": rows, "length": length, "vector_GiB": sum(nbytes) / GIB}
    return {**said, "graph_of_a_row_GiB": round(sizes.graph / GIB, 2), "peak_GiB": plans}


def peak() -> float:
    """Largest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def zipf(vocabulary: int, rows: int, length: int) -> Tensor:
    """Tokens by Zipf's law, of shape (rows, length)."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return torch.multinomial(weights, rows * length, replacement=True).view(rows, length)


def write(shape: str, folder: Path, rows: int, length: int, layers: int | None = None) -> dict[str, Any]:
    """A Trainer's checkpoint and its tokens, and what a training step of all rows at once took."""
    model = network(shape, layers=layers).train()
    vocabulary = model.config.vocab_size
    windows = zipf(vocabulary, STEPS * rows, length + 1)
    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4)
    cpu_seconds = 0.0
    for batch in windows.split(rows):
        started = time.process_time()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cpu_seconds = time.process_time() - started
    found = {"training_step_peak_GiB": round(peak(), 2), "training_step_cpu_seconds": round(cpu_seconds, 1)}
    checkpoint = folder / f"checkpoint-{STEPS}"
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": []}))
    windows.flatten().numpy().astype("<u2").tofile(folder / "tokens.bin")
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


def measure(folder: Path, rows: int, length: int, memory: str | None, budget: float, hvps: int) -> dict[str, Any]:
    """The analysis, and what had been taken by the verdict."""
    started = time.monotonic()
    passed: dict[str, tuple[float, float, float]] = {}

    def progress(stage: str, done: float) -> None:
        if stage not in passed:
            passed[stage] = (round(time.monotonic() - started, 1), round(time.process_time(), 1), round(peak(), 2))
            print(stage, *passed[stage], file=sys.stderr, flush=True)

    options = Options(
        data=folder / "tokens.bin", tokens=rows * length, sequence_length=length,
        memory=memory, depths=False, deadline=started + budget, max_hvps=hvps,
    )  # fmt: skip
    report = analyze_checkpoint(folder / f"checkpoint-{STEPS}", options, progress)
    solves = [report.full, *([report.body] if report.body else [])]
    parts = [e.status for e in [*([report.ends] if report.ends else []), *report.layers]]
    # The stages after the next update begin with the verdict known.
    verdict = passed.get("full model with rare rows") or passed.get("embedding, head", passed["report"])
    return {
        "memory": memory,
        "max_hvps": hvps,
        "plan": [f.message for f in report.findings if f.code == "memory-plan"],
        "mode": report.cost.mode,
        "seconds_to_verdict": verdict[0],
        "cpu_seconds_to_verdict": verdict[1],
        "peak_to_verdict_GiB": verdict[2],
        "solves": [{"status": e.status, "hvps": e.hvps, "rho": e.rho, "residual": e.residual} for e in solves],
        "bracket": [report.generalisation.rho_low, report.generalisation.rho_high],
        "verdict": report.verdict,
        "parts_converged": f"{parts.count('converged')} of {len(parts)}, {parts.count('skipped')} skipped",
        "hvps": report.cost.hvps,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_GiB": round(peak(), 2),
        "stages": passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=["plan", "gpt2", "smollm2"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--memory", help="limit, as 8GiB")
    parser.add_argument("--hvps", type=int, default=100, help="products that one estimate may take")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing more is started")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.folder:
        found = (
            write(options.shape, options.folder, options.rows, options.length, options.layers)
            if options.write
            else measure(options.folder, options.rows, options.length, options.memory, options.budget, options.hvps)
        )
        print(json.dumps(found))
        return
    if options.shape == "plan":
        save("shapes_plan", {"shapes": [needed(s, options.rows, options.length) for s in ("gpt2", *LLAMAS) if s != "tiny"]})
        return
    with TemporaryDirectory() as folder:
        said = {"shape": options.shape, "layers": options.layers, "rows": options.rows, "length": options.length}
        said |= {"threads": options.threads, "torch": torch.__version__}
        said |= _child("--in", folder, "--write") | _child("--in", folder)
    file = HERE / "results" / "shapes.json"
    known = json.loads(file.read_text()) if file.exists() else []
    known = [k for k in known if any(k.get(key) != said[key] for key in ("shape", "layers", "memory", "max_hvps"))]
    file.write_text(json.dumps([*known, said], indent=2) + "\n")
    print(json.dumps(said, indent=2))


def _child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
