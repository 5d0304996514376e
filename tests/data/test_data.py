"""Every form of data, as the libraries that write it do; sampling, and the record of which tokens were used."""

from __future__ import annotations

import gzip
import json
import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from formats import saved_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.data import tokens
from curvcli.data.shards import Shard, find_sources, read_shard
from curvcli.errors import InputError, UsageError

IDS = (np.arange(1000) * 37 % 251).astype(np.int64)


@pytest.fixture(scope="module")
def checkpoint(samples: Path) -> Checkpoint:
    return open_checkpoint(samples / "calm" / "checkpoint-10")  # vocabulary 256, context 65


@pytest.fixture
def speaking(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same with a tokenizer of words."""
    from dataclasses import replace

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "whale": 2, "<unk>": 3}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")  # noqa: S106
    made.save_pretrained(place)
    return replace(checkpoint, tokenizer=place)


def ids_of(shard: Shard) -> list[int]:
    return shard.windows.reshape(-1).tolist()


def megatron(path: Path, documents: list[np.ndarray], code: int, dtype: str) -> None:
    """By hand, after megatron/core/datasets/indexed_dataset.py: the library cannot be installed without CUDA."""
    path.with_suffix(".bin").write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    lengths = np.array([len(d) for d in documents], dtype="<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths * np.dtype(dtype).itemsize)[:-1]]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + index.tobytes())


def llm_c(path: Path, magic: int, version: int, dtype: str, count: int | None = None) -> None:
    """By hand, after llm.c's dev/data/data_common.py: 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(IDS) if count is None else count
    path.write_bytes(header.tobytes() + IDS.astype(dtype).tobytes())


FORMS = {
    "nano16.bin": lambda p: IDS.astype("<u2").tofile(p),
    "nano32.bin": lambda p: IDS.astype("<u4").tofile(p),
    "gpt2.bin": lambda p: llm_c(p, 20240520, 1, "<u2"),
    "llama3.bin": lambda p: llm_c(p, 20240801, 7, "<u4"),
    "mega.bin": lambda p: megatron(p, [IDS[:100], IDS[100:103], IDS[103:]], 4, "<i4"),
    "mega8.idx": lambda p: megatron(p, [IDS[:500], IDS[500:]], 8, "<u2"),
    "ids.npy": lambda p: np.save(p, IDS.astype("u1")),
    "ids.parquet": lambda p: pq.write_table(
        pa.table({"input_ids": [IDS[:7].tolist(), IDS[7:].tolist()]}), p, row_group_size=1
    ),
    "ids.jsonl": lambda p: p.write_text("".join(json.dumps({"input_ids": d.tolist()}) + "\n" for d in (IDS[:3], IDS[3:]))),
    "ids.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json.dumps({"tokens": IDS.tolist()}).encode())),
    "ids.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(json.dumps({"tokens": IDS.tolist()}).encode())),
    "saved": lambda p: saved_dataset(p, {"input_ids": [IDS[:400].tolist(), IDS[400:401].tolist(), IDS[401:].tolist()]}),
    "dict": lambda p: saved_dataset(p, {"input_ids": [IDS[:400].tolist(), IDS[400:].tolist()]}, "train"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sample", ["first", "spread", "random"])
def test_every_form_gives_the_same_stream(tmp_path: Path, checkpoint: Checkpoint, name: str, sample: str) -> None:
    FORMS[name](tmp_path / name)
    shard = read_shard(tmp_path / name, checkpoint, tokens=96, sequence_length=16, sample=sample)  # type: ignore[arg-type]
    assert shard.windows.shape == (6, 17)
    rebuilt = [i for start, count in shard.offsets for i in IDS[start : start + 17 * count].tolist()]
    assert ids_of(shard) == rebuilt
    assert (shard.offsets == [(0, 6)]) == (sample == "first")


TEXT = "the whale\nthe the whale\n"


def test_text_is_one_stream_and_documents_end(tmp_path: Path, speaking: Checkpoint) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 10)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress((TEXT * 10).encode()))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()) * 10)
    pq.write_table(pa.table({"text": TEXT.splitlines() * 10}), tmp_path / "d.parquet")
    saved_dataset(tmp_path / "d", {"text": TEXT.splitlines() * 10})
    for name in ("t.txt", "t.txt.gz"):
        shard = read_shard(tmp_path / name, speaking, tokens=4, sequence_length=4)
        assert ids_of(shard) == [1, 2, 1, 1, 2]
    for name in ("d.jsonl", "d.parquet", "d"):
        shard = read_shard(tmp_path / name, speaking, tokens=6, sequence_length=6)
        assert ids_of(shard) == [1, 2, 0, 1, 1, 2, 0]


