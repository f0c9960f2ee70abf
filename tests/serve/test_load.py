"""The load generator is bounded and counts what it sends, and the benchmark of serving runs, writes and judges."""

import asyncio
import itertools
import json
import sys
import time

import pytest

from benchmarks import serve, serve_load, serve_report
from benchmarks.serve_field import QUICK, Field, one
from benchmarks.serve_load import Answer, Load, Prompts, closed, opened, percentile, turns
from benchmarks.serve_peers import run_vllm
from molora.serve.request import Base


def test_a_quick_run_writes_its_files(tmp_path):
    assert serve.main(["--quick", "--only", "decode,working,fairness,peers", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["serve.json", "serve.md", "serve.png"]
    run = json.loads((tmp_path / "serve.json").read_text())
    assert list(run["sections"]) == ["decode", "working set", "fairness", "peers"] and run["quick"]
    decode = {row["name"]: row for row in run["sections"]["decode"]["rows"]}
    assert {"8 rows, 1 distinct", "8 rows, 8 distinct"} <= set(decode)
    assert all(row["rate"] > 0 and len(row["ratios"]) == 1 for row in decode.values())
    rows = {row["name"] for row in run["sections"]["peers"]["rows"]}
    assert {"molora, 8 distinct", "PEFT adapter_names, 8 distinct", "PEFT set_adapter, 8 distinct"} <= rows
    assert run["sections"]["peers"]["note"].startswith("8 of 8 answers of molora equal those of PEFT")
    shares = [told["share"] for told in run["sections"]["fairness"]["loads"]]
    assert sum(shares[:4]) == pytest.approx(1) and sum(shares[4:]) == pytest.approx(1)
    text = (tmp_path / "serve.md").read_text()
    for part in ("## Goals", "twice the slots, pinned", "greedy, 10x load", "vLLM: not run", "not measured"):
        assert part in text
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_quick_run_of_a_real_server(tmp_path):
    assert serve.main(["--quick", "--only", "server,registered,programs", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "serve.json").read_text())
    loads = run["sections"]["server"]["loads"]
    assert [told["name"].partition(",")[0] for told in loads] == ["closed loop"] * 2 + ["Poisson"] * 3
    for told in loads:
        assert told["rate"] > 0 and 0 < told["in_engine"] < told["overhead"] < 1
    assert any("adapters: 8 registered" in line for line in run["sections"]["server"]["report"])
    assert "routed mixture of 8" in {row["name"] for row in run["sections"]["programs"]["rows"]}


def test_an_unknown_section_is_an_error_with_choices(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--only", "decod,sever"])
    assert "no section begins with sever; there are: decode, programs" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "met"), [(0.90, True), (0.8999, False), (1.2, True)])
def test_goals_are_judged_by_their_limits(ratio, met):
    rows = [{"name": "16 rows, 16 distinct", "batch": 16, "ratio": ratio}]
    loads = [{"name": "greedy, 1x load", "share": 0.9}, {"name": "greedy, 10x load", "share": 0.31}]
    full = {"name": "closed loop, 32 clients, streamed", "overhead": 0.02}
    found = serve_report.goals({"decode": {"rows": rows}, "fairness": {"loads": loads}, "server": {"loads": [full]}})
    goals = {goal["goal"]: goal for goal in found}
    assert goals["decoding, batch of 16: 16 distinct adapters / 1"]["met"] is met
    assert goals["share of a greedy tenant among 4"]["met"] is False
    assert goals["CPU of the server outside of the model at full load, streamed"]["met"] is True
    assert goals["1,000 registered adapters ready"]["met"] is None


def test_a_closed_loop_keeps_its_concurrency_and_ends():
    running, most, asked = [0], [0], []

    async def ask(request):
        running[0] += 1
        most[0] = max(most[0], running[0])
        asked.append(request)
        await asyncio.sleep(0)
        running[0] -= 1
        return request

    assert sorted(asyncio.run(closed(ask, iter(range(20)), 4, 60.0))) == list(range(20))
    assert most[0] == 4 and len(asked) == 20
    assert asyncio.run(closed(ask, iter(range(20)), 4, -1.0)) == []  # the time is up before it begins


def test_an_open_loop_sends_at_its_moments_whatever_takes_how_long():
    sent = []

    async def ask(request):
        sent.append((request, time.monotonic()))
        await asyncio.sleep(0.2)

    start = time.monotonic()
    asyncio.run(opened(ask, ["a", "b", "c"], [0.0, 0.02, 0.04]))
    assert [name for name, _ in sent] == ["a", "b", "c"]
    assert all(moment - start >= at for (_, moment), at in zip(sent, (0.0, 0.02, 0.04), strict=True))
    assert sent[-1][1] < sent[0][1] + 0.2  # nobody waited for an answer


def test_poisson_arrivals_and_lengths():
    prompts = Prompts(100, seed=1)
    arrivals = prompts.arrivals(rate=50.0, count=2000)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert arrivals[0] == 0 and min(gaps) >= 0 and mean == pytest.approx(1 / 50, rel=0.1)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)  # of an exponential
    lengths = [prompts.between(4, 9) for _ in range(500)]
    assert set(lengths) == set(range(4, 10))
    one, other = (prompts.request(Base(), 6, 5) for _ in range(2))
    assert len(one.prompt_ids) == 6 and one.prompt_ids != other.prompt_ids and one.sampling.max_tokens == 5


