"""The plots of bench/report.py, in one style and 800 pixels wide."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import figures
import matplotlib
from figures import LIMIT, OURS, strongest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from onepass.cli.timing import Result

Points: TypeAlias = list[tuple[float, float]]

BLUE, LIGHT, RED, INK, GREY = "#1f5f99", "#b5c9dc", "#c0392b", "#22272e", "#66707a"
COLORS = {  # of the contenders' lines
    OURS: BLUE,
    "default": "#a3adb8",
    "foreach": "#7b8794",
    "fused": "#3e4c59",
    "compiled": "#d9822b",
    "DeepSpeed": "#2f9e6e",
    "optimi": "#8e5bb5",
    "bitsandbytes": "#b5485d",
    "pytorch_optimizer": "#9a8a1c",
    "lion-pytorch": "#2aa1a8",
}
BESIDE: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps grid lines off the text
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "onepass",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#e3e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(told: dict[str, Any], results: list[Result], folder: Path) -> list[Path]:
    """Draw every plot for which there are results, as PNG and SVG, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in PICTURES.items():
            if picture := make(results):
                sign(picture, told)
                written += save(picture, folder / name)
    return written


def save(picture: Figure, path: Path) -> list[Path]:
    """Save a plot as PNG and as SVG, the SVG without a date so that it is reproducible."""
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    picture.savefig(paths[0])
    picture.savefig(paths[1], metadata={"Date": None})
    return paths


def sign(picture: Figure, told: dict[str, Any]) -> None:
    """Write machine, versions and date in small type at the bottom."""
    versions = figures.versions({"machine": told.get("machine", {})})  # the versions of all peers would not fit
    text = "; ".join(filter(None, [figures.machine(told), versions, figures.when(told)]))
    picture.text(0.012, 0.012, text, fontsize=6.5, color=GREY, ha="left", va="bottom")


