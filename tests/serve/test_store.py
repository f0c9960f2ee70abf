"""AdapterStore: adapters come and go beside requests; none stalls, harms or reads another."""

import json
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora.control import routed_layers, trace_of
from molora.errors import ConfigError, LoadError
from molora.files import CONFIG, WEIGHTS
from molora.hub.manifest import Manifest
from molora.hub.store import Hub
from molora.routing.rows import Rows
from molora.serve.engine.jobs import salt_of
from molora.serve.request import Base, Mixture, ServeError, Weighted
from molora.serve.store.loading import HeldSource
from molora.serve.store.store import AdapterStore
from tests import tiny
from tests.serve.adapters import ALL, WAIT, Fake, Told, held, peft_logits, peft_lora

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make():
    """Make stores that are closed in the end."""
    made = []

    def build(*args, slots=None, **options):
        told = Told()
        store = AdapterStore(
            tiny.tiny_llama(), *args, slots={2: 2, 8: 2} if slots is None else slots, on_change=told, **options
        )
        store.told = told
        made.append(store)
        return store

    yield build
    for store in made:
        store.close()
        assert not any(thread.is_alive() for thread in store._loaders._threads)


def state(store, name):
    return store.entry(name).state


def fetch(store, *names):
    """Lease adapters, waiting until they are ready."""
    got = []

    def ready():
        lease = store.lease(names)
        while lease is None and store.between_steps():
            lease = store.lease(names)
        got.extend([lease] if lease is not None else [])
        return bool(got)

    store.told.until(ready)
    return got[0]


def run(store, ids, leases):
    """Logits of a batch whose row i gets what lease i has, all with weight 1; None: the base."""
    rows = {}
    for row, lease in enumerate(leases):
        for adapter, slot in lease.rows.values() if lease is not None else ():
            size = store.slots.buckets[adapter]
            gates = rows.setdefault(adapter, torch.zeros(len(leases), 1, size))
            gates[row, 0, slot] = 1.0
    trace = trace_of(store.model)
    trace.rows = {name: Rows(gates=told) for name, told in rows.items()}
    try:
        with torch.no_grad():
            return store.model(input_ids=ids, use_cache=False).logits
    finally:
        trace.rows = None


@pytest.fixture
def ids():
    return torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))


# --- what is served is what was given -------------------------------------------------------------------------------


def test_rows_at_ranks_2_8_and_16_equal_peft(make, tmp_path, ids):
    store = make(slots={2: 1, 8: 1, 16: 1})
    folders = {f"r{rank}": peft_lora(tmp_path / f"r{rank}", rank, rank=rank, targets=ALL) for rank in (2, 8, 16)}
    for name, folder in folders.items():
        entry = store.register(name, folder)
        assert (entry.state, entry.digest, entry.kind) == ("disk", None, "lora") and entry.rank == int(name[1:])
    leases = [fetch(store, name) for name in folders]
    together = run(store, ids, [*leases, None])
    for row, folder in enumerate(folders.values()):
        assert torch.allclose(together[row : row + 1], peft_logits(folder, ids[row : row + 1]), atol=3e-5)
    base = run(store, ids, [None] * 4)
    assert torch.allclose(together[3], base[3], atol=1e-6)
    entries = store.entries()
    assert [entry.in_use for entry in entries] == [1, 1, 1] and all(entry.last_load_ms > 0 for entry in entries)


def test_more_adapters_than_slots_are_all_served_in_turn(make, tmp_path, ids, monkeypatch):
    # all loads cost the same, or one that a busy machine held up would be kept for its cost, and found ready
    monkeypatch.setattr("molora.serve.store.loaders.time", SimpleNamespace(perf_counter=lambda: 0.0))
    store = make(slots={8: 2})
    folders = {f"a{n}": peft_lora(tmp_path / f"a{n}", n, rank=1 + n) for n in range(5)}
    for name, folder in folders.items():
        store.register(name, folder)
    for _ in range(2):
        for name, folder in folders.items():
            with fetch(store, name) as lease:
                assert torch.allclose(run(store, ids, [lease] * 4), peft_logits(folder, ids), atol=3e-5), name
    counters = store.counters()
    assert counters["loads"] == 10 and counters["evictions"] == 8
    assert counters["reads"] == 5  # the second time from memory


