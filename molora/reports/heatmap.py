"""Heat-maps of routing: which expert carries how much, by layer and by task, as a PNG.

The first panel shows each expert's share of the gate mass in each layer, over all tasks; dead experts are crossed out.
One more panel per task shows by how many percentage points the task differs from that: what an expert is used for.
Both colour scales (cividis, and purple to orange through white) can be read with every common form of colour
blindness.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..plan import place_of
from ..routing.metrics import Usage
from .tables import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS = 64  # more layers than this are labelled by block
ACROSS = 10.5  # inches of panels in one line


def share_matrix(usage: Usage, task: str | None = None) -> np.ndarray:
    """Return shares of the gate mass (sites, largest E); NaN where there is no such expert or nothing was counted."""
    experts = max((one.num_experts for site in usage.sites if (one := usage.figures(site))), default=0)
    matrix = np.full((len(usage.sites), experts), np.nan)
    for row, site in enumerate(usage.sites):
        one = usage.figures(site, task)
        if one is not None:
            matrix[row, : one.num_experts] = one.gate_share
    return matrix


def draw(usage: Usage, title: str = "") -> Figure:
    """Return the figure of a usage; raise ConfigError when nothing was counted or matplotlib is missing."""
    Figure = _figure_class()
    matrix = share_matrix(usage)
    if matrix.size == 0:
        raise ConfigError("there is nothing to draw: no routing decision was counted")
    tasks = usage.counted_tasks if len(usage.counted_tasks) > 1 else []
    panels, (rows, experts) = 1 + len(tasks), matrix.shape
    width = min(max(1.9, 0.24 * experts + 0.5), 3.5)
    lines = math.ceil(panels / max(1, int(ACROSS / width)))
    across = math.ceil(panels / lines)
    height = min(max(1.6, 0.17 * rows + 0.3), 14.0)
    names = _row_labels(usage.sites)
    margin = 0.075 * max(len(name) for name in names.values()) + 0.5
    size = (max(margin + across * width + 0.3, 4.8), lines * (height + 0.55) + 1.15 + (0.35 if title else 0))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(lines + 1, across * 2, height_ratios=[height] * lines + [0.13])
    spots: list[Axes] = []
    for number in range(panels):
        line, column = divmod(number, across)
        place = grid[line, 2 * column : 2 * column + 2]
        spots.append(figure.add_subplot(place, sharey=spots[0] if spots else None))

    share = spots[0].imshow(matrix, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    _cross_out(spots[0], usage)
    _bar(figure, grid[lines, :across] if tasks else grid[lines, :], share, _share_label(usage))
    differences = [100 * (share_matrix(usage, task) - matrix) for task in tasks]
    most = max((float(np.nanmax(np.abs(difference))) for difference in differences), default=0.0) or 1.0
    for spot, difference in zip(spots[1:], differences, strict=True):
        shift = spot.imshow(difference, aspect="auto", cmap="PuOr_r", vmin=-most, vmax=most, interpolation="nearest")
        if spot is spots[-1]:
            _bar(figure, grid[lines, across:], shift, "task minus all tasks, percentage points")
    for number, spot in enumerate(spots):
        spot.set_title((["all tasks", *tasks] if tasks else [""])[number][:28], fontsize=10)
        spot.set_facecolor("0.85")  # where a layer has no such expert
        _label_axes(spot, usage.sites, names, experts, leftmost=number % across == 0)
        if number + across >= panels:
            spot.set_xlabel("expert", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def write_png(usage: Usage, path: str | Path, title: str = "") -> Path:
    """Draw a usage into a PNG file, in one step; returns the path."""
    path = Path(path)
    figure = draw(usage, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _figure_class() -> Any:
    try:
        # not pyplot: it would choose a display for the whole process
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib; install it with pip install 'molora[report]'") from None
    return Figure


def _bar(figure: Figure, place: Any, image: Any, label: str) -> None:
    bar = figure.colorbar(image, cax=figure.add_subplot(place), orientation="horizontal")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _share_label(usage: Usage) -> str:
    counts = {figures.num_experts for site in usage.sites if (figures := usage.figures(site))}
    even = f", even: {1 / counts.pop():.2g}" if len(counts) == 1 else ""
    return f"share of gate mass{even}; × dead"


def _cross_out(spot: Axes, usage: Usage) -> None:
    """Put a cross on dead experts."""
    dead = [(e, row) for row, site in enumerate(usage.sites) if (f := usage.figures(site)) for e in f.dead]
    if dead and len(dead) <= 2000:
        x, y = zip(*dead, strict=True)
        spot.scatter(x, y, marker="x", s=14, linewidths=1.1, color="white")


def _row_labels(sites: Sequence[str]) -> dict[str, str]:
    """Return the label of each row that gets one: the layer, or with too many layers the block at its first layer."""
    names = short_names(sites)
    if len(sites) <= MAX_LABELS:
        return {site: name if len(name) <= 40 else "…" + name[-39:] for site, name in names.items()}
    first: dict[str, str] = {}
    for site in sites:
        first.setdefault(place_of(site).block or site, site)
    blocks, step = short_names(list(first)), math.ceil(len(first) / MAX_LABELS)
    return {site: blocks[block] for block, site in list(first.items())[::step]}


def _label_axes(spot: Axes, sites: Sequence[str], names: dict[str, str], experts: int, leftmost: bool) -> None:
    step = max(1, math.ceil(experts / 12))
    spot.set_xticks(range(0, experts, step))
    rows = [row for row, site in enumerate(sites) if site in names]
    spot.set_yticks(rows, [names[sites[row]] for row in rows])
    if leftmost and rows and len(rows) < len(sites):
        spot.set_ylabel("block", fontsize=9)
    spot.tick_params(labelsize=8, length=2, labelleft=leftmost)
    blocks = [place_of(site).block for site in sites]
    for row in range(1, len(sites)):
        if blocks[row] != blocks[row - 1] and len(sites) > len(set(blocks)):
            spot.axhline(row - 0.5, color="white", linewidth=1.4)  # two colours, to be seen on both scales
            spot.axhline(row - 0.5, color="black", linewidth=0.5)
