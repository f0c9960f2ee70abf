"""The sections of the serving benchmark that ask a real `molora serve`, a process of its own, on loopback.

What the server costs beside the model is CPU time: of its whole process, read from the system, minus that of forwards
(`molora_model_seconds` of /metrics). It so counts HTTP, JSON, tokenising, scheduling, sampling, detokenising, streaming
and the threads of the adapter store; it leaves out the client.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from . import serve_load as load
from .serve_field import RANK, Field
from .serve_load import Answer, Load, Prompts
from .serve_sections import Section

START = 120.0  # seconds that a server may take to start
CLIENTS = 32


class Server:
    """A running `molora serve`.

    Args:
        url: of it.
        process: of it.
        report: what it said when it started.
    """

    def __init__(self, url: str, process: subprocess.Popen[str], report: list[str]) -> None:
        self.url, self.process, self.report = url, process, report

    def cpu(self) -> float | None:
        """Return the CPU seconds of its process so far; None where the system does not tell."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.exists():
            return None
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metrics(self) -> dict[str, float]:
        """Return its metrics that have no labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(r"^(molora_\w+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@contextmanager
def serving(field: Field, *options: str) -> Iterator[Server]:
    """Start a server on a free port, and stop it at the end."""
    command = [sys.executable, "-c", "import sys; from molora.cli import main; sys.exit(main())", "serve"]
    command += ["--model", str(field.folder / "model"), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    report: list[str] = []
    log = process.stderr
    assert log is not None
    try:
        until = time.monotonic() + START
        for line in log:
            report.append(line.rstrip())
            found = re.match(r"serving on (http://\S+)", line)
            if found:
                break
            if time.monotonic() > until:
                raise RuntimeError("the server did not start in time:\n" + "\n".join(report))
        else:
            raise RuntimeError("the server did not start:\n" + "\n".join(report))
        # somebody must read on, or a server that has much to say would stand still
        threading.Thread(target=lambda: deque(log, maxlen=0), daemon=True).start()
        yield Server(found[1], process, report)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def server(field: Field, until: float) -> Section:
    """Full load in a closed loop, streamed and whole; then Poisson arrivals at several rates."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 6)
    names = [f"a{i}" for i in range(min(16, sizes.adapters))]
    flags = ["--hub", str(field.hub), "--slot", f"{RANK}={len(names)}", "--backend", "hf-cb", "--log-level", "warning"]
    flags += [part for name in names for part in ("--adapter", name)]
    flags += ["--max-batch", str(CLIENTS), "--kv-memory", str(sizes.kv_bytes), "--max-waiting", "4096"]
    answers = (8, 4 * sizes.answer)
    loads = []
    with serving(field, *flags) as running:
        _run(running, _bodies(prompts, names, len(names), True), concurrency=len(names))  # loads the adapters
        full = {}
        for name, streamed in (("streamed", True), ("whole", False)):
            bodies = _bodies(prompts, names, 2 * sizes.requests, streamed, answers)
            full[name] = _run(running, bodies, concurrency=CLIENTS)
            loads.append(_told(f"closed loop, {CLIENTS} clients, {name}", full[name], streamed))
        capacity = len(full["streamed"][0].answers) / full["streamed"][0].seconds
        for part in (0.25, 0.5, 0.75):
            rate, count = part * capacity, sizes.requests
            bodies = _bodies(prompts, names, count, True, answers)
            done = _run(running, bodies, arrivals=prompts.arrivals(rate, count))
            loads.append(_told(f"Poisson, {rate:.1f} requests per second ({part:.0%} of full load)", done, True))
        report = running.report
    return {
        "title": "A server, over HTTP",
        "shape": f"`molora serve` in a process of its own; {len(names)} adapters in slots, batches of up to {CLIENTS}; "
        f"prompts of 4 to 64 and answers of {answers[0]} to {answers[1]} tokens of random text, each token a word",
        "note": "Overhead is the part of the server process's CPU time that was not spent in forwards of the model: "
        "in the engine's thread (scheduling, gates, sampling, text), and in all others (HTTP, JSON, tokens, loading).",
        "loads": loads,
        "report": report,
    }


def _bodies(
    prompts: Prompts, names: list[str], count: int, streamed: bool, answers: tuple[int, int] = (8, 8)
) -> list[dict[str, Any]]:
    return [
        {
            "model": names[i % len(names)],
            "prompt": " ".join(f"t{token}" for token in prompts.prompt(prompts.between(4, 64))),
            "max_tokens": prompts.between(*answers),
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed,
        }
        for i in range(count)
    ]


def _run(
    running: Server, bodies: list[dict[str, Any]], concurrency: int = 0, arrivals: list[float] | None = None
) -> tuple[Load, dict[str, float | None]]:
    """Send requests; return what came of them, and how the server spent its CPU time."""

    async def send() -> list[Answer]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=running.url, timeout=load.LIMIT, limits=limits) as client:

            async def ask(body: dict[str, Any]) -> Answer:
                return await _ask(client, body)

            if arrivals is None:
                return await load.closed(ask, iter(bodies), concurrency, load.LIMIT)
            return await load.opened(ask, bodies, arrivals)

    cpu, before, began = running.cpu(), running.metrics(), time.monotonic()
    answers = asyncio.run(send())
    seconds, after, used = time.monotonic() - began, running.metrics(), running.cpu()
    engine, model = (
        after[f"molora_{n}_seconds_total"] - before[f"molora_{n}_seconds_total"] for n in ("engine", "model")
    )
    tokens = int(after["molora_answer_tokens_total"] - before["molora_answer_tokens_total"])
    assert tokens == sum(body["max_tokens"] for body in bodies), "answers are not as long as they were asked to be"
    spent: dict[str, float | None] = {"engine": engine, "model": model, "process": None}
    if cpu is not None and used is not None:
        spent["process"] = used - cpu
    return Load(answers, seconds, tokens, engine, model), spent


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    answer = Answer(body["model"], time.monotonic())
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        answer.times.append(time.monotonic())
        return answer
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                if "error" in told:
                    raise RuntimeError(told["error"])
                if told["choices"] and told["choices"][0]["text"]:
                    answer.times.append(time.monotonic())
    return answer


def _told(name: str, done: tuple[Load, dict[str, float | None]], streamed: bool) -> dict[str, Any]:
    """Return a load as the report shows it."""
    found, spent = done
    told: dict[str, Any] = {
        "name": name,
        "requests": len(found.answers),
        "rate": found.rate,
        "per_second": len(found.answers) / found.seconds,
        "cpu_seconds": spent,
        "overhead": None if not spent["process"] else 1 - found.model / spent["process"],
        "in_engine": None if not spent["process"] else (found.engine - found.model) / spent["process"],
        "first": load.spread(found.firsts()) if streamed else None,
        "each": load.spread(found.gaps()) if streamed else None,
    }
    return told
