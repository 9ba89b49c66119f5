"""Colours of the report and how a figure becomes PNG, for light and for dark pages.

Arms take the Okabe-Ito hues, which people with colour-vision deficiencies can tell apart; the dark theme uses brighter
relatives of the same hues. Text never goes through mathtext, so any name may hold any character.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

DPI = 150


@dataclass(frozen=True)
class Theme:
    """Colours as hex strings."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    bad: str
    arms: tuple[str, ...]

    def arm(self, index: int) -> str:
        return self.arms[index % len(self.arms)]

    @property
    def balance(self) -> LinearSegmentedColormap:
        """Below, at and above a fair share: blue, the page itself, orange."""
        low, high = ("#0b5394", "#b64a00") if self.name == "light" else ("#4aa8ff", "#ff8f3f")
        return LinearSegmentedColormap.from_list("balance", [low, self.surface, high])

    @property
    def amount(self) -> LinearSegmentedColormap:
        """From the page itself (none) to the strongest blue (most)."""
        high = "#08519c" if self.name == "light" else "#6cb6ff"
        return LinearSegmentedColormap.from_list("amount", [self.surface, high])

    @property
    def depth(self) -> LinearSegmentedColormap:
        """Layers from first to last."""
        ends = ("#8a6fd1", "#00796b", "#c98a00") if self.name == "light" else ("#b39dff", "#3ddbc4", "#ffcf5c")
        return LinearSegmentedColormap.from_list("depth", list(ends))


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1a2230",
    muted="#5b6676",
    grid="#e4e8ee",
    bad="#b3261e",
    arms=("#0072b2", "#d55e00", "#009e73", "#b8548f", "#a67c00", "#3f97cc", "#5b6676"),
)
DARK = Theme(
    name="dark",
    surface="#171c24",
    ink="#e7ecf3",
    muted="#9aa6b6",
    grid="#2b3340",
    bad="#ff8a80",
    arms=("#58b0ee", "#ff8b3d", "#2ed3a1", "#e58cc3", "#e6c04a", "#a9d8f7", "#9aa6b6"),
)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Matplotlib settings of a theme, for figures created and drawn inside."""
    with mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.parse_math": False,
            "text.color": theme.ink,
            "figure.facecolor": theme.surface,
            "axes.facecolor": theme.surface,
            "axes.edgecolor": theme.grid,
            "axes.labelcolor": theme.muted,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlecolor": theme.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.formatter.useoffset": False,
            "grid.color": theme.grid,
            "grid.linewidth": 0.8,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.solid_capstyle": "round",
        }
    ):
        yield


def new_figure(width: float, height: float, row_gap: float = 0.04) -> Figure:
    """An empty figure in inches, laid out so that labels never overlap; no global state, no display."""
    return Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=row_gap))


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, drawn once (`savefig` would draw and lay it out twice)."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A class name in a script that the font lacks shows as boxes; that is no reason to stop or to shout.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def shorten(text: str, limit: int = 28) -> str:
    """`text`, cut in the middle where it is too long for a label."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"