def test_several_files_are_one_stream_and_no_window_crosses(tmp_path: Path, checkpoint: Checkpoint) -> None:
    for i, part in enumerate((IDS[:30], IDS[30:70], IDS[70:])):
        part.astype("<u2").tofile(tmp_path / f"train_{i}.bin")
    names = [tmp_path / f"train_{i}.bin" for i in range(3)]
    by_name = read_shard(names, checkpoint, tokens=80, sequence_length=16)
    by_pattern = read_shard(tmp_path / "train_*.bin", checkpoint, tokens=80, sequence_length=16)
    assert by_name.sha256 == by_pattern.sha256
    # 30 tokens hold one window of 17, 40 hold two: each file's rest is left out.
    assert by_name.offsets == [(0, 1), (30, 2), (70, 2)]
    assert ids_of(by_name)[17:34] == IDS[30:47].tolist()
    assert by_name.path.endswith("train_0.bin and 2 more")
    assert [s.tokens for s in find_sources(names, checkpoint)] == [30, 40, 930]


def test_no_window_crosses_a_row(tmp_path: Path, checkpoint: Checkpoint) -> None:
    np.save(tmp_path / "rows.npy", IDS[:400].reshape(10, 40))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"input_ids": r}) + "\n" for r in IDS[:400].reshape(10, 40).tolist())
    )
    for name in ("rows.npy", "rows.jsonl"):
        shard = read_shard(tmp_path / name, checkpoint, tokens=10**6, sequence_length=16)
        assert shard.offsets == [(40 * i, 2) for i in range(10)]
        whole = read_shard(tmp_path / name, checkpoint, tokens=10**6, sequence_length=None)
        assert whole.windows.shape == (10, 40)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    length=st.integers(1, 30),
    windows=st.integers(1, 40),
    sample=st.sampled_from(["first", "spread", "random"]),
    seed=st.integers(0, 3),
)
def test_offsets_identify_the_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Checkpoint,
    sizes: list[int],
    length: int,
    windows: int,
    sample: str,
    seed: int,
) -> None:
    place = tmp_path_factory.mktemp("files")
    bounds = np.cumsum([0, *sizes])
    for i, (a, b) in enumerate(pairwise(bounds)):
        np.save(place / f"{i}.npy", IDS[a:b]) if b > a else np.save(place / f"{i}.npy", np.zeros(1, dtype=np.int64))
    stream = np.concatenate([np.load(place / f"{i}.npy") for i in range(len(sizes))])
    names = [place / f"{i}.npy" for i in range(len(sizes))]
    available = sum(len(np.load(n)) // (length + 1) for n in names)
    call = {"tokens": windows * length, "sequence_length": length, "sample": sample, "seed": seed}
    if not available:
        with pytest.raises(InputError):
            read_shard(names, checkpoint, **call)  # type: ignore[arg-type]
        return
    shard = read_shard(names, checkpoint, **call)  # type: ignore[arg-type]
    assert len(shard.windows) == min(windows, available)
    rebuilt = [i for start, count in shard.offsets for i in stream[start : start + (length + 1) * count].tolist()]
    assert ids_of(shard) == rebuilt
    assert len(set(shard.starts.tolist())) == len(shard.windows)
    assert read_shard(names, checkpoint, **call).sha256 == shard.sha256  # type: ignore[arg-type]
    if sample == "spread" and windows > 1 and available > windows:
        assert shard.starts[-1] - shard.starts[0] >= len(stream) * (windows - 1) / windows / 2


def test_random_follows_the_seed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    shards = [
        read_shard(tmp_path / "ids.npy", checkpoint, tokens=96, sequence_length=16, sample="random", seed=s)
        for s in (0, 0, 1)
    ]
    assert shards[0].sha256 == shards[1].sha256 != shards[2].sha256


def test_uint32_is_told_from_uint16_for_a_large_vocabulary(tmp_path: Path, checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    large = replace(checkpoint, vocabulary=128_256)
    ids = np.random.default_rng(0).integers(0, 128_256, 500)
    ids.astype("<u4").tofile(tmp_path / "wide.bin")
    assert ids_of(read_shard(tmp_path / "wide.bin", large, tokens=32, sequence_length=32)) == ids[:33].tolist()
    narrow = np.random.default_rng(0).integers(0, 50_000, 500)
    narrow.astype("<u2").tofile(tmp_path / "narrow.bin")
    assert ids_of(read_shard(tmp_path / "narrow.bin", large, tokens=32, sequence_length=32)) == narrow[:33].tolist()


@pytest.mark.parametrize("vocabulary", [256, 128_256])
def test_int64_without_a_header_is_told_from_uint32(vocabulary: int, tmp_path: Path, checkpoint: Checkpoint) -> None:
    """numpy's own integers, written by tofile: as uint32 every second token would be 0."""
    from dataclasses import replace

    model = replace(checkpoint, vocabulary=vocabulary)
    ids = np.random.default_rng(0).integers(0, vocabulary, 500)
    ids.tofile(tmp_path / "ids.bin")
    shard = read_shard(tmp_path / "ids.bin", model, tokens=32, sequence_length=32)
    assert ids_of(shard) == ids[:33].tolist()


def write_bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(b" " * 2**28, 1))


def write_outside(path: Path) -> None:
    path.mkdir()
    (path / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')


BAD = {
    "short.bin": (lambda p: IDS[:5].astype("<u2").tofile(p), "one sequence takes"),
    "odd.bin": (lambda p: p.write_bytes(b"123"), "no whole number"),
    "eval.bin": (lambda p: llm_c(p, 20240522, 1, "<u2"), "evaluation format"),
    "version.bin": (lambda p: llm_c(p, 20240520, 2, "<u2"), "version 2"),
    "cut.bin": (lambda p: llm_c(p, 20240520, 1, "<u2", count=5000), "its header says 5,000"),
    "negative.npy": (lambda p: np.save(p, -IDS), "token id -"),
    "beyond.npy": (lambda p: np.save(p, IDS + 100), "vocabulary has 256"),
    "float.npy": (lambda p: np.save(p, IDS / 2), "not token ids"),
    "raw.npy": (lambda p: IDS.astype("u2").tofile(p), "as numpy.memmap and OLMo write them, are read as .bin: rename it"),
    "object.npy": (lambda p: np.save(p, np.array([{}]), allow_pickle=True), "plain .npy"),
    "empty.parquet": (lambda p: p.write_bytes(b""), "cannot be read"),
    "strange.parquet": (lambda p: pq.write_table(pa.table({"colour": [1]}), p), "colour"),
    "floats.parquet": (lambda p: pq.write_table(pa.table({"input_ids": [[0.5] * 40]}), p), "not token ids"),
    "broken.jsonl": (lambda p: p.write_text('{"input_ids": [1, 2'), "line 1 is no JSON"),
    "list.jsonl": (lambda p: p.write_text("[1, 2]\n"), "line 1 is no object"),
    "words.jsonl": (lambda p: p.write_text('{"input_ids": ["a"]}\n'), "neither text nor token ids"),
    "text.jsonl": (lambda p: p.write_text('{"text": "the whale"}\n'), "no tokenizer"),
    "bomb.jsonl.gz": (write_bomb, "longer than 64 MiB"),
    "cut.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b'{"input_ids": [1]}\n' * 5000)[:30]), "cannot be read"),
    "noise.jsonl.zst": (lambda p: p.write_bytes(b"\x00" * 100), "cannot be read"),
    "folder": (lambda p: p.mkdir(), "no dataset of datasets.save_to_disk"),
    "outside": (
        lambda p: (p.mkdir(), (p / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')),
        "outside",
    ),
    "other.safetensors": (lambda p: save_file({"labels": IDS}, p), "no tensor input_ids"),
    "nameless": (lambda p: (p.mkdir(), (p / "state.json").write_text('{"_data_files": []}')), "names no data files"),
    "lost.idx": (lambda p: p.write_bytes(b"MMIDIDX"), "missing beside"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line(tmp_path: Path, checkpoint: Checkpoint, name: str) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises((InputError, UsageError), match=message) as caught:
        read_shard(tmp_path / name, checkpoint, tokens=96, sequence_length=16)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 5, "no Megatron index"),
        (9, 2, "version 2"),
        (17, 7, "type code 7"),
        (18, 10**15, "too few"),
        (34, 10**6, "do not follow"),
    ],
)
def test_a_damaged_megatron_index_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, at: int, value: int, message: str
) -> None:
    megatron(tmp_path / "m.bin", [IDS[:500], IDS[500:]], 4, "<i4")
    data = bytearray((tmp_path / "m.idx").read_bytes())
    form = "<B" if at == 17 else "<i" if at == 34 else "<Q"
    struct.pack_into(form, data, at, value)
    (tmp_path / "m.idx").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_shard(tmp_path / "m.bin", checkpoint, tokens=96, sequence_length=16)


def test_splits_have_to_be_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    saved_dataset(tmp_path / "d", {"input_ids": [IDS.tolist()]}, "validation")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    with pytest.raises(InputError, match="validation, test"):
        read_shard(tmp_path / "d", checkpoint, tokens=96, sequence_length=16)
    assert len(read_shard(tmp_path / "d" / "validation", checkpoint, tokens=96, sequence_length=16).windows) == 6


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '{"_data_files": 3, "splits": 3}', '{"_data_files": [3], "splits": [3]}']
)
def test_a_dataset_whose_json_is_of_another_form(tmp_path: Path, checkpoint: Checkpoint, file: str, text: str) -> None:
    saved_dataset(tmp_path / "d", {"input_ids": [IDS.tolist()]})
    (tmp_path / "d" / file).write_text(text)
    with pytest.raises(InputError):
        read_shard(tmp_path / "d", checkpoint, tokens=96, sequence_length=16)


