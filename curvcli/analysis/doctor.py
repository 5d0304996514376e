"""`curv doctor`: what this machine and a checkpoint allow, from headers and milliseconds of work, and what to run next."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from curvcli.analysis.checkpoint import DEFAULT_TOKENS, architecture_of
from curvcli.analysis.config import find_config
from curvcli.analysis.plan import WANTED
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import UNNAMED, Checkpoint
from curvcli.curvature.resources import free_bytes
from curvcli.data.shards import find_sources
from curvcli.documents import Versions
from curvcli.errors import CurvError, UnsupportedError, counted
from curvcli.optimizers import rule_for
from curvcli.optimizers.base import Group, OptimizerView

Status = Literal["ok", "info", "warning", "error"]
# What an installation may lack: package, what it is for, how it is had.
_EXTRAS = (
    ("pyarrow", "parquet and Arrow data", "pip install 'curvcli[data]'"),
    ("zstandard", "data compressed with zstd", "pip install 'curvcli[data]'"),
    ("peft", "LoRA adapters", "pip install 'curvcli[peft]'"),
    ("lightning", "the Lightning callback", "pip install 'curvcli[lightning]'"),
    ("pandas", ".to_frame() in notebooks", "pip install 'curvcli[notebook]'"),
    ("s3fs", "checkpoints behind s3://", "pip install 'curvcli[s3]'"),
    ("gcsfs", "checkpoints behind gs://", "pip install 'curvcli[gcs]'"),
)


_COUNTS = ("parameters with state", "state entries", "groups")  # of a summary, beside the options


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: for people, a word or two.
        status: ok; info, a fact that asks for nothing; warning, a part will be missing; error, nothing can be measured.
        found: what is there.
        remedy: what to do about it; None where there is nothing to do.
    """

    what: str
    status: Status
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Examined:
    """What `examine` found, and the commands that it suggests."""

    machine: Sequence[Check]
    extras: Sequence[Check]
    checkpoint: Sequence[Check]
    commands: Sequence[str]

    @property
    def able(self) -> bool:
        """Whether what was looked at can be measured."""
        return all(check.status != "error" for check in (*self.machine, *self.checkpoint))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        groups = {"machine": self.machine, "extras": self.extras, "checkpoint": self.checkpoint}
        return {
            "able": self.able,
            **{name: [asdict(check) for check in checks] for name, checks in groups.items()},
            "commands": list(self.commands),
        }


