"""What goes wrong while requests run: nothing hangs, nobody gets another's answer, and in the end nothing is held."""

import dataclasses
import random
import threading

import pytest
import torch

from molora.serve.request import Base, Mixture, Request, ServeError, Weighted
from molora.serve.store.store import AdapterStore
from tests import tiny
from tests.serve.adapters import Fake, peft_lora
from tests.serve.faults import WAIT, Field, Reader, after_steps, blocked, check, consistent, make_engine, one
from tests.serve.kinds import GREEDY
from tests.serve.loras import LLAMA, generated, make_loras, make_mixture, prompts_of

LONG = dataclasses.replace(GREEDY, max_tokens=60)
PROMPTS = prompts_of(6, seed=21, longest=24)


@pytest.fixture(scope="module")
def field():
    base = tiny.tiny_llama()
    return Field(base, make_loras(base, LLAMA, count=8))


@pytest.fixture(params=["hf-simple", "hf-cb"])
def backend(request):
    return request.param


@pytest.fixture
def make(field, backend):
    """Return a function that makes a store with some LoRAs and an engine on it; they are closed in the end."""
    made = []

    def build(count=4, slots=4, register=True, options=None, **store_options):
        store_options = {"patience": 0.1, "remember_failure": 60.0} | store_options
        store = AdapterStore(tiny.tiny_llama(), slots={4: slots}, **store_options)
        made.append(store)
        for number in range(count if register else 0):
            store.register(f"a{number}", field.source(f"a{number}", store.slots))
        engine = make_engine(store, backend, **(options or {}))
        made.append(engine)
        return engine, store

    yield build
    for part in reversed(made):
        part.close()


def ask(engine, prompt, name, sampling=GREEDY, **options):
    """Submit a request for one adapter, or the base; return its reader."""
    program = Base() if name is None else one(name)
    return Reader(engine.submit(Request(list(prompt), program, sampling, **options)), (prompt, name))


def right(field, reader, name=None):
    """Check a whole answer."""
    prompt, told = reader.what
    assert reader.finish == "length", reader.last
    limit = reader.stream.request.sampling.max_tokens
    assert reader.tokens == field.expected(prompt, name or told, limit)
    return True


# --- loading, unloading and swapping under load -------------------------------------------------------------------


def test_a_load_that_is_stuck_delays_nobody_else(make, field):
    engine, store = make(count=2)
    slow = Fake(field.source("a2", store.slots), slow=True)
    store.register("a2", slow)
    waits = [ask(engine, prompt, "a2") for prompt in PROMPTS[:3]]
    assert slow.began.wait(WAIT)
    runs = ask(engine, PROMPTS[0], "a0", LONG)  # whole answers come while the load does not go on
    others = [ask(engine, prompt, name) for prompt in PROMPTS for name in ("a1", None)]
    assert all(right(field, reader) for reader in [runs, *others])
    assert [reader.chunks for reader in waits] == [[], [], []] and engine.stats().waiting == 3
    slow.gate.set()
    assert all(right(field, reader) for reader in waits) and slow.loads == 1
    check(engine, store, [runs, *waits, *others])


def test_unloading_ends_no_running_answer_and_tells_those_that_wait(make, field):
    engine, store = make(options={"max_batch": 2})
    waits, done = [], threading.Event()

    def unload():  # on the engine's thread, while two run
        waits.extend(ask(engine, PROMPTS[n], "a0") for n in range(2, 5))
        waits.append(ask(engine, PROMPTS[5], "a1"))
        store.unregister("a0")
        done.set()

    after_steps(engine, 2, unload)
    with blocked(engine):
        runs = [ask(engine, PROMPTS[n], "a0", LONG) for n in range(2)]
    assert done.wait(WAIT)
    other = waits.pop()
    with pytest.raises(ServeError, match="a0") as unknown:
        ask(engine, PROMPTS[0], "a0")
    assert unknown.value.status == 404
    assert all(right(field, reader) for reader in [*runs, other])
    for reader in waits:
        assert reader.finish == "error" and reader.last.error.code == "model_not_found"
    check(engine, store, [*runs, *waits, other])
    assert not store._table.buckets["slots_4"].taken.keys() - {entry.slot for entry in store._table.names.values()}


