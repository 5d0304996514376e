"""Every example of the documentation is run: shell lines through the application, Python, TOML and YAML for what they say.

A block of another kind, or one that is not to be run, has a comment before it that says why: `<!-- not run: REASON -->`.
Measurements are those in tests/assets: what is tested is that a reader's line is understood, read, and written.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import expandvars
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from formats import distributed
from logs import record, write
from places import ASSETS, ROOT, SAMPLES
from tiny import build
from tracks import course_of
from typer.testing import CliRunner

from curvcli.analysis.checkpoint import Opened
from curvcli.cli import app
from curvcli.documents import Report, load_report
from curvcli.schedules.plan import grow

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<before>(?:<!--.*-->\n)*)```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = 'data = "data/shard.bin"\nsequence-length = 16\ntokens = 64\n\n[gate]\nmax-rho = 1.0\n'


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    not_run: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text()
        for match in FENCE.finditer(content):
            line = content[: match.start("kind")].count("\n") + 1
            yield Block(page.name, line, match["kind"], match["text"], "<!-- not run: " in match["before"])


BLOCKS = [block for block in _blocks() if block.page != "cli.md"]  # that page is written by a script, which a test holds
RUN = [block for block in BLOCKS if not block.not_run]
# Pages whose blocks go on from one another: run from top to bottom. Elsewhere each block stands alone.
IN_ORDER = ("first-checkpoint.md", "notebooks.md")


def standing(kinds: tuple[str, ...]) -> list[Block]:
    return [block for block in RUN if block.kind in kinds and block.page not in IN_ORDER]


def of(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "block",
        # These measure: an explanation, a run, an estimate.
        [
            pytest.param(block, marks=pytest.mark.slow) if block.page in ("explain.md", "track.md", "cost.md") else block
            for block in standing(kinds)
        ],
        ids=str,
    )


def _measured(opened: Opened, *arguments: object) -> Report:
    path = str(opened.checkpoint.path)
    report = load_report(ASSETS / ("init.json" if path.endswith("init") else "hot-60.json"))
    place = {"checkpoint": report.checkpoint.model_copy(update={"path": path, "step": opened.checkpoint.step})}
    return report if "hot" in path else report.model_copy(update=place)


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the examples has: checkpoints, data and documents under the names that the pages give them."""
    home = tmp_path_factory.mktemp("reader")
    model = build()
    for place in ("ckpt", "run/checkpoint-1000", "run/checkpoint-2000"):
        model.save_pretrained(home / place)
    for folder in ("data", "shards", "out", "reports", "runs/first"):
        (home / folder).mkdir(parents=True)
    for name in ("train.bin", "shard.bin", "data/shard.bin", "shards/train_000.bin", "shards/train_001.bin"):
        (np.arange(70_000) % 64).astype(np.uint16).tofile(home / name)
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"input_ids": [list(range(17))] * 600}), home / name)
    shutil.copy(SAMPLES / "nanogpt" / "ckpt.pt", home / "out" / "ckpt.pt")
    for name in ("report", "last-good", "before", "after", "reports/last", "reports/last-good"):
        shutil.copy(ASSETS / "hot-60.json", home / f"{name}.json")
    (home / "track.json").write_text(course_of([1.0, 1.1, 1.0]).to_json())
    for name in ("calm", "hot"):
        (home / name).mkdir()
        shutil.copy(home / "track.json", home / name)
    (home / "schedule.json").write_text(grow(8).to_json())
    for place in ("run", "runs/first"):
        write(home / place / "curvature.jsonl", *map(record, range(3)))
    (home / "curv.toml").write_text(CONFIG)
    shutil.move(distributed(home / "written"), home / "outputs" / "checkpoint" / "step-3")
    (home / "mynets.py").write_text("from tiny import build as llama\n")
    return home


@pytest.fixture
def home(masters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    shutil.copytree(masters, place)
    (place / "sample_checkpoints").symlink_to(SAMPLES)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)  # other tests have networks of that name
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RUN", "run")  # which jobs of a cluster are given
    monkeypatch.setattr(Opened, "measure", _measured)
    return place


def commands(text: str) -> list[list[str]]:
    """The curv commands of shell lines: without their comments, and what they are piped or written into."""
    found = []
    for line in text.splitlines():
        for part in re.split(r"&&|;", re.sub(r"\s#.*", "", line.removeprefix("$ "))):
            if part.strip().startswith("curv "):
                found.append(shlex.split(re.split(r"[|>]", part)[0])[1:])
    return found


