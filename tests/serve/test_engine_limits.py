"""What an engine refuses, ends and survives."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

from molora.serve.engine import loop as loop_module
from molora.serve.engine.engine import Engine
from molora.serve.request import Base, Mixture, Request, Sampling, ServeError, Weighted
from molora.serve.tenants.tenant import not_found
from tests import tiny
from tests.serve.kinds import GREEDY, answers
from tests.serve.loras import LLAMA, generated, make_loras, make_mixture, make_store, prompts_of
from tests.serve.served import until

WAIT = 30.0
LONG = dataclasses.replace(GREEDY, max_tokens=100)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tiny.tiny_llama()
    loras = make_loras(base, LLAMA, count=2)
    store = make_store(base, loras)
    store.register("m0", make_mixture(base, tmp_path_factory.mktemp("mixture"), LLAMA)[1])
    yield base, loras, store
    store.close()


@pytest.fixture(params=["hf-simple", "hf-cb"])
def make(parts, request):
    """Return a function that makes an engine; all are closed at the end."""
    made = []

    def build(**options):
        options = {"backend": request.param, "kv_bytes": 1 << 20, "max_batch": 4, "timeout": WAIT} | options
        made.append(Engine(parts[2].model, tiny.tiny_tokenizer(), parts[2], **options))
        return made[-1]

    yield build
    for engine in made:
        engine.close()
    assert all(entry.in_use == 0 for entry in parts[2].entries())


class Blocked:
    """Holds the engine's thread between two forwards."""

    def __init__(self, engine):
        self.inside, self.go = threading.Event(), threading.Event()
        self.future = engine.call(self._hold)
        assert self.inside.wait(WAIT)

    def _hold(self):
        self.inside.set()
        assert self.go.wait(WAIT)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.go.set()
        self.future.result(WAIT)


