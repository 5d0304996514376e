"""Checkpoint formats: one reader a format, registered here.

A new format is a file in this room, a line in READERS, and a test on files that its own library wrote.
"""

from __future__ import annotations

from curvcli.checkpoints.base import CheckpointReader
from curvcli.checkpoints.formats.adapter import AdapterReader
from curvcli.checkpoints.formats.dcp import DCPReader
from curvcli.checkpoints.formats.dcp_safetensors import DCPSafetensorsReader
from curvcli.checkpoints.formats.deepspeed import DeepSpeedReader
from curvcli.checkpoints.formats.fsdp import FSDPReader
from curvcli.checkpoints.formats.huggingface import HuggingFaceReader
from curvcli.checkpoints.formats.megatron import MegatronReader
from curvcli.checkpoints.formats.torchfile import TorchFileReader
from curvcli.checkpoints.formats.weights_file import WeightsFileReader

__all__ = ["READERS"]

# The first that accepts a path reads it: what is recognised by more stands before what is recognised by less.
READERS: tuple[CheckpointReader, ...] = (
    MegatronReader(),
    DeepSpeedReader(),
    FSDPReader(),
    DCPReader(),
    DCPSafetensorsReader(),
    AdapterReader(),
    HuggingFaceReader(),
    WeightsFileReader(),
    TorchFileReader(),
)
