"""The same rows in every container: one loss, that of the rows one by one, by transformers' logits and a sum of our own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from formats import saved_dataset
from safetensors.numpy import save_file
from tiny import build
from transformers import LlamaForCausalLM

from curvcli.data.examples import Examples
from curvcli.data.shards import Shard
from curvcli.data.tasks import causal_loss, labelled_loss, left_out, predictions, read_data
from curvcli.errors import InputError, UsageError

Rows = list[dict[str, Any]]
CHECKPOINT = SimpleNamespace(vocabulary=64, context=32, tokenizer=None, path=Path("checkpoint"))
IDS = np.random.default_rng(0).integers(1, 64, (12, 24))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build().eval()


def ragged() -> Rows:
    """As a trainer of instructions has them before its collator: prompts not counted, no padding."""
    rows = []
    for i, ids in enumerate(IDS.tolist()):
        n = 14 + i % 5
        rows.append({"input_ids": ids[:n], "attention_mask": [1] * n, "labels": [-100] * 6 + ids[6:n]})
    return rows


def padded(side: str = "right") -> Rows:
    """The same, padded to one length."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def pad(name: str, values: list[int]) -> list[int]:
        blanks = [fill[name]] * (20 - len(values))
        return values + blanks if side == "right" else blanks + values

    return [{name: pad(name, values) for name, values in row.items()} for row in ragged()]


def columns(rows: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def stream(path: Path, rows: Rows) -> None:
    table = pa.table(columns(rows))
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITE: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": lambda p, rows: p.write_text(lines(rows)),
    "rows.ndjson": lambda p, rows: p.write_text(lines(rows)),
    "rows.jsonl.gz": lambda p, rows: p.write_bytes(gzip.compress(lines(rows).encode())),
    "rows.parquet": lambda p, rows: pq.write_table(pa.table(columns(rows)), p, row_group_size=5),
    "rows.arrow": stream,
    "rows.feather": lambda p, rows: feather.write_feather(pa.table(columns(rows)), p),
    "disk": lambda p, rows: saved_dataset(p, columns(rows)),
    "splits": lambda p, rows: saved_dataset(p, columns(rows), "train"),
    "rows.safetensors": lambda p, rows: save_file({k: np.asarray(v) for k, v in columns(rows).items()}, p),
}


def read(path: Path | list[Path], tokens: int = 10_000, task: str = "causal-lm", **given: Any) -> Shard | Examples:
    return read_data(path, CHECKPOINT, task, tokens=tokens, sequence_length=None, **given)  # type: ignore[arg-type]


def written(folder: Path, name: str, rows: Rows) -> Path:
    WRITE[name](folder / name, rows)
    return folder / name


def measured(model: LlamaForCausalLM, found: Shard | Examples, size: int = 5) -> float:
    """Batches averaged by their predictions, as the measurement does."""
    assert isinstance(found, Examples)
    batches = found.batches(size)
    counts = [predictions(batch, "causal-lm") for batch in batches]
    assert sum(counts) == found.tokens
    with torch.no_grad():
        return sum(n * causal_loss(model, b).item() for n, b in zip(counts, batches, strict=True)) / found.tokens


