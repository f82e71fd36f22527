"""One look for every picture: colours of methods, frames, and figures as inline SVG."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "LEVELS",
    "MUTED",
    "SURFACE",
    "THEME",
    "WIDTH",
    "Look",
    "css_colours",
    "dodge",
    "frame",
    "in_powers",
    "inline_svg",
    "looks",
    "shorten",
    "svg_file",
]

#: Width of a picture in inches: one column of the page, and a whole phone.
WIDTH = 4.4

#: Every colour by name, on a light and on a dark page. Pictures are drawn in the light
#: one, which the SVG then replaces by a CSS variable of that name. Simulated for red
#: and green blindness, the nearest two method colours stay 6 apart (OKLab × 100).
THEME = {
    "ink": ("#1c1b19", "#f0efea"),
    "muted": ("#6b6963", "#a5a39c"),
    "grid": ("#e4e2dc", "#33322f"),
    "surface": ("#ffffff", "#161615"),
    "coal": ("#45433f", "#e9e8e3"),
    "grey": ("#b3b1aa", "#6d6c67"),
    "slate": ("#66788c", "#8a99a8"),
    "orange": ("#e2711d", "#f5953d"),
    "red": ("#b5281e", "#d9483a"),
    "blue": ("#1f5fd6", "#5b9bff"),
    "sky": ("#6fb1f0", "#b4dcff"),
    "navy": ("#14264f", "#3a62b8"),
    "green": ("#0f7d58", "#3fa57c"),
    "yellow": ("#d9a514", "#f0cf58"),
    "violet": ("#7a1f8c", "#9457d6"),
    "magenta": ("#d64fae", "#f58fd0"),
    "level0": ("#12366b", "#b9dafa"),
    "level1": ("#1f5799", "#8fbff0"),
    "level2": ("#3c7fc4", "#659fdc"),
    "level3": ("#67a3da", "#4580bd"),
    "level4": ("#97c3ea", "#32639a"),
    "leaf": ("#e0892e", "#e8a45c"),
    "frame": ("#f07c1a", "#c33a17"),
}
INK, MUTED, GRID, SURFACE = (
    THEME[name][0] for name in ("ink", "muted", "grid", "surface")
)
#: Levels of a hierarchical matrix, the coarsest first; the leaves last.
LEVELS = (*(THEME[f"level{k}"][0] for k in range(5)), THEME["leaf"][0])

#: Method (or its beginning) to colour and marker; the first that fits.
LOOKS = (
    ("frozen", "grey", "s"),
    ("full", "coal", "s"),
    ("lora", "orange", "^"),
    ("kfac-pruner", "red", "v"),
    ("sylva:kfac:hodlr", "sky", "o"),
    ("sylva:kfac:dense", "navy", "o"),
    ("sylva:kfac", "blue", "o"),
    ("sylva:kfac-natural", "navy", "D"),
    ("sylva:fisher-diag", "green", "D"),
    ("sylva:weight-gradient", "yellow", "P"),
    ("sylva:gradient", "violet", "X"),
    ("sylva:magnitude", "magenta", "p"),
    ("sylva:kfac-pruner", "red", "p"),
    ("sylva:random", "slate", "o"),
)
#: Colours for methods without one of their own: those that mean least first.
SPARE = (
    "sky", "yellow", "magenta", "violet", "green", "navy", "blue", "red", "orange",
)  # fmt: skip

RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "sylva",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn in every picture.

    Parameters
    ----------
    name : str
        Name of the colour in `THEME`.
    marker : str
        Marker of matplotlib.
    hollow : bool
        Whether the marker is filled with the page's colour: the control.
    """

    name: str
    marker: str
    hollow: bool = False

    @property
    def colour(self) -> str:
        """The colour on a light page."""
        return THEME[self.name][0]

    @property
    def face(self) -> str:
        """The colour that fills the marker."""
        return SURFACE if self.hollow else self.colour

    @property
    def point(self) -> dict[str, Any]:
        """How matplotlib draws a point of it, but for the size."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "mfc": self.face,
            "mec": self.colour if self.hollow else SURFACE,
            "mew": 1.4 if self.hollow else 0.6,
        }


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Give each method its look: that of its family, else one that nobody has.

    Two variants of a family (two ranks of LoRA) may share it only when no colour is
    left; methods without a family are then grey, and neighbours have different markers.
    """
    methods = list(methods)
    places = {method: _family(method) for method in methods}
    owners: dict[str, str] = {}
    for method in sorted(methods, key=places.__getitem__):
        if places[method] < len(LOOKS):
            owners.setdefault(LOOKS[places[method]][1], method)
    spare = (name for name in SPARE if name not in owners)
    markers = itertools.cycle("dh")
    found: dict[str, Look] = {}
    for method in methods:
        _, name, marker = (*LOOKS, ("", "muted", ""))[places[method]]
        if owners.get(name) != method:
            name = next(spare, name)
        hollow = method.startswith("sylva:random")
        found[method] = Look(name, marker or next(markers), hollow)
    return found


