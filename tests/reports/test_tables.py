"""Text tables: alignment, what is shown, and names cut to what tells sites apart."""

import torch

from molora.reports.tables import bars, findings_text, metrics_table, routing_table, short_names, table
from molora.routing.metrics import Usage
from molora.routing.trace import Site
from molora.routing.types import Context, Routing
from molora.train.findings import Finding


def usage_of(choices, experts, tasks=(), shared=False):
    """Top-1 routing of one row per task in two layers: choices[task] lists the experts of its tokens."""
    usage = Usage(tasks)
    for layer in range(2):
        site = Site(f"model.layers.{layer}.mlp", "default", f"g{layer}", shared=shared)
        gates = torch.nn.functional.one_hot(torch.tensor(choices), experts).float()
        usage(site, Routing(gates, gates, gates), Context(task_ids=torch.arange(len(choices))))
    return usage


def test_columns_are_aligned():
    text = table(["name", "x"], [["a", 1.23456], ["longer", None], ["b", 12345.678]])
    assert text.splitlines() == [
        "name            x",
        "──────  ─────────",
        "a           1.235",
        "longer          -",
        "b       1.235e+04",
    ]


def test_bars_are_relative_to_the_largest_and_show_whatever_is_there():
    assert bars([1.0, 0.5, 0.0, 0.001]) == "█▄ ▁"
    assert bars([0.25] * 3) == "███"
    assert bars([0.0, 0.0]) == "  "
    assert bars([]) == ""


def test_names_lose_what_all_sites_share():
    names = short_names(["model.layers.0.q", "model.layers.1.mlp.up"])
    assert list(names.values()) == ["0.q", "1.mlp.up"]
    assert short_names(["model.q"]) == {"model.q": "model.q"}
    assert list(short_names(["a.b", "a.b.c"]).values()) == ["b", "b.c"]
    assert list(short_names(["enc.0.q", "dec.0.q"]).values()) == ["enc.0.q", "dec.0.q"]


def test_the_routing_table():
    lines = routing_table(usage_of([[0, 0, 0, 1]], 3)).splitlines()
    assert lines[0].split() == "layer experts gate mass load H token H mean effective per token dead".split()
    # entropy of (3/4, 1/4) is 0.5623 nats: 0.512 of ln 3, and exp(0.5623) = 1.755 experts
    assert lines[2].split() == ["0.mlp", "3", "█▃", "0.000-0.750", "0.000", "0.512", "1.755", "1.000", "1:", "e2"]
    assert lines[3].startswith("1.mlp")
    assert "8 decisions" in lines
    assert "0.1 of the even share" in "\n".join(lines)
    assert "*" not in "".join(lines)
    shared = routing_table(usage_of([[0, 1]], 2, shared=True))
    assert "0.mlp*" in shared
    assert "* decides for other layers too" in shared


def test_the_routing_table_of_one_task_and_of_nothing():
    usage = usage_of([[0, 0], [1, 1]], 2, ["a", "b", "c"])
    assert "1: e1" in routing_table(usage, "a").splitlines()[2]
    assert "1: e0" in routing_table(usage, "b").splitlines()[2]
    assert "4 decisions of task 'a'" in routing_table(usage, "a")
    assert routing_table(usage, "c") == "no routing decision was counted for task 'c'"
    assert routing_table(Usage()) == "no routing decision was counted"


def test_many_experts_have_no_profile_and_a_short_list_of_dead_ones():
    line = routing_table(usage_of([[0, 1]], 40)).splitlines()[2]
    assert "█" not in line
    assert line.endswith("38: e2 e3 e4 e5 e6 e7 …")


def test_metrics_and_their_mean():
    lines = metrics_table({"a": {"rows": 4, "accuracy": 0.5}, "b": {"rows": 2, "accuracy": 1.0}}).splitlines()
    assert [line.split() for line in lines[2:]] == [["a", "4", "0.500"], ["b", "2", "1.000"], ["mean", "6", "0.750"]]
    assert len(metrics_table({"a": {"rows": 4}}).splitlines()) == 3


def test_findings():
    text = findings_text([Finding("ok", "good"), Finding("fail", "bad", "mend it"), Finding("warn", "so so")])
    assert text.splitlines() == [
        "ok    good",
        "FAIL  bad",
        "      -> mend it",
        "WARN  so so",
        "",
        "1 ok, 1 to look at, 1 failed",
    ]
