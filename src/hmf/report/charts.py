# SPDX-License-Identifier: Apache-2.0
"""Charts of the report: SVG from matplotlib, with real text and the page's colours, and the data as a table."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDTH, HEIGHT = 4.4, 2.9  # inches of 72 units; a phone shows a unit as about one pixel
TEXT, GRID = "#f000f0", "#f000f1"  # placeholders of the page's colours, like the colours of series and shades
SERIES = 6  # number of the page's colours of series, --s0 to --s5
MARKERS, DASHES = "osD^vP", ("-", "--", "-.", ":")
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.titlesize": 11,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        low, high: bounds of the values.
        colour, dash: indices into the page's colours and dash patterns.
        shade: replaces the colour: a position from 0 to 1 between two colours of the page.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    dash: int = 0
    shade: float | None = None

    @property
    def paint(self) -> str:
        return f"#f0010{self.colour % SERIES}" if self.shade is None else f"#f2{round(self.shade * 1000):04x}"


@dataclass(frozen=True)
class Chart:
    """A picture with its caption and a table of its numbers. source: the file or command that they come from."""

    key: str
    title: str
    picture: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str
    computed: bool = False
    notes: Sequence[str] = ()
    name: ClassVar = "chart"


def number(value: float) -> str:
    """A number in the format of axes and tables, for example 0.0312, 12.5, 16,384 or 1.8M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tokens(value: float) -> str:
    """A number of tokens, for example 512 or 16K."""
    return f"{value / 1024:,.0f}K" if value and value % 1024 == 0 else number(value)


def safe(name: str) -> str:
    """A name in a form that can be part of an element's id."""
    return re.sub(r"[^\w-]", "-", name)