def _family(method: str) -> int:
    """Return which of `LOOKS` a method has, their number if none."""
    return next(
        (
            place
            for place, (beginning, _, _) in enumerate(LOOKS)
            if method == beginning or method.startswith(f"{beginning}:")
        ),
        len(LOOKS),
    )


def css_colours(dark: bool) -> str:
    """Return the theme as CSS declarations."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in THEME.items())


def in_powers(value: float, _: float = 0) -> str:
    """Print a tick of a logarithmic axis, without the mathematics that SVG has not."""
    if value <= 0:
        return ""
    exponent, raised = round(math.log10(value)), "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
    digits = str(exponent).translate(str.maketrans("-0123456789", raised))
    return {0: "1", 1: "10"}.get(exponent, f"10{digits}")


def shorten(text: str, length: int = 32) -> str:
    """Cut a label that no picture has room for."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def dodge(
    places: Sequence[float], gap: float, low: float, high: float
) -> NDArray[np.float64]:
    """Move labels as little as keeps them ``gap`` apart and within bounds.

    Parameters
    ----------
    places : sequence of float, length n
        Where the labels want to stand.
    gap, low, high : float
        Least distance, and bounds (given up if there is no room for all).

    Returns
    -------
    ndarray of float64, shape (n,)
        The least-squares solution: isotonic regression of the places less the gaps.
    """
    from scipy.optimize import isotonic_regression

    wanted = np.asarray(places, dtype=np.float64)
    if not wanted.size:
        return wanted
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(wanted.size)
    clear = isotonic_regression(wanted[order] - steps).x
    clear = np.clip(clear, low, max(low, high - steps[-1])) + steps
    moved = np.empty_like(wanted)
    moved[order] = clear
    return moved


def frame(
    height: float,
    *,
    width: float = WIDTH,
    left: float = 0.5,
    right: float = 0.15,
    top: float = 0.12,
    bottom: float = 0.42,
) -> tuple[Figure, Axes]:
    """Return a figure with one axes, its margins in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
    )
    return figure, axes


def svg_file(draw: Callable[[], Figure], **options: Any) -> str:
    """Draw a figure as the text of an SVG file, the same for the same figure.

    Parameters
    ----------
    draw : callable
        Returns the figure. Called under the page's style, without pyplot's state.
    **options
        Of `matplotlib.figure.Figure.savefig`.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(RC), warnings.catch_warnings():
        # The viewer draws the text, whatever fonts there are here.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        draw().savefig(buffer, format="svg", metadata={"Date": None}, **options)
    return buffer.getvalue()


def inline_svg(draw: Callable[[], Figure], name: str, label: str) -> str:
    """Draw a figure as SVG that lives inside an HTML page.

    Parameters
    ----------
    draw : callable
        Returns the figure, as for `svg_file`.
    name : str
        Prefix of the ids, unique on the page, as those of two figures would clash.
    label : str
        What the picture shows, for those who cannot see it.

    Returns
    -------
    str
        ``<svg>`` whose colours are the page's CSS variables and whose text is text, in
        the page's font, so that it follows the theme and can be searched.
    """
    text = svg_file(draw, transparent=True)
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL
    )
    text = re.sub(r"\s*font-family: [^;\"]*;?", "", text)
    text = text.replace("xlink:href", "href").replace("rotate(-0 ", "rotate(0 ")
    used = set(re.findall(r"href=\"#([^\"]+)\"|url\(#([^)]+)\)", text))
    ids = {one or other for one, other in used}
    text = re.sub(
        r"\s*\bid=\"([^\"]+)\"",
        lambda m: f' id="{name}-{m[1]}"' if m[1] in ids else "",
        text,
    )
    text = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{name}-", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    for colour, (light, _) in THEME.items():
        text = text.replace(f": {light}", f": var(--{colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg class="chart" {box[0] if box else ""} role="img"'
    inner = text[text.index(">") + 1 :]
    return f'{head} aria-label="{escape(label)}">{inner}'
