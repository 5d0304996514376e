"""Damage at random to a file of a checkpoint or of data, and what becomes of it: a result, or one line."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import NETWORKS, RANKED, earlier, fresh, master, tokenizer
from safetensors.torch import load_file, save_file
from stored import stored

from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.state.soundness import state_findings, weight_findings
from curvcli.data.shards import read_shard
from curvcli.errors import CurvError
from curvcli.optimizers.preconditioner import prepare

SECONDS = 30
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
# Damages that leave every file one that its library wrote: only the set of them is wrong.
MIXED = ("files swapped", "ranks exchanged", "a step before")


class Draw:
    """A damage is a function of two numbers, so that a failing one is told by them."""

    def __init__(self, kind: int, seed: int, earlier: Path | None = None) -> None:
        self.kind = kind
        self.random = np.random.default_rng(seed)
        self.earlier = earlier

    def below(self, n: int) -> int:
        return int(self.random.integers(max(1, n)))


def _flip(file: Path, draw: Draw, span: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.below(min(len(content), span or len(content)))] ^= 1 << draw.below(8)
    file.write_bytes(bytes(content))


def _truncate(file: Path, draw: Draw) -> None:
    file.write_bytes(file.read_bytes()[: draw.below(file.stat().st_size)])


def _overwrite(file: Path, draw: Draw) -> None:
    """A run of bytes by zeros, by 255 or by noise."""
    content = bytearray(file.read_bytes())
    start, length = draw.below(len(content)), 1 + draw.below(64)
    fill = (b"\0" * length, b"\xff" * length, draw.random.bytes(length))[draw.below(3)]
    content[start : start + length] = fill
    file.write_bytes(bytes(content))


def _insert(file: Path, draw: Draw) -> None:
    content = file.read_bytes()
    at = draw.below(len(content))
    file.write_bytes(content[:at] + draw.random.bytes(1 + draw.below(16)) + content[at:])


def _number(file: Path, draw: Draw) -> None:
    """A digit run of a header or JSON by another number."""
    content = file.read_bytes()
    digits = [i for i in range(min(len(content), 20_000)) if content[i : i + 1].isdigit()]
    if digits:
        at = digits[draw.below(len(digits))]
        end = at
        while content[end : end + 1].isdigit():
            end += 1
        other = (b"0", b"-1", b"99999999999", b"1e999", b"null", b'"x"', b"NaN", b"[]")[draw.below(8)]
        file.write_bytes(content[:at] + other + content[end:])


def _swap(file: Path, draw: Draw) -> None:
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p != file)
    if others:
        other = others[draw.below(len(others))]
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)


def _exchange(file: Path, draw: Draw) -> None:
    """With the same file of another rank."""
    pattern = re.compile(r"(?<=rank_)\d|(?<=__)\d(?=_)")
    twins = [p for p in sorted(file.parent.iterdir()) if p != file and pattern.sub("", p.name) == pattern.sub("", file.name)]
    if twins and pattern.search(file.name):
        first, second = file.read_bytes(), twins[0].read_bytes()
        file.write_bytes(second)
        twins[0].write_bytes(first)


def _before(file: Path, draw: Draw) -> None:
    """The same file as it was a step before."""
    found = (
        [p for p in sorted(draw.earlier.rglob(file.name)) if _unnumbered(p.parent) == _unnumbered(file.parent)]
        if (draw.earlier)
        else []
    )
    if found:
        file.write_bytes(found[0].read_bytes())


def _unnumbered(directory: Path) -> str:
    return "" if directory.name in ("copy", "SHARDED_STATE_DICT-earlier") else re.sub(r"global_step\d+", "", directory.name)


def _directory(file: Path, draw: Draw) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path, draw: Draw) -> None:
    file.unlink()
    os.mkfifo(file)


def _loop(file: Path, draw: Draw) -> None:
    file.unlink()
    file.symlink_to(file)


def _dtypes(file: Path, draw: Draw) -> None:
    """Another type for a tensor: by name in a header, by value in a torch file."""
    content = file.read_bytes()
    others = ((b'"F32"', b'"I32"'), (b"FloatStorage", b"LongStorage"), (b"FloatStorage", b"HalfStorage"))
    for old, new in others:
        if old in content and draw.below(2):
            file.write_bytes(content.replace(old, new, 1 + draw.below(3)))
            return
    file.write_bytes(content.replace(b'"F32"', b'"BF16"'))


def _raw_value(file: Path, draw: Draw) -> None:
    """The same in a file that torch does not load alone, as .distcp: four bytes of its data, or a run of them."""
    content = bytearray(file.read_bytes())
    if len(content) >= 8:
        start, length = 4 * draw.below(len(content) // 4), 4 * (1 + draw.below(16))
        number = struct.pack("<f", (float("nan"), float("inf"), -1.0, 0.0, 1e30)[draw.below(5)])
        content[start : start + length] = number * (len(content[start : start + length]) // 4)
    file.write_bytes(bytes(content))


def _values(file: Path, draw: Draw) -> None:
    """NaN, infinity, zero, a negative or an absurd number in one tensor of a torch file."""
    try:
        # Cloned: what is read may be a map of the file that is written below.
        document = (
            {name: tensor.clone() for name, tensor in load_file(file).items()}
            if file.suffix == ".safetensors"
            else torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
        )
    except Exception:
        return _raw_value(file, draw)
    tensors: list[torch.Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            tensors.append(value.data)
        elif isinstance(value, (dict, list, tuple)):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)

    walk(document)
    if tensors:
        tensor = tensors[draw.below(len(tensors))]
        value = (float("nan"), float("inf"), -1.0, 0.0, 1e30)[draw.below(5)]
        if draw.below(2):
            tensor.fill_(value)
        else:
            tensor.view(-1)[draw.below(tensor.numel())] = value
    if file.suffix == ".safetensors":
        save_file(document, file, metadata={"format": "pt"})
    else:
        torch.save(document, file)
    return None


DAMAGES: tuple[tuple[str, Callable[[Path, Draw], object]], ...] = (
    ("flipped bit", _flip),
    ("flipped bit of the header", lambda file, draw: _flip(file, draw, 2000)),
    ("truncated", _truncate),
    ("overwritten", _overwrite),
    ("inserted", _insert),
    ("another number", _number),
    ("files swapped", _swap),
    ("wrong type", _dtypes),
    ("wrong value", _values),
    ("empty", lambda file, draw: file.write_bytes(b"")),
    ("missing", lambda file, draw: file.unlink()),
    ("LFS pointer", lambda file, draw: file.write_bytes(POINTER)),
    ("noise", lambda file, draw: file.write_bytes(draw.random.bytes(500))),
    ("directory", _directory),
    ("pipe", _pipe),
    ("link to itself", _loop),
)
RANK_DAMAGES = (*DAMAGES, ("ranks exchanged", _exchange), ("a step before", _before))


def damages(name: str) -> tuple[tuple[str, Callable[[Path, Draw], object]], ...]:
    """Those that make sense for a format."""
    return RANK_DAMAGES if name in RANKED else DAMAGES


class HungError(BaseException):
    pass


@contextmanager
def _limit() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise HungError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class Outcome:
    """What became of a file that was read: "read" or "a finding", and a digest of weights, moments and steps."""

    word: str
    digest: str


def read_everything(path: Path, name: str, original: Path | None = None) -> Outcome:
    """Everything before the measurement itself.

    Args:
        original: the undamaged checkpoint; None where this is it.
    """
    network = NETWORKS.get(name)
    if network is None:
        inspect_checkpoint(path)
    checkpoint = open_checkpoint(path, network)
    model = checkpoint.model()
    # A wrong number is worse than none: what was loaded is what the format's own library reads.
    own = model.state_dict()
    for key, value in stored(name, path, original).items():
        mine = own[key]
        assert torch.equal(mine, value.float()) or torch.equal(mine, value.float().t()), key
    found = weight_findings(model)
    digest = hashlib.sha256()
    for value in own.values():
        digest.update(value.numpy().tobytes())
    if checkpoint.optimizer is not None:
        view = checkpoint.optimizer.view(model)
        found += state_findings(view, checkpoint.step, path)
        metric = prepare(view, {n: p for n, p in model.named_parameters() if p.requires_grad})
        ones = torch.ones(metric.root.space.size, dtype=metric.root.space.dtype)
        assert all(bool(torch.isfinite(lifted).all()) for lifted in metric.root.lift(ones).values())
        for key in sorted(view.state):
            for part in ("step", "exp_avg", "exp_avg_sq"):
                digest.update(torch.as_tensor(view.state[key].get(part, 0)).double().numpy().tobytes())
    return Outcome("a finding" if found else "read", digest.hexdigest())


@cache
def _undamaged(name: str, root: Path) -> str:
    return read_everything(master("checkpoint", name, root), name).digest


def attempt(run: Callable[[], str]) -> str:
    """The outcome: that of the run, or refused in one line. Anything else is raised."""
    try:
        with _limit():
            return run()
    except CurvError as error:
        line = str(error)
        assert "\n" not in line
        assert 20 < len(line) < 1200, line
        return "refused"


def damaged_checkpoint(name: str, kind: int, seed: int, root: Path, target: Path) -> tuple[str, str]:
    """Damages one file of a fresh copy. Returns the damage's name and what became of it.

    "unnoticed" is a mixture of files that was read as if it were one save's, to other numbers.
    """
    path = fresh("checkpoint", name, root, target)
    draw = Draw(kind, seed, earlier(name, root))
    files = sorted(p for p in target.rglob("*") if p.is_file())
    label, damage = damages(name)[kind % len(damages(name))]
    if label in MIXED and name in RANKED:
        files = [p for p in files if p.suffix in (".pt", ".distcp", ".bin") or p.name == ".metadata"]
    damage(files[draw.below(len(files))], draw)

    def run() -> str:
        outcome = read_everything(path, name, master("checkpoint", name, root))
        if outcome.word == "read" and label in MIXED and outcome.digest != _undamaged(name, root):
            return "unnoticed"
        return outcome.word

    return label, attempt(run)


def data_checkpoint(root: Path) -> Checkpoint:
    """A model of 64 tokens with a tokenizer, for the data to go with."""
    place = root / "tokenizer"
    if not place.is_dir():
        tokenizer(place)
    return replace(open_checkpoint(master("checkpoint", "transformers, no optimizer", root)), tokenizer=place)


def damaged_data(name: str, kind: int, seed: int, root: Path, target: Path) -> tuple[str, str]:
    path = fresh("data", name, root, target)
    label, damage = DAMAGES[kind % len(DAMAGES)]
    draw = Draw(kind, seed)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    damage(files[draw.below(len(files))], draw)
    return label, attempt(lambda: read_data(path, root))


def read_data(path: Path, root: Path) -> str:
    windows = read_shard(path, data_checkpoint(root), tokens=512, sequence_length=16).windows
    assert windows.dtype == torch.int64
    assert 0 <= int(windows.min()) <= int(windows.max()) < 64
    return "read"