def lines(
    key: str,
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    source: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = None,
    marks: Mapping[float, str] | None = None,
    legend: Callable[[Series], bool] = lambda one: True,
    computed: bool = False,
    notes: Sequence[str] = (),
    x_shown: Callable[[float], str] = number,
) -> Chart:
    """Curves over a common axis.

    Args:
        marks: vertical lines by position, with their meaning, which the notes also state.
        legend: selects the series that the legend names.
        bounds: limits of the vertical axis.
        x_shown: formats a value of the horizontal axis.
    """

    def draw(axes: Any) -> None:
        for one in series:
            plain = len(one.x) > 30 or one.shade is not None
            style = {
                "color": one.paint,
                "label": one.name if legend(one) else None,
                "linestyle": DASHES[one.dash % 4],
                "marker": None if plain and len(one.x) > 1 else MARKERS[one.colour % len(MARKERS)],
            }
            if one.low is None or one.high is None:
                axes.plot(one.x, one.y, **style)
            else:
                below = [max(0.0, y - low) for y, low in zip(one.y, one.low, strict=True)]
                above = [max(0.0, high - y) for y, high in zip(one.y, one.high, strict=True)]
                axes.errorbar(one.x, one.y, (below, above), capsize=3, elinewidth=1, **style)
        for at in marks or {}:
            axes.axvline(at, color=TEXT, linestyle="--", linewidth=1)
        axes.set(xlabel=x_label, ylabel=y_label)
        if bounds is not None:
            axes.set_ylim(*bounds)
        if log_y:
            _logarithmic(axes, [y for one in series for y in one.y])
        if log_x:
            axes.set_xscale("log")
        if x_ticks is not None:
            axes.xaxis.set_major_locator(FixedLocator(x_ticks))
            axes.xaxis.set_minor_locator(NullLocator())
        elif not log_x:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_shown(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        if any(map(legend, series)) and len(series) > 1:
            axes.legend()

    stated = [*notes, *(f"The dashed line at {x_shown(at)}: {meaning}." for at, meaning in (marks or {}).items())]
    # A gap in a curve is a NaN, which may be at the same place as a value.
    values = [{x: y for x, y in zip(one.x, one.y, strict=True) if not math.isnan(y)} for one in series]
    points = sorted({x for by_x in values for x in by_x})
    rows = [[x_shown(x), *(number(by_x[x]) if x in by_x else "" for by_x in values)] for x in points]
    picture = render(key, f"{title}. {y_label} over {x_label}", draw)
    return Chart(key, title, picture, [x_label, *(one.name for one in series)], rows, source, computed, stated)


def bars(
    key: str,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    kinds: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    source: str,
    notes: Sequence[str] = (),
) -> Chart:
    """A bar for each name. Bars whose kind begins with "replaced" are hatched."""
    distinct_kinds = sorted(set(kinds))

    def draw(axes: Any) -> None:
        for kind in distinct_kinds:
            chosen, replaced = [index for index, one in enumerate(kinds) if one == kind], kind.startswith("replaced")
            axes.bar(
                chosen,
                [values[index] for index in chosen],
                label=kind,
                edgecolor=TEXT,
                linewidth=0.6,
                color=Series("", [], [], colour=int(replaced)).paint,
                hatch="///" if replaced else "",
            )
        axes.set(xlabel=x_label, ylabel=y_label)
        step = max(1, math.ceil(len(names) / 12))
        axes.set_xticks(range(0, len(names), step), names[::step])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        if len(distinct_kinds) > 1:
            axes.legend()

    rows = [[name, kind, f"{value:.4g}"] for name, kind, value in zip(names, kinds, values, strict=True)]
    return Chart(
        key,
        title,
        render(key, f"{title}. {y_label} by {x_label}", draw),
        [x_label, "kind", y_label],
        rows,
        source,
        notes=notes,
    )


def intervals(
    key: str,
    title: str,
    names: Sequence[str],
    series: Sequence[Series],
    x_label: str,
    *,
    source: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
) -> Chart:
    """For each name and series, a point with its interval. The `x` of a series are indices into `names`."""

    def draw(axes: Any) -> None:
        width = 0.6 / max(1, len(series))
        for turn, one in enumerate(series):
            places = [x + (turn - (len(series) - 1) / 2) * width for x in one.x]
            below = [max(0.0, y - low) for y, low in zip(one.y, one.low or one.y, strict=True)]
            above = [max(0.0, high - y) for y, high in zip(one.y, one.high or one.y, strict=True)]
            axes.errorbar(
                one.y,
                places,
                xerr=(below, above),
                linestyle="none",
                label=one.name,
                color=one.paint,
                capsize=3,
                marker=MARKERS[one.colour % len(MARKERS)],
                markersize=6,
                elinewidth=1.4,
            )
        axes.set(xlabel=x_label, xlim=(-3, 103), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    height = 1.3 + 0.14 * len(series) * len(names) + 0.25 * len(names)
    picture = render(key, f"{title}. {x_label}, with intervals", draw, height)
    return Chart(key, title, picture, head, rows, source, notes=notes)


def render(key: str, label: str, draw: Callable[[Any], None], height: float = HEIGHT) -> Markup:
    """The axes that `draw` fills, as an SVG element with the accessible name `label`."""
    written = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    return _themed(written.getvalue(), key, label)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """Set ticks at 1, 2 and 5 times powers of ten, or at even distances if the values are close together."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    span = max(positive) / min(positive) if positive else 1.0
    if span < 1.2:  # too narrow for a logarithmic scale
        axes.set_ylim(0, 1.2 * max(positive, default=1.0))
        return
    axes.set_yscale("log")
    subs = (1.0,) if span > 1000 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs) if span > 8 else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())


def _themed(svg: bytes, key: str, label: str) -> Markup:
    """matplotlib's SVG as an element of a page, with unique ids, and without fonts, fixed size or fixed colours."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w-]+)\)|href=\"#([\w-]+)\"", svg.decode()))
    kept = {name for pair in used for name in pair if name}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if element.get("id") not in kept:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            element.set("style", re.sub(r"font-family:[^;]*;? ?", "", style).replace("stroke: #000000", "stroke: none"))
    root.attrib.pop("width"), root.attrib.pop("height"), root.attrib.pop("version", None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-label", "focusable": "false"}
    title = ElementTree.Element(f"{{{SVG}}}title", {"id": f"{key}-label"})
    title.text = label
    root.insert(0, title)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return Markup(re.sub(r"#f[0-2][0-9a-f]{4}", _colour, ElementTree.tostring(root, encoding="unicode")))


def _colour(placeholder: re.Match[str]) -> str:
    code = placeholder[0]
    if code in (TEXT, GRID):
        return "currentColor" if code == TEXT else "var(--line)"
    if code.startswith("#f2"):
        return f"color-mix(in oklab, var(--shade-1) {int(code[3:], 16) / 10:g}%, var(--shade-0))"
    return f"var(--s{code[-1]})"
