"""Every format, damaged at random: a result, or one line. `python tests/test_fuzz.py 2000` prints the counts.

CURV_FUZZ=N tries N damages of every format instead of a few.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from formats import CHECKPOINTS, DATA, fresh

from curvcli.checkpoints import inspect_checkpoint
from curvcli.errors import CurvError
from curvcli.inputs import open_checkpoint
from curvcli.inputs.base import Checkpoint
from curvcli.inputs.data.shards import read_shard
from curvcli.inputs.state.soundness import state_findings, weight_findings
from curvcli.optimizers.preconditioner import prepare

EXAMPLES = int(os.environ.get("CURV_FUZZ", "12"))
SECONDS = 30
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


class Draw:
    """A damage is a function of two numbers, so that a failing one is told by them."""

    def __init__(self, kind: int, seed: int) -> None:
        self.kind = kind
        self.random = np.random.default_rng(seed)

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
    for old, new in ((b'"F32"', b'"I32"'), (b"FloatStorage", b"LongStorage"), (b"FloatStorage", b"HalfStorage")):
        if old in content and draw.below(2):
            file.write_bytes(content.replace(old, new, 1 + draw.below(3)))
            return
    file.write_bytes(content.replace(b'"F32"', b'"BF16"'))


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
        return _flip(file, draw)
    tensors: list[torch.Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            tensors.append(value)
        elif isinstance(value, dict):
            for part in value.values():
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


def _stored(home: Path) -> dict[str, torch.Tensor]:
    """The weights that the files hold now, as the libraries read them."""
    found: dict[str, torch.Tensor] = {}
    for file in (*sorted(home.glob("model*.safetensors")), *sorted(home.glob("weights.safetensors"))):
        found |= load_file(file)
    for file in sorted(home.glob("pytorch_model-*.bin")):
        found |= torch.load(file, weights_only=True)
    for file in (home / "pytorch_model.bin", home / "ckpt.pt", home / "plain.pt"):
        if file.is_file() and not found:
            document = torch.load(file, weights_only=True)
            found = document.get("model", document)
    return found


def _read(path: Path) -> str:
    """What becomes of a checkpoint: everything before the measurement itself. Returns the outcome."""
    inspect_checkpoint(path)
    checkpoint = open_checkpoint(path)
    model = checkpoint.model()
    # A wrong number is worse than none: what was loaded is what the file holds.
    stored, own = _stored(path if path.is_dir() else path.parent), model.state_dict()
    assert stored or (path / ".metadata").exists()  # DCP's own reader would run what a damaged file says
    for name, value in stored.items():
        mine = own[name]
        assert torch.equal(mine, value.float()) or torch.equal(mine, value.float().t()), name
    found = weight_findings(model)
    if checkpoint.optimizer is not None:
        view = checkpoint.optimizer.view(model)
        found += state_findings(view, checkpoint.step, path)
        metric = prepare(view, {n: p for n, p in model.named_parameters() if p.requires_grad})
        assert all(bool(torch.isfinite(scale).all()) for scale in metric.scale.values())
    return "a finding" if found else "read"


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
    """Damages one file of a fresh copy. Returns the damage's name and what became of it."""
    path = fresh("checkpoint", name, root, target)
    draw = Draw(kind, seed)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    label, damage = DAMAGES[kind % len(DAMAGES)]
    damage(files[draw.below(len(files))], draw)
    return label, attempt(lambda: _read(path))


def damaged_data(name: str, kind: int, seed: int, root: Path, target: Path, checkpoint: Checkpoint) -> tuple[str, str]:
    path = fresh("data", name, root, target)
    label, damage = DAMAGES[kind % len(DAMAGES)]
    damage(path, Draw(kind, seed))

    def run() -> str:
        windows = read_shard(path, checkpoint, tokens=512, sequence_length=16).windows
        assert windows.dtype == torch.int64
        assert 0 <= int(windows.min()) <= int(windows.max()) < 64
        return "read"

    return label, attempt(run)


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masters")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "copy"


FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CURV_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", CHECKPOINTS)
@FUZZ
@given(kind=st.integers(0, len(DAMAGES) - 1), seed=st.integers(0, 2**32))
def test_damaged_checkpoints(name: str, masters: Path, copy: Path, kind: int, seed: int) -> None:
    damaged_checkpoint(name, kind, seed, masters, copy)


@pytest.mark.parametrize("name", DATA)
@FUZZ
@given(kind=st.integers(0, len(DAMAGES) - 1), seed=st.integers(0, 2**32))
def test_damaged_data(name: str, masters: Path, copy: Path, kind: int, seed: int) -> None:
    checkpoint = open_checkpoint(fresh("checkpoint", "transformers, no optimizer", masters, copy.parent / "model"))
    damaged_data(name, kind, seed, masters, copy, checkpoint)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_undamaged_is_read_without_findings(name: str, masters: Path, copy: Path) -> None:
    assert attempt(lambda: _read(fresh("checkpoint", name, masters, copy))) == "read"


def main(count: int) -> None:
    """Prints the table of docs/security-tests.md: what became of `count` damages of every format."""
    with tempfile.TemporaryDirectory() as scratch:
        root, target = Path(scratch) / "masters", Path(scratch) / "copy"
        model = open_checkpoint(fresh("checkpoint", "transformers, no optimizer", root, Path(scratch) / "model"))
        rows: list[tuple[str, Counter[str]]] = []
        by_damage: dict[str, Counter[str]] = {}
        for kind, name in [("checkpoint", n) for n in CHECKPOINTS] + [("data", n) for n in DATA]:
            outcomes: Counter[str] = Counter()
            for number in range(count):
                try:
                    if kind == "checkpoint":
                        label, outcome = damaged_checkpoint(name, number, number, root, target)
                    else:
                        label, outcome = damaged_data(name, number, number, root, target, model)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    label, outcome = DAMAGES[number % len(DAMAGES)][0], "FAILED"
                    print(f"{name}, damage {number} ({label}): {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                outcomes[outcome] += 1
                by_damage.setdefault(label, Counter())[outcome] += 1
            rows.append((name, outcomes))
            shutil.rmtree(target, ignore_errors=True)
    for heading, table in (("format", rows), ("damage", list(by_damage.items()))):
        columns = ("refused", "a finding", "read", "FAILED")
        print(f"\n| {heading} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
        for name, counts in table:
            print(f"| {name} | {' | '.join(str(counts[c]) for c in columns)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
