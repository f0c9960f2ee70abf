"""What `molora serve` does: read options, start, say what was started, and serve until it is told to stop.

SIGTERM and SIGINT (Ctrl+C) stop it: it takes no more requests, lets running answers end for `drain` seconds, writes
what is owed, and ends with code 0; a second SIGINT ends it at once. Options, a model, a library or tenants that cannot
be used end it with code 2 and one message, what nobody foresaw with code 1.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from .collecting import keep_what_was_loaded
from .options import ServeOptions

BACKLOG = 2048  # connections that wait to be accepted


def run(args: argparse.Namespace) -> int:
    """Run `molora serve`; returns the exit code."""
    try:
        import uvicorn  # noqa: F401  (told now, not after the model is loaded)

        from .http import create_app
        from .start import start
    except ImportError as error:
        raise ConfigError(f"a server needs {error.name}; install it with pip install 'molora[serve]'") from error
    options = read_options(args)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.replicas > 1 or options.cluster:
        from .cluster.command import run_cluster

        return run_cluster(options, check=args.check)
    # the port first: it costs nothing to find out that it is taken
    listener = None if args.check else listen(options.host, options.port)
    service, report = start(options)
    for line in report:
        print(line, file=sys.stderr)
    if listener is None:
        service.close(0.0)
        return 0
    app = create_app(
        service,
        drain=options.drain,
        max_body=int(options.max_body),
        docs=options.docs,
        open_metrics=options.open_metrics,
    )
    try:
        run_app(app, listener, "serving", drain=options.drain, log_level=options.log_level)
    finally:
        service.close(0.0)  # does nothing when the application has ended in order
    print("the server has ended", file=sys.stderr)
    return 0


def run_app(app: Any, listener: socket.socket, doing: str, *, drain: float, log_level: str) -> None:
    """Say where an application answers, and run it until SIGINT or SIGTERM.

    Args:
        app: the ASGI application.
        listener: of `listen`.
        doing: the word for what it does there.
        drain: seconds that running answers get.
        log_level: of uvicorn.
    """
    import uvicorn

    keep_what_was_loaded()
    listener.listen(BACKLOG)  # from here on clients wait, and are not refused, until the application answers
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{doing} on http://{shown}:{port}", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=log_level == "debug",
        timeout_graceful_shutdown=max(1, round(drain)),
        server_header=False,
    )
    # uvicorn sends itself the signal again that ended it; this process has answered it by then
    before = {one: signal.signal(one, _noted) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _noted(number: int, frame: Any) -> None:
    """Go on, to end in order."""


def read_options(args: argparse.Namespace) -> ServeOptions:
    """Return the options that flags and the file of `--config` make.

    Raises:
        ConfigError: a key or value is wrong; all problems at once.
    """
    known = {one.name for one in fields(ServeOptions)}
    flags: dict[str, Any] = {name: value for name, value in vars(args).items() if name in known}
    if flags.get("slots"):
        flags["slots"] = dict(_slot(text) for text in flags["slots"])
    return ServeOptions.read(args.config, **flags)


def _slot(text: str) -> tuple[int, int]:
    rank, _, count = text.partition("=")
    if not (rank.isdigit() and count.isdigit()):
        raise ConfigError(f"--slot '{text}' is not RANK=COUNT; write 8=16 for sixteen adapters of rank 8")
    return int(rank), int(count)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket of an address that nobody else has; it takes connections once `listen()` was called on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or 0") from error
    listener.set_inheritable(True)
    return listener
