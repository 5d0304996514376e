"""This package's version, which every document carries: that of its metadata, and written down in pyproject.toml alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Three numbers with dots between them; "unknown" for a source tree that was not installed."""
    try:
        return version("curvcli")
    except PackageNotFoundError:
        return "unknown"