@pytest.mark.slow
def test_a_row_of_millions_of_ids_in_a_kilobyte(tmp_path: Path, checkpoint: Checkpoint) -> None:
    ids = pa.array(np.zeros(2**25, dtype=np.int8))
    rows = pa.ListArray.from_arrays(pa.array([0, len(ids)], pa.int32()), ids)
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    assert (tmp_path / "a.parquet").stat().st_size < 4096
    with pytest.raises(InputError, match="claims 33,554,432 values"):
        read_shard(tmp_path / "a.parquet", checkpoint, tokens=96, sequence_length=16)


@pytest.mark.slow
def test_a_dataset_of_a_million_files(tmp_path: Path, checkpoint: Checkpoint) -> None:
    saved_dataset(tmp_path / "d", {"input_ids": [IDS.tolist()] * 2})
    (tmp_path / "d" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00001-of-00002.arrow"}] * 10**6})
    )
    with pytest.raises(InputError, match="1,000,000 files"):
        read_shard(tmp_path / "d", checkpoint, tokens=96, sequence_length=16)


def test_a_pipe_in_a_dataset_is_not_waited_for(tmp_path: Path, checkpoint: Checkpoint) -> None:
    saved_dataset(tmp_path / "d", {"input_ids": [IDS.tolist()] * 2})
    part = tmp_path / "d" / "data-00001-of-00002.arrow"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(InputError, match="is no file"):
        read_shard(tmp_path / "d", checkpoint, tokens=96, sequence_length=16)


