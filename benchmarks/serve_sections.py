"""The sections of the serving benchmark that run an engine in this process.

Where things are compared, they take turns (serve_load.turns), and what counts is the CPU time of the engine's thread,
since other work on the machine does not count in it; loads that wait for adapters are measured by the clock.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from molora.serve.request import Base, Mixture, Program, Request

from . import serve_load as load
from .serve_field import RANK, Field, kinds, one
from .serve_load import Prompts, turns
from .timing import Result

Section = dict[str, Any]
SHORT = 4  # tokens of a prompt, where so many decode that reading longer ones would take most of the time
GREEDY = "greedy"


def _row(name: str, result: Result, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "rate": 1 / statistics.median(result.seconds),
        "ratio": result.ratio,
        "quartiles": result.quartiles,
        "ratios": result.ratios,
        **more,
    }


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(field: Field, until: float) -> Section:
    """Throughput against distinct adapters in the batch: every row its own one, and a large batch with ever more."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab)
    rows: list[dict[str, Any]] = []
    few = min(16, sizes.rows)
    names = [f"a{i}" for i in range(sizes.rows)]
    with field.engine(field.store(sizes.rows, names), sizes.rows) as engine:
        _warm(engine, prompts, [one(name) for name in names])
        share = (until - time.monotonic()) / 3
        for batch, prompt, end in ((few, sizes.prompt, time.monotonic() + share), (sizes.rows, SHORT, until)):
            counts = [2**n for n in range(12) if 2**n <= batch]

            def work(count: int, batch: int = batch, prompt: int = prompt) -> float:
                asked = [one(f"a{i % count}") for i in range(batch)]
                answer = sizes.answer if batch == few else sizes.answer // 2
                return _decoded(engine, [prompts.request(program, prompt, answer) for program in asked])

            results = turns({str(count): partial(work, count) for count in counts}, end, sizes.least)
            for count in counts:
                rows.append(_row(f"{batch} rows, {count} distinct", results[str(count)], batch=batch, distinct=count))
    return {
        "title": "Decoding against distinct adapters in the batch",
        "shape": f"LoRAs of rank {RANK} on all linear layers, {sizes.rows} slots; answers of {sizes.answer} tokens for "
        f"{few} rows, of {sizes.answer // 2} for {sizes.rows}; tokens per CPU second of the engine's thread while all "
        "rows decode",
        "of": "1 adapter",
        "rows": rows,
    }


