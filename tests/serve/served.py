"""A small world for the tests over HTTP: a base model, a library, two tenants, and servers around them.

Tenant `ann` may use what begins with `ann-`, `shared` and the mixture `mix`; tenant `bob` what begins with `bob-`, and
`shared`. Both may load and unload what is theirs; `plain` may not, and `noone` has no right to the base model either.
"""

import contextlib
import copy
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import torch
import uvicorn
import yaml

import molora
from molora.serve.http import create_app
from molora.serve.options import ServeOptions
from molora.serve.start import start
from tests import tiny
from tests.serve.adapters import peft_lora
from tests.serve.loras import make_mixture

WAIT = 30.0  # seconds that a test waits for a server at most
LOADING = 120.0  # and for a process to start on a busy machine
ADAPTERS = ("ann-law", "ann-news", "bob-secret", "bob-plans", "shared")
ABOUT = {
    "ann-law": ("doctor", "patient", "drug", "virus"),
    "ann-news": ("team", "match", "goal", "player"),
    "bob-secret": ("star", "planet", "atom", "cell"),
    "bob-plans": ("bank", "market", "stock", "price"),
    "shared": ("film", "movie", "book", "song"),
}
# enough of them for a guard to tell what is unlike all
WORDS = {
    name: [f"the {one} is not the {other}" for one in words for other in words]
    + [f"is it the {one} or the {other}" for one in words for other in words]
    for name, words in ABOUT.items()
}
KEYS = {name: f"{name}-key-0123456789abcdefghijklmnopqrstuv" for name in ("ann", "bob", "plain", "noone", "admin")}
TENANTS = {
    "tenants": {
        "ann": {"models": ["ann-*", "shared", "mix"], "manage": True, "keys": ["KEY_ANN"]},
        "bob": {"models": ["bob-*", "shared"], "manage": True, "keys": ["KEY_BOB"]},
        "plain": {"models": ["shared"], "keys": ["KEY_PLAIN"], "limits": {"requests_per_minute": 2}},
        "noone": {"models": ["shared"], "base": False, "keys": ["KEY_NOONE"]},
    },
    "admin_keys": ["KEY_ADMIN"],
}
ENVIRONMENT = {f"KEY_{name.upper()}": key for name, key in KEYS.items()}
SIZES = {"slots": {4: 4}, "kv_memory": "2MiB", "cpu_memory": "16MiB", "max_batch": 8}


def make_world(folder):
    """Write the base model, the library and the tenants; returns the folder."""
    tiny.save_tiny(tiny.tiny_llama(), tiny.tiny_tokenizer(), folder / "base")
    hub = molora.Hub(folder / "hub")
    for seed, name in enumerate(ADAPTERS):
        hub.add(peft_lora(folder / f"lora-{name}", seed=seed), name, prompts=WORDS[name], task=name)
    _, mixture = make_mixture(tiny.tiny_llama(), folder / "mixture", ["q_proj", "down_proj"])
    hub.add(mixture, "mix", task="all")
    (folder / "tenants.yaml").write_text(yaml.safe_dump(TENANTS))
    return folder


def options_of(world, **changes):
    """Return the options of a server of the world."""
    return ServeOptions(**{"model": str(world / "base"), "hub": str(world / "hub"), **SIZES, **changes})


def with_tenants(world, folder, monkeypatch, **changes):
    """Return the options of a server with tenants, whose database is in `folder`."""
    for name, key in ENVIRONMENT.items():
        monkeypatch.setenv(name, key)
    return options_of(world, tenants=str(world / "tenants.yaml"), database=str(folder / "tenants.db"), **changes)


@contextlib.contextmanager
def started(options):
    """A Service, ended after the block."""
    service, _ = start(options)
    try:
        yield service
    finally:
        service.close(5.0)


@contextlib.contextmanager
def listening(service, **options):
    """A real server on a free port of this machine, on a thread; yields its URL."""
    app = create_app(service, close=False, **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            until(lambda: server.started, "the server did not start")
            yield url
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


def bearer(name):
    """The header of a tenant's key."""
    return {"Authorization": f"Bearer {KEYS[name]}"}


def until(condition, what="it did not come true", limit=WAIT):
    """Wait for a condition that another thread or process makes true."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Process:
    """`molora serve` as a process of its own; ends with the block.

    Attributes:
        url: where it listens.
        log: the file that its output goes to.
    """

    def __init__(self, folder, options, *flags):
        self.config, self.log = folder / "serve.yaml", folder / "server.log"
        self.config.write_text(yaml.safe_dump({"port": 0, **options}))
        self.command = [sys.executable, "-m", "molora.cli", "serve", "--config", str(self.config), *flags]

    def __enter__(self):
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        found = []

        def is_up():
            assert self.process.poll() is None, self.text()
            with self.log.open("rb") as file:
                file.seek(begin)
                lines = file.read().decode(errors="replace").splitlines()
            found[:] = [line.rpartition(" ")[2] for line in lines if line.startswith("serving on ")]
            return bool(found)

        until(is_up, "the server did not start", LOADING)
        self.url = found[0]

        def is_ready():
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/readyz").status_code == 200
            return False

        until(is_ready, "the server was not ready")
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def end(self, signal):
        """Send a signal; returns the exit code."""
        self.process.send_signal(signal)
        return self.process.wait(WAIT)

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT)


@torch.no_grad()
def text_of(prompt, limit, lora=None):
    """What transformers generates greedily, with a LoRA that PEFT loads: independent of this server."""
    from peft import PeftModel

    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    if lora is not None:
        model = PeftModel.from_pretrained(copy.deepcopy(model), lora).eval()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    options = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
