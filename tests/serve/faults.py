"""An engine on a store under test, answers as their readers saw them, and what must hold when all is over."""

import threading
from collections import Counter
from contextlib import contextmanager

from peft import get_peft_model_state_dict

from molora.serve.backends.continuous import Continuous
from molora.serve.engine.engine import Engine
from molora.serve.request import Mixture, Weighted
from molora.serve.store.loading import HeldSource
from tests import tiny
from tests.serve.kinds import GREEDY
from tests.serve.loras import generated

WAIT = 30.0  # seconds that anything may take


def one(name):
    return Weighted(((name, 1.0),))


class Reader:
    """Reads a stream to its end on a thread of its own.

    Args:
        stream: to read.
        what: anything the test wants to find again.
    """

    def __init__(self, stream, what=None):
        self.stream, self.what, self.chunks = stream, what, []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for chunk in self.stream:
            with self._changed:
                self.chunks.append(chunk)
                self._changed.notify_all()

    def until(self, tokens):
        """Wait until so many tokens have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens) >= tokens, WAIT), "a token did not come"

    @property
    def tokens(self):
        return [token.id for chunk in self.chunks for token in chunk.tokens]

    @property
    def last(self):
        """The last chunk; waits for it."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), f"nothing ended {self.stream.request}"
        assert [chunk.finish is None for chunk in self.chunks] == [True] * (len(self.chunks) - 1) + [False]
        return self.chunks[-1]

    @property
    def finish(self):
        return self.last.finish


class Field:
    """LoRAs that transformers answers for, and answers that it gives alone.

    Args:
        base: the base model.
        loras: of PEFT, a0, a1, ...
    """

    def __init__(self, base, loras):
        self.base, self.loras = base, loras
        self._known = {}

    def source(self, name, slots):
        """Return a LoRA as a source in memory."""
        tensors = get_peft_model_state_dict(self.loras, adapter_name=name)
        return HeldSource(self.loras.peft_config[name].to_dict(), {k: v.clone() for k, v in tensors.items()}, slots)

    def expected(self, prompt, name, limit=GREEDY.max_tokens):
        """Return what transformers generates with one LoRA, or with the base (None)."""
        key = (tuple(prompt), name)
        if len(self._known.get(key, ())) < limit:
            model = self.base
            if name is not None:
                self.loras.set_adapter(name)
                model = self.loras
            self._known[key] = generated(model, list(prompt), limit)
        return self._known[key][:limit]


def make_engine(store, backend, **options):
    options = {"kv_bytes": 1 << 20, "max_batch": 6, "timeout": WAIT} | options
    return Engine(store.model, tiny.tiny_tokenizer(), store, backend=backend, **options)


@contextmanager
def blocked(engine):
    """Hold the engine's thread between two forwards."""
    inside, go = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert go.wait(WAIT)

    future = engine.call(hold)
    assert inside.wait(WAIT)
    try:
        yield
    finally:
        go.set()
        future.result(WAIT)


def after_steps(engine, steps, act):
    """Let `act` be called on the engine's thread after its next `steps` forwards."""
    left = [steps]

    def wrap(backend):
        step = backend.step

        def counted():
            events = step()
            left[0] -= 1
            if left[0] == 0:
                act()
            return events

        backend.step = counted

    engine.call(lambda: [wrap(backend) for backend in engine._backends.all]).result(WAIT)


def check(engine, store, readers):
    """Check, after all have ended, that counters add up and that nothing is held any more."""
    ends = Counter(reader.finish for reader in readers)
    assert engine.drain(WAIT)
    stats = engine.stats()
    assert stats.ended == ends
    assert (stats.running, stats.waiting, stats.kv_used, stats.healthy) == (0, 0, 0, True)
    assert stats.tokens_out == sum(len(reader.tokens) for reader in readers)
    for reader in readers:
        assert reader.last.usage.completion == len(reader.tokens)
        assert (reader.last.error is None) == (reader.finish not in ("error", "timeout"))
    drawn = Counter()
    for reader in readers:
        program = reader.stream.request.program
        names = program.names if isinstance(program, Weighted) else ()
        names = (program.name,) if isinstance(program, Mixture) else names
        for name in names or ("(base)",):
            drawn[name] += len(reader.tokens)
    assert {name: count for name, count in drawn.items() if count} == stats.by_adapter
    shares = engine.shares()
    assert sum(share.output for share in shares.values()) == stats.tokens_out
    assert all(share.waiting == 0 for share in shares.values())
    for backend in engine._backends.all:
        assert backend.running() == [] and backend.used() == 0
        if isinstance(backend, Continuous):
            pages = backend.pages
            assert pages.held() == 0 and pages.reserved == 0
            free = [pages.cache.pool.count_free_blocks(kind.index) for kind in pages.kinds]
            assert sum(free) + pages.kept() == sum(pages.blocks)
    consistent(store)


def consistent(store):
    """Check that nobody has a lease, and that every place is taken by one adapter that knows it."""
    with store._changed:
        table = store._table
        assert store._changed.wait_for(lambda: not any(one.busy for one in residents(table)), WAIT)
        assert all(one.users == 0 for one in residents(table))
        places = []
        for bucket in table.buckets.values():
            assert len(bucket.taken) <= bucket.capacity
            for slot, resident in bucket.taken.items():
                assert (resident.slot, resident.bucket) == (slot, bucket.name) and 0 <= slot < bucket.capacity
                assert resident.place is not None and (resident.ready or resident in table.doomed)
                places.append(resident.place)
        assert len(set(places)) == len(places)
        taken = {one for bucket in table.buckets.values() for one in bucket.taken.values()}
        assert all(one in taken for one in table.names.values() if one.ready)
        assert sum(table.copies.values()) <= table.cpu_bytes
        assert {one for one in table.names.values() if one.loaded is not None} <= table.copies.keys()


def residents(table):
    """Return all adapters that a store knows of, forgotten ones that still hold a place among them."""
    taken = {one for bucket in table.buckets.values() for one in bucket.taken.values()}
    return taken | set(table.names.values())
