"""Small valid checkpoints, one writer per format, for tests that damage them. A new format is one function and one line.

Those that only several ranks can write are in RANKED: two processes of torch write them, once for all of a library.
"""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed_runs
import fsdp_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from accelerate import Accelerator
from places import SAMPLES
from ranks import EARLIER, launch
from safetensors.numpy import save_file
from safetensors.torch import load_file, save_model
from safetensors.torch import save_file as save_tensors
from tiny import config
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from curvcli import save_optimizer
from curvcli.models.base import Architecture


def _llama() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A Llama after three steps of AdamW, grouped as the Trainer does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    named = list(model.named_parameters())
    plain, norms = ([p for n, p in named if ("norm" in n) is norm] for norm in (False, True))
    optimizer = torch.optim.AdamW([{"params": plain}, {"params": norms, "weight_decay": 0.0}], lr=1e-3)  # type: ignore[arg-type]
    for _ in range(3):
        ids = torch.randint(64, (4, 17))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, optimizer


def _trainer(path: Path, **how: Any) -> Path:
    model, optimizer = _llama()
    model.save_pretrained(path, **how)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    state = '{"global_step": 3, "log_history": [{"step": 3, "loss": 4.1, "learning_rate": 0.001, "grad_norm": 2.0}]}'
    (path / "trainer_state.json").write_text(state)
    return path


def trainer(path: Path) -> Path:
    return _trainer(path)


def sharded(path: Path) -> Path:
    return _trainer(path, max_shard_size="8KB")


def old_bin(path: Path) -> Path:
    """pytorch_model.bin and an optimizer file of the form before zip."""
    model, optimizer = _llama()
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), path / "optimizer.pt", _use_new_zipfile_serialization=False)
    return path


def old_shards(path: Path) -> Path:
    """pytorch_model-00001-of-0000n.bin, which accelerate writes still and transformers did until release 5."""
    model, optimizer = _llama()
    model.config.save_pretrained(path)
    Accelerator(cpu=True).save_model(model, path, max_shard_size="8KB", safe_serialization=False)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path


def pretrained(path: Path) -> Path:
    _llama()[0].save_pretrained(path)
    return path


def single(path: Path) -> Path:
    """One .safetensors file, with the network's config.json beside it."""
    model, _ = _llama()
    model.config.save_pretrained(path)
    save_model(model, str(path / "weights.safetensors"))
    return path / "weights.safetensors"


def nanogpt(path: Path) -> Path:
    path.mkdir(parents=True)
    shutil.copy(SAMPLES / "nanogpt" / "ckpt.pt", path)
    return path / "ckpt.pt"


def plain(path: Path) -> Path:
    """A training script's own torch.save, with the network's config.json beside it."""
    model, optimizer = _llama()
    model.config.save_pretrained(path)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, path / "plain.pt")
    return path / "plain.pt"


def ours(path: Path) -> Path:
    model, optimizer = _llama()
    model.save_pretrained(path)
    save_optimizer(path, optimizer, model)
    return path


def distributed(path: Path) -> Path:
    """torch.distributed.checkpoint, nested."""
    model, optimizer = _llama()
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path / "step-3", no_dist=True)
    model.config.save_pretrained(path / "step-3")
    return path / "step-3"


def lightning(path: Path) -> Path:
    from lightning_runs import Lit, fit

    path.mkdir(parents=True)
    fit(Lit(), path / "epoch=0-step=2.ckpt")
    config().save_pretrained(path)
    return path / "epoch=0-step=2.ckpt"


def accelerated(path: Path) -> Path:
    """accelerate's save_state, with the network's config.json beside it."""
    accelerator, (model, optimizer) = Accelerator(cpu=True), _llama()
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.save_state(str(path / "step_3"))
    model.config.save_pretrained(path / "step_3")
    return path / "step_3"