def test_an_adapter_may_be_config_and_tensors(make, ids):
    store = make()
    config, tensors = held(3)
    store.register("a", (config, tensors))
    with fetch(store, "a") as lease:
        layer = routed_layers(store.model, lease.rows["a"].adapter)[Q]
        A, B = layer.molora_bank[lease.rows["a"].adapter].pair(lease.rows["a"].slot)
        assert torch.equal(A, tensors[f"base_model.model.{Q}.lora_A.weight"])
        assert torch.allclose(B, 2 * tensors[f"base_model.model.{Q}.lora_B.weight"])  # alpha / r = 2


# --- one bad adapter harms nobody -----------------------------------------------------------------------------------


def broken_folders(tmp_path):
    """Folders with something wrong, and whether registering finds it already."""
    nan = peft_lora(tmp_path / "nan", 1)
    tensors = load_file(nan / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, nan / WEIGHTS, {"format": "pt"})
    cut = peft_lora(tmp_path / "cut", 2)
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-8])
    huge = peft_lora(tmp_path / "huge", 3)
    save_file({n: t * 1e30 for n, t in load_file(huge / WEIGHTS).items()}, huge / WEIGHTS, {"format": "pt"})
    other = peft_lora(tmp_path / "other", 4)
    tensors = load_file(other / WEIGHTS)
    save_file({name: torch.cat([t, t], -1) for name, t in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    dora = peft_lora(tmp_path / "dora", 5, use_dora=True)
    wide = peft_lora(tmp_path / "wide", 6, rank=9)
    late = {"nan": (nan, "NaN or Inf"), "huge": (huge, "served adapters stay below")}
    early = {"cut": (cut, WEIGHTS), "other": (other, "needs A"), "dora": (dora, "DoRA"), "wide": (wide, "rank is 9")}
    return early, late


def test_corrupt_adapters_among_good_ones(make, tmp_path, ids):
    store = make()
    early, late = broken_folders(tmp_path)
    for name, (folder, why) in early.items():
        with pytest.raises(LoadError, match=why):
            store.register(name, folder)
        assert name not in store.names
    good = peft_lora(tmp_path / "good", 9)
    store.register("good", good)
    for name, (folder, _) in late.items():
        store.register(name, folder)
    store.want(["nan", "good", "huge"])
    store.told.until(lambda: [state(store, n) for n in ("nan", "good", "huge")] == ["errored", "ready", "errored"])
    for name, (_, why) in late.items():
        for _ in range(2):  # every waiter is told
            with pytest.raises(ServeError, match=why) as told:
                store.lease(["good", name])
            assert told.value.code == "adapter_load_failed" and told.value.status == 400 and name in str(told.value)
        assert why in store.entry(name).error
    assert store.entry("good").in_use == 0
    with fetch(store, "good") as lease:
        assert torch.allclose(run(store, ids, [lease] * 4), peft_logits(good, ids), atol=3e-5)
    assert store.counters()["failures"] == 2


def test_a_failed_load_is_remembered_and_then_tried_again(make):
    store = make(remember_failure=1000.0)
    source = Fake(HeldSource(*held(1), store.slots), error=OSError(5, "Input/output error", "/secret/path"))
    store.register("a", source)
    assert store.lease(["a"]) is None
    store.told.until(lambda: state(store, "a") == "errored")
    for _ in range(3):
        with pytest.raises(ServeError, match="'a' could not be loaded: OSError: Input/output error") as told:
            store.lease(["a"])
        assert told.value.status == 424 and "/secret/path" not in told.value.message
        store.want(["a"])
    assert source.loads == 1  # not once per waiter
    store._table.remember_failure = 0.0
    source.error = None
    fetch(store, "a").release()
    assert source.loads == 2 and store.entry("a").error is None


def test_files_that_change_after_the_first_load_are_not_served_as_the_same(make, tmp_path):
    store = make(slots={8: 1}, cpu_bytes=20_000)
    folder = peft_lora(tmp_path / "a", 1)
    store.register("a", folder)
    store.register("b", peft_lora(tmp_path / "b", 2))
    fetch(store, "a").release()
    peft_lora(folder, 7)  # other numbers
    store._table.forget_copy(store._table.names["a"])
    fetch(store, "b").release()
    assert store.lease(["a"]) is None
    store.told.until(lambda: state(store, "a") == "errored")
    assert "have changed" in store.entry("a").error
    store.register("a", folder)
    fetch(store, "a").release()


# --- nobody waits for somebody else's disk --------------------------------------------------------------------------


def test_a_slow_adapter_holds_up_no_quick_one(make):
    store = make(loaders=2)
    slow = Fake(HeldSource(*held(1), store.slots), slow=True)
    store.register("slow", slow)
    for number in range(3):
        store.register(f"quick{number}", held(number))
    store.want(["slow", "quick0", "quick1"])
    assert slow.began.wait(WAIT)
    fetch(store, "quick0").release()
    fetch(store, "quick2").release()
    assert state(store, "slow") == "loading"
    assert store.lease(["slow", "quick1"]) is None  # at once, while the disk is slow
    assert store.entry("quick1").in_use == 0
    slow.gate.set()
    fetch(store, "slow", "quick1").release()


def test_what_is_in_memory_gets_its_slot_while_every_reader_is_stuck(make):
    store = make(loaders=1, slots={2: 2})
    for name in "abc":
        store.register(name, held(ord(name)))
        fetch(store, name).release()
    warm = next(name for name in "abc" if state(store, name) == "warm")
    slow = Fake(HeldSource(*held(1), store.slots), slow=True)
    store.register("slow", slow)
    store.want(["slow"])
    assert slow.began.wait(WAIT)
    fetch(store, warm).release()
    slow.gate.set()


def test_loading_follows_the_queue_and_evicts_nothing_that_is_needed_sooner(make):
    store = make(slots={2: 2}, loaders=1)
    gate = Fake(HeldSource(*held(0), store.slots), slow=True)
    store.register("first", gate)
    others = {name: Fake(HeldSource(*held(ord(name)), store.slots)) for name in "abcd"}
    for name, source in others.items():
        store.register(name, source)
    store.want(["first"])
    assert gate.began.wait(WAIT)
    store.want(["first", "c", "a", "b"])  # the order changed while the disk was busy
    gate.gate.set()
    store.told.until(lambda: [state(store, name) for name in "cab"] == ["ready", "warm", "warm"])
    assert [state(store, name) for name in ("first", "c", "a", "b", "d")] == ["ready", "ready", "warm", "warm", "disk"]
    assert store.counters()["evictions"] == 0 and others["d"].loads == 0


# --- names come and go under load -----------------------------------------------------------------------------------


def test_unregistering_lets_running_requests_end(make, tmp_path, ids):
    store = make(slots={8: 1})
    folder, following = peft_lora(tmp_path / "a", 1), peft_lora(tmp_path / "b", 2)
    store.register("a", folder)
    store.register("b", following)
    lease = fetch(store, "a")
    assert dict(store.kinds()) == {"a": "lora", "b": "lora"}
    store.unregister("a")
    assert "a" not in store.names and dict(store.kinds()) == {"b": "lora"}
    with pytest.raises(ServeError) as unknown:
        store.lease(["a"])
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
    assert store.lease(["b"]) is None
    store.told.until(lambda: state(store, "b") == "warm")
    assert torch.allclose(run(store, ids, [lease] * 4), peft_logits(folder, ids), atol=3e-5)  # still its own
    lease.release()
    lease.release()  # again: nothing
    with fetch(store, "b") as other:
        assert torch.allclose(run(store, ids, [other] * 4), peft_logits(following, ids), atol=3e-5)
    with pytest.raises(ServeError):
        store.unregister("a")


def test_unregistering_while_it_loads(make):
    store = make(slots={2: 1})
    slow = Fake(HeldSource(*held(1), store.slots), slow=True)
    store.register("a", slow)
    store.register("b", held(2))
    store.want(["a"])
    assert slow.began.wait(WAIT)
    store.unregister("a")
    slow.gate.set()
    fetch(store, "b").release()
    store.told.until(lambda: store.counters()["reads"] == 2)
    assert {one.name for one in store._table.copies} == {"b"}


def test_a_name_with_new_content_has_another_digest_and_salt(make, ids):
    store = make()
    store.register("a", held(1))
    old = fetch(store, "a")
    first = store.digest(Weighted((("a", 1.0),)))
    store.register("a", held(2))
    with pytest.raises(ServeError, match="was not loaded yet"):
        store.digest(Weighted((("a", 1.0),)))
    new = fetch(store, "a")  # while the old one runs
    assert old.rows["a"] != new.rows["a"] and old.digests != new.digests
    assert store.digest(Weighted((("a", 1.0),))) != first == salt_of(Weighted((("a", 1.0),)), old.digests)
    old.release()
    store.register("b", held(1))  # the first content under another name
    fetch(store, "b").release()
    assert store.digest(Weighted((("b", 1.0),))) == first
    assert store.digest(Weighted((("b", 0.5),))) != first
    assert store.digest(Base()) == store.digest(Weighted(())) == b""
    new.release()


def test_the_same_folder_again_changes_nothing(make, tmp_path):
    store = make()
    folder = peft_lora(tmp_path / "a", 1)
    store.register("a", folder)
    lease = fetch(store, "a")
    assert store.register("a", folder).in_use == 1
    lease.release()


def test_pinned_adapters_are_loaded_unasked_and_stay(make):
    store = make(slots={2: 2})
    store.register("a", held(1), pinned=True)
    store.told.until(lambda: state(store, "a") == "ready")
    for number in range(4):
        store.register(f"b{number}", held(number + 10))
        fetch(store, f"b{number}").release()
    assert state(store, "a") == "ready" and store.entry("a").pinned
    with pytest.raises(ServeError, match="cannot be pinned"):
        store.pin("b3")
    with pytest.raises(ServeError, match="2 adapters in 'slots_2' at once, which has 2 places, 1 of them pinned"):
        store.lease(["b1", "b2"])
    store.register("a", held(5))  # new content keeps the pin
    assert store.entry("a").pinned
    store.pin("a", False)
    fetch(store, "b1", "b2").release()


def test_copies_stay_within_their_memory(make):
    nbytes = sum(tensor.numel() * 4 for tensor in held(0)[1].values())
    store = make(slots={8: 1}, cpu_bytes=3 * nbytes)
    for number in range(6):
        store.register(f"a{number}", held(number))
        fetch(store, f"a{number}").release()
        assert sum(store._table.copies.values()) <= 3 * nbytes
    assert store.counters()["drops"] == 3
    with pytest.raises(ConfigError, match=r"has [\d,]+ bytes, and adapters may take"):
        store.register("big", held(1, rank=8))


def test_threads_that_hammer_a_store_always_get_what_they_asked_for(make):
    """Each content says in its numbers who it is: a slot must hold it for as long as the lease lasts."""
    store = make(slots={2: 3}, loaders=2)
    names = [f"a{number}" for number in range(8)]
    for number, name in enumerate(names):
        store.register(name, held(number, bias=100.0 * number))
    bank = routed_layers(store.model, "slots_2")[Q].molora_bank["slots_2"]
    problems, served, deadline = [], [], time.monotonic() + WAIT

    def is_there(lease):
        for name, (_, slot) in lease.rows.items():
            if not name.startswith("x") and round(float(bank.pair(slot)[0].mean()) / 100) != int(name[1:]):
                problems.append((name, slot))

    def client(seed):
        rng = random.Random(seed)
        for _ in range(25):
            wanted = rng.sample(names, rng.choice((1, 1, 2, 3)))
            lease = None
            while lease is None and time.monotonic() < deadline:
                try:
                    lease = store.lease(wanted)
                except ServeError as error:
                    if error.code == "model_not_found":
                        break  # unregistered a moment ago
                    raise
                if lease is None:
                    with store._changed:
                        store._changed.wait(0.2)
            if lease is not None:
                is_there(lease)
                is_there(lease)
                lease.release()
                served.append(wanted)

    def operator():
        rng = random.Random(99)
        for _ in range(30):
            number = rng.randrange(len(names))
            store.unregister(names[number])
            store.register(names[number], held(number, bias=100.0 * number))
            store.entries()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)] + [threading.Thread(target=operator)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads) and not problems
    assert len(served) >= 50
    counters = store.counters()
    ready = sum(one.ready for bucket in store._table.buckets.values() for one in bucket.taken.values())
    assert counters["loads"] - counters["evictions"] - counters["removals"] == ready
    assert all(entry.in_use == 0 for entry in store.entries())