def programs(field: Field, until: float) -> Section:
    """Routed mixtures, weighted mixes and the base beside one adapter, in batches of 16 rows."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 1)
    batch = min(16, sizes.rows)
    names = [f"a{i}" for i in range(batch)]
    everything: list[Program] = [
        Base() if i % 4 == 0 else one(names[i]) if i % 4 == 1 else Mixture(f"m{i % sizes.mixtures}") if i % 4 == 2
        else next(iter(kinds(batch, 0).values()))
        for i in range(batch)
    ]  # fmt: skip
    asked: dict[str, list[Program]] = {
        "one adapter": [one("a0")] * batch,
        "base": [Base()] * batch,
        **{name: [program] * batch for name, program in kinds(batch, 1).items()},
        f"{sizes.mixtures} routed mixtures": [Mixture(f"m{i % sizes.mixtures}") for i in range(batch)],
        "base, adapters, mixes and mixtures": everything,
    }
    with field.engine(field.store(batch, names, sizes.mixtures), batch) as engine:
        _warm(engine, prompts, [one(name) for name in names] + [Mixture(f"m{i}") for i in range(sizes.mixtures)])

        def work(programs: list[Program]) -> float:
            return _decoded(engine, [prompts.request(one, sizes.prompt, sizes.answer) for one in programs])

        results = turns({name: partial(work, told) for name, told in asked.items()}, until, sizes.least)
    return {
        "title": "Decoding by gate program",
        "shape": f"{batch} rows; routed mixtures have 8 experts of rank 8 and a router in each linear layer, 2 experts "
        "for each token; tokens per CPU second of the engine's thread",
        "of": "one adapter",
        "rows": [_row(name, result) for name, result in results.items()],
    }


def _decoded(engine: Any, requests: list[Request]) -> float:
    found = load.decode(engine, requests)
    return found.engine / found.tokens


def _warm(engine: Any, prompts: Prompts, programs: list[Program]) -> None:
    """Let everything be loaded that a section uses."""
    load.on_engine(
        engine, lambda ask: load.opened(ask, [prompts.request(p, 2, 2) for p in programs], [0.0] * len(programs))
    )


# --- registered adapters, and more of them than slots -----------------------------------------------------------------


def registered(field: Field, until: float) -> Section:
    """The same working set in servers that know 10, 100 and 1,000 adapters; and how soon 1,000 are ready."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 2)
    own = [f"a{i}" for i in range(min(8, sizes.adapters))]
    ready, counts = _ready(field), sorted({min(n, sizes.library) for n in (10, 100, 1000)})
    with ExitStack() as stack:
        engines = {}
        for count in counts:
            store = field.store(len(own), own, hub=field.library)
            for number in range(count - len(own)):
                store.register(f"l{number:04d}")
            assert len(store.names) == count
            engines[count] = stack.enter_context(field.engine(store, 16))
            _warm(engines[count], prompts, [one(name) for name in own])

        def work(count: int) -> float:
            requests = _mixed(prompts, sizes.requests, itertools.cycle(own))
            began = time.process_time()
            done = load.on_engine(engines[count], lambda ask: load.closed(ask, requests, 16, load.LIMIT))
            return (time.process_time() - began) / done.tokens

        results = turns({str(count): partial(work, count) for count in counts}, until, sizes.least)
    return {
        "title": "Registered adapters",
        "shape": f"{len(own)} adapters in use, all in slots; closed loop of 16 requests with mixed lengths; tokens per "
        "CPU second of the whole process, reader included",
        "note": f"Time until {sizes.library:,} adapters of a library are registered and may be asked for, with the "
        f"library's index still to be built: {ready['cold']:.2f} s of the clock ({ready['cold_cpu']:.2f} s of CPU); "
        f"with the index there: {ready['warm']:.2f} s.",
        "of": f"{counts[0]} registered",
        "rows": [_row(f"{n} registered", results[str(n)], registered=n) for n in counts],
        "ready": ready,
    }


def _ready(field: Field) -> dict[str, float]:
    """Return the seconds until all adapters of a large library are registered."""
    found, library = {}, field.library
    for index in ("cold", "warm"):
        store = field.store(2, hub=library)
        try:
            wall, cpu = time.monotonic(), time.process_time()
            assert store.register_all() == {}
            found[index], found[f"{index}_cpu"] = time.monotonic() - wall, time.process_time() - cpu
            assert len(store.names) == field.sizes.library
        finally:
            store.close()
    return found


