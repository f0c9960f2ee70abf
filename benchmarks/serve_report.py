"""Goals, tables and pictures of the serving benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import write_files

Sections = dict[str, dict[str, Any]]
SHARE = 0.05  # that a greedy tenant may have beyond its share


# --- goals ------------------------------------------------------------------------------------------------------------


def _ratio(sections: Sections, key: str, name: str) -> float | None:
    rows = sections.get(key, {}).get("rows", [])
    return next((row["ratio"] for row in rows if row["name"] == name), None)


def _load(sections: Sections, key: str, begins: str) -> dict[str, Any]:
    loads = sections.get(key, {}).get("loads", [])
    return next((one for one in loads if one["name"].startswith(begins)), {})


def goals(sections: Sections) -> list[dict[str, Any]]:
    """Return each goal with its limit, what was measured (None: not measured in this run) and whether it is met."""
    found: list[dict[str, Any]] = []

    def goal(text: str, sign: str, limit: float, value: float | None, unit: str = "") -> None:
        rounded = None if value is None else round(value, 4)
        met = None if rounded is None else (rounded >= limit if sign == ">=" else rounded <= limit)
        found.append({"goal": text, "sign": sign, "limit": limit, "measured": value, "unit": unit, "met": met})

    decode = sections.get("decode", {}).get("rows", [])
    for batch in sorted({row["batch"] for row in decode if row["batch"] >= 16}) or [16]:
        value = _ratio(sections, "decode", f"{batch} rows, 16 distinct")
        goal(f"decoding, batch of {batch}: 16 distinct adapters / 1", ">=", 0.90, value)
    goal("1,000 registered adapters / 10", ">=", 0.95, _ratio(sections, "registered", "1000 registered"))
    # the index of the library is built in this time; in seconds of the clock
    rows, ready = sections.get("registered", {}).get("rows", []), sections.get("registered", {}).get("ready")
    is_full = any(row["registered"] == 1000 for row in rows)
    goal("1,000 registered adapters ready", "<=", 5.0, ready["cold"] if ready and is_full else None, " s")
    value = _ratio(sections, "working set", "twice the slots")
    goal("working set of twice the slots / resident", ">=", 0.70, value)
    latency = {one["name"]: one for one in sections.get("working set", {}).get("latency", [])}
    if latency:
        one, other = (latency[f"{name}, pinned"]["each"]["p95"] for name in ("twice the slots", "resident"))
        value = one / other
    goal("a resident adapter's time per token, p95, beside loads / without", "<=", 2.0, value if latency else None)
    goal("routed mixture of 8 experts / one adapter", ">=", 0.70, _ratio(sections, "programs", "routed mixture of 8"))
    full = _load(sections, "server", "closed loop").get("overhead")
    goal("CPU of the server outside of the model at full load, streamed", "<=", 0.02, full)
    share = _load(sections, "fairness", "greedy, 10x").get("share")
    goal("share of a greedy tenant among 4", "<=", 0.25 + SHARE, share)
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    right = ["---"] + ["---:"] * (len(head) - 1)
    return ["", *("| " + " | ".join(cells) + " |" for cells in (head, right, *lines))]


def markdown(run: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    where = run["machine"]
    loads = ", ".join(f"{load:.1f}" for load in where["load_average"] or ()) or "unknown"
    text = [
        "# Serving, side by side",
        "",
        f"`make bench-serve` on {where['processor']}, {where['cores']} cores, {where['threads_used']} thread for the "
        f"model ({where['vector_units']}), load average {loads} at the start; {where['date']}; Python "
        f"{where['python']}, torch {where['torch']}, PEFT {where['peft']}, transformers {where['transformers']}, "
        f"molora {where['molora']}. Took {run['minutes']:.1f} minutes. {run.get('note', '')}".strip(),
        "",
        f"The model is a Llama of random weights, so that all of this takes minutes: {run['model']}. Ratios are of "
        "tokens per second, each to a reference measured right before and after it, medians over interleaved rounds, "
        "with quartiles in brackets." + (" A quick run: tiny shapes, which show nothing." * run["quick"]),
        "",
        "## Goals",
    ]
    lines = []
    for goal in run["goals"]:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3f}{goal['unit']}"
        met = {True: "met", False: "**missed**", None: ""}[goal["met"]]
        lines.append([goal["goal"], f"{goal['sign']} {goal['limit']:.2f}{goal['unit']}", measured, met])
    text += _table(["Goal", "limit", "measured", ""], lines)
    for key, part in run["sections"].items():
        text += ["", f"## {part['title']}", "", f"{part['shape']}. {part.get('note', '')}".strip()]
        text += _rows(part) if "rows" in part else []
        text += _latency(part["latency"]) if "latency" in part else []
        if "loads" in part:
            text += _fairness(part["loads"]) if key == "fairness" else _server(part["loads"])
    return "\n".join(text) + "\n"


def _rows(part: dict[str, Any]) -> list[str]:
    lines = []
    for row in part["rows"]:
        low, high = row["quartiles"]
        ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        lines.append([row["name"], f"{row['rate']:.0f}", ratio, str(len(row["ratios"]))])
    return _table(["", "tokens/s", f"/ {part['of']}", "rounds"], lines)


def _ms(told: dict[str, float | None] | None, *names: str) -> str:
    if told is None or told["p50"] is None:
        return ""
    return " / ".join(f"{told[name]:.0f}" for name in names)


def _latency(latency: list[dict[str, Any]]) -> list[str]:
    lines = [[one["name"], _ms(one["first"], "p50", "p95"), _ms(one["each"], "p50", "p95", "p99")] for one in latency]
    return _table(["requests for", "first token ms, p50 / p95", "each token ms, p50 / p95 / p99"], lines)


def _fairness(loads: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            one["name"],
            str(one["concurrency"]),
            str(one["tokens"]),
            f"{one['share']:.1%}",
            _ms(one["first"], "p50", "p95"),
        ]
        for one in loads
    ]
    return _table(["tenant", "requests at a time", "tokens", "share", "first token ms, p50 / p95"], lines)


def _server(loads: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in loads:
        overhead = "" if one["overhead"] is None else f"{one['overhead']:.1%} ({one['in_engine']:.1%} + "
        overhead += "" if one["overhead"] is None else f"{one['overhead'] - one['in_engine']:.1%})"
        firsts, each = _ms(one["first"], "p50", "p95"), _ms(one["each"], "p50", "p95", "p99")
        lines.append([one["name"], str(one["requests"]), f"{one['rate']:.0f}", firsts, each, overhead])
    head = ["load", "requests", "tokens/s", "first token ms, p50 / p95", "each token ms, p50 / p95 / p99"]
    return _table([*head, "overhead (engine's thread + others)"], lines)


# --- files ------------------------------------------------------------------------------------------------------------


def write(run: dict[str, Any], folder: Path) -> None:
    """Write serve.json, serve.md and serve.png."""
    write_files(folder, "serve", run, markdown(run), lambda path: picture(run["sections"], path))


def picture(sections: Sections, path: Path) -> None:
    """Draw one panel per section."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {key: part for key, part in sections.items() if part.get("rows") or part.get("loads")}
    columns = min(3, max(1, len(parts)))
    lines = -(-len(parts) // columns) or 1
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.axis("off")
    for axis, (key, part) in zip(axes.flat, parts.items(), strict=False):
        if key == "decode":
            for batch in sorted({row["batch"] for row in part["rows"]}):
                mine = [(row["distinct"], row["rate"]) for row in part["rows"] if row["batch"] == batch]
                axis.plot(*zip(*mine, strict=True), marker="o", label=f"batch of {batch}")
            axis.set(
                xlabel="distinct adapters in the batch", ylabel="tokens per CPU second", xscale="log", ylim=(0, None)
            )
            axis.set_xticks([row["distinct"] for row in part["rows"]], [str(row["distinct"]) for row in part["rows"]])
            axis.legend(fontsize=7)
        elif key == "fairness":
            colors = ["tab:red" if one["tenant"] == "greedy" else "tab:blue" for one in part["loads"]]
            axis.bar(range(len(colors)), [one["share"] for one in part["loads"]], color=colors)
            axis.set_xticks(
                range(len(colors)), [one["name"] for one in part["loads"]], rotation=40, ha="right", fontsize=6
            )
            axis.axhline(0.25, color="black", linewidth=0.8)
            axis.set(ylabel="share of the tokens")
        elif "rows" in part:
            rows = part["rows"][::-1]
            colors = ["silver" if "PEFT" in row["name"] else "tab:blue" for row in rows]
            axis.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=colors)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.tick_params(axis="y", labelsize=7)
            axis.set(xlabel=f"tokens per second / {part['of']}")
        else:
            told = [one for one in part["loads"] if one["first"]]
            for what, marker in (("first", "o"), ("each", "s")):
                for percent, style in (("p50", "-"), ("p95", "--")):
                    points = sorted((one["per_second"], one[what][percent]) for one in told)
                    axis.plot(*zip(*points, strict=True), style, marker=marker, label=f"{what} token, {percent}")
            axis.set(xlabel="requests per second", ylabel="milliseconds", yscale="log")
            axis.legend(fontsize=7)
        axis.set_title(part["title"], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