def test_a_listener_that_fails_stops_no_loader(make):
    store = make()

    def listener():
        store.told()
        raise RuntimeError("listener")

    store.on_change = listener
    store.register("a", held(1))
    fetch(store, "a").release()


# --- libraries ------------------------------------------------------------------------------------------------------


def library(tmp_path, names=("news", "law")):
    hub = Hub(tmp_path / "hub")
    for number, name in enumerate(names):
        hub.add(peft_lora(tmp_path / name, number), name, task="t", base="tiny/llama", description="d")
    return hub


def test_names_of_a_library_and_nothing_else(make, tmp_path, monkeypatch):
    hub = library(tmp_path)
    store = make(hub)
    store.register("news")
    store.register("team/latest", "law@1")
    assert [entry.parent for entry in store.entries()] == ["tiny/llama"] * 2
    monkeypatch.chdir(tmp_path)
    for name, source in (("x", "hub/news/1"), ("x", str(tmp_path / "news")), ("x", "nobody"), ("../x", "news")):
        with pytest.raises(ConfigError):
            store.register(name, source)
    peft_lora(tmp_path / "poems", 5)
    with pytest.raises(ConfigError, match="'poems' is unknown"):
        store.register("poems")  # a folder of this name in the working directory is not the library's
    fetch(store, "news", "team/latest").release()


