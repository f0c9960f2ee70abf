"""Requests that end early, at every stage of their life, alone and in a crowd that does everything at random."""

import asyncio
import dataclasses
import random
import threading
import time
from types import SimpleNamespace

import pytest

from molora.serve.engine import loop as loop_module
from molora.serve.request import Base, Mixture, Request, ServeError, Weighted
from molora.serve.store.store import AdapterStore
from tests import tiny
from tests.serve.adapters import Fake
from tests.serve.faults import WAIT, Field, Reader, after_steps, blocked, check, consistent, make_engine, one
from tests.serve.kinds import GREEDY
from tests.serve.loras import LLAMA, generated, make_loras, make_mixture, prompts_of

LONG = dataclasses.replace(GREEDY, max_tokens=60)
PROMPTS = prompts_of(6, seed=31, longest=24)
STAGES = ("queued", "cold", "no room", *(f"step {n}" for n in (1, 4, 8)))  # answers have 8 tokens


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tiny.tiny_llama()
    field = Field(base, make_loras(base, LLAMA, count=6))
    return field, make_mixture(base, tmp_path_factory.mktemp("mixture"), LLAMA)


@pytest.fixture(params=["hf-simple", "hf-cb"])
def make(parts, request):
    """Return a function that makes an engine on a store with a0, a1 and a mixture m; both are closed in the end."""
    made = []

    def build(count=2, slots=4, **options):
        store = AdapterStore(tiny.tiny_llama(), slots={4: slots}, patience=0.1)
        made.append(store)
        for number in range(count):
            store.register(f"a{number}", parts[0].source(f"a{number}", store.slots))
        store.register("m", parts[1][1])
        engine = make_engine(store, request.param, **options)
        made.append(engine)
        return engine, store

    yield build
    for part in reversed(made):
        part.close()


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose number is added to the engine's clock."""
    ahead = [0.0]
    now = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], thread_time=time.thread_time)
    monkeypatch.setattr(loop_module, "time", now)
    return ahead


def ask(engine, prompt, program, sampling=GREEDY, **options):
    return Reader(engine.submit(Request(list(prompt), program, sampling, **options)), (prompt, program))


def expected_of(parts, reader):
    """Return what transformers generates alone."""
    prompt, program = reader.what
    limit = reader.stream.request.sampling.max_tokens
    if isinstance(program, Mixture):
        return generated(parts[1][0], list(prompt), limit)
    return parts[0].expected(prompt, program.names[0] if isinstance(program, Weighted) else None, limit)


def whole(parts, reader):
    assert reader.finish == "length", reader.last
    assert reader.tokens == expected_of(parts, reader)
    return True


def brought_to(stage, engine, store, parts, act, **options):
    """Ask for an answer beside others, and call `act(id)` when it is at a stage; returns its reader and the others'."""
    field, found = parts[0], []
    beside = [ask(engine, PROMPTS[n], program) for n, program in enumerate((one("a0"), Base(), Mixture("m")))]

    def victim(name="a1"):
        found.append(ask(engine, PROMPTS[3], one(name), id="victim", **options))

    if stage == "queued":
        with blocked(engine):
            victim()
            act("victim")
    elif stage == "cold":
        slow = Fake(field.source("a2", store.slots), slow=True)
        store.register("a2", slow)
        victim("a2")
        assert slow.began.wait(WAIT)
        act("victim")
        assert found[0].finish != "length"
        slow.gate.set()
    else:
        assert all(whole(parts, other) for other in beside)  # its adapters are there, then
        if stage == "no room":
            after_steps(engine, 2, lambda: (victim(), act("victim")))  # on the engine's thread, while four run
            with blocked(engine):
                beside += [ask(engine, PROMPTS[n], one("a0")) for n in range(4)]
        else:
            after_steps(engine, int(stage.split()[1]), lambda: act("victim"))
            with blocked(engine):
                beside += [ask(engine, PROMPTS[n], one("a0")) for n in range(2)]
                victim()
        beside.append(ask(engine, PROMPTS[3], one("a1")))
    assert all(whole(parts, other) for other in beside)
    return found[0], beside


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_at_every_stage(make, parts, stage):
    engine, store = make(max_batch=4)
    reader, beside = brought_to(stage, engine, store, parts, engine.cancel)
    assert reader.finish in ("cancelled", "length")
    if stage in ("queued", "cold", "no room"):
        assert reader.finish == "cancelled" and reader.tokens == []
    assert reader.tokens == parts[0].expected(PROMPTS[3], "a1")[: len(reader.tokens)]
    beside.append(ask(engine, PROMPTS[3], one("a1")))  # its place, its name and its blocks are free again
    assert whole(parts, beside[-1])
    check(engine, store, [reader, *beside])


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_time_at_every_stage(make, parts, stage, clock):
    engine, store = make(max_batch=4, timeout=1000.0)

    def expire(id):
        clock[0] = 60.0

    reader, beside = brought_to(stage, engine, store, parts, expire, timeout=50.0)
    assert reader.finish in ("timeout", "length")
    if stage in ("queued", "cold", "no room"):
        assert reader.finish == "timeout" and reader.tokens == [] and reader.last.error.status == 504
    assert reader.tokens == parts[0].expected(PROMPTS[3], "a1")[: len(reader.tokens)]
    check(engine, store, [reader, *beside])


