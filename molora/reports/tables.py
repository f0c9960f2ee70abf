"""Plain text tables: routing per layer, metrics per task, findings of the doctor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..routing.metrics import Figures, Usage

if TYPE_CHECKING:
    from ..train.findings import Finding

_BARS = " ▁▂▃▄▅▆▇█"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = (0,)) -> str:
    """Return lines of aligned columns.

    Args:
        header: one title per column.
        rows: cells; floats are shown with three digits, None as a dash.
        left: columns that are aligned to the left; the others hold numbers and go to the right.
    """
    cells = [[str(title) for title in header], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
    return str(value)


def bars(shares: Sequence[float]) -> str:
    """Return one character per expert, its height the share relative to the largest: a load profile in a cell."""
    most = max(shares, default=0.0)
    if most <= 0:
        return " " * len(shares)
    # whatever is not zero is visible
    return "".join(_BARS[max(1, round(8 * share / most))] if share > 0 else _BARS[0] for share in shares)


def short_names(sites: Sequence[str]) -> dict[str, str]:
    """Return names without the leading and trailing segments that all sites have in common.

    `model.layers.0.q_proj` and `model.layers.1.v_proj` become `0.q_proj` and `1.v_proj`.
    """
    split = [site.split(".") for site in sites]
    if len(split) < 2:
        return {site: site for site in sites}
    start = 0
    while all(len(parts) > start + 1 for parts in split) and len({parts[start] for parts in split}) == 1:
        start += 1
    return {site: ".".join(parts[start:]) for site, parts in zip(sites, split, strict=True)}


MAX_BARS = 32  # more experts than this have no profile in a terminal


def routing_table(usage: Usage, task: str | None = None) -> str:
    """Return the table of `molora inspect`: one line per decision of the model, then how to read it.

    Args:
        usage: the statistics.
        task: of one task only.
    """
    sites = [(site, usage.figures(site, task)) for site in usage.sites]
    names = short_names(usage.sites)
    rows = []
    for site, figures in sites:
        if figures is None:
            continue
        profile = bars(figures.gate_share) if figures.num_experts <= MAX_BARS else ""
        rows.append(
            [
                names[site] + ("*" if usage.group(site) else ""),
                figures.num_experts,
                profile,
                f"{min(figures.load):.3f}-{max(figures.load):.3f}",
                figures.token_entropy,
                figures.mean_entropy,
                figures.effective_experts,
                figures.experts_per_token,
                _dead(figures),
            ]
        )
    if not rows:
        return "no routing decision was counted" + (f" for task '{task}'" if task else "")
    header = ["layer", "experts", "gate mass", "load", "H token", "H mean", "effective", "per token", "dead"]
    counted = sum(figures.tokens for _, figures in sites if figures is not None)
    shared = [line for line in ["* decides for other layers too"] if any(usage.group(site) for site in usage.sites)]
    lines = [
        table(header, rows, left=(0, 2, 8)),
        "",
        f"{counted:,} decisions" + (f" of task '{task}'" if task else ""),
        "load: least and most chosen expert's share of choices; H: entropy of a token's probs, and of their mean, 1 is",
        "uniform; effective: exp of the latter; dead: share of choices or of gate mass below "
        f"{usage.dead_below:g} of the even share",
        *shared,
    ]
    return "\n".join(lines)


def _dead(figures: Figures) -> str:
    if not figures.dead:
        return "-"
    shown = " ".join(f"e{e}" for e in figures.dead[:6]) + (" …" if len(figures.dead) > 6 else "")
    return f"{len(figures.dead)}: {shown}"


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return metrics by task, and their mean over tasks when there are several."""
    columns = list(dict.fromkeys(name for figures in metrics.values() for name in figures))
    rows: list[list[Any]] = [[task, *(figures.get(name) for name in columns)] for task, figures in metrics.items()]
    if len(metrics) > 1:
        counts = ("rows", "tokens")
        values = {name: [f[name] for f in metrics.values() if name in f] for name in columns}
        mean = [sum(v) if name in counts else sum(v) / len(v) for name, v in values.items()]
        rows.append(["all" if not columns else "mean", *mean])
    return table(["task", *columns], rows)


def findings_text(findings: Sequence[Finding]) -> str:
    """Return one line per finding, with the next step below it."""
    marks = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]}  {finding.what}")
        if finding.next:
            lines.append(f"      -> {finding.next}")
    counts = {level: sum(f.level == level for f in findings) for level in marks}
    lines.append(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return "\n".join(lines)