def test_a_library_that_was_tampered_with(make, tmp_path):
    hub = library(tmp_path)
    store = make(hub)
    assert store.register_all() == {} and store.names == {"news", "law"}
    file = hub.get("law").folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    store.want(["law", "news"])
    store.told.until(lambda: (state(store, "law"), state(store, "news")) == ("errored", "ready"))
    assert "sha256 differs" in store.entry("law").error


def test_damaged_versions_are_refused_alone(make, tmp_path):
    hub = library(tmp_path, ("news", "law", "poems"))
    (hub.get("law").folder / CONFIG).write_text("{")
    store = make(hub)
    refused = store.register_all()
    assert list(refused) == ["law"] and "JSON" in refused["law"] and store.names == {"news", "poems"}


def test_a_manifest_is_followed_and_one_bad_adapter_blocks_no_other(make, tmp_path):
    hub = library(tmp_path, ("news", "law", "poems"))
    store = make(hub)
    store.register("stray", held(1))
    manifest = Manifest.of({"news": {"adapter": "news", "pin": True}, "laws": "law@1", "gone": "nobody"})
    manifest.save(tmp_path / "m.yaml")
    changes = store.reconcile(tmp_path / "m.yaml")
    assert [(one.name, one.action) for one in changes] == [
        ("stray", "remove"),
        ("news", "add"),
        ("news", "pin"),
        ("laws", "add"),
        ("gone", "failed"),
    ]
    assert "'nobody' is unknown" in changes[-1].why
    assert store.names == {"news", "laws"} and store.entry("news").pinned
    lease = fetch(store, "laws")
    hub.add(peft_lora(tmp_path / "next", 77), "news", task="t", base="tiny/llama", description="d")
    hub.alias("jus", "law")
    again = store.reconcile({"news": "news", "laws": "jus", "poems": {"adapter": "poems", "digest": "0" * 64}})
    assert [(one.name, one.action) for one in again] == [
        ("news", "unpin"),
        ("news", "swap"),
        ("laws", "keep"),
        ("poems", "failed"),
    ]
    assert store.entry("laws").in_use == 1
    lease.release()
    assert [one.action for one in store.reconcile(["news"])] == ["remove", "keep"]
    with pytest.raises(ConfigError, match="pin must be true or false, got 'yes'"):
        store.reconcile({"news": {"adapter": "news", "pin": "yes"}})


