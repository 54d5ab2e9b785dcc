"""A figure as SVG that follows the page's colours and tells names on hovering.

What has a ``gid`` gets a ``<title>``; black becomes the page's text colour, so that one figure
serves light and dark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dery_cli.runtime.printable import printable

STYLE: Any = {
    "svg.hashsalt": "dery",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,  # dollars in a class name are dollars
}
WIDTH = 6.4
"""Inches; the page scales figures to its own width."""

_TEXT = ("#000000", "black")


@dataclasses.dataclass
class Drawn:
    """One figure.

    Args:
        name: Of its files.
        heading: Above it.
        words: Below the heading.
        figure: Of matplotlib.
        titles: What hovering says, by ``gid``.
    """

    name: str
    heading: str
    words: str
    figure: Figure
    titles: dict[str, str] = dataclasses.field(default_factory=dict)

    def hover(self, artist: Any, words: str) -> None:
        """Let an artist say something when it is pointed at."""
        gid = f"{self.name}-{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = printable(words)

    def svg(self) -> str:
        """For the page: scalable, in the page's text colour, with its titles."""
        stream = io.StringIO()
        with quiet():
            self.figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        for colour in _TEXT:
            text = text.replace(f"fill: {colour}", "fill: currentColor")
            text = text.replace(f"stroke: {colour}", "stroke: currentColor")
        text = text.replace("<text ", '<text fill="currentColor" ')
        for gid, words in self.titles.items():
            title = f"<title>{html.escape(words)}</title>"
            text = text.replace(f'<g id="{gid}">', f'<g id="{gid}">{title}', 1)
        # identifiers must differ between the figures of one page
        for identifier in sorted(set(re.findall(r'id="([^"]+)"', text))):
            if not identifier.startswith(self.name):
                mine = f"{self.name}--{identifier}"
                text = text.replace(f'id="{identifier}"', f'id="{mine}"')
                text = text.replace(f'"#{identifier}"', f'"#{mine}"')
                text = text.replace(f"url(#{identifier})", f"url(#{mine})")
        label = html.escape(f"{self.heading}: {self.words}")
        return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """The same on white, 150 dots an inch."""
        stream = io.BytesIO()
        with quiet():
            self.figure.savefig(
                stream,
                format="png",
                dpi=150,
                facecolor="white",
                bbox_inches="tight",
                metadata={"Software": None},
            )
        return stream.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Our style, without matplotlib's word on letters that its fonts lack: the page's have them."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for every donor, the same in all figures."""
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(place % palette.N) for place, name in enumerate(names)}


def short(name: str) -> str:
    """A donor's name without its plugin."""
    return name.partition("__")[2] or name


def count_ticks(axis: Axis, *, log: bool = False) -> None:
    """Ticks written as sizes are everywhere: 300k, 2M."""
    if log:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """A round number without the zeros that ``show_count`` keeps for exact ones."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
