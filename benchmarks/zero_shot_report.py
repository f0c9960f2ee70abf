"""Tables and the picture of the zero-shot benchmark, from which rows were answered right."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NEEDS = {
    "nothing": "the adapters alone",
    "texts": "texts of each adapter's own task (router_retriever, phatgoose and glider: with labels)",
    "examples": "a few labelled rows of what is asked",
    "training": "joint training of a router on labelled rows of all its adapters' tasks",
}
KEYS = ("held_out", "in_distribution")
Right = Mapping[str, list[bool]]  # task -> which rows were right


def share(right: list[bool]) -> float:
    """Return the accuracy over rows."""
    return sum(right) / len(right)


def mean(right: Right) -> float:
    """Return the mean accuracy over tasks."""
    return statistics.fmean(share(rows) for rows in right.values())


def error(right: Right) -> float:
    """Return the standard error of `mean` from the rows drawn in each task, as if all were independent."""
    return sum(share(rows) * (1 - share(rows)) / len(rows) for rows in right.values()) ** 0.5 / len(right)


def references(run: Mapping[str, Any]) -> dict[str, dict[str, Right | None]]:
    """Return base, best single adapter and oracle for both questions, from what single adapters answer."""
    singles: dict[str, Right] = run["singles"]
    tasks, adapters = list(run["tasks"]), [name for name in singles if name != "base"]

    def best_for(task: str, among: list[str]) -> str:
        return max(among, key=lambda name: share(singles[name][task]))

    best = max(adapters, key=lambda name: mean(singles[name]))
    # held out: of each adapter only what it was not trained for counts
    others = {task: [name for name in adapters if name != task] for task in tasks}
    shares = {name: statistics.fmean(share(singles[name][task]) for task in tasks if task != name) for name in adapters}
    ranked = sorted(adapters, key=lambda name: -shares[name])
    stand_in = {task: next(name for name in ranked if name != task) for task in tasks}
    return {
        "frozen base": {"held_out": singles["base"], "in_distribution": singles["base"]},
        "best single adapter": {
            "held_out": {task: singles[stand_in[task]][task] for task in tasks},
            "in_distribution": singles[best],
        },
        "oracle": {
            "held_out": {task: singles[best_for(task, others[task])][task] for task in tasks},
            "in_distribution": {task: singles[task][task] for task in tasks},
        },
    }


def packed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run for a file: rows as strings of 0 and 1, and the accuracies beside them."""

    def pack(right: Right | None) -> dict[str, str] | None:
        return None if right is None else {task: "".join("01"[hit] for hit in rows) for task, rows in right.items()}

    both = ("held_out", "in_distribution")
    rows = {**references(run), **run["routers"]}
    summary = {
        name: {key: {"mean": mean(row[key]), "error": error(row[key])} if row.get(key) else None for key in both}
        for name, row in rows.items()
    }
    routers = {name: {**row, **{key: pack(row[key]) for key in both}} for name, row in run["routers"].items()}
    return {
        **run,
        "singles": {name: pack(right) for name, right in run["singles"].items()},
        "routers": routers,
        "summary": summary,
    }