def first_of(stream):
    """Wait for the first chunk of a stream; return the iterator of the rest."""
    chunks = iter(stream)
    assert next(chunks).finish is None
    return chunks


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "code", "told"),
    [
        (Request([]), 400, "invalid_request", "no tokens"),
        (Request([5, tiny.VOCAB]), 400, "invalid_request", "token 96, but the model knows tokens 0 to 95"),
        (Request([-1]), 400, "invalid_request", "token -1"),
        (Request([5], sampling=Sampling(temperature=3.0, top_p=0.0)), 400, "invalid_request", "temperature.*top_p"),
        (Request([5], sampling=Sampling(logit_bias=((96, 1.0),))), 400, "invalid_request", "logit_bias names token 96"),
        (Request([5] * 128), 400, "context_length_exceeded", "128 tokens"),
        (Request([5] * 100, sampling=LONG), 400, "context_length_exceeded", "100 of the answer"),
        (Request([5], Weighted((("nobody", 1.0),))), 404, "model_not_found", "nobody"),
        (Request([5], Mixture("nobody")), 404, "model_not_found", "nobody"),
        (Request([5], Mixture("a0")), 400, "invalid_request", "plain adapter"),
        (Request([5], Weighted((("m0", 1.0),))), 400, "invalid_request", "takes no weight"),
        (Request([5], Weighted((("a0", 1.0), ("a0", 0.5)))), 400, "invalid_request", "named twice"),
        (Request([5], Weighted((("a0", float("nan")),))), 400, "invalid_request", "weight of 'a0'"),
        (Request([5], Weighted(())), 400, "invalid_request", "1 to 32 adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_at_once(make, request_, status, code, told):
    engine = make()
    with pytest.raises(ServeError, match=told) as refused:
        engine.submit(request_)
    assert (refused.value.status, refused.value.code) == (status, code)
    if status == 404:
        assert refused.value.body() == not_found("nobody").body()  # as of one that is forbidden
    assert engine.stats().waiting == 0


def test_the_longest_request_that_fits_is_served(make, parts):
    engine = make()
    found = answers(engine, [Request([5] * 28, Base(), LONG), Request([5] * 127, Base(), GREEDY_ALL)])
    assert found[0] == generated(parts[0], [5] * 28, 100) and len(found[1]) == 1
    assert engine.answer_limit(28, LONG) == 100 and engine.answer_limit(28, Sampling()) == 100
    assert engine.answer_limit(28, Sampling(max_tokens=3)) == 3
    small = make(kv_bytes=80 * 256)  # of which hf-cb keeps some blocks
    room = small.answer_limit(0, Sampling())
    assert 40 <= room <= 80
    with pytest.raises(ServeError, match="memory of keys and values") as told:
        small.submit(Request([5] * 10, sampling=LONG))
    assert told.value.code == "context_length_exceeded"
    assert len(answers(small, [Request([5] * 10, Base(), GREEDY_ALL)])[0]) == room - 10


GREEDY_ALL = dataclasses.replace(GREEDY, max_tokens=None)


def test_a_full_queue_refuses_and_goes_on(make, parts):
    engine = make(max_waiting=3)
    prompts = prompts_of(3)
    with Blocked(engine):
        streams = [engine.submit(Request(ids, Base(), GREEDY)) for ids in prompts]
        with pytest.raises(ServeError, match="3 requests are waiting") as told:
            engine.submit(Request([5]))
        assert (told.value.status, told.value.code) == (429, "queue_full") and told.value.retry_after > 0
        with pytest.raises(ServeError, match="waiting"):
            engine.embed([[5]])
    for stream, ids in zip(streams, prompts, strict=True):
        assert [t.id for chunk in stream for t in chunk.tokens] == generated(parts[0], ids, 8)


def test_one_id_is_one_request(make):
    engine = make()
    request = Request([5], Base(), GREEDY)
    with Blocked(engine):
        stream = engine.submit(request)
        with pytest.raises(ServeError, match="choose another id"):
            engine.submit(request)
    stream.result()
    engine.submit(request).result()


# --- ended --------------------------------------------------------------------------------------------------------


def test_a_waiting_request_is_cancelled_without_a_token(make):
    engine = make()
    with Blocked(engine):
        kept, gone = (engine.submit(Request([5], Weighted((("a0", 1.0),)), GREEDY)) for _ in range(2))
        gone.cancel()
        engine.cancel("nobody")
    chunks = list(gone)
    assert len(chunks) == 1 and chunks[0].finish == "cancelled" and chunks[0].usage.completion == 0
    assert kept.result()[1].finish == "length"
    assert engine.stats().ended == {"length": 1, "cancelled": 1}


def test_cancelling_frees_the_room_at_once(make):
    engine = make(kv_bytes=160 * 256)
    chunks = first_of(engine.submit(Request([5] * 9, Weighted((("a0", 1.0),)), LONG)))
    other = engine.submit(Request([6] * 9, Base(), LONG))  # two do not fit
    next(chunks)
    assert engine.stats().running == 1 and engine.stats().waiting == 1
    chunks.close()  # the reader leaves
    assert other.result()[1].finish == "length"
    assert engine.drain(WAIT)
    assert engine.stats().ended == {"cancelled": 1, "length": 1} and engine.stats().kv_used == 0


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose number is added to the engine's clock."""
    ahead = [0.0]
    now = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], thread_time=time.thread_time)
    monkeypatch.setattr(loop_module, "time", now)
    return ahead


def test_time_is_up_for_those_that_wait_and_those_that_run(make, clock):
    engine = make(kv_bytes=160 * 256, timeout=50.0)
    runs = engine.submit(Request([5] * 9, Base(), LONG))
    chunks = first_of(runs)
    with Blocked(engine):
        waits = engine.submit(Request([6] * 9, Base(), LONG))
        patient = engine.submit(Request([7], Base(), GREEDY, timeout=1000.0))  # the server's limit holds
        clock[0] = 60.0
    for stream in (chunks, waits, patient):
        last = list(stream)[-1]
        assert last.finish == "timeout" and last.error.status == 504 and "60." in last.error.message
    clock[0] = 0.0
    assert engine.submit(Request([5], Base(), GREEDY)).result()[1].finish == "length"
    with Blocked(engine):
        short = engine.submit(Request([5], Base(), GREEDY, timeout=2.0))
        clock[0] = 3.0
    with pytest.raises(ServeError, match="not finished after"):
        short.result()


