"""Goals, tables and pictures of the speed benchmark."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from .files import write_files
from .models import versions
from .sections import BASE, OURS

Sections = dict[str, dict[str, Any]]


def machine() -> dict[str, Any]:
    """Describe where and when this runs."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        **versions(),
    }


# --- goals ------------------------------------------------------------------------------------------------------------


def _row(sections: Sections, key: str, name: str) -> dict[str, Any] | None:
    rows = sections.get(key, {}).get("rows", [])
    return next((row for row in rows if row["name"] == name), None)


def _paired(one: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    if one is None or other is None:
        return None
    return statistics.median([a / b for a, b in zip(one["ratios"], other["ratios"], strict=True)])


def goals(sections: Sections) -> list[dict[str, Any]]:
    """Return each goal with its limit, what was measured (None: not measured in this run) and whether it is met."""
    found: list[dict[str, Any]] = []

    def goal(text: str, limit: float, value: float | None, unit: str = "") -> None:
        met = None if value is None else round(value, 4) <= limit
        found.append({"goal": text, "limit": limit, "measured": value, "unit": unit, "met": met})

    def ratio(key: str, name: str, of: str = "ratio") -> float | None:
        row = _row(sections, key, name)
        return None if row is None else row.get(of)

    for key, text, limit in (("training", "training step", 1.15), ("prefill", "prefill", 1.12)):
        goal(f"{text} / frozen base", limit, ratio(key, OURS))
        goal(f"{text} / PEFT LoRA r=64", 1.0, _paired(_row(sections, key, OURS), _row(sections, key, "PEFT LoRA r=64")))
    goal("memory saved for backward / frozen base", 1.25, ratio("training", OURS, "saved_ratio"))
    goal("decode step, batch 1 / frozen base", 1.25, ratio("decode", OURS))
    plain = _row(sections, "decode", "PEFT LoRA r=8")
    goal("decode step, batch 1 / PEFT LoRA r=8", 1.0, _paired(_row(sections, "decode", OURS), plain))
    many, one = (_row(sections, "tenants 16", f"molora, {n} distinct") for n in (16, 1))
    goal("decode, batch 16: 16 distinct adapters / 1 adapter", 1.05, _paired(many, one))
    goal("decode, batch 16: 16 distinct adapters / frozen base", 1.15, None if many is None else many["ratio"])
    for mode, text in (("inference", "prefill"), ("training", "training")):
        rows = (_row(sections, "by experts", f"molora, experts {e}, {mode}") for e in (64, 8))
        goal(f"E=64 / E=8 at k=2, one linear layer, {text}", 1.2, _paired(*rows))
    for entry in sections.get("slots", {}).get("slots", []):
        text = f"slot write of {entry['megabytes']:.1f} MB, {entry['loaded']} loaded"
        goal(text, 5.0, entry["molora_ms"], " ms")
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    right = ["---"] + ["---:"] * (len(head) - 1)
    return ["", *("| " + " | ".join(cells) + " |" for cells in (head, right, *lines))]


def markdown(run: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    where = run["machine"]
    text = [
        "# Speed, side by side",
        "",
        f"{where['processor']}, {where['cores']} cores, {where['threads_used']} thread used ({where['vector_units']}), "
        f"load average {_loads(where)} at the start; {where['date']}; "
        f"Python {where['python']}, torch {where['torch']}, PEFT {where['peft']}, "
        f"transformers {where['transformers']}, molora {where['molora']}. "
        f"Took {run['minutes']:.1f} minutes. {run.get('note', '')}".strip(),
        "",
        "Processor time of one thread. Each figure is the median, over interleaved rounds, of the ratio to the frozen "
        "base timed right before and after; in brackets the quartiles. Milliseconds are medians. Experts and LoRAs "
        "are float32, on all linear layers; experts have rank 8." + (" A quick run: tiny shapes." * run["quick"]),
        "",
        "## Goals (E=8, r=8, k=2)",
    ]
    lines = []
    for goal in run["goals"]:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3f}{goal['unit']}"
        met = {True: "met", False: "**missed**", None: ""}[goal["met"]]
        lines.append([goal["goal"], f"<= {goal['limit']:.2f}{goal['unit']}", measured, met])
    text += _table(["Goal", "limit", "measured", ""], lines)
    for part in run["sections"].values():
        text += ["", f"## {part['title']}", "", f"{part['shape']}. {part.get('note', '')}".strip()]
        text += _slots(part) if "slots" in part else _ratios(part)
    return "\n".join(text) + "\n"


def _loads(where: dict[str, Any]) -> str:
    return ", ".join(f"{load:.1f}" for load in where["load_average"] or ()) or "unknown"


def _slots(part: dict[str, Any]) -> list[str]:
    lines = [[str(e["loaded"]), f"{e['molora_ms']:.2f} ms", f"{e['peft_ms']:.0f} ms"] for e in part["slots"]]
    return _table(["adapters loaded", "molora.write_expert", "PEFT add_adapter (empty)"], lines)


def _ratios(part: dict[str, Any]) -> list[str]:
    extra = {"tokens_per_second": "tokens/s", "saved_mib": "saved MiB", "saved_ratio": "saved / base"}
    extra["trainable_k"] = "trainable, thousands"
    extra = {key: head for key, head in extra.items() if key in part["rows"][0]}
    lines = []
    for row in part["rows"]:
        low, high = row["quartiles"]
        cells = [
            row["name"],
            f"{row['ms']:.2f}",
            f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})",
            str(len(row["ratios"])),
        ]
        cells += [f"{row[key]:.3f}" if key == "saved_ratio" else f"{row[key]:.1f}" for key in extra]
        lines.append(cells)
    return _table(["", "ms", "/ frozen base", "rounds", *extra.values()], lines)


