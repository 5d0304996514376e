"""The network that weights belong to, and what its loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

Task = Literal["causal-lm", "masked-lm", "seq2seq", "classification"]


@dataclass(frozen=True)
class Architecture:
    """The network that weights belong to, where the file with the weights does not say it or the user says otherwise.

    Attributes:
        name: for people.
        build: a float32 model in evaluation mode on the CPU, whose weights are still to be loaded. Raises InputError.
        task: what its loss is.
        vocabulary: token ids lie below it; None where that is not known beforehand.
        context: longest sequence it takes, where known.
        tokenizer: directory of its tokenizer, where there is one.
        configuration: transformers' config.json that it is built from, where it is.
    """

    name: str
    build: Callable[[], nn.Module]
    task: Task = "causal-lm"
    vocabulary: int | None = None
    context: int | None = None
    tokenizer: Path | None = None
    configuration: Path | None = None
