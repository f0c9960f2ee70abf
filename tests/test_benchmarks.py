"""The speed benchmark runs on tiny shapes, writes its files, and judges its goals by what it measured."""

import json

import pytest
import torch

from benchmarks import models, report, speed
from benchmarks.budget import Budget, Part
from benchmarks.models import LoopLinear
from benchmarks.scaling import routed
from benchmarks.sections import BASE, OURS, QUICK, Field
from benchmarks.timing import Plain, Result, against, race, saved_bytes


def test_a_quick_run_writes_its_files(tmp_path):
    assert speed.main(["--quick", "--only", "training,tenants,by active,slots", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]
    run = json.loads((tmp_path / "speed.json").read_text())
    assert list(run["sections"]) == ["training", "tenants 4", "by active", "slots"]
    rows = {row["name"]: row for row in run["sections"]["training"]["rows"]}
    assert {BASE, OURS, "PEFT LoRA r=64", "PEFT X-LoRA, frozen experts", "per-expert loop E=8 k=2"} <= set(rows)
    assert all(row["ms"] > 0 and len(row["ratios"]) == QUICK.least for row in rows.values())
    assert rows["per-expert loop E=8 k=2"]["saved_mib"] > rows[OURS]["saved_mib"] > rows[BASE]["saved_mib"] > 0
    assert run["machine"]["threads_used"] == 1 and run["machine"]["peft"] and run["quick"]
    text = (tmp_path / "speed.md").read_text()
    for part in ("## Goals", "PEFT adapter_names, 4 distinct", "molora.write_expert", "tokens/s", "not measured"):
        assert part in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_section_is_an_error_with_choices(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--only", "trainig"])
    assert "no section begins with trainig; there are: training, prefill" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "met"), [(1.1499, True), (1.15, True), (1.151, False)])
def test_goals_are_judged_by_their_limits(ratio, met):
    rows = [{"name": OURS, "ratio": ratio, "ratios": [ratio, ratio]}, {"name": "PEFT LoRA r=64", "ratios": [1.0, 2.0]}]
    goals = {goal["goal"]: goal for goal in report.goals({"training": {"rows": rows}})}
    assert goals["training step / frozen base"]["met"] is met
    paired = goals["training step / PEFT LoRA r=64"]
    assert paired["measured"] == pytest.approx((ratio / 1 + ratio / 2) / 2) and paired["met"] is True
    assert goals["prefill / frozen base"]["met"] is None


def test_a_race_takes_turns_and_compares_with_the_reference_close_by(monkeypatch):
    # a clock that runs slower and slower: absolute times drift, ratios do not
    now, order = [0.0], []
    monkeypatch.setattr("benchmarks.timing.time.thread_time", lambda: now[0])

    def work(name, cost):
        def run():
            order.append(name)
            now[0] += cost * (1 + len(order) / 1000)

        return Plain(run)

    works = {"base": work("base", 1.0), "two": work("two", 2.0), "three": work("three", 3.0), "four": work("four", 4.0)}
    results = race(works, until=0.0, least=4)
    assert order[4:9] == ["base", "two", "three", "base", "four"]  # after one slow warm-up of each
    assert order[9:15] == ["base", "base", "four", "three", "base", "two"]  # and the next round backwards
    for name, cost in (("two", 2), ("three", 3), ("four", 4)):
        assert results[name].ratio == pytest.approx(cost, rel=0.005)
        assert len(results[name].ratios) == 4
    assert against(results["four"], results["two"]) == pytest.approx(2, rel=0.01)
    assert Result([1.0, 2.0, 9.0], [1.0, 2.0, 9.0]).ratio == 2.0


def test_saved_bytes_counts_storages_once_and_no_parameters():
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == 3 * 8 * 4
    assert saved_bytes(layer, lambda: layer(x) + layer(x)) == 3 * 8 * 4


def test_the_loop_and_molora_compute_the_same_function():
    base = torch.nn.Linear(12, 12, bias=False)
    loop, ours = LoopLinear(base, 4, 8, 2), routed(base, 4, 2)
    bank, router = ours.molora_bank["default"], ours.molora_router["default"]
    for expert, (A, B) in enumerate(zip(loop.expert_A, loop.expert_B, strict=True)):
        bank.write(expert, A, B, scale=loop.scaling)
    router.scorer.weight.data.copy_(loop.gate.weight.data)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), loop(x))
    assert (loop(x) - base(x)).abs().max() > 1e-4


def test_contenders_share_the_weights_of_the_base_and_differ_from_it():
    field = Field(QUICK)
    try:
        base = field.base(QUICK.wide)
        ids = torch.randint(0, QUICK.wide.vocab, (1, 6))
        with torch.no_grad():
            plain = base(input_ids=ids).logits
            for name, model in field.contenders(QUICK.wide, "prefill").items():
                shared = {p.data_ptr() for p in model.parameters()}
                assert base.get_input_embeddings().weight.data_ptr() in shared
                assert torch.equal(model.eval()(input_ids=ids).logits, plain) == (name == BASE), name
        for trainable in (False, True):
            model = models.xlora(base, field.loras(QUICK.wide), trainable)
            assert any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n) == trainable
    finally:
        field.close()


def budgeted(monkeypatch, minutes, slower=1.0):
    """Run three sections against a fake clock; return their rounds, the whole minutes and the note."""
    now = [100.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])

    def section(setup, seconds):
        def run(field, until):
            now[0] += setup * slower
            rounds = 0
            while rounds < 3 or (rounds < 60 and now[0] + seconds * slower < until):
                now[0] += seconds * slower
                rounds += 1
            return {"rows": [{"ratios": [1.0] * rounds}]}

        return run

    costs = {"long": (30.0, 60.0, 3), "short": (20.0, 2.0, 2), "last": (30.0, 30.0, 1)}
    parts = {name: Part(section(s, r), s, r, share) for name, (s, r, share) in costs.items()}
    budget, rounds = Budget(minutes, parts), {}
    for name, part in parts.items():
        result = part.run(None, budget.begin(name))
        budget.finish(name, result)
        rounds[name] = len(result["rows"][0]["ratios"])
    return rounds, (now[0] - 100) / 60, budget.note()


@pytest.mark.parametrize("slower", [0.5, 1.0, 1.4])
def test_a_budget_holds_and_every_section_has_its_rounds(monkeypatch, slower):
    # 80 + 3 * 92 seconds at the least, 12 minutes given: there is time to spare even if all takes 1.4 times longer
    rounds, took, note = budgeted(monkeypatch, 12, slower)
    assert min(rounds.values()) >= 3 and rounds["long"] > 3 and rounds["short"] > 10
    assert 0.75 * 12 < took <= 12 and "overrun" not in note


def test_a_budget_that_is_too_small_is_said_to_be(monkeypatch):
    rounds, took, note = budgeted(monkeypatch, 3)
    assert rounds == {"long": 3, "short": 3, "last": 3} and took == pytest.approx((80 + 3 * 92) / 60)
    assert "least number of rounds, 3, to: long, short, last" in note and "overrun by 2.9 minutes" in note


def test_without_a_budget_there_are_the_least_rounds_and_no_note(monkeypatch):
    rounds, _, note = budgeted(monkeypatch, 0)
    assert set(rounds.values()) == {3} and note == ""