def test_an_encoding_that_takes_too_long_is_given_up(make):
    engine = make()
    with Blocked(engine), pytest.raises(ServeError, match="not encoded within") as told:
        engine.embed([[5, 6]], Weighted((("a0", 1.0),)), timeout=0.01)
    assert told.value.status == 504 and engine.stats().waiting == 0
    assert engine.embed([[5, 6]], Weighted((("a0", 1.0),))).values.shape == (1, 32)
    assert engine.stats().started == 1 and engine.stats().ended == {"timeout": 1, "stop": 1}


def test_embeddings_are_requests_that_start_and_end(make, parts, monkeypatch):
    """What has started has ended, once nothing runs; what could not start has ended as well, as answers do."""
    engine = make()
    for _ in range(3):
        engine.embed([[5, 6], [7]])
        stats = engine.stats()
        assert stats.started == sum(stats.ended.values()) == stats.ended["stop"]
    assert engine.submit(Request([5], Base(), GREEDY)).result()[1].finish == "length"
    assert engine.stats().started == 4 and engine.stats().ended == {"stop": 3, "length": 1}
    monkeypatch.setattr(parts[2], "lease", lambda names: None)  # it waits for ever
    told = []

    def ask():
        with pytest.raises(ServeError) as refused:
            engine.embed([[5]], Weighted((("a0", 1.0),)))
        told.append(refused.value.code)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: engine.stats().waiting == 1)
    engine.close()
    asking.join(WAIT)
    assert told == ["draining"] and engine.stats().started == 4
    assert engine.stats().ended == {"stop": 3, "length": 1, "cancelled": 1}


# --- survived -----------------------------------------------------------------------------------------------------

POISON = 13


