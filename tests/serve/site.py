"""A server over a tiny model with adapters, on a free port of this machine: what the tests of its page stand on."""

import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from molora.prompts.choice import Choice
from molora.serve.engine.engine import Engine
from molora.serve.http.app import create_app
from molora.serve.service import Service
from molora.serve.tenants.store import Tenants
from molora.serve.tenants.tenant import Tenant
from tests import tiny
from tests.serve.loras import LLAMA, make_loras, make_mixture, make_store

WAIT = 30.0  # seconds that anything is waited for at most


class Chooser:
    """A selector that chooses by the first word of a prompt, so that tests know what it says."""

    def select(self, prompts, allowed):
        """Choose the adapter that a prompt names; none when it names none."""
        return [self._choose(prompt, allowed) for prompt in prompts]

    def _choose(self, prompt, allowed):
        scores = {name: float(name in prompt.split()) for name in allowed}
        named = [name for name in allowed if scores[name]]
        weights = {name: 1 / len(named) for name in named}
        why = f"the prompt names {' and '.join(named) or 'nobody'}"
        return Choice(weights, scores, scores, not named, why)


class Gate:
    """Lets a model make as many forwards as it is told to."""

    def __init__(self, model):
        self._model, self._hook = model, None
        self._permits = threading.Semaphore(0)

    @contextmanager
    def shut(self):
        """Hold every forward inside the block until `let` allows it."""
        self._permits = threading.Semaphore(0)
        self._hook = self._model.register_forward_pre_hook(lambda *_: self._permits.acquire(timeout=WAIT) and None)
        try:
            yield self
        finally:
            self._hook.remove()
            self.let(10_000)

    def let(self, count):
        """Allow so many forwards more."""
        self._permits.release(count)


@contextmanager
def serving(service):
    """Serve a service on a free port of this machine; yields its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who comes before the server has started waits
    config = uvicorn.Config(create_app(service, close=False), log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def tiny_engine(folder):
    """An engine over a tiny model with adapters a0 to a2 and a routed mixture `mix`; yields it and its gate."""
    base = tiny.tiny_llama()
    store = make_store(base, make_loras(base, LLAMA, count=3), slots={4: 4})
    _, mixture = make_mixture(base, folder / "mix", LLAMA)
    store.register("mix", mixture)
    engine = Engine(store.model, tiny.tiny_tokenizer(), store, kv_bytes=1 << 22, selectors={"words": Chooser()})
    try:
        yield SimpleNamespace(engine=engine, store=store, gate=Gate(store.model))
    finally:
        engine.close()
        store.close()


def service_of(parts, tenants=None):
    """Return a service of an engine; several may share one."""
    return Service(parts.engine, parts.store, name="tiny", tokenizer=parts.engine.tokenizer, tenants=tenants)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with tiny_engine(tmp_path_factory.mktemp("page")) as made:
        yield made


@pytest.fixture(scope="module")
def url(parts):
    """A server where everybody may do everything."""
    with serving(service_of(parts)) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(parts, tmp_path_factory):
    """A server with tenants over the same engine, and the keys of two tenants and an admin."""
    with Tenants(str(tmp_path_factory.mktemp("tenants") / "t.db")) as tenants:
        tenants.put(Tenant("ann", models=frozenset({"a0", "mix"}), weight=3))
        tenants.put(Tenant("bob", models=frozenset({"*"}), manage=True))
        keys = {name: tenants.add_key(name).secret for name in ("ann", "bob")}
        keys["admin"] = tenants.add_key(None).secret
        with serving(service_of(parts, tenants)) as address:
            yield SimpleNamespace(url=address, **keys)


def overview(url, key=None, **options):
    """Ask for /v1/overview."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/overview", headers=headers, params=options)
