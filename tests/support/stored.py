"""The weights that a checkpoint's files hold, as the libraries that own the formats read them."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from formats import NETWORKS
from safetensors.torch import load_file
from tiny import build
from torch import Tensor


def stored(name: str, path: Path, original: Path | None) -> dict[str, Tensor]:
    """By the model's names. Empty where the library refuses, or would run what a damaged file says.

    Args:
        original: the undamaged checkpoint, where `path` is a damaged copy.
    """
    if name in ("DeepSpeed ZeRO 2", "DeepSpeed ZeRO 3"):
        found = _zero(path)
        assert found or original is not None
        return found
    if name == "DeepSpeed universal":
        return _universal(path)
    if name in ("torch.distributed.checkpoint", "FSDP, sharded"):
        return _distributed(path, path if original is None else original)
    found = {}
    home = path if path.is_dir() else path.parent
    if name == "LoRA":
        tensors = load_file(path / "adapter_model.safetensors")
        return {k.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for k, t in tensors.items()}
    if name == "Composer":
        document = torch.load(path, weights_only=True)
        return {key.removeprefix("model."): t for key, t in document["state"]["model"].items()}
    for file in [path] if path.suffix == ".safetensors" else sorted(home.glob("model*.safetensors")):
        found |= load_file(file)
    for file in sorted(home.glob("pytorch_model-*.bin")):
        found |= torch.load(file, weights_only=True)
    for file in (home / "pytorch_model.bin", home / "ckpt.pt", home / "plain.pt", home / "averaged.pt"):
        if file.is_file() and not found:
            document = torch.load(file, weights_only=True)
            found = document.get("model", document)
    if (file := home / "pytorch_model_fsdp.bin").is_file() and not found:
        found = torch.load(file, weights_only=True)
    for file in home.glob("*.ckpt"):
        document = torch.load(file, weights_only=True)["state_dict"]
        found = {key.removeprefix("net."): value for key, value in document.items()}
    assert found
    return {key.removeprefix("_orig_mod."): value for key, value in found.items()}


def _zero(path: Path) -> dict[str, Tensor]:
    """By DeepSpeed's own conversion, held to weights_only and to the classes of a good file."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TQDM_DISABLE": "1"}),
        patch("builtins.print"),
        torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]),
    ):
        try:
            found = get_fp32_state_dict_from_zero_checkpoint(str(path))
        except Exception:  # it reads what curv does not need, as latest
            return {}
        return {key: value.clone() for key, value in found.items()}


def _universal(path: Path) -> dict[str, Tensor]:
    # Those that curv takes from there: frozen ones it takes from the model's file, tied ones under their first name.
    model = NETWORKS["DeepSpeed universal"].build()
    shapes = {key: value.shape for key, value in model.named_parameters() if value.requires_grad}
    files = {file.parent.name: file for file in path.rglob("fp32.pt")}
    return {
        name: torch.load(files[name], weights_only=True)["param"].detach().view(shape)
        for name, shape in shapes.items()
        if name in files
    }


def _distributed(path: Path, original: Path) -> dict[str, Tensor]:
    """torch's reader runs what `.metadata` says, so it is asked only where that is the undamaged one's."""
    inner = "pytorch_model_fsdp_0" if (original / "pytorch_model_fsdp_0").is_dir() else "."
    metadata = path / inner / ".metadata"
    if metadata.read_bytes() != (original / inner / ".metadata").read_bytes():
        return {}
    model = build() if inner != "." else _small(original)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=path / inner, no_dist=True)
    return state["model"]


def _small(original: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original))
