"""The same requests by PEFT's `adapter_names`, by swapping adapters, and by vLLM where its environment is given.

All answers are greedy, of given lengths, in float32 on one thread, and only tokens that were asked for count. PEFT runs
static batches with transformers' `generate`: rows that are done wait for the longest one. `adapter_names` is one batch
of everybody; swapping is one batch for each adapter, after `set_adapter`. vLLM runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from molora.serve.request import Request

from . import serve_load as load
from .models import twin
from .serve_field import Field, one, quiet
from .serve_load import Prompts, turns
from .serve_sections import Section, _row, _warm

OURS = "molora"
WORKER = Path(__file__).parent / "serve_vllm.py"
PATIENCE = 600.0  # seconds that vLLM may take, most of which it needs to start


def peers(field: Field, until: float, vllm: Path | None = None) -> Section:
    """molora beside PEFT in two ways, and vLLM."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 5)
    batch = min(16, sizes.rows)
    lengths = [(prompts.between(4, 64), prompts.between(8, max(9, sizes.answer))) for _ in range(batch)]
    names = [f"a{i}" for i in range(batch)]
    model = _peft(field, names)
    engine_of = field.engine(field.store(batch, names), batch)
    works: dict[str, Any] = {}
    with engine_of as engine:
        _warm(engine, prompts, [one(name) for name in names])

        def requests(count: int) -> list[Request]:
            return [prompts.request(one(names[i % count]), *lengths[i]) for i in range(batch)]

        def ours(count: int) -> float:
            asked = requests(count)
            done = load.on_engine(engine, lambda ask: load.opened(ask, asked, [0.0] * batch))
            return done.engine / done.tokens

        for count in dict.fromkeys((batch, 1)):
            works[f"{OURS}, {count} distinct"] = partial(ours, count)
            works[f"PEFT adapter_names, {count} distinct"] = lambda n=count: _timed(_mixed_batch, model, requests(n))
            works[f"PEFT set_adapter, {count} distinct"] = lambda n=count: _timed(_one_by_one, model, requests(n))
        alike = _agree(engine, model, requests(batch))
        results = turns(works, until, min(2, sizes.least))
    rows = [_row(name, result, distinct=int(name.split(", ")[1].split()[0])) for name, result in results.items()]
    told = "vLLM: not run; give the environment that it is installed in with --vllm."
    extra: dict[str, Any] = {}
    if vllm is not None:
        found = run_vllm(vllm, field, [requests(n) for n in (batch, 1) for _ in range(4)])
        told = found.pop("note")
        extra["vllm"] = found
    return {
        "title": "Beside other ways to serve several adapters",
        "shape": f"the same {batch} requests, sent together, prompts of 4 to 64 and answers of 8 to {sizes.answer} "
        "tokens; tokens that were asked for per CPU second of the thread that runs the model",
        "note": f"{alike} of {batch} answers of molora equal those of PEFT token by token. {told}",
        "of": f"{OURS}, {batch} distinct",
        "rows": rows,
        **extra,
    }


def _peft(field: Field, names: list[str]) -> PeftModel:
    with quiet():
        model = PeftModel.from_pretrained(twin(field.base), field.adapter(names[0]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(field.adapter(name), adapter_name=name)
    return model.eval()


def _timed(run: Any, model: PeftModel, requests: list[Request]) -> float:
    began = time.thread_time()
    run(model, requests)
    return (time.thread_time() - began) / sum(request.sampling.max_tokens for request in requests)


def _mixed_batch(model: PeftModel, requests: list[Request]) -> dict[str, list[int]]:
    return _generate(model, requests, adapter_names=[request.program.names[0] for request in requests])


def _one_by_one(model: PeftModel, requests: list[Request]) -> dict[str, list[int]]:
    by_adapter: dict[str, list[Request]] = {}
    for request in requests:
        by_adapter.setdefault(request.program.names[0], []).append(request)
    found = {}
    for name, group in by_adapter.items():
        model.set_adapter(name)
        found.update(_generate(model, group))
    return found


@torch.inference_mode()
def _generate(model: PeftModel, requests: list[Request], **options: Any) -> dict[str, list[int]]:
    """Return the answers of one static batch, padded on the left, by id."""
    width = max(len(request.prompt_ids) for request in requests)
    longest = max(request.sampling.max_tokens for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    options |= {"do_sample": False, "max_new_tokens": longest, "eos_token_id": None, "pad_token_id": 0}
    with quiet():
        out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
    return {request.id: row[: request.sampling.max_tokens].tolist() for request, row in zip(requests, out, strict=True)}


def _agree(engine: Any, model: PeftModel, requests: list[Request]) -> int:
    """Return how many answers are the same by molora and by PEFT."""
    done = load.on_engine(engine, lambda ask: load.opened(ask, requests, [0.0] * len(requests)))
    expected = _one_by_one(model, requests)
    return sum(answer.tokens == expected[request.id] for answer, request in zip(done.answers, requests, strict=True))


# --- vLLM -------------------------------------------------------------------------------------------------------------


def run_vllm(venv: Path, field: Field, batches: list[list[Request]]) -> dict[str, Any]:
    """Run batches by the vLLM of another environment; returns its rates by distinct adapters, and a note."""
    names = sorted({request.program.names[0] for batch in batches for request in batch})
    task = {
        "model": str(field.folder / "model"),
        "adapters": {name: str(field.adapter(name)) for name in names},
        "rows": max(map(len, batches)),
        "batches": [[(r.prompt_ids, r.sampling.max_tokens, r.program.names[0]) for r in batch] for batch in batches],
    }
    file = field.folder / "vllm.json"
    file.write_text(json.dumps(task))
    environment = {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(field.folder), "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [str(venv / "bin" / "python"), str(WORKER), str(file)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"note": f"vLLM: did not run ({type(error).__name__})."}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"note": f"vLLM: did not run, exit code {done.returncode}: {last[:300]}"}
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rates: dict[int, list[float]] = {}
    for batch, seconds in zip(batches, told["seconds"], strict=True):
        distinct = len({request.program.names[0] for request in batch})
        rates.setdefault(distinct, []).append(sum(r.sampling.max_tokens for r in batch) / seconds)
    # the first batch of each kind loads adapters
    found = {str(n): statistics.median(values[1:] or values) for n, values in rates.items()}
    text = ", ".join(f"{rate:.0f} with {n} distinct" for n, rate in found.items())
    return {"rates": found, "note": f"vLLM {told['version']}, in a process of its own: tokens per CPU second {text}."}