def row_by_row(model: LlamaForCausalLM, rows: Rows) -> float:
    """Each row alone, without padding: the sum of -log p of its labels over their number."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for place, label in list(enumerate(row["labels"]))[1:]:
            if label != -100:
                total, count = total - logs[place - 1, label].item(), count + 1
    return total / count


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_labels_and_masks_mean_the_same_everywhere(name: str, form: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    if form == "ragged" and name.endswith("safetensors"):
        pytest.skip("a tensor has one width")
    rows = ragged() if form == "ragged" else padded()
    found = read(written(tmp_path, name, rows))
    assert measured(model, found) == pytest.approx(row_by_row(model, ragged()), rel=1e-5)
    assert isinstance(found, Examples)
    assert found.sha256 == read(written(tmp_path, "rows.jsonl", rows)).sha256
    assert [kind for _, kind in found.files] == [{"disk": "datasets", "splits": "datasets"}.get(name, name[5:]).replace(
        "ndjson", "jsonl").replace("feather", "arrow")]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk", "rows.safetensors"])
def test_padding_on_the_left_needs_its_mask(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Where attention_mask were dropped, causal attention would see the padding. Positions shift, as in training."""
    found = read(written(tmp_path, name, padded("left")))
    rows = columns(padded("left"))
    with torch.no_grad():
        own = model(**{k: torch.tensor(v) for k, v in rows.items()}).loss.item()
        blind = model(input_ids=torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"])).loss.item()
    assert measured(model, found) == pytest.approx(own, rel=1e-5)
    assert abs(own - blind) > 1e-4


def test_several_files_and_patterns_are_read_as_one(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Of different kinds, and rows of different widths in each."""
    for name, rows in (("a.jsonl", ragged()[:5]), ("b.parquet", ragged()[5:10])):
        WRITE[f"rows{Path(name).suffix}"](tmp_path / name, rows)
    WRITE["rows.safetensors"](tmp_path / "c.safetensors", padded()[10:])
    found = read([tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.safetensors"])
    assert measured(model, found) == pytest.approx(row_by_row(model, ragged()), rel=1e-5)
    assert isinstance(found, Examples)
    assert [kind for _, kind in found.files] == ["jsonl", "parquet", "safetensors"]
    assert read(tmp_path / "[abc].*").tokens == found.tokens
    few = read([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tokens=12)
    assert isinstance(few, Examples)
    assert (few.tokens, few.rows, len(few.files)) == (8, 1, 1), "no further than asked"
    WRITE["rows.jsonl"](tmp_path / "d.jsonl", [{"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": [0, 0]}])
    with pytest.raises(InputError, match="other columns than"):
        read([tmp_path / "a.jsonl", tmp_path / "d.jsonl"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk", "rows.safetensors"])
def test_rows_without_labels_count_what_is_no_padding(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in padded()]
    own = [{**row, "labels": row["input_ids"]} for row in ragged()]
    assert measured(model, read(written(tmp_path, name, rows))) == pytest.approx(row_by_row(model, own), rel=1e-5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.arrow", "disk"])
def test_masks_of_ones_leave_documents_a_stream(name: str, tmp_path: Path) -> None:
    """What a tokenizer wrote without padding. Padding of a later row, past those looked at, is left out of the stream."""
    rows = [{"input_ids": [i % 50 + 1] * 3, "attention_mask": [1, 1, 1]} for i in range(70)]
    rows += [{"input_ids": [60, 61, 0], "attention_mask": [1, 1, 0]}]
    found = read_data(
        written(tmp_path, name, rows), CHECKPOINT, "causal-lm", tokens=1000, sequence_length=1, sample="spread"  # type: ignore[arg-type]
    )  # fmt: skip
    assert isinstance(found, Shard)
    assert found.windows.flatten().tolist() == [i % 50 + 1 for i in range(70) for _ in range(3)] + [60, 61]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk", "rows.safetensors"])
def test_masks_of_answers_are_labels(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """TRL's completion_mask and assistant_masks say which tokens count."""
    for mask in ("completion_mask", "assistant_masks"):
        rows = [{"input_ids": r["input_ids"], mask: [int(x != -100) for x in r["labels"]]} for r in padded()]
        (tmp_path / mask).mkdir()
        found = read(written(tmp_path / mask, name, rows))
        assert measured(model, found) == pytest.approx(row_by_row(model, ragged()), rel=1e-5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk"])
@pytest.mark.parametrize("form", ["position_ids", "seq_lengths"])
def test_packed_documents_are_kept_apart(name: str, form: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Positions that begin again, or lengths as TRL writes them: each document as if it stood alone, in rows of unequal
    length too; without them, documents of a row see each other, as in training on such rows."""
    packed, alone = [], []
    for a, b in zip(ragged()[::2], ragged()[1::2], strict=True):
        a, b = a["input_ids"][:9], b["input_ids"]
        lengths = [len(a), len(b)]
        where = {"position_ids": [*range(len(a)), *range(len(b))]} if form == "position_ids" else {"seq_lengths": lengths}
        packed.append({"input_ids": a + b, "attention_mask": [1] * sum(lengths), **where})
        alone += [{"input_ids": x, "labels": x} for x in (a, b)]
    assert measured(model, read(written(tmp_path, name, packed)), 2) == pytest.approx(row_by_row(model, alone), rel=1e-5)
    together = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in packed]
    (tmp_path / "together").mkdir()
    found = read(written(tmp_path / "together", name, together))
    assert measured(model, found) == pytest.approx(row_by_row(model, together), rel=1e-5)
    assert abs(row_by_row(model, together) - row_by_row(model, alone)) > 2e-4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk"])
def test_a_mask_that_counts_documents_is_none(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """As axolotl's packed rows have it: taken for a mask of ones, documents saw each other. Positions say what it means."""
    rows, alone = [], []
    for a, b in zip(padded()[::2], padded()[1::2], strict=True):
        parts = [x["input_ids"][:9] for x in (a, b)]
        ids = parts[0] + parts[1]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * 9 + [2] * 9})
        alone += [{"input_ids": x, "labels": x} for x in parts]
    with pytest.raises(InputError, match="values to 2") as refused:
        read(written(tmp_path, name, rows))
    assert "position_ids" in refused.value.hint
    (tmp_path / "told").mkdir()
    told = [
        {**row, "position_ids": [*range(9), *range(9)], "labels": [*row["labels"][:9], -100, *row["labels"][10:]]}
        for row in rows
    ]
    found = read(written(tmp_path / "told", name, told))
    assert measured(model, found, 2) == pytest.approx(row_by_row(model, alone), rel=1e-5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk"])
def test_other_columns_are_left_out_in_all_alike(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"row {i}", "meta": {"id": i}, "turns": ["a", "b"], **row, "token_type_ids": [0] * 20, "length": 20}
        for i, row in enumerate(padded())
    ]
    found = read(written(tmp_path, name, rows))
    assert isinstance(found, Examples)
    assert set(found.columns) == {"input_ids", "attention_mask", "labels", "token_type_ids", "length"}
    assert left_out(model, found.columns) == ["token_type_ids", "length"]
    assert measured(model, found) == pytest.approx(row_by_row(model, ragged()), rel=1e-5)


class Plain(torch.nn.Module):
    """A model of one's own that takes ids and calls them what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(idx))


def test_a_model_gets_what_it_takes(tmp_path: Path) -> None:
    found = read(written(tmp_path, "rows.parquet", ragged()))
    assert isinstance(found, Examples)
    assert left_out(Plain(), found.columns) == ["attention_mask"]
    model, labels = Plain(), found.columns["labels"]
    own = torch.nn.functional.cross_entropy(model(found.columns["input_ids"])[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert causal_loss(model, found.columns).item() == pytest.approx(own.item())


def test_rows_without_labels_for_other_tasks(tmp_path: Path) -> None:
    found = read(written(tmp_path, "rows.parquet", [{"input_ids": [1, 2]}] * 3), task="seq2seq")
    assert isinstance(found, Examples)
    with pytest.raises(InputError, match="no column labels"):
        labelled_loss(Plain(), found.columns)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": None}], "row 2 .*labels"),
        ([{"input_ids": [1, 2, 3], "completion_mask": [1, 1]}], "completion_mask of"),
        ([{"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}], "do not add up"),
        ([{"input_ids": [1, 2, 3], "seq_lengths": [-1, 4]}], "do not add up"),
        ([{"input_ids": [1, 2], "labels": [0.5, 0.5]}], "floats, not ids"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "chat template is a program"),
        ([{"conversations": [{"from": "human", "value": "hi"}]}], "chat template is a program"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "disk"])
def test_rows_that_are_refused(name: str, rows: Rows, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read(written(tmp_path, name, rows))


def test_conversations_are_refused_for_other_tasks_too(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", [{"messages": [{"role": "user", "content": "hi"}], "labels": 1}])
    with pytest.raises(InputError, match="chat template is a program"):
        read(path, task="seq2seq")


def test_rows_without_end_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvcli.data.examples.MOST", 1000)
    rows = [{"input_ids": [1] * 30, "labels": [-100] * 30} for _ in range(100)]
    with pytest.raises(InputError, match="hold 1,020 ids and 0 predictions"):
        read(written(tmp_path, "rows.parquet", rows))


@pytest.mark.slow
def test_a_column_of_millions_of_values_in_a_kilobyte(tmp_path: Path) -> None:
    flat = pa.array(np.zeros(2**25, dtype=np.int8))
    huge = pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)
    table = pa.table({"input_ids": [[1, 2]], "labels": huge})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    with pytest.raises(InputError, match="claims 33,554,432 values of labels"):
        read(tmp_path / "a.parquet")


def test_examples_are_not_sampled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --sample"):
        read(written(tmp_path, "rows.parquet", ragged()), sample="spread")
