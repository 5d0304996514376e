"""Checkpoints of 70 billion weights, whose files are holes: opened by their headers in seconds."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pace import in_time
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

INSPECT = """
import json, resource, sys, time
from pathlib import Path
start = time.process_time()
from curvcli.analysis.inspection import inspect_checkpoint
found = inspect_checkpoint(Path(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if Path("/proc/self/status").exists():  # Linux passes the parent's peak on in ru_maxrss
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps([found["parameters"], time.process_time() - start, peak, "transformers" in sys.modules]))
"""


def _shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a 70B Llama."""
    width, inner, narrow, words = 8192, 28672, 1024, 128256
    parts = {"q_proj": (width, width), "k_proj": (narrow, width), "v_proj": (narrow, width), "o_proj": (width, width)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width)}
    for layer in range(80):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{part}.weight": shape for part, shape in parts.items()}
        shapes |= {f"{prefix}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{prefix}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,)}


def _hole(file: Path, size: int, head: bytes = b"") -> None:
    """A file of that size that takes no space; skips where the file system has none such."""
    try:
        with file.open("wb") as stream:
            stream.write(head)
            stream.truncate(size)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files: {error}")


def _config(path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(kind | sizes | heads))


def _shards(path: Path) -> None:
    """Sixty safetensors files of bfloat16 and their index."""
    shapes, where = _shapes(), {}
    for shard in range(60):
        file, header, offset = f"model-{shard + 1:05d}-of-00060.safetensors", {}, 0
        for name in [*shapes][shard::60]:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset, where[name] = offset + size, file
        text = json.dumps(header).encode()
        _hole(path / file, 8 + len(text) + offset, len(text).to_bytes(8, "little") + text)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    _config(path)


def _ranks(path: Path, ranks: int = 64) -> None:
    """What FSDP2 on so many ranks leaves: weights and two moments, each tensor in a piece a rank, float32."""
    tensors: dict[str, Any] = {}
    places, paths = {}, {}
    offsets = [0] * ranks

    def add(*where: str, shape: tuple[int, ...]) -> None:
        key, chunks = ".".join(where), []
        rows = -(-shape[0] // ranks)
        for rank in range(ranks):
            start = torch.Size([rank * rows, *[0] * (len(shape) - 1)])
            sizes = torch.Size([min(rows, shape[0] - rank * rows), *shape[1:]])
            chunks.append(ChunkStorageMetadata(offsets=start, sizes=sizes))
            length = 4 * sizes.numel() + 1200
            places[MetadataIndex(key, start, rank)] = _StorageInfo(f"__{rank}_0.distcp", offsets[rank], length)
            offsets[rank] += length
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), chunks)
        paths[key] = where

    for name, shape in _shapes().items():
        add("model", name, shape=shape)
        for moment in ("exp_avg", "exp_avg_sq"):
            add("optimizer", "state", name, moment, shape=shape)
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, paths, places, StorageMeta())))
    for rank in range(ranks):
        _hole(path / f"__{rank}_0.distcp", offsets[rank])
    _config(path)


# The limits are those of issue and documentation, in seconds of the processor (the machine may be busy) and bytes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "seconds", "memory"), [(_shards, 3, 500e6), pytest.param(_ranks, 12, 600e6, marks=pytest.mark.slow)]
)
def test_inspect_of_seventy_billion(write: Callable[[Path], None], seconds: float, memory: float, tmp_path: Path) -> None:
    """Nearly all of the shards' time is the import of torch; the ranks' is a pickle of ten million instructions."""
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, str(tmp_path)], capture_output=True, text=True, check=True, timeout=99
    )
    values, taken, peak, transformers = json.loads(done.stdout)
    print(f"{write.__name__}: {taken:.1f} s, {peak / 1e6:.0f} MB")
    assert values == 70_553_706_496
    assert not transformers
    assert in_time(taken, seconds, time.process_time)
    assert peak < memory