def no_tokens(name: str, path: Path) -> None:
    """More documents without a token than anyone can wait for, in kilobytes."""
    if name.endswith(".zst"):
        path.write_bytes(zstandard.compress(b"\n" * 2**19))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(b'{"ids": []}\n' * 2**19, 1))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"ids": pa.nulls(2**19, pa.list_(pa.int32()))}), path)
    else:
        saved_dataset(path, {"ids": pa.array([[]], pa.list_(pa.int32())).take(pa.array(np.zeros(2**19, dtype=np.int8)))})


@pytest.mark.parametrize(
    "name",
    ["blank.jsonl.zst", "null.parquet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("empty.jsonl.gz", "empty"))],
)
def test_documents_without_tokens_are_not_skipped_for_ever(name: str, tmp_path: Path, checkpoint: Checkpoint) -> None:
    no_tokens(name, tmp_path / name)
    with pytest.raises(InputError, match="without a token"):
        read_shard(tmp_path / name, checkpoint, tokens=96, sequence_length=16)


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_what_is_sampled_from_is_bounded(
    name: str, tmp_path: Path, speaking: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To sample evenly, all of a file is read: of one that has to be tokenised or parsed only so much."""
    monkeypatch.setattr(tokens, "MOST", 100)
    line = "the whale " * 200 if name.endswith("txt") else json.dumps({"ids": [1] * 101})
    (tmp_path / name).write_text(line)
    assert len(read_shard(tmp_path / name, speaking, tokens=16, sequence_length=16).windows) == 1
    with pytest.raises(InputError, match=r"more .*than can be sampled from"):
        read_shard(tmp_path / name, speaking, tokens=16, sequence_length=16, sample="spread")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((1,), "a0.bin has 1 token, one sequence takes 32 + 1; give more data: a prediction takes two tokens"),
        ((2,), "a0.bin has 2 tokens, one sequence takes 32 + 1; pass --sequence-length 1, or give more data"),
        (
            (3, 20, 5),
            "a1.bin, the longest of 3 files, has 20 tokens, one sequence takes 32 + 1; pass --sequence-length 19 or",
        ),
    ],
)
def test_too_few_tokens_name_what_would_do(
    counts: tuple[int, ...], said: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for n, count in enumerate(counts):
        np.zeros(count, dtype="<u2").tofile(tmp_path / f"a{n}.bin")
    with pytest.raises(InputError) as caught:
        read_shard(sorted(tmp_path.glob("*.bin")), checkpoint, tokens=32, sequence_length=32)
    assert said in str(caught.value)
