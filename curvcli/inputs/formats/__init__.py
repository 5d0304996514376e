"""Checkpoint formats: one reader a format, registered here.

A new format is a file in this room, a line in READERS, and a test on files that its own library wrote.
"""

from __future__ import annotations

from curvcli.inputs.base import CheckpointReader
from curvcli.inputs.formats.adapter import AdapterReader
from curvcli.inputs.formats.dcp import DCPReader
from curvcli.inputs.formats.dcp_safetensors import DCPSafetensorsReader
from curvcli.inputs.formats.deepspeed import DeepSpeedReader
from curvcli.inputs.formats.fsdp import FSDPReader
from curvcli.inputs.formats.huggingface import HuggingFaceReader
from curvcli.inputs.formats.megatron import MegatronReader
from curvcli.inputs.formats.torchfile import TorchFileReader
from curvcli.inputs.formats.weights_file import WeightsFileReader

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