def unpacked(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run of a file as `packed` was given it."""

    def unpack(rows: Mapping[str, str] | None) -> Right | None:
        return None if rows is None else {task: [hit == "1" for hit in text] for task, text in rows.items()}

    both = ("held_out", "in_distribution")
    routers = {name: {**row, **{key: unpack(row[key]) for key in both}} for name, row in run["routers"].items()}
    return {**run, "singles": {name: unpack(rows) for name, rows in run["singles"].items()}, "routers": routers}


def markdown(run: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    where, tasks, sizes = run["machine"], run["tasks"], run["sizes"]
    known = references(run)
    text = [
        "# Routers on tasks that nobody names",
        "",
        f"`make bench-zero-shot`: {len(tasks)} adapters of `adapters_hub/` on MiniLM, {sizes['rows']} held-out rows "
        f"per task, or as many as there are ({sum(task['held_out_rows'] for task in tasks.values())} in all). What "
        "each router is and may know is said in benchmarks/zero_shot_routers.py, what is asked in zero_shot.py. "
        f"{where['date']}, {where['processor']}, torch {where['torch']}, PEFT {where['peft']}; took "
        f"{run.get('minutes', 0):.0f} minutes." + " A quick run: the numbers mean nothing." * run["quick"],
        "",
        "Accuracy in %, the mean over tasks, with one standard error from the rows alone. *Held out*: each task "
        "without its own adapter. *In distribution*: all adapters, the task is not named.",
    ]
    lines = []
    for name in known:
        lines.append([f"*{name}*", "", *_cells(known[name])])
    order = sorted(run["routers"], key=lambda name: list(NEEDS).index(run["routers"][name]["needs"]))
    lines += [[name, run["routers"][name]["needs"], *_cells(run["routers"][name])] for name in order]
    text += _table(["", "needs", "held out", "in distribution"], lines)
    text += ["", "Needs: " + "; ".join(f"*{name}*: {said}" for name, said in NEEDS.items()) + "."]
    text += [
        "",
        "The best single adapter and the oracle are chosen with hindsight, on the rows that are measured. Oracle: in "
        "distribution the task's own adapter, held out the other adapter that does best on the task. Routers that are "
        f"trained, {sizes['router_steps']} steps of {sizes['batch']} rows each, go without "
        f"{sizes['together']} tasks at once. All are asked about the same rows, so that differences between them are "
        "known better than the errors of each say.",
    ]
    failures = {name: row["failure"] for name, row in run["routers"].items() if row["failure"]}
    text += [line for name, why in failures.items() for line in ("", f"{name} does not run on this encoder: {why}.")]
    text += ["", *told(run)]
    for key, title in (("held_out", "Held out"), ("in_distribution", "In distribution")):
        rows = {**known, **{name: run["routers"][name] for name in order}}
        lines = [
            [name, *(f"{100 * share(row[key][task]):.0f}" for task in tasks)] for name, row in rows.items() if row[key]
        ]
        text += ["", f"## {title}, by task", *_table(["", *tasks], lines)]
    lines = [[name, *(f"{100 * share(right[task]):.0f}" for task in tasks)] for name, right in run["singles"].items()]
    text += ["", "## Each adapter alone, on every task", *_table(["", *tasks], lines)]
    return "\n".join(text) + "\n"


def short(run: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in the README: references, PEFT's, and who does best of each kind at a question."""
    known, routers = references(run), run["routers"]
    whole = {name: row for name, row in routers.items() if row["held_out"]}
    chosen = [name for name in ("uniform average", "arrow", "PEFT Arrow", "PEFT X-LoRA") if name in whole]
    for kind in list(NEEDS)[1:]:
        mine = [name for name in whole if whole[name]["needs"] == kind and name not in chosen]
        best = {max(mine, key=lambda name: mean(whole[name][key])) for key in KEYS if mine}
        chosen += [name for name in mine if name in best]
    rows = {name: ("", known[name]) for name in ("frozen base", "best single adapter")}
    rows |= {name: (whole[name]["needs"], whole[name]) for name in chosen}
    if "shipped mixture" in routers:
        rows["shipped mixture"] = (routers["shipped mixture"]["needs"], routers["shipped mixture"])
    rows["oracle"] = ("the task's name", known["oracle"])
    lines = [[name, needs, *_cells(row)] for name, (needs, row) in rows.items()]
    return _table(["", "needs", "held out", "in distribution"], lines)[1:]


def told(run: Mapping[str, Any]) -> list[str]:
    """Return what the table says, in words that follow from it."""
    known, routers = references(run), run["routers"]
    found = []
    for key, title in (("held_out", "Held out"), ("in_distribution", "In distribution")):
        reached = {name: mean(row[key]) for name, row in routers.items() if row[key]}
        if not reached:
            continue
        top = max(reached.values())
        best = " and ".join(f"`{name}`" for name, value in reached.items() if value == top)
        base, single, oracle = (mean(known[name][key]) for name in known)
        worse = sorted(name for name, value in reached.items() if value < base)
        does = "do" if " and " in best else "does"
        text = f"{title}: {best} {does} best, {100 * top:.1f}, beside {100 * base:.1f} of the base alone, "
        text += f"{100 * single:.1f} of the best single adapter and {100 * oracle:.1f} of the oracle."
        text += f" Worse than the base alone: {', '.join(worse)}." if worse else " None is worse than the base alone."
        if "uniform average" in reached:
            level = reached["uniform average"]
            lost = sorted(name for name, value in reached.items() if value < level)
            text += f" Worse than the uniform average: {', '.join(lost) or 'none'}."
        found += [text, ""]
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        "-" if row[key] is None else f"{100 * mean(row[key]):.1f} ± {100 * error(row[key]):.1f}"
        for key in ("held_out", "in_distribution")
    ]


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    right = ["---"] + ["---:"] * (len(head) - 1)
    return ["", *("| " + " | ".join(cells) + " |" for cells in (head, right, *lines))]


def picture(run: Mapping[str, Any], path: Path) -> None:
    """Draw the mean accuracy of every router for both questions, beside base, best single adapter and oracle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(NEEDS, ("tab:grey", "tab:blue", "tab:green", "tab:orange"), strict=True))
    styles = {"frozen base": ":", "best single adapter": "--", "oracle": "-"}
    known, routers = references(run), run["routers"]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.7 + 0.32 * max(4, len(routers))), sharey=False)
    titles = {"held_out": "without the task's own adapter", "in_distribution": "all adapters, task not named"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        shown = [name for name in routers if routers[name][key]]
        shown.sort(key=lambda name: mean(routers[name][key]))
        for place, name in enumerate(shown):
            row = routers[name]
            width, bar = 100 * mean(row[key]), 100 * error(row[key])
            axis.barh(place, width, xerr=bar, color=colors[row["needs"]], error_kw={"linewidth": 0.8})
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        for name, style in styles.items():
            axis.axvline(100 * mean(known[name][key]), color="black", linestyle=style, linewidth=1, label=name)
        axis.set(xlabel="accuracy in %, mean over tasks", title=title)
        values = [100 * mean(row[key]) for row in (*known.values(), *(routers[name] for name in shown))]
        axis.set_xlim(max(0.0, min(values) - 8), min(100.0, max(values) + 4))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend([*handles, *lines], [*colors, *labels], loc="lower center", ncol=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