# --- files ------------------------------------------------------------------------------------------------------------


def write(run: dict[str, Any], folder: Path) -> None:
    """Write speed.json, speed.md and speed.png."""
    write_files(folder, "speed", run, markdown(run), lambda path: picture(run["sections"], path))


def picture(sections: Sections, path: Path) -> None:
    """Draw one panel per section that has ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in sections.values() if part.get("rows")]
    columns = min(3, max(1, len(parts)))
    lines = -(-len(parts) // columns) or 1
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.axis("off")
    for axis, part in zip(axes.flat, parts, strict=False):
        if "by" in part:
            _lines(axis, part["rows"], "value", lambda row: f"{row['kind']}, {row['mode']}", "ratio")
            axis.set(xlabel=part["by"], ylabel="time / frozen layer", xscale="log")
        elif "distinct" in part["rows"][0]:
            rows = [row for row in part["rows"] if row["distinct"]]
            _lines(axis, rows, "distinct", lambda row: row["name"].partition(",")[0], "tokens_per_second")
            axis.axhline(part["rows"][0]["tokens_per_second"], color="grey", linestyle=":", label=BASE)
            axis.set(xlabel="distinct adapters in the batch", ylabel="tokens per second", ylim=(0, None))
            axis.legend(fontsize=7)
        else:
            rows = part["rows"][::-1]
            colors = ["tab:blue" if "molora" in r["name"] else "silver" for r in rows]
            axis.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=colors)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.tick_params(axis="y", labelsize=7)
            axis.set(xlabel="time / frozen base")
        axis.set_title(f"{part['title']}\n{part['shape']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axis: Any, rows: list[dict[str, Any]], x: str, series: Any, y: str) -> None:
    for name in dict.fromkeys(map(series, rows)):
        mine = sorted((row[x], row[y]) for row in rows if series(row) == name)
        style = "--" if "inference" in name else "-"
        axis.plot(
            *zip(*mine, strict=True), style, marker="o", color="tab:blue" if "molora" in name else "grey", label=name
        )
    axis.legend(fontsize=7)