def compiled(path: Path) -> Path:
    """The Trainer's, of a model that was compiled and saved with its wrapper's prefix."""
    path = _trainer(path)
    state = load_file(path / "model.safetensors")
    save_tensors({f"_orig_mod.{n}": t for n, t in state.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def composer(path: Path) -> Path:
    """By hand after composer/core/state.py, whose package holds other versions of torch."""
    model, optimizer = _llama()
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    named = {
        "state": {f"model.{n}": s for n, s in state["state"].items()},
        "param_groups": [{**g, "params": [f"model.{n}" for n in g["params"]]} for g in state["param_groups"]],
    }
    weights = {f"model.{n}": t for n, t in model.state_dict().items()}
    inner = {"model": weights, "optimizers": {"AdamW": named}, "timestamp": {"epoch": 0, "batch": 3}}
    model.config.save_pretrained(path)
    torch.save({"state": inner, "rng": [{"torch": torch.get_rng_state()}]}, path / "ep0-ba3-rank0.pt")
    return path / "ep0-ba3-rank0.pt"


def averaged(path: Path) -> Path:
    """A training script's file with an average of the weights beside them."""
    model, optimizer = _llama()
    average = {n: t + 1 for n, t in model.state_dict().items()}
    model.config.save_pretrained(path)
    document = {"model": model.state_dict(), "model_ema": average, "optimizer": optimizer.state_dict(), "step": 3}
    torch.save(document, path / "averaged.pt")
    return path / "averaged.pt"


def adapter(path: Path) -> Path:
    """peft's LoRA, with its base inside the checkpoint's directory."""
    from peft import LoraConfig, get_peft_model

    model, _ = _llama()
    model.save_pretrained(path / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        ids = torch.randint(64, (4, 17))
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned.peft_config["default"].base_model_name_or_path = "base"
    tuned.save_pretrained(str(path))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    return path


# Writes a checkpoint under the path and returns what the user would name.
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "transformers Trainer": trainer,
    "transformers, sharded": sharded,
    "transformers, pytorch_model.bin": old_bin,
    "pytorch_model.bin in shards": old_shards,
    "transformers, no optimizer": pretrained,
    "one .safetensors": single,
    "nanoGPT": nanogpt,
    "plain torch.save": plain,
    "optimizer.safetensors": ours,
    "torch.distributed.checkpoint": distributed,
    "Lightning": lightning,
    "accelerate": accelerated,
    "a compiled model's": compiled,
    "Composer": composer,
    "with an average": averaged,
    "LoRA": adapter,
}

_NET = Architecture("Net", deepspeed_runs.build, vocabulary=11)


@dataclass(frozen=True)
class Ranked:
    """What two ranks wrote: the library's runs, the directory among them, and the network where none lies beside."""

    library: str
    directory: str
    network: Architecture | None = None


RANKED = {
    "DeepSpeed ZeRO 2": Ranked("deepspeed", "stage2", _NET),
    "DeepSpeed ZeRO 3": Ranked("deepspeed", "stage3", _NET),
    "DeepSpeed universal": Ranked("deepspeed", "universal-stage2", _NET),
    "FSDP, full": Ranked("fsdp", "FULL_STATE_DICT"),
    "FSDP, sharded": Ranked("fsdp", "SHARDED_STATE_DICT"),
}


@cache
def ranks(library: str, root: Path) -> Path:
    """All runs of a library, as two ranks wrote them."""
    path = root / library
    if not path.is_dir():
        path.mkdir(parents=True)
        if library == "deepspeed":
            launch(partial(deepspeed_runs.write, runs=deepspeed_runs.FUZZED), path, initialize=False)
        else:
            launch(fsdp_runs.write, path)
    if library == "fsdp":
        # The Trainer writes its configuration beside full weights, and people copy it beside sharded ones.
        for name in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            config().save_pretrained(path / name)
    return path


_IDS = np.arange(4000) % 64


def _write(path: Path, name: str, write: Callable[[Path], object]) -> Path:
    path.mkdir(parents=True)
    write(path / name)
    return path / name


def _llm_c(file: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(_IDS)
    file.write_bytes(header.tobytes() + _IDS.astype("<u2").tobytes())


def _megatron(file: Path) -> None:
    """Two documents, by hand after Megatron-LM's indexed_dataset.py."""
    file.with_suffix(".bin").write_bytes(_IDS.astype("<i4").tobytes())
    half = len(_IDS) // 2
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 3)
    lengths, pointers = np.array([half, half], dtype="<i4"), np.array([0, 4 * half], dtype="<i8")
    file.write_bytes(head + lengths.tobytes() + pointers.tobytes() + np.arange(3, dtype="<i8").tobytes())


def packed(column: list[int] | str, pack: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    key = "text" if isinstance(column, str) else "input_ids"
    return lambda file: file.write_bytes(pack(json.dumps({key: column}).encode()))


def saved_dataset(path: Path, columns: dict[str, list], split: str | None = None) -> None:
    """By the datasets library, two files where there are two rows."""
    from datasets import Dataset, DatasetDict

    made = Dataset(pa.table(columns))
    files = min(2, len(made))
    if split:
        DatasetDict({split: made}).save_to_disk(path, num_shards={split: files})
    else:
        made.save_to_disk(path, num_shards=files)


def _dataset(path: Path, *, split: bool = False) -> Path:
    rows = {"input_ids": [_IDS[i : i + 100].tolist() for i in range(0, len(_IDS), 100)]}
    saved_dataset(path / "saved", rows, "train" if split else None)
    return path / "saved"


def tokenizer(path: Path) -> None:
    """One of words, whose words are the numbers below 64."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(path)  # noqa: S106


_TEXT = " ".join(map(str, _IDS))

# Writes 4,000 token ids below 64 under the path and returns the file.
DATA: dict[str, Callable[[Path], Path]] = {
    "nanoGPT .bin": lambda p: _write(p, "a.bin", lambda f: _IDS.astype("<u2").tofile(f)),
    ".npy": lambda p: _write(p, "a.npy", lambda f: np.save(f, _IDS.astype(np.int32))),
    "safetensors": lambda p: _write(p, "a.safetensors", lambda f: save_file({"input_ids": _IDS.astype(np.int32)}, f)),
    "llm.c .bin": lambda p: _write(p, "a.bin", _llm_c),
    "Megatron .idx": lambda p: _write(p, "a.idx", _megatron),
    "parquet": lambda p: _write(p, "a.parquet", lambda f: pq.write_table(pa.table({"input_ids": [_IDS.tolist()]}), f)),
    "jsonl": lambda p: _write(p, "a.jsonl", lambda f: f.write_text(json.dumps({"input_ids": _IDS.tolist()}))),
    "jsonl.gz": lambda p: _write(p, "a.jsonl.gz", packed(_IDS.tolist(), gzip.compress)),
    "jsonl.zst": lambda p: _write(p, "a.jsonl.zst", packed(_IDS.tolist(), zstandard.compress)),
    "datasets.save_to_disk": _dataset,
    "datasets.save_to_disk, splits": partial(_dataset, split=True),
    "text": lambda p: _write(p, "a.txt", lambda f: f.write_text(_TEXT)),
    "text.gz": lambda p: _write(p, "a.txt.gz", lambda f: f.write_bytes(gzip.compress(_TEXT.encode()))),
    "jsonl of text": lambda p: _write(p, "a.jsonl", packed(_TEXT, bytes)),
}


NETWORKS = MappingProxyType({name: ranked.network for name, ranked in RANKED.items() if ranked.network})


@cache
def master(kind: str, name: str, root: Path) -> Path:
    """A format's sample, written once per root by its library: what the user would name."""
    if name in RANKED:
        return ranks(RANKED[name].library, root) / RANKED[name].directory
    table = CHECKPOINTS if kind == "checkpoint" else DATA
    return table[name](root / kind / "".join(c if c.isalnum() else "-" for c in name))


def earlier(name: str, root: Path) -> Path | None:
    """The same run a step before, where the sample's writer saved that."""
    found = master("checkpoint", name, root)
    found = found.with_name(found.name + EARLIER)
    return found if found.is_dir() else None


def fresh(kind: str, name: str, root: Path, target: Path) -> Path:
    """A copy of a format's sample, under `target`, free to damage."""
    found = master(kind, name, root)
    home = found if found.is_dir() else found.parent
    shutil.rmtree(target, ignore_errors=True)
    # live.pt is the tests' own, beside what DeepSpeed wrote, and its script is no part of the checkpoint.
    shutil.copytree(home, target, ignore=shutil.ignore_patterns("live.pt", "zero_to_fp32.py"))
    return target / found.relative_to(home)