def test_what_cannot_be_registered(make):
    store = make()
    with pytest.raises(ConfigError, match="no library"):
        store.register_all()
    for name in ("", "a//b", "a/../b", "x" * 200, "a b", "/etc", 3):
        with pytest.raises(ConfigError, match="cannot be served as"):
            store.register(name, held(1))
    with pytest.raises(ConfigError, match="got int"):
        store.register("a", 3)
    with pytest.raises(LoadError, match="type 'IA3'"):
        store.register("a", ({"peft_type": "IA3"}, {"x": torch.zeros(1)}))
    assert store.names == frozenset()


def test_an_unknown_adapter_answers_as_a_forbidden_one(make):
    from molora.serve.tenants.tenant import not_found

    store = make()
    for call in (lambda: store.lease(["x"]), lambda: store.entry("x"), lambda: store.digest(Mixture("x"))):
        with pytest.raises(ServeError) as unknown:
            call()
        assert unknown.value.body() == not_found("x").body() and unknown.value.status == 404


@pytest.mark.slow
def test_a_thousand_adapters_are_ready_in_five_seconds(make, tmp_path):
    from molora.hub.card import AdapterCard, hash_files

    for number in range(1000):
        folder = tmp_path / "hub" / f"a{number:04d}" / "1"
        folder.mkdir(parents=True)
        config, tensors = held(number)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(tensors, folder / WEIGHTS)
        card = AdapterCard(task="t", base="tiny/llama", description="d", files=hash_files(folder))
        (folder / "card.yaml").write_text(card.to_yaml())
    store = make(Hub(tmp_path / "hub"))
    start = time.process_time()  # others may use the machine, too
    assert store.register_all() == {}  # the index of the library is built on the way
    seconds = time.process_time() - start
    assert len(store.names) == 1000 and store.counters()["reads"] == 0
    assert seconds < 5, seconds
    fetch(store, "a0999").release()