def examine(path: Path | None = None, data: Sequence[Path] | None = None, model: str | None = None) -> Examined:
    """Look at the machine and, where one is given, at a checkpoint's headers. What is wrong is a check: nothing is raised.

    Args:
        path: checkpoint, run directory or URL.
        data: of the measurement; from curv.toml by default.
        model: network of the weights, where it is not beside them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine, extras = list(_machine(device)), list(_extras())
    if path is None:
        return Examined(machine, extras, [], ["curv demo", "curv doctor CHECKPOINT"])
    named = shlex.quote(str(path))
    try:
        checkpoint = open_checkpoint(path, architecture_of(model))
        optimizer = checkpoint.optimizer.summary() if checkpoint.optimizer else None
    except CurvError as error:
        return Examined(machine, extras, [_wrong("checkpoint", error)], [])
    read = _data(checkpoint, data)
    checks = [
        Check("checkpoint", "ok", f"{checkpoint.path} ({checkpoint.format}, {_step(checkpoint)})"),
        _network(checkpoint),
        *_optimizer(checkpoint, optimizer),
        read,
        _memory(checkpoint, optimizer, device),
        *(Check("finding", "warning", f"{f.code}: {f.message}") for f in checkpoint.findings),
    ]
    given = "".join(f" --data {shlex.quote(str(file))}" for file in data or ())
    unnamed = checkpoint.architecture == UNNAMED
    network = "" if model is None else f" --model {shlex.quote(model)}"
    given += " --model package.module:factory" if unnamed else network
    if read.status == "error":
        # A configuration that cannot be read has to be mended first: neither of these would run.
        ways = [f"curv init {named}{network}", f"curv analyze {named} --data FILE{given}"]
        return Examined(machine, extras, checks, ways if _has_config(checkpoint) else [f"curv doctor {named}{given}"])
    lr = " --lr LR" if any(c.what == "learning rate" and c.status == "warning" for c in checks) else ""
    commands = [f"curv analyze {named}{given}{lr} --estimate", f"curv analyze {named}{given}{lr}"]
    return Examined(machine, extras, checks, commands)


def _machine(device: torch.device) -> Iterator[Check]:
    found = Versions.installed()
    yield Check("curv", "info", f"{found.curvcli}, Python {platform.python_version()} on {platform.system()}")
    if found.transformers is None:
        yield Check("transformers", "error", "not installed", "pip install transformers")
    yield Check("torch", "info", f"{found.torch}, transformers {found.transformers}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU that torch can use"
    threads = torch.get_num_threads()
    yield Check("device", "ok", f"{device.type}: {name}, {counted(cores or 1, 'core')}, {counted(threads, 'thread')}")
    yield Check("free memory", "info", f"{_size(free_bytes(device))} to plan with on {device.type}, 70 % of what is free")
    yield _attention(device)


def _attention(device: torch.device) -> Check:
    """Which kernels can be differentiated twice, as a Hessian-vector product does: tried, on a few numbers."""
    fused, math = _twice(device, None), _twice(device, SDPBackend.MATH)
    if not math:
        return Check(
            "attention", "error", "no attention kernel of this torch has a second derivative", "install another torch"
        )
    if fused:
        return Check("attention", "ok", "the default kernel has a second derivative, and so has math")
    return Check("attention", "ok", "math kernel or eager, which curv takes; fused kernels have no second derivative")


def _twice(device: torch.device, backend: SDPBackend | None) -> bool:
    x = torch.linspace(-1, 1, 2 * 4 * 8, device=device).reshape(1, 2, 4, 8).requires_grad_()
    try:
        if backend is None:
            out = scaled_dot_product_attention(x, x, x)
        else:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(x, x, x)
        # Squared, so that the second derivative is not 0 anyway.
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)
    except RuntimeError:
        return False
    return True


def _extras() -> Iterator[Check]:
    for package, what, remedy in _EXTRAS:
        try:
            yield Check(package, "ok", f"{version(package)}: {what}")
        except PackageNotFoundError:
            yield Check(package, "info", f"not installed: {what}", remedy)


def _network(checkpoint: Checkpoint) -> Check:
    if checkpoint.architecture == UNNAMED:
        remedy = "pass --model package.module:factory, or --model DIR of a transformers config.json"
        return Check("network", "error", checkpoint.architecture, remedy)
    return Check("network", "ok", f"{checkpoint.architecture}, {checkpoint.task}")


def _optimizer(checkpoint: Checkpoint, summary: Mapping[str, object] | None) -> Iterator[Check]:
    if checkpoint.optimizer is None or summary is None:
        yield Check(
            "optimizer", "warning", "no state in the checkpoint: the second moment is estimated, and there is no verdict",
            "save optimizer state, or give a checkpoint that has it",
        )  # fmt: skip
        yield Check("learning rate", "warning", "unknown: there is no edge without one", "pass --lr LR")
        return
    if "not used" in summary:
        yield Check("optimizer", "error", str(summary["not used"]), "pass --optimizer none for the bare Hessian")
        return
    try:
        name = _name_of(summary)
    except UnsupportedError as error:
        # Of some formats the headers have a part of the options: whoever measures sees all.
        yield Check("optimizer", "warning", f"as far as the headers tell, {error.message}", error.hint)
        name = "optimizer state"
    except CurvError:
        name = "optimizer state"
    entries = summary.get("state entries")
    kept = f", with {', '.join(map(str, entries))}" if isinstance(entries, list) else ""
    yield Check("optimizer", "ok", f"{name}{kept}")
    lr = summary.get("lr")
    if isinstance(lr, (int, float)) and lr > 0:
        yield Check("learning rate", "ok", f"{lr:g}, of the checkpoint")
    elif checkpoint.last_lr is not None:
        stored = "0 in the checkpoint, as a schedule that has ended leaves it" if lr == 0 else "not among the headers"
        whose = "log has" if checkpoint.last_lr_source == "log" else "arguments give its last step"
        yield Check("learning rate", "ok", f"{stored}; the run's {whose} {checkpoint.last_lr:g}")
    elif lr == 0:
        yield Check("learning rate", "warning", "0 in the checkpoint, and the run has no log", "pass --lr LR")


def _name_of(summary: Mapping[str, object]) -> str:
    """The optimizer, as far as names of state entries and options tell. Raises UnsupportedError where none is known."""
    entries = summary.get("state entries")
    if not isinstance(entries, list):
        return "optimizer state"
    options = {key: value for key, value in summary.items() if key not in _COUNTS}
    view = OptimizerView((Group(("seen",), options),), {"seen": {str(key): torch.zeros(()) for key in entries}})
    return rule_for(view).name(view)


def _has_config(checkpoint: Checkpoint) -> bool:
    """Whether the configuration, if there is any, can be read."""
    try:
        find_config(checkpoint.path)
    except CurvError:
        return False
    return True


def _data(checkpoint: Checkpoint, data: Sequence[Path] | None) -> Check:
    try:
        config, file = find_config(checkpoint.path, data=not data)
        wanted = data or config.data
        if not wanted:
            where = f"{file} names none" if file else "there is no curv.toml beside or above the checkpoint"
            return Check("data", "error", where, "pass --data FILE, or write one with curv init")
        sources = find_sources(wanted, checkpoint)
    except CurvError as error:
        return _wrong("data", error)
    known = [source.tokens for source in sources if source.tokens is not None]
    shown = f"{sources[0].path} ({sources[0].kind})" + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    least = config.tokens or DEFAULT_TOKENS
    if len(known) == len(sources) and sum(known) < least:
        remedy = "a verdict on few tokens is often unresolved: give more data"
        return Check("data", "warning", f"{shown}: {counted(sum(known), 'token')}, of {least:,} asked for", remedy)
    return Check("data", "ok", ": ".join([shown, *([counted(sum(known), "token")] if known else [])]))


def _memory(checkpoint: Checkpoint, summary: Mapping[str, object] | None, device: torch.device) -> Check:
    """The least that a measurement holds, from headers: kept graphs and activations come on top."""
    values = sum(prod(tensor.shape) for tensor in checkpoint.tensors)
    entries = (summary or {}).get("state entries")
    moments = len(entries) if isinstance(entries, list) else 0
    # In float32, as it is measured, whatever the files have.
    least, free = 4 * values * (1 + moments + WANTED), free_bytes(device)
    found = f"at least {_size(least)}: {values:,} float32 weights, their state, and {WANTED} vectors of that size"
    if least > free:
        remedy = "measure on a machine with more, or watch from inside the job: docs/how-to/training.md"
        return Check("memory", "error", f"{found}; {_size(free)} can be planned with", remedy)
    return Check("memory", "ok", found)


def _wrong(what: str, error: CurvError) -> Check:
    return Check(what, "error", error.message, error.hint or None)


def _step(checkpoint: Checkpoint) -> str:
    return f"step {checkpoint.step:,}" if checkpoint.step is not None else "step unknown"


def _size(count: float) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.3g} {name}"
