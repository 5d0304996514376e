"""curv: how close a training run is to its edge of stability, and where.

    report = curvcli.analyze(model, loss, batches, optimizer)
    report.full.rho
    track = curvcli.track("run/", tokens=4096)
    plan = curvcli.schedule(depth=48)

Names are imported on first use, so that `import curvcli` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from curvcli.documents.shown import shown_by

if TYPE_CHECKING:
    from curvcli.analysis.api import Estimated, analyze
    from curvcli.analysis.compare import compare
    from curvcli.analysis.explain import explain
    from curvcli.analysis.gate import gate
    from curvcli.analysis.schedule import schedule
    from curvcli.analysis.track import track
    from curvcli.checkpoints.formats.optimizer_file import save_optimizer
    from curvcli.documents import Report, load
    from curvcli.errors import CurvError, InputError, UnsupportedError, UsageError
    from curvcli.training import ArchitectureWarmup, CurvatureTracker

    __version__: str

__all__ = [
    "ArchitectureWarmup",
    "CurvError",
    "CurvatureTracker",
    "Estimated",
    "InputError",
    "Report",
    "UnsupportedError",
    "UsageError",
    "analyze",
    "compare",
    "explain",
    "gate",
    "load",
    "save_optimizer",
    "schedule",
    "track",
]

# Documents stand below what draws them, and must not know it: here both are known, and nothing of it is imported yet.
shown_by(**{what: f"curvcli.render.notebook:{what}" for what in ("line", "html", "picture", "frame")})

_HOME = {
    "analyze": "analysis.api",
    "Estimated": "analysis.api",
    "compare": "analysis.compare",
    "explain": "analysis.explain",
    "schedule": "analysis.schedule",
    "track": "analysis.track",
    "gate": "analysis.gate",
    "Report": "documents",
    "load": "documents",
    "save_optimizer": "checkpoints.formats.optimizer_file",
    "ArchitectureWarmup": "training",
    "CurvatureTracker": "training",
    "CurvError": "errors",
    "InputError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from curvcli.documents.version import package_version

        return package_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"curvcli.{_HOME[name]}"), name)