@pytest.mark.parametrize("stage", ["queued", "cold", "running"])
def test_an_engine_that_closes_tells_everybody(make, parts, stage):
    engine, store = make(max_batch=2)
    slow = Fake(parts[0].source("a2", store.slots), slow=True)
    store.register("a2", slow)
    readers = [ask(engine, PROMPTS[n], one("a0"), LONG) for n in range(2)]
    if stage == "running":
        for reader in readers:
            reader.until(tokens=3)
    readers += [ask(engine, PROMPTS[2], one("a2")), ask(engine, PROMPTS[3], Mixture("m"))]
    if stage == "cold":
        assert slow.began.wait(WAIT)
    told = []

    def embed():
        try:
            engine.embed([[5, 6]], one("a2"))
        except ServeError as error:
            told.append(error.status)

    embedding = threading.Thread(target=embed)
    with blocked(engine):
        embedding.start()
        while not engine._loop._encoding and embedding.is_alive():
            threading.Event().wait(0.001)
        closing = threading.Thread(target=engine.close)
        closing.start()
    closing.join(WAIT)
    embedding.join(WAIT)
    assert not closing.is_alive() and not embedding.is_alive() and told == [503]
    for reader in readers:
        assert reader.finish in ("cancelled", "length")
        assert not reader.tokens or reader.tokens == expected_of(parts, reader)[: len(reader.tokens)]
    with pytest.raises(ServeError) as refused:
        engine.submit(Request([5]))
    assert refused.value.status == 503
    stats = engine.stats()
    assert sum(stats.ended.values()) == len(readers) + 1 and stats.running == stats.waiting == 0
    slow.gate.set()
    consistent(store)


def test_who_waits_for_the_whole_answer_gets_it_and_cancels_by_leaving(make, parts):
    engine, _ = make()
    left = []

    async def run():
        stream = engine.submit(Request(PROMPTS[0], one("a0"), GREEDY))
        chunks = await asyncio.wait_for(stream.chunks(), WAIT)
        assert [token.id for chunk in chunks for token in chunk.tokens] == parts[0].expected(PROMPTS[0], "a0")
        assert chunks[-1].finish == "length" and await stream.chunks() == []
        with blocked(engine):
            left.append(engine.submit(Request(PROMPTS[1], one("a0"), LONG)))
            waits = asyncio.create_task(left[0].chunks())
            await asyncio.sleep(0)  # it waits now
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
        over = engine.submit(Request(PROMPTS[2], Base(), GREEDY))
        assert engine.drain(WAIT)
        assert len((await over.chunks())[-1:]) == 1  # it had ended before anybody asked

    asyncio.run(run())
    assert Reader(left[0]).finish == "cancelled"
    assert engine.stats().ended == {"length": 2, "cancelled": 1}


# --- everything at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_that_does_everything_at_random(make, parts, seed):
    """Threads ask, leave, unload, load other contents under the same names and pin, while some forwards fail."""
    field = parts[0]
    engine, store = make(count=6, slots=3, max_batch=4)
    contents = {f"a{n}": {f"a{n}"} for n in range(6)}  # name -> what it may have meant
    sources = {name: field.source(name, store.slots) for name in contents}
    readers, failed, lock = [], [], threading.Lock()
    layer, calls = store.model.get_base_model().model.layers[-1], [0]

    def fail(*_):
        calls[0] += 1
        if calls[0] % 61 == 60:
            raise RuntimeError("broken")

    def send(number):
        draws = random.Random(100 * seed + number)
        try:
            for _ in range(14):
                prompt, name = draws.choice(PROMPTS), draws.choice([*contents, "m", None])
                program = Base() if name is None else Mixture("m") if name == "m" else one(name)
                timeout = draws.choice([None, None, None, 0.05])
                try:
                    reader = ask(engine, prompt, program, tenant=f"t{number}", timeout=timeout)
                except ServeError as error:
                    assert error.code == "model_not_found"  # it is unloaded just now
                    continue
                with lock:
                    readers.append(reader)
                if draws.random() < 0.2:
                    reader.stream.cancel()
                elif draws.random() < 0.5:
                    reader.last  # noqa: B018  wait
        except Exception as error:
            failed.append(error)

    def change():
        draws = random.Random(seed)
        try:
            for _ in range(30):
                name, other = draws.choice([*contents]), draws.choice([*contents])
                action = draws.choice(["swap", "swap", "unload", "pin", "unpin"])
                try:
                    if action == "unload":
                        store.unregister(name)
                        threading.Event().wait(0.005)  # some ask for it meanwhile
                    if action in ("swap", "unload"):
                        contents[name].add(other)
                        store.register(name, sources[other])
                    else:
                        store.pin(name, action == "pin")
                except ServeError as error:
                    assert error.code == "pin_refused"
                threading.Event().wait(0.01)
        except Exception as error:
            failed.append(error)

    hook = layer.register_forward_pre_hook(fail)
    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not failed and not any(thread.is_alive() for thread in threads)
    for reader in readers:
        prompt, program = reader.what
        if isinstance(program, Weighted):
            known = [field.expected(prompt, content) for content in contents[program.names[0]]]
        else:
            known = [expected_of(parts, reader)]
        assert reader.tokens in [answer[: len(reader.tokens)] for answer in known], "this answer is of somebody else"
        assert reader.finish in ("length", "cancelled", "timeout", "error")
        if reader.finish == "error":
            assert reader.last.error.code in ("engine_error", "model_not_found")
    hook.remove()
    assert sum(reader.finish == "length" for reader in readers) > 10
    last = [ask(engine, prompt, Mixture("m")) for prompt in PROMPTS[:2]]
    assert all(whole(parts, reader) for reader in last)
    check(engine, store, [*readers, *last])
