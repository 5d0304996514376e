"""The terminal that verbs print to."""

from __future__ import annotations

import os
import shutil
from typing import Any

from rich.console import Console


def terminal(**settings: Any) -> Console:
    """rich's console, as wide as the terminal is: of a dumb one (TERM=dumb, unknown) rich takes no size and assumes 80."""
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        size = shutil.get_terminal_size()
        settings = {"width": size.columns, "height": size.lines, **settings}
    return Console(**settings)
