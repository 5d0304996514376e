"""On a GPU: `python -m pytest -o addopts= --confcutdir=tests/cuda tests/cuda`.

That needs pytest and what the package depends on, and nothing of its extras.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu import DEVICE, LINES, REAL


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LINES:
        terminalreporter.section(f"measured on {torch.cuda.get_device_name(DEVICE) if REAL else DEVICE}")
        for line in LINES:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test begins with the GPU's memory given back."""
    yield
    if REAL and torch.cuda.is_available():
        torch.cuda.empty_cache()