def test_a_name_that_changes_under_load_is_old_or_new_and_never_half(make, field):
    """Two contents take turns under one name; prompts are few, so that keys are found again where they may be."""
    engine, store = make(count=0, slots=2)
    contents = [field.source(name, store.slots) for name in ("a4", "a5")]
    store.register("x", contents[0])
    readers, stop, failed = [], threading.Event(), []

    def swap():
        turn = 0
        while not stop.is_set():
            turn += 1
            store.register("x", contents[turn % 2])
            # the next one comes when somebody was served by this one
            lease_seen.clear()
            lease_seen.wait(0.05)

    def send(seed):
        draws = random.Random(seed)
        try:
            for _ in range(12):
                reader = ask(engine, draws.choice(PROMPTS), "x")
                readers.append(reader)
                reader.last  # noqa: B018  wait
                lease_seen.set()
        except Exception as error:
            failed.append(error)

    lease_seen = threading.Event()
    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
    swapper = threading.Thread(target=swap)
    for thread in [swapper, *threads]:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    stop.set()
    swapper.join(WAIT)
    assert not failed and not any(thread.is_alive() for thread in [swapper, *threads])
    seen = set()
    for reader in readers:
        prompt, _ = reader.what
        assert reader.finish == "length"
        known = [name for name in ("a4", "a5") if reader.tokens == field.expected(prompt, name)]
        assert known, "an answer is of neither content"
        seen.update(known)
    assert seen == {"a4", "a5"} and len(readers) == 48
    for name, content in zip(("a5", "a4"), reversed(contents), strict=True):
        store.register("x", content)
        readers.append(ask(engine, PROMPTS[0], "x"))
        assert right(field, readers[-1], name)  # what is asked for afterwards is new
    check(engine, store, readers)


def test_a_mixture_is_replaced_and_unloaded_under_load(make, field, tmp_path):
    engine, store = make(count=1, mixtures=2)
    models = [make_mixture(field.base, tmp_path / str(n), LLAMA, seed=n) for n in range(2)]
    store.register("m", models[0][1])
    old = [Reader(engine.submit(Request(list(p), Mixture("m"), LONG)), p) for p in PROMPTS[:2]]
    old[0].until(tokens=1)
    old[1].until(tokens=1)
    store.register("m", models[1][1])
    new = [Reader(engine.submit(Request(list(p), Mixture("m"), GREEDY)), p) for p in PROMPTS[:4]]
    plain = ask(engine, PROMPTS[4], "a0")
    for readers, (model, _), limit in ((old, models[0], 60), (new, models[1], 8)):
        for reader in readers:
            assert reader.finish == "length" and reader.tokens == generated(model, list(reader.what), limit)
    assert right(field, plain)
    store.unregister("m")
    again = ask(engine, PROMPTS[5], None)
    assert right(field, again)
    check(engine, store, [*old, *new, plain, again])
    engine.call(lambda: [store.between_steps() for _ in range(3)]).result(WAIT)
    assert list(store.model.peft_config) == ["slots_4"] and not store._table.doomed


# --- too little room ----------------------------------------------------------------------------------------------


def test_twice_as_many_adapters_as_slots_alone_and_in_pairs(make, field):
    """Requests that need one adapter or two at once, from several threads: none waits for ever for another."""
    engine, store = make(count=8, slots=4, cpu_bytes=40_000)  # copies of about half of them fit beside the slots
    readers, failed = [], []

    def send(seed):
        draws = random.Random(seed)
        try:
            for _ in range(10):
                prompt, names = draws.choice(PROMPTS), draws.sample([f"a{i}" for i in range(8)], 2)
                if draws.random() < 0.5:
                    readers.append(ask(engine, prompt, names[0], tenant=f"t{seed}"))
                    continue
                # a weight of zero changes nothing, but the adapter must be there
                program = Weighted(((names[0], 1.0), (names[1], 0.0)))
                stream = engine.submit(Request(list(prompt), program, GREEDY, tenant=f"t{seed}"))
                readers.append(Reader(stream, (prompt, names[0])))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not failed and len(readers) == 40
    assert all(right(field, reader) for reader in readers)
    assert store.counters()["evictions"] > 0
    check(engine, store, readers)