def run(words: list[str], columns: int = 80) -> str:
    if "--estimate" in words:
        words = [*words, "--tokens", "128"]  # one product is made, which of 32,768 tokens takes seconds
    if words[0] == "init":
        words = [*words, "--force"]  # this reader has a configuration
    words = ["cpu" if word == "cuda" and not torch.cuda.is_available() else expandvars(word) for word in words]
    done = CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert done.exit_code in ((0, 1, 3) if words[0] == "gate" else (0,)), (words, done.stderr)
    return done.stdout


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(RUN) > 20
    for block in RUN:
        assert block.kind in ("sh", "bash", "console", "toml", "python", "yaml", "text", ""), block
        if block.kind in ("sh", "bash", "console"):
            assert commands(block.text), f"{block} has no curv command: say why it is not run"
        if block.kind == "text":
            assert not commands(block.text), f"{block} shows what is printed, and has a command"
        if not block.kind:
            assert block.page == "SECURITY.md" or "```" not in block.text, block


@of("sh", "bash")
def test_shell(block: Block, home: Path) -> None:
    for words in commands(block.text):
        run(words)


@of("console")
def test_console(block: Block, home: Path) -> None:
    """A plan's output is compared word for word; what a measurement shows, test by test elsewhere."""
    if "curv analyze init" in block.text:
        python = next(b for b in RUN if b.kind == "python" and 'save_pretrained("init")' in b.text)
        exec(python.text, {})  # noqa: S102
    shown = ""
    for words in commands(block.text):
        output = run(words)
        shown += output if words[0] == "schedule" else ""
    expected = "".join(f"{line}\n" for line in block.text.splitlines() if not line.startswith("$ "))
    if "curv schedule" in block.text:
        assert shown.split() == expected.split()


@of("toml")
def test_toml(block: Block, home: Path) -> None:
    said = tomllib.loads(block.text)
    (home / "curv.toml").write_text(block.text.replace("1024", "16").replace("32768", "64"))
    run(["inspect", "ckpt"])
    run(["analyze", "ckpt", "-q"])
    run(["track", "run", "-q"])
    if "gate" in said:
        run(["gate", "ckpt", "-q"])
        assert "last-good.json" in run(["gate", "--explain"], columns=300)  # of which a path takes a part


class _Trainer:
    """Stands for a trainer: the examples hand it their callbacks."""

    def __init__(self, *arguments: object, callbacks: list[object]) -> None:
        assert callbacks


@of("python")
def test_python(block: Block, home: Path) -> None:
    model = build()
    ids = torch.arange(32).reshape(2, 16)
    batches = [{"input_ids": ids, "labels": ids}]

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    value = loss(model, batches[0])
    if "warmup" not in block.text:  # which is of a run's beginning
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    (home / "schedule.json").write_text(grow(2, start=1, groups=1).to_json())
    have: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches, "loss": loss, "value": value}
    have |= {"Trainer": _Trainer}
    have |= {"start": 0, "total": 1, "n_tokens": lambda batch: batch["labels"].numel()}
    if "rho_source=tracker" in block.text:
        exec(next(b for b in RUN if b.kind == "python" and "for step in range" in b.text).text, have)  # noqa: S102
    exec(block.text, have)  # noqa: S102
    if isinstance(have.get("report"), Report):
        assert have["report"].full.rho is not None


# The tutorial trains a model twice.
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p.startswith("first") else p for p in IN_ORDER])
def test_a_page_that_is_read_from_top_to_bottom(page: str, home: Path) -> None:
    names: dict[str, Any] = {}
    blocks = [block for block in RUN if block.page == page]
    assert {block.kind for block in blocks} <= {"sh", "console", "python", "text"}
    for block in blocks:
        if block.kind == "python":
            exec(block.text, names)  # noqa: S102
        elif block.kind != "text":
            for words in commands(block.text):
                run(words)


@of("yaml")
def test_yaml(block: Block, home: Path) -> None:
    said = yaml.safe_load(block.text)
    if "jobs" in said:
        inputs = next(step["with"] for step in said["jobs"]["curvature"]["steps"] if "with" in step)
        known = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
        assert inputs.keys() <= known.keys()
        flags = [f"--{name}={value}" for name, value in inputs.items() if name != "path"]
        run(["gate", inputs["path"], *flags])
    elif "repos" in said:
        (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
        (used,) = said["repos"][0]["hooks"]
        assert used["id"] == hook["id"]
        run([*shlex.split(hook["entry"])[1:], *used["args"]])
    else:
        lines = commands("\n".join(said["curvature"]["script"]))
        assert lines
        for words in lines:
            run(words)