def working_set(field: Field, until: float) -> Section:
    """Twice as many adapters in use as there are slots, beside as many as there are."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 3)
    slots, batch = min(8, sizes.adapters // 2), min(16, sizes.rows)
    gaps: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    cpu: dict[str, float] = {}
    with ExitStack() as stack:
        works, stores = {}, {}
        for name, count in (("resident", slots), ("twice the slots", 2 * slots)):
            names = [f"a{i}" for i in range(count)]
            # one adapter is pinned in both: what becomes of its requests is what residents feel of the others' loads
            stores[name] = field.store(slots, names, pinned=names[:1])
            engine = stack.enter_context(field.engine(stores[name], batch))
            _warm(engine, prompts, [one(each) for each in names])

            def work(name: str = name, names: list[str] = names, engine: Any = engine) -> float:
                requests = _mixed(
                    prompts, sizes.requests, itertools.cycle(names), lambda a: "pinned" if a == "a0" else "others"
                )
                began = time.process_time()
                done = load.on_engine(engine, lambda ask: load.closed(ask, requests, 2 * batch, load.LIMIT))
                cpu[name] = (time.process_time() - began) / done.tokens
                for label in ("pinned", "others"):
                    gaps.setdefault(f"{name}, {label}", []).extend(done.gaps(label))
                    firsts.setdefault(f"{name}, {label}", []).extend(done.firsts(label))
                return done.seconds / done.tokens

            works[name] = work
        results = turns(works, until, sizes.least)
        loads = stores["twice the slots"].counters()
    return {
        "title": "More adapters in use than slots",
        "shape": f"{slots} slots; closed loop of {2 * batch} requests, {batch} of them running, over {slots} or "
        f"{2 * slots} adapters in turn, one of which is pinned; tokens per second of the clock",
        "note": f"{loads['loads']:.0f} loads into slots, {loads['evictions']:.0f} evictions. CPU of the whole process "
        f"for a token, in the last round: {1e3 * cpu['twice the slots']:.2f} ms, "
        f"resident {1e3 * cpu['resident']:.2f} ms.",
        "of": "resident",
        "rows": [_row(name, result, cpu_ms=1e3 * cpu[name]) for name, result in results.items()],
        "latency": [
            {"name": name, "first": load.spread(firsts[name]), "each": load.spread(gaps[name])} for name in gaps
        ],
    }


def _mixed(
    prompts: Prompts, count: int, names: Iterator[str], label: Callable[[str], str] | None = None
) -> Iterator[Request]:
    """Yield requests with prompts and answers of mixed lengths."""
    for number in range(count):
        name = next(names)
        request = prompts.request(one(name), prompts.between(4, 64), prompts.between(8, 32))
        if label is not None:
            request.id = f"{label(name)}:{number}"
        yield request


# --- fairness ---------------------------------------------------------------------------------------------------------


def fairness(field: Field, until: float) -> Section:
    """Four tenants with equal weights, one of which sends ten times as much as each of the others."""
    sizes, prompts = field.sizes, Prompts(field.sizes.shape.vocab, 4)
    tenants, each = ["law", "news", "sport", GREEDY], 4
    loads = []
    with field.engine(field.store(4, [f"a{i}" for i in range(4)]), 8) as engine:
        _warm(engine, prompts, [one(f"a{i}") for i in range(4)])
        for factor in (1, 10):
            done, began = _crowd(engine, prompts, tenants, each, factor, sizes.seconds)
            start, end = began + sizes.seconds / 5, began + sizes.seconds
            drawn = Counter({name: 0 for name in tenants})
            for answer in done.answers:
                drawn[answer.label] += sum(start <= moment <= end for moment in answer.times)
            # those that were asked before the window began found a queue that was still filling
            inside = [answer for answer in done.answers if start <= answer.sent <= end]
            total = max(1, sum(drawn.values()))
            for name in tenants:
                loads.append(
                    {
                        "name": f"{name}, {factor if name == GREEDY else 1}x load",
                        "tenant": name,
                        "factor": factor,
                        "concurrency": each * (factor if name == GREEDY else 1),
                        "tokens": drawn[name],
                        "share": drawn[name] / total,
                        "first": load.spread([answer.first for answer in inside if answer.label == name]),
                    }
                )
    return {
        "title": "Fair shares under a greedy tenant",
        "shape": f"4 tenants of equal weight, each with an adapter; {each} requests at any time each, {10 * each} of "
        f"the greedy one; 8 run at a time; tokens of answers in {0.8 * sizes.seconds:.0f} s in which all of them "
        "always have something waiting",
        "loads": loads,
    }


def _crowd(
    engine: Any, prompts: Prompts, tenants: list[str], each: int, factor: int, seconds: float
) -> tuple[load.Load, float]:
    """Run tenants side by side for some time; return what came of it, and when it began."""
    began = time.monotonic()

    async def run(ask: Callable[[Request], Any]) -> list[Any]:
        def endless(place: int, tenant: str) -> Iterator[Request]:
            while True:
                yield prompts.request(one(f"a{place}"), prompts.between(4, 64), prompts.between(8, 32), tenant)

        found = await asyncio.gather(
            *(
                load.closed(ask, endless(place, name), each * (factor if name == GREEDY else 1), seconds)
                for place, name in enumerate(tenants)
            )
        )
        return [answer for answers in found for answer in answers]

    return load.on_engine(engine, run), began