def test_what_a_load_tells():
    answers = [Answer("x", 1.0, [1.5, 2.0, 4.0], "length", [5, 6, 7]), Answer("y", 2.0, [2.25], "length", [8])]
    load = Load(answers, 4.0, 4)
    assert load.rate == 1.0 and load.firsts() == [0.5, 0.25] and load.gaps() == [0.5, 2.0] and load.gaps("y") == []
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0 and percentile([0.0, 10.0], 95) == 9.5 and percentile([], 50) is None
    assert serve_load.spread([0.001, 0.003])["p50"] == pytest.approx(2.0)


def test_turns_compare_with_the_reference_close_by():
    # everything becomes slower and slower: seconds drift, ratios of throughput do not
    calls, order = [0], []

    def work(name, cost):
        def run():
            calls[0] += 1
            order.append(name)
            return cost * (1 + calls[0] / 1000)

        return run

    works = {"base": work("base", 1.0), "two": work("two", 2.0), "half": work("half", 0.5), "four": work("four", 4.0)}
    results = turns(works, until=0.0, least=4)
    assert order[4:9] == ["base", "two", "half", "base", "four"] and order[9:12] == ["base", "base", "four"]
    for name, ratio in (("base", 1.0), ("two", 0.5), ("half", 2.0), ("four", 0.25)):
        assert results[name].ratio == pytest.approx(ratio, rel=0.005) and len(results[name].ratios) == 4


FAKE = '''
"""Stands for vLLM: checks what it is given, as vLLM would, and answers nothing."""
import json, pathlib, sys, types
__version__ = "0.0-fake"
class LLM:
    def __init__(self, model, enable_lora, max_loras, max_lora_rank, max_num_seqs, **options):
        assert json.loads(pathlib.Path(model, "config.json").read_text())["model_type"] == "llama"
        assert enable_lora and max_lora_rank == 8 and (max_loras, max_num_seqs) == (2, 4), (max_loras, max_num_seqs)
    def generate(self, prompts, params, lora_request, use_tqdm):
        assert len(prompts) == len(params) == len(lora_request) == 4
        assert all(prompt["prompt_token_ids"] and one.max_tokens == 5 for prompt, one in zip(prompts, params))
        for request in lora_request:
            assert pathlib.Path(request.path, "adapter_model.safetensors").exists()
        sum(range(200000))
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature == 0 and ignore_eos
        self.max_tokens = max_tokens
class LoRARequest:
    def __init__(self, name, number, path):
        assert number >= 1
        self.path = path
request = types.ModuleType("vllm.lora.request")
request.LoRARequest = LoRARequest
sys.modules |= {"vllm.lora": types.ModuleType("vllm.lora"), "vllm.lora.request": request}
'''


def test_vllm_is_asked_in_its_own_environment_and_its_absence_is_said(tmp_path):
    """By a module that stands for it: what is proven is what vLLM is given and how its times are read."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "vllm.py").write_text(FAKE)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    field = Field(QUICK)
    try:
        prompts = Prompts(128)
        batches = [[prompts.request(one(f"a{i % n}"), 3, 5) for i in range(4)] for n in (2, 2, 1, 1)]
        found = run_vllm(tmp_path, field, batches)
        assert set(found["rates"]) == {"2", "1"} and all(rate > 0 for rate in found["rates"].values())
        assert found["note"].startswith("vLLM 0.0-fake, in a process of its own")
        python.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
        assert run_vllm(tmp_path, field, batches) == {"note": "vLLM: did not run, exit code 3: no such module"}
        assert run_vllm(tmp_path / "none", field, batches)["note"] == "vLLM: did not run (FileNotFoundError)."
    finally:
        field.close()
