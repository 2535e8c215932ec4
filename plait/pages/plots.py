"""Pictures for reports: SVG text whose colours are CSS variables, so that the page decides between dark and light."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from plait.design.summary import size

# Colours that stand for the page's variables until the SVG is written.
INK, GRID = "#010203", "#010204"
SERIES = ("#010205", "#010206", "#010207", "#010208", "#010209", "#01020a")
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}

FLAT, MOST_NAMES = 8, 32  # names under an axis that do not overlap lying, and standing
MARK_WIDTH, LETTER_WIDTH = 0.7, 0.1  # inches that a legend takes for a line's mark, and for a letter
SIZE = (5, 3.4)  # inches of 72 units: so small that letters stay readable on a page 390 pixels wide

Line = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def losses(trained: Sequence[Line], heldout: Sequence[Line]) -> str:
    """Training loss (lines; each point a mean over some steps) and held-out loss (marks) against tokens read."""

    def draw(axes: Axes) -> None:
        for index, (name, x, y) in enumerate(trained):
            axes.plot(x, smooth(y), color=SERIES[index % len(SERIES)], lw=1.6, label=name)
        for index, (_, x, y) in enumerate(heldout):
            style = {"marker": MARKERS[index % len(MARKERS)], "ms": 5, "ls": "none"}
            axes.plot(x, y, color=SERIES[index % len(SERIES)], **style)
        axes.set_xlabel("tokens read")
        axes.set_ylabel("loss, nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))

    return picture("loss", draw)


def bars(
    name: str, label: str, names: Sequence[str], heights: Sequence[float], marked: Sequence[bool], kinds: str
) -> str:
    """One bar for each of `names`, those that are marked in another colour. kinds: "MARKED, OTHERS", what the two are."""

    def draw(axes: Axes) -> None:
        for colour, kind, which in zip(SERIES, kinds.split(", "), (True, False), strict=False):
            if here := [i for i, mark in enumerate(marked) if mark is which]:
                axes.bar(here, [heights[i] for i in here], color=colour, label=kind)
        step = -(-len(names) // MOST_NAMES)
        standing = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(names) > FLAT else {}
        axes.set_xticks(range(0, len(names), step), names[::step], **standing)
        axes.set_ylabel(label)

    return picture(name, draw)


def curves(name: str, label: str, lines: Sequence[Line], x_label: str = "tokens read") -> str:
    """Lines against what has been read."""

    def draw(axes: Axes) -> None:
        for index, (line, x, y) in enumerate(lines):
            axes.plot(x, smooth(y), color=SERIES[index % len(SERIES)], lw=1.6, label=line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.set_yscale("log")

    return picture(name, draw)


def by_context(name: str, label: str, lines: Sequence[Line]) -> str:
    """Numbers against tokens of context."""

    def draw(axes: Axes) -> None:
        _marked(axes, lines)
        _context_axis(axes, lines)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)

    return picture(name, draw)


def decode_times(lines: Sequence[Line]) -> str:
    """Milliseconds a token against tokens of context."""
    return by_context("decode", "decode, ms per token", lines)


def state_sizes(lines: Sequence[Line]) -> str:
    """Bytes of state against tokens of context."""

    def draw(axes: Axes) -> None:
        _marked(axes, lines)
        _context_axis(axes, lines)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: size(y)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("state of one sequence")

    return picture("state", draw)


def _marked(axes: Axes, lines: Sequence[Line]) -> None:
    for index, (name, x, y) in enumerate(lines):
        look = {"ls": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)], "ms": 4.5, "lw": 1.6}
        axes.plot(x, y, color=SERIES[index % len(SERIES)], label=name, **look)


def _context_axis(axes: Axes, lines: Sequence[Line]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for _, xs, _ in lines for x in xs}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of context")


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with those around it, over about a thirtieth of all."""
    reach = len(values) // 60
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _columns(names: Sequence[str]) -> int:
    """Of a legend, so that it is no wider than the picture."""
    longest = max(map(len, names), default=1)
    return max(1, min(len(names), int(SIZE[0] / (MARK_WIDTH + LETTER_WIDTH * longest))))


def picture(name: str, draw: Callable[[Axes], Any]) -> str:
    """What `draw` draws, as one <svg> element. `name` keeps its ids apart from other pictures' on the page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(axis="y")
        names = axes.get_legend_handles_labels()[1]
        # over the data it would hide some
        figure.legend(loc="outside upper left", ncols=_columns(names), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL
    )  # its style is the whole page's
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
