"""What tests on a GPU share: the device, a small Llama with its batches, and commands in a process of their own.

`CURV_TEST_DEVICE=cpu` runs what can be run without a GPU, so that the tests themselves are tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when CUDA's library starts: without it sums of cuBLAS may come in any order, and nothing is bit-equal.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from places import ROOT
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvcli.data.tasks import causal_loss

DEVICE = torch.device(os.environ.get("CURV_TEST_DEVICE", "cuda"))
REAL = DEVICE.type == "cuda"
VOCABULARY = 97
LINES: list[str] = []  # measured on the way, shown at the end

there = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        REAL and not torch.cuda.is_available(), reason="no GPU that torch can use; CURV_TEST_DEVICE=cpu tries the tests"
    ),
]
real = pytest.mark.skipif(not REAL, reason="of a GPU's own memory, kernels or clock")


def say(line: str) -> None:
    """A number for whoever reads the run."""
    LINES.append(line)


def llama(*, width: int = 64, layers: int = 2, vocabulary: int = VOCABULARY, length: int = 128, **more: Any) -> nn.Module:
    """Weights that are the same on every device: drawn on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length, use_cache=False, **more,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    with torch.no_grad():  # as far from its start as a trained one: curvature is not that of noise
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def tokens(
    *, batches: int = 3, rows: int = 4, length: int = 33, vocabulary: int = VOCABULARY, seed: int = 1
) -> list[Tensor]:
    """Windows of ids, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        found.append(torch.minimum(ids, torch.randint(vocabulary, (rows, length), generator=generator)))
    return found


def moved(batches: list[Any], device: torch.device | str = DEVICE) -> list[Any]:
    return [batch.to(device) for batch in batches]


def trained(model: nn.Module, optimizer: Any, batches: list[Any], steps: int = 8) -> None:
    every = optimizer if isinstance(optimizer, list) else [optimizer]
    for step in range(steps):
        loss = causal_loss(model, batches[step % len(batches)])
        loss.backward()
        for one in every:
            one.step()
            one.zero_grad()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
    """Model and optimizer, state and all, on the CPU in float32."""
    import copy

    other = copy.deepcopy(model).to("cpu").float()
    new = make(other)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if mine in optimizer.state:
            new.state[theirs] = _to_cpu(optimizer.state[mine])
    return other, new


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _to_cpu(part) for key, part in value.items()}
    return [_to_cpu(part) for part in value] if isinstance(value, list) else value


def apart(found: list[Tensor], truth: list[Tensor]) -> float:
    """Norm of the difference over that of the truth, in float64."""
    pairs = [(f.detach().cpu().double(), t.detach().cpu().double()) for f, t in zip(found, truth, strict=True)]
    return float(
        sum((f - t).square().sum() for f, t in pairs) ** 0.5
        / max(1e-300, float(sum(t.square().sum() for _, t in pairs)) ** 0.5)
    )


def started(*arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """`curv` in a process of its own; `before` is run ahead of it."""
    code = f"{before}\nfrom curvcli.cli import main\nmain()"
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {**os.environ, "PYTHONPATH": found, "COLUMNS": "200", "CURV_TRACEBACK": "", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own,
    )


def ended(process: subprocess.Popen[str], code: int | None = 0, timeout: float = 240) -> tuple[str, str]:
    """What it printed; the exit code is the one expected."""
    out, err = process.communicate(timeout=timeout)
    assert code is None or process.returncode == code, f"exit {process.returncode}, not {code}\n{out[-3000:]}\n{err[-3000:]}"
    return out, err


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def estimates(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every eigenvalue of a document with its certificate, by its place."""
    if isinstance(value, dict):
        if {"eigenvalue", "residual", "status"} <= value.keys():
            yield place or "report", value
        for key, part in value.items():
            yield from estimates(part, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from estimates(part, f"{place}[{index}]")


def agree(one: Any, other: Any, slack: float = 2e-3) -> None:
    """The same parts with the same statuses, and eigenvalues that differ by no more than their residuals and rounding."""
    first, second = dict(estimates(one)), dict(estimates(other))
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    wrong = []
    for place, mine in first.items():
        theirs = second[place]
        if mine["status"] != theirs["status"]:
            wrong.append(
                f"{place}: {mine['status']} and {theirs['status']}, {mine['eigenvalue']} and {theirs['eigenvalue']}"
            )
        for key in ("eigenvalue", "rho"):
            a, b = mine.get(key), theirs.get(key)
            if (a is None) != (b is None):
                wrong.append(f"{place}.{key}: {a} and {b}")
            elif a is not None and b is not None and mine["eigenvalue"]:
                scale = abs(a / mine["eigenvalue"])
                allowed = scale * max(mine["residual"], theirs["residual"]) + slack * max(abs(a), abs(b))
                if not abs(a - b) <= allowed:
                    wrong.append(f"{place}.{key}: {a:.7g} and {b:.7g} differ by more than {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Within it each time that the CPU waits for the GPU is noted, with where."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for one in seen:
                if "synchronizing" in str(one.message) and "prototype" not in str(one.message):  # what it says of itself
                    found.append(f"{Path(one.filename).name}:{one.lineno}")


def counted(places: list[str]) -> str:
    """Places by how often, most first."""
    return ", ".join(f"{places.count(p)} x {p}" for p in sorted(set(places), key=lambda p: -places.count(p))[:12])