@pytest.fixture
def poisoned(parts):
    """Let every forward that reads the token POISON fail."""
    model = parts[2].model.get_base_model()

    def check(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and bool((ids == POISON).any()):
            raise RuntimeError("poison")

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    yield
    hook.remove()


def test_a_forward_that_fails_ends_its_batch_and_nothing_else(make, parts, poisoned):
    engine = make(max_batch=2)
    prompts = [[5, 6], [POISON], [7, 8], [9]]
    with Blocked(engine):
        streams = [engine.submit(Request(ids, Weighted((("a1", 1.0),)), GREEDY)) for ids in prompts]
    ended = [list(stream) for stream in streams]
    assert [chunks[-1].finish for chunks in ended] == ["error", "error", "length", "length"]
    error = ended[1][-1].error
    assert error.status == 500 and error.code == "engine_error" and "RuntimeError" in error.message
    assert "poison" not in error.message  # what went wrong inside is for the log
    parts[1].set_adapter("a1")
    for chunks, ids in list(zip(ended, prompts, strict=True))[2:]:
        assert [t.id for chunk in chunks for t in chunk.tokens] == generated(parts[1], ids, 8)
    with pytest.raises(ServeError, match="RuntimeError"):
        engine.embed([[POISON]])
    stats = engine.stats()
    assert stats.healthy and stats.ended == {"error": 3, "length": 2} and stats.kv_used == 0


def test_what_is_done_at_the_end_is_done_once_and_harms_nobody(make):
    engine, told = make(), []

    def note(stream, last):
        told.append(last)

    asked = Request([5], Base(), GREEDY)
    engine.submit(asked, when_done=note).result()
    failing = dataclasses.replace(asked, id="failing")
    assert engine.submit(failing, when_done=lambda stream, last: 1 / 0).result()[1].finish == "length"
    assert engine.submit(dataclasses.replace(asked, id="next"), when_done=note).result()[1].finish == "length"
    with Blocked(engine):
        gone = engine.submit(dataclasses.replace(asked, id="gone"), when_done=note)
        gone.cancel()
    assert list(gone)[-1].finish == "cancelled"
    assert engine.drain(WAIT)
    assert [(last.finish, last.usage.completion) for last in told] == [("length", 8), ("length", 8), ("cancelled", 0)]


class Fatal(BaseException):
    """What no handler catches."""


def test_a_thread_that_dies_is_reported_and_leaves_nobody_waiting(make):
    engine = make()
    chunks = first_of(engine.submit(Request([5] * 9, Weighted((("a0", 1.0),)), LONG)))

    def die():
        raise Fatal

    assert isinstance(engine.call(die).exception(WAIT), Fatal)
    last = list(chunks)[-1]
    assert last.finish == "error" and last.error.status == 503
    engine.close()
    assert not engine.stats().healthy
    for ask in (lambda: engine.submit(Request([5])), lambda: engine.embed([[5]]), lambda: engine.call(print)):
        with pytest.raises(ServeError) as told:
            ask()
        assert (told.value.status, told.value.code) == (503, "engine_failed")


def test_draining_ends_what_is_there_and_takes_nothing_new(make):
    engine = make()
    with Blocked(engine):
        streams = [engine.submit(Request([5 + i], Base(), GREEDY)) for i in range(6)]
        drained = []
        thread = threading.Thread(target=lambda: drained.append(engine.drain(WAIT)))
        thread.start()
        while not engine.stats().draining:
            threading.Event().wait(0.001)
        with pytest.raises(ServeError, match="going down") as told:
            engine.submit(Request([5]))
        assert (told.value.status, told.value.code) == (503, "draining")
    thread.join(WAIT)
    assert drained == [True]
    assert [stream.result()[1].finish for stream in streams] == ["length"] * 6


def test_draining_without_time_and_closing_cancel(make):
    engine = make()
    chunks = first_of(engine.submit(Request([5], Base(), LONG)))
    with Blocked(engine) as blocked:
        thread = threading.Thread(target=blocked.go.wait, args=(WAIT,))
        thread.start()
        done = []
        drain = threading.Thread(target=lambda: done.append(engine.drain(0.0)))
        drain.start()
    drain.join(WAIT)
    assert done == [False] and list(chunks)[-1].finish == "cancelled"
    other = make()
    chunks = first_of(other.submit(Request([5], Base(), LONG)))
    other.close()
    other.close()
    assert list(chunks)[-1].finish in ("cancelled", "length") and not other.stats().healthy


# --- shares -------------------------------------------------------------------------------------------------------


def test_a_greedy_tenant_does_not_hold_up_another(make):
    engine = make(max_batch=1, max_waiting=100)
    order = []

    def note(stream, last):
        order.append(stream.request.tenant)

    with Blocked(engine):
        streams = []
        for tenant, count in (("greedy", 30), ("modest", 5)):
            for _ in range(count):
                request = Request([5, 6], Base(), GREEDY, tenant=tenant)
                streams.append(engine.submit(request, when_done=note))
    for stream in streams:
        stream.result()
    assert len(order) == 35
    assert order[:11].count("modest") == 5  # turn by turn, though it came last
    shares = engine.shares()
    assert (shares["greedy"].output, shares["modest"].output) == (240, 40)
    assert engine.stats().by_tenant == {"greedy": 300, "modest": 50}


def test_a_waiting_engine_rests(make):
    engine = make()
    engine.submit(Request([5], Base(), GREEDY)).result()
    before = engine.stats()
    assert 0 < before.model_seconds <= before.engine_seconds
    threading.Event().wait(0.2)
    after = engine.stats()
    assert (after.steps, after.engine_seconds) == (before.steps, before.engine_seconds)
