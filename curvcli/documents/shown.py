"""How documents show themselves in Python and in notebooks.

What draws stands above documents, in rooms that these must not import: the package names it when it is first imported, and
it is found by that name when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_PLACES: dict[str, str] = {}


def shown_by(**places: str) -> None:
    """Name what shows documents: `line`, `html`, `picture` and `frame`, each as "package.module:function" of a document."""
    _PLACES.update(places)


class Shown:
    """A document that people look at: short in Python, as a page's top in a notebook, as a picture and as a table."""

    def __repr__(self) -> str:
        """What it is of and what it says, in one line."""
        return str(_show("line", self))

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        """The top of its page, for a notebook: self-contained HTML without script."""
        return str(_show("html", self))

    def plot(self, path: Path | str | None = None) -> Any:
        """The picture that `--plot` writes, which a notebook shows where it ends a cell.

        Args:
            path: where it is written too (.png, .svg, .pdf).

        Returns:
            A `curvcli.render.picture.Picture`; its `figure` is matplotlib's.

        Raises:
            UsageError: the path's name ends in something else.
            InputError: it cannot be written.
        """
        return _show("picture", self, path)

    def to_frame(self) -> Any:
        """A pandas.DataFrame: of a report a row a part, of a track a checkpoint, of a gate a rule, of a schedule a phase.

        Of a comparison of checkpoints a row is a part, of tracks a step; of a job's log it is a record.

        Columns are named as in CSV, values are at full precision; what is not known is missing, and `status` says why.

        Raises:
            UnsupportedError: pandas is not installed.
        """
        return _show("frame", self)


def _show(what: str, *given: object) -> Any:
    module, _, name = _PLACES[what].partition(":")
    return getattr(import_module(module), name)(*given)
