"""The arguments of `molora route`; the standard library only, so that help needs nothing else."""

from __future__ import annotations

import argparse


def add_route(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora route`."""
    add = command.add_argument
    add("--config", metavar="FILE", help="a YAML of options; flags win over it")
    add("--upstream", metavar="URL", help="an OpenAI-compatible server: vLLM, SGLang, LoRAX, molora serve, ...")
    add("--selector", metavar="DIR", help="a fitted prompt selector, of molora prompts fit")
    add("--base", action="append", metavar="NAME", help="what the upstream server calls its base model")
    add("--name", dest="names", action="append", metavar="ADAPTER=NAME", help="what it calls an adapter")
    add("--pattern", help="what it calls the others, such as {tenant}/{adapter} (default: {adapter})")
    add("--key-variable", metavar="NAME", help="variable that holds its API key (default: MOLORA_UPSTREAM_KEY)")
    add("--ca", metavar="FILE", help="certificates that its own is checked by (default: those of the system)")
    add("--tenants", metavar="FILE", help="a YAML of tenants (default: everybody may use everything)")
    add("--database", metavar="URL", help="keys and usage (default: a file beside --tenants)")
    add("--feedback", metavar="DIR", help="let a bandit choose among what the selector scored, and learn; its log")
    add("--timeout", type=float, help="seconds that a request may take (default: 300)")
    add("--retries", type=int, help="of connecting (default: 2)")
    add("--connections", type=int, help="to the upstream server at the same time (default: 200)")
    add("--host", help="(default: 127.0.0.1, this machine alone)")
    add("--port", type=int, help="(default: 8080; 0: a free one)")
    add("--drain", type=float, help="seconds that running answers get when the router is stopped (default: 30)")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="(default: info)")
    add("--check", action="store_true", help="start, print the report, and stop")