def blank(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty plot with room for the line of the machine."""
    layout = ConstrainedLayoutEngine(rect=(0.005, 0.04, 0.985, 0.955), wspace=0.04)
    picture = Figure(figsize=(width, height), layout=layout)
    axes = picture.subplots(1, columns, sharey=True, squeeze=False)
    return picture, list(axes[0])


def rows(axes: Axes, names: Iterable[str]) -> None:
    """Label one row per class, from the top."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def speedup(results: list[Result]) -> Figure | None:
    """Draw the step times of the strongest peer and of torch's default relative to onepass, for each class."""
    large, small = figures.all_classes(results, "large"), figures.all_classes(results, "small: 1000 x 100")
    kinds = {"large": large, "small": small}
    found = {name: rows for name, rows in kinds.items() if any(figures.peers(r) for r in rows.values())}
    if not found:
        return None
    classes = [name for name in figures.ELEMENTWISE if any(name in kind for kind in found.values())]
    picture, panels = blank(8, 1.35 + 0.36 * len(classes), len(found))
    for axes, (name, kind) in zip(panels, found.items(), strict=True):
        rows(axes, classes)
        speedup_panel(axes, kind, classes)
        axes.set_title(f"{name}: {figures.size(kind)}")
    ahead = any(min(figures.peers(r).values(), default=1) < 1 for kind in found.values() for r in kind.values())
    key = {"strongest peer": BLUE, "torch's default": LIGHT} | (
        {"strongest peer, ahead of onepass": RED} if ahead else {}
    )
    picture.legend(swatches(key.values()), list(key), loc="outside upper left", ncols=3, handlelength=1)
    return picture


def swatches(colors: Iterable[str]) -> list[Any]:
    """Return the legend handles of bars."""
    return [Rectangle((0, 0), 1, 1, color=color) for color in colors]


def speedup_panel(axes: Axes, found: dict[str, Result], classes: list[str]) -> None:
    """Draw the bars of one workload in logarithmic axes, starting from the ratio 1."""
    bars: list[tuple[float, float, str, str]] = []  # place, ratio, text, color
    for y, name in enumerate(classes):
        if name not in found or not (best := strongest(found[name])):
            continue
        default = figures.peers(found[name]).get("default") if best[0] != "default" else None
        place = y - 0.19 if default else y
        bars.append((place, best[1], f"{figures.times(best[1])} {best[0]}", RED if best[1] < 1 else BLUE))
        if default:
            bars.append((y + 0.19, default, figures.times(default), LIGHT))
    for place, ratio, text, color in bars:
        axes.barh(place, ratio - 1, 0.36, left=1, color=color, zorder=2)
        ink = GREY if color == LIGHT else INK
        axes.annotate(text, (max(ratio, 1), place), fontsize=7.5, color=ink, path_effects=HALO, **BESIDE)
    least, longest = min(ratio for _, ratio, _, _ in bars), max(ratio for _, ratio, _, _ in bars)
    start = min(0.85, least * 0.9)
    picture = axes.figure
    assert isinstance(picture, Figure)
    width = 72 * picture.get_figwidth() / len(picture.axes) * 0.84  # of the panel, in points
    ends = [math.log(max(ratio, 1) / start) / (1 - (6 + 4.6 * len(text)) / width) for _, ratio, text, _ in bars]
    axes.axvline(1, color=INK, lw=1, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(start, start * math.exp(max(ends)))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if start <= t <= max(longest, 1.5)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("step time relative to onepass (1x: equally fast)")


def roofline(results: list[Result]) -> Figure | None:
    """Draw each class's GB/s, the limit, and the GB/s of its strongest peer for the same bytes."""
    found = {name: r for name, r in figures.all_classes(results, "large").items() if r.moved}
    if not found:
        return None
    picture, (axes,) = blank(8, 1.2 + 0.36 * len(found))
    rows(axes, found)
    shown = {
        r.optimizer: [OURS, *([LIMIT] if LIMIT in r.samples else []), *(strongest(r) or ())[:1]] for r in found.values()
    }
    top = max(figures.bandwidth(r, name) for r in found.values() for name in shown[r.optimizer])
    for y, r in enumerate(found.values()):
        ours, best = figures.bandwidth(r), strongest(r)
        axes.barh(y - 0.19, ours, 0.36, color=BLUE, zorder=2)
        text = f"{figures.number(ours)} GB/s"
        if LIMIT in r.samples:
            limit = figures.bandwidth(r, LIMIT)
            axes.plot([limit, limit], [y - 0.42, y + 0.42], color=INK, lw=2, solid_capstyle="butt", zorder=4)
            text += f", {r.ratios()[LIMIT]:.0%} of the limit"
        axes.text(top * 1.03, y - 0.19, text, va="center", fontsize=8)
        if best:
            axes.barh(y + 0.19, figures.bandwidth(r, best[0]), 0.36, color=LIGHT, zorder=2)
            text = f"{figures.number(figures.bandwidth(r, best[0]))} {best[0]}"
            axes.text(top * 1.03, y + 0.19, text, va="center", fontsize=7.5, color=GREY)
    axes.set_xlim(0, top * 1.38)
    axes.set_xticks([t for t in axes.get_xticks() if t <= top])
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines["bottom"].set_bounds(0, top)
    axes.set_xlabel("GB/s of the bytes that a step must read and write")
    axes.set_title(figures.size(found), pad=24)
    handles = [*swatches((BLUE, LIGHT)), Line2D([], [], color=INK, lw=2)]
    texts = [OURS, "strongest peer", "limit: the same traffic with additions only"]
    axes.legend(handles, texts, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=1, borderpad=0.1)
    return picture


def tensors(results: list[Result]) -> Figure | None:
    """Draw AdamW's time per tensor of 100 elements, from few tensors to many."""

    def of(fresh: bool) -> dict[str, Points]:
        kind = [r for r in figures.grid(results, fresh) if r.elements == 100 * r.tensors]
        return curves(kind, lambda r: (r.tensors, 1e6 / r.tensors))

    hot, fresh = of(fresh=False), of(fresh=True)
    if len(hot.get(OURS, [])) < 2:
        return None
    picture, (axes,) = blank(8, 4.6)
    lines(axes, hot)
    for name, points in fresh.items():
        axes.plot(*zip(*points, strict=True), color=color(name), ls=":", marker="o", mfc="white", ms=4.5, zorder=3)
    if fresh:
        handle = Line2D([], [], color=GREY, ls=":", marker="o", mfc="white", ms=4.5)
        axes.legend(
            [handle], ["with new gradients at every step"], loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
        )
    axes.set_xlabel("tensors of 100 elements each")
    axes.set_ylabel("us/tensor")
    axes.set_title("A step of AdamW over many small tensors")
    return picture


def scaling(results: list[Result]) -> Figure | None:
    """Draw AdamW's time per element, from small models to large ones."""
    kind = [r for r in results if re.fullmatch(r"elements: \w+", r.workload) and r.first == OURS]  # not bfloat16
    found = curves(kind, lambda r: (r.elements, 1e9 / r.elements))
    if len(found.get(OURS, [])) < 2:
        return None
    picture, (axes,) = blank(8, 4.6)
    lines(axes, found)
    axes.set_xlabel("elements")
    axes.set_ylabel("ns/element")
    axes.set_title(f"A step of {kind[0].optimizer}, from small models to large ones")
    return picture


def curves(results: list[Result], place: Callable[[Result], tuple[float, float]]) -> dict[str, Points]:
    """Return a line per contender; ``place`` returns a result's x and the factor of its seconds."""
    found: dict[str, dict[float, float]] = {}
    for r in results:
        x, factor = place(r)
        for name in r.samples:
            found.setdefault(name, {}).setdefault(x, r.seconds(name) * factor)
    return {name: sorted(points.items()) for name, points in found.items()}


def color(name: str) -> str:
    """Return a contender's color; contenders without one in COLORS get one of matplotlib's by their names."""
    if name == LIMIT:
        return INK
    return COLORS.get(name) or f"C{sum(name.encode()) % 10}"


def lines(axes: Axes, found: dict[str, Points]) -> None:
    """Draw lines in logarithmic axes, each with its name at its end."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, points in found.items():
        style: dict[str, Any] = (
            {"ls": "--", "lw": 1.2} if name == LIMIT else {"marker": "o", "ms": 3.5, "lw": 2.6 if name == OURS else 1.5}
        )
        axes.plot(*zip(*points, strict=True), color=color(name), zorder=4 if name == OURS else 2, **style)
    axes.margins(x=0.03, y=0.08)
    low, high = axes.get_xlim()
    end = max(x for points in found.values() for x, _ in points)
    axes.set_xlim(low, high * (high / low) ** 0.17)  # room for the names
    axes.spines["bottom"].set_bounds(low, high)
    axes.xaxis.set_major_locator(FixedLocator([10.0**n for n in range(16) if low <= 10**n <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: figures.count(round(x)) if x >= 1 else f"{x:g}"))
    axes.grid(which="major")
    axes.set_axisbelow(True)
    ends = sorted((points[-1][1], name) for name, points in found.items())
    bottom, top = axes.get_ylim()
    heights = spread_out([math.log(y) for y, _ in ends], 0.045 * math.log(top / bottom), math.log(bottom))
    for (_, name), height in zip(ends, heights, strict=True):
        bold: dict[str, Any] = {"weight": "bold"} if name == OURS else {}
        axes.annotate("  " + name, (end, math.exp(height)), color=color(name), path_effects=HALO, **BESIDE, **bold)


def spread_out(places: list[float], step: float, least: float) -> list[float]:
    """Return ascending places, moved as little as possible to be a step apart and half a step above ``least``."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1:
            below, above = groups[-2:]
            if lowest(above, step, least) >= lowest(below, step, least) + step * len(below):
                break
            groups[-2:] = [below + above]
    return [lowest(group, step, least) + step * i for group in groups for i in range(len(group))]


def lowest(group: list[float], step: float, least: float) -> float:
    """Return the lowest place of a stack of names that is centered on the mean of their places."""
    return max(sum(group) / len(group) - step * (len(group) - 1) / 2, least + step / 2)


PICTURES: dict[str, Callable[[list[Result]], Figure | None]] = {
    "speedup": speedup,
    "roofline": roofline,
    "tensors": tensors,
    "scaling": scaling,
}
