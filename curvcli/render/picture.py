"""A picture drawn by matplotlib: saved as a file, or put into a page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from curvcli.render.style import light
from curvcli.render.svg import embedded

LONGEST_BESIDE, ROW = 26, 0.17  # of a narrow picture's legend: characters of labels in two columns, inches a line
FORMATS = ("png", "svg", "pdf")
WIDE, NARROW = 8.0, 4.7  # inches; on a page as wide as a phone's, the wide one's text would be too small to read
EDGE = "edge of stability, rho = 1; threshold of lambda"
# No date and no chance in the file: the same document gives the same picture.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_STYLE: dict[Any, Any] = {
    "text.usetex": False, "text.parse_math": False, "svg.hashsalt": "curv", "font.family": "sans-serif", "font.size": 9.5,
    "text.color": light("ink"), "axes.labelcolor": light("ink"), "axes.edgecolor": light("soft"),
    "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": light("soft"), "ytick.color": light("soft"), "xtick.labelcolor": light("soft"),
    "ytick.labelcolor": light("soft"), "grid.color": light("line"), "hatch.color": light("soft"), "hatch.linewidth": 1.2,
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.columnspacing": 1.4, "legend.handletextpad": 0.5,
}  # fmt: skip


class Picture:
    """A figure of panels one below the other over a common axis.

    Args:
        draw: puts what is shown into the panels. It runs in this project's style, whatever the reader's own is.
        heights: of the panels, in inches.
        heading: what stands above the picture in a file; a page has said it already.
        width: in inches, WIDE or NARROW.
    """

    def __init__(
        self, draw: Callable[[Picture], None], heights: Sequence[float], heading: str, *, width: float = WIDE
    ) -> None:
        self.heading = heading
        self.narrow = width < WIDE
        self._labels: dict[str, Sequence[str]] = {}
        with rc_context(_STYLE):
            self.figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
            panels = self.figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
            self.axes: list[Axes] = list(panels[:, 0])
            draw(self)
            self.figure.align_ylabels()

    def __repr__(self) -> str:
        return f"<Picture: {self.heading}>"

    def label(self, artist: Artist, labels: Sequence[str]) -> None:
        """What the artist's marks say when pointed at on a page, one by one."""
        gid = f"labelled{len(self._labels)}"
        artist.set_gid(gid)
        self._labels[gid] = labels

    def legend(self, columns: int) -> None:
        """Above the panels, where no curve runs through it; each label once."""
        known = [pair for axes in self.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        named = {label: handle for handle, label in reversed(known)}
        labels = list(dict.fromkeys(label for _, label in known))
        self.legend_of([named[label] for label in labels], labels, columns)

    def legend_of(self, handles: Sequence[Artist], labels: Sequence[str], columns: int) -> None:
        """A legend of these."""
        if self.narrow:
            columns = min(columns, 1 if max(map(len, labels), default=0) > LONGEST_BESIDE else 2)
            more = max(0, ceil(len(labels) / columns) - 2)
            self.figure.set_figheight(self.figure.get_figheight() + ROW * more)
        self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, alignment="left")

    def save(self, suffix: str) -> bytes:
        """The picture as the bytes of a file of that format (png, svg or pdf)."""
        with rc_context(_STYLE):
            if self.figure.legends:  # which stand where the figure's own title would
                self.figure.legends[0].set_title(self.heading, prop=FontProperties(weight="bold", size=11))
            else:
                self.figure.suptitle(self.heading, x=0.01, ha="left", fontweight="bold", fontsize=11)
        return self._bytes(suffix, {})

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.save("png")

    def embed(self, name: str, says: str) -> Markup:
        """The picture as an <svg> of a page, of the class and with ids that begin with `name`."""
        self.figure.patch.set_visible(False)
        for axes in self.axes:
            axes.patch.set_visible(False)
        return embedded(self._bytes("svg", {"svg.fonttype": "none"}), self._labels, name, says)

    def _bytes(self, suffix: str, style: dict[Any, Any]) -> bytes:
        buffer = io.BytesIO()
        with rc_context({**_STYLE, **style}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that the font lacks: a page has others
            self.figure.savefig(buffer, format=suffix, dpi=150, metadata=_METADATA[suffix])
        return buffer.getvalue()


def readable_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis whose ends are set: round values, two at least, however narrow it is."""
    low, high = sorted(log10(end) for end in axis.get_view_interval())
    decades = high - low
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _round(value)))
    axis.set_minor_locator(NullLocator())


def round_steps(axis: Axis, *, narrow: bool) -> None:
    """Whole ticks of an axis of steps, 1, 2 or 5 times a power of ten apart."""
    axis.set_major_locator(MaxNLocator(nbins=4 if narrow else 8, integer=True, steps=[1, 2, 5, 10]))


def foot(least: float) -> float:
    """Where bars on a logarithmic axis begin: the next of 1, 2 and 5 times a power of ten, well below the least of them."""
    power = 10.0 ** floor(log10(least / 1.2))
    return power * max(step for step in (1, 2, 5) if step == 1 or step * power <= least / 1.2)


def _round(value: float) -> str:
    """A round value as people read it."""
    return f"{value:,.7g}" if value == 0 or 1e-4 <= abs(value) < 1e7 else f"{value:.0e}"