def test_a_queue_that_overflows_refuses_and_serves_the_rest(make, field):
    engine, store = make(options={"max_waiting": 3, "max_batch": 2})
    readers, refused, lock = [], [], threading.Lock()

    def send(seed):
        for number in range(8):
            try:
                reader = ask(engine, PROMPTS[(seed + number) % 6], f"a{seed % 4}", tenant="many")
            except ServeError as error:
                with lock:
                    refused.append((error.status, error.code, error.retry_after))
                continue
            with lock:
                readers.append(reader)

    with blocked(engine):
        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        readers.append(ask(engine, PROMPTS[0], "a0", tenant="other"))  # whom a full queue does not shut out
    assert len(readers) == 4 and set(refused) == {(429, "queue_full", 1)} and len(refused) == 29
    assert all(right(field, reader) for reader in readers)
    readers.append(ask(engine, PROMPTS[0], "a0"))
    assert right(field, readers[-1])
    check(engine, store, readers)


# --- adapters that cannot be loaded -------------------------------------------------------------------------------


def test_corrupt_adapters_among_good_ones(make, field, tmp_path):
    engine, store = make(count=2)
    broken = {name: peft_lora(tmp_path / name, seed=number) for number, name in enumerate(("cut", "nan", "huge"))}
    for name, folder in broken.items():
        store.register(name, folder)
    file = broken["cut"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    for name, value in (("nan", float("nan")), ("huge", 1e30)):
        _spoil(broken[name] / "adapter_model.safetensors", value)
    names = ["cut", "a0", "nan", "a1", "huge", "a0"] * 4
    readers = [ask(engine, PROMPTS[i % 6], name) for i, name in enumerate(names)]
    for reader in readers:
        if reader.what[1] in broken:
            assert reader.finish == "error" and reader.tokens == []
            assert reader.last.error.status in (400, 424), reader.last.error
        else:
            assert right(field, reader)
    told = {name: store.entry(name) for name in broken}
    assert all(entry.state == "errored" and entry.error for entry in told.values())
    assert store.counters()["failures"] == 3  # remembered, not tried for each request
    store.register("nan", field.source("a3", store.slots))  # repaired
    readers.append(ask(engine, PROMPTS[0], "nan"))
    assert right(field, readers[-1], "a3")
    check(engine, store, readers)


def _spoil(file, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, file)


def test_a_slow_disk_costs_only_those_that_need_it(make, field):
    """Every reader of the store is stuck; time is up for some that wait, the others are served when the disk is."""
    engine, store = make(count=2, loaders=2)
    warm = [ask(engine, PROMPTS[0], f"a{n}") for n in range(2)]
    assert all(right(field, reader) for reader in warm)
    slow = {f"a{n}": Fake(field.source(f"a{n}", store.slots), slow=True) for n in range(2, 6)}
    for name, source in slow.items():
        store.register(name, source)
    hasty = [ask(engine, PROMPTS[1], name, timeout=0.2) for name in slow]
    waits = [ask(engine, PROMPTS[2], name) for name in slow]
    for reader in hasty:
        assert reader.finish == "timeout" and reader.last.error.status == 504
    served = [ask(engine, prompt, name) for prompt in PROMPTS for name in ("a0", "a1", None)]
    assert all(right(field, reader) for reader in served)
    assert sum(source.began.is_set() for source in slow.values()) == 2  # the others queue for a reader
    for source in slow.values():
        source.gate.set()
    assert all(right(field, reader) for reader in waits)
    check(engine, store, [*warm, *hasty, *waits, *served])


# --- forwards that fail -------------------------------------------------------------------------------------------


def test_forwards_that_raise_half_way_leave_nothing_wrong_behind(make, field):
    """Some forwards fail in the last layer, after keys were written; the same prompts are right afterwards."""
    engine, store = make()
    layer = store.model.get_base_model().model.layers[-1].mlp
    calls, bad = [0], {3, 4, 11}

    def fail(*_):
        calls[0] += 1
        if calls[0] in bad:
            raise torch.OutOfMemoryError("no memory") if calls[0] == 4 else RuntimeError("broken")

    hook = layer.register_forward_pre_hook(fail)
    readers = []
    for _ in range(6):
        with blocked(engine):
            turn = [ask(engine, prompt, name) for prompt in PROMPTS[:3] for name in ("a0", "a1")]
        readers += turn
        assert all(reader.finish == "error" or right(field, reader) for reader in turn)
    hook.remove()
    assert {reader.finish for reader in readers[:6]} == {"error"}
    assert all(right(field, reader) for reader in readers[-6:])
    check(engine, store, readers)
    consistent(store)
