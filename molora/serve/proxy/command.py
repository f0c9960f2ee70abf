"""What `molora route` does: read options, say what was started, and forward until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...prompts.saving import load_selector, wants_model
from ..command import listen, run_app
from ..feedback import make_feedback
from .options import RouteOptions


def run(args: argparse.Namespace) -> int:
    """Run `molora route`; returns the exit code."""
    try:
        import uvicorn  # noqa: F401  (told now, before anything is read)

        from .app import create_route_app
    except ImportError as error:
        raise ConfigError(f"a router needs {error.name}; install it with pip install 'molora[serve]'") from error
    options = read_route_options(args)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # which would tell every request
    listener = None if args.check else listen(options.host, options.port)
    proxy, report = start_route(options, os.environ)
    for line in report:
        print(line, file=sys.stderr)
    if listener is None:
        asyncio.run(proxy.close())
        return 0
    app = create_route_app(
        proxy,
        timeout=options.timeout,
        max_body=int(options.max_body),
        docs=options.docs,
        open_metrics=options.open_metrics,
    )
    run_app(app, listener, "routing", drain=options.drain, log_level=options.log_level)
    return 0


def read_route_options(args: argparse.Namespace) -> RouteOptions:
    """Return the options that flags and the file of `--config` make.

    Raises:
        ConfigError: a key or value is wrong; all problems at once.
    """
    known = {one.name for one in fields(RouteOptions)}
    flags: dict[str, Any] = {name: value for name, value in vars(args).items() if name in known}
    if flags.get("names"):
        flags["names"] = dict(_pair(text) for text in flags["names"])
    return RouteOptions.read(args.config, **flags)


def start_route(options: RouteOptions, environ: Any) -> tuple[Any, list[str]]:
    """Make everything that options name but the server itself.

    Returns:
        The Proxy, and the lines of a report.

    Raises:
        ConfigError, LoadError: something that is named cannot be used.
    """
    from ..start import open_tenants
    from .proxy import Proxy
    from .upstream import Upstream

    tenants, lines = open_tenants(options)
    key = environ.get(options.key_variable)
    if key is not None and (not key.strip().isascii() or not key.strip().isprintable()):
        raise ConfigError(f"the key in {options.key_variable} holds characters that no header can")
    key = key.strip() if key else None
    selector = None
    if options.selector is not None:
        if wants_model(options.selector):
            raise ConfigError(
                f"the selector in '{options.selector}' reads the hidden states of a model, which a router has not; "
                "fit it with: molora prompts fit --embedder sentence (or words)"
            )
        selector = load_selector(Path(options.selector))
        shown = ", ".join(selector.names[:8]) + (", ..." if len(selector.names) > 8 else "")
        told = f"{len(selector.names)} adapters ({shown}), version {selector.version}"
    upstream = Upstream(
        options.upstream,
        key=key,
        timeout=options.timeout,
        connect_timeout=options.connect_timeout,
        retries=options.retries,
        connections=options.connections,
        max_answer=int(options.max_answer),
        ca=options.ca,
    )
    proxy = Proxy(
        upstream,
        selector=selector,
        bases=options.bases,
        names=options.names,
        pattern=options.pattern,
        tenants=tenants,
        feedback=make_feedback(options.feedback),
        answer_tokens=options.answer_tokens,
    )
    lines = [
        f"upstream {options.upstream}, {'with' if key else 'without'} a key (variable {options.key_variable})",
        "selector: none, so 'auto' is unknown" if selector is None else f"selector: {told}",
        *lines,
    ]
    return proxy, lines


def _pair(text: str) -> tuple[str, str]:
    adapter, _, name = text.partition("=")
    if not adapter or not name:
        raise ConfigError(f"--name '{text}' is not ADAPTER=NAME; write news=llama-news")
    return adapter, name
