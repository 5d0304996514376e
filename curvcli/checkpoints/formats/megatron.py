"""Checkpoints of Megatron-LM and NeMo: recognised, so that the answer names the conversion and not a missing file."""

from __future__ import annotations

from pathlib import Path

from curvcli.checkpoints.base import Checkpoint
from curvcli.errors import CurvError, UnsupportedError
from curvcli.files.safe import read_json
from curvcli.models.base import Architecture

_MEGATRON = (
    "weights are cut between ranks and named in Megatron's own way; export them with Megatron-Bridge "
    "(AutoBridge.export_ckpt(megatron_path, hf_path)) or Megatron-LM's tools/checkpoint/convert.py, and point curv at the "
    "result; the optimizer's state is not converted, so its second moment is then estimated"
)
_NEMO = (
    "export it with NeMo (nemo.collections.llm.export_ckpt(path=..., target='hf')) and point curv at the result; the "
    "optimizer's state is not exported, so its second moment is then estimated"
)


class MegatronReader:
    """Megatron's `latest_checkpointed_iteration.txt`, `mp_rank_*`, `metadata.json`; NeMo's .nemo, `weights` + `context`."""

    def accepts(self, path: Path) -> bool:
        """Whether Megatron-LM or NeMo wrote it."""
        return _kind(path) is not None

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Raises UnsupportedError, which names the conversion to run."""
        kind = _kind(path)
        raise UnsupportedError(
            f"{path} is a checkpoint of {kind}, which curv does not read", hint=_NEMO if kind == "NeMo" else _MEGATRON
        )


def _kind(path: Path) -> str | None:
    if path.is_file():
        return "NeMo" if path.suffix == ".nemo" else None
    if (path / "weights").is_dir() and (path / "context").is_dir():
        return "NeMo"
    if (path / "latest_checkpointed_iteration.txt").is_file() or any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return "Megatron-LM"
    return "Megatron-LM" if _dist_checkpointing(path / "metadata.json") else None


def _dist_checkpointing(file: Path) -> bool:
    try:
        return file.is_file() and "sharded_backend" in read_json(file)
    except (CurvError, TypeError):
        return False
