"""The arguments of `molora serve`; the standard library only, so that help needs nothing else."""

from __future__ import annotations

import argparse


def add_serve(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `molora serve`."""
    add = command.add_argument
    add("--config", metavar="FILE", help="a YAML of options; flags win over it")
    add("--model", help="folder or Hub name of the base model")
    add("--name", help="what clients call the base model (default: the last part of --model)")
    add("--gguf-file", metavar="FILE", help="the file in --model, when it is a GGUF")
    add("--hub", metavar="DIR", help="the library of adapters")
    add("--adapter", dest="adapters", action="append", metavar="NAME", help="serve this adapter (default: all)")
    add("--pin", dest="pinned", action="append", metavar="NAME", help="load it before the server is ready, and keep it")
    add("--manifest", metavar="FILE", help="the adapters that are wanted, instead of --adapter and --pin")
    add("--tenants", metavar="FILE", help="a YAML of tenants (default: everybody may use everything)")
    add("--database", metavar="URL", help="keys and usage (default: a file beside --tenants)")
    add("--feedback", metavar="DIR", help="take rewards of answers, and keep them there for the bandits of `auto`")
    add("--slot", dest="slots", action="append", metavar="RANK=COUNT", help="adapters that act at once (8=16, 16=8)")
    add("--backend", choices=("auto", "hf-cb", "hf-simple"), help="how requests share forwards (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the base (default: auto)")
    add("--quantize", choices=("4bit", "8bit"), help="load the base through bitsandbytes")
    add("--kv-memory", metavar="SIZE", help="of keys and values (default: 1GiB)")
    add("--cpu-memory", metavar="SIZE", help="of adapters beside those in slots (default: 1GiB)")
    add("--max-batch", type=int, help="requests that run at the same time (default: 32)")
    add("--max-waiting", type=int, help="requests that wait at most (default: 256)")
    add("--max-length", type=int, help="tokens of prompt and answer (default: what the model takes)")
    add("--timeout", type=float, help="seconds that a request may take (default: 300)")
    add("--host", metavar="ADDRESS", help="to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, help="to listen on (default: 8000; 0: a free one)")
    add("--drain", type=float, help="seconds that running answers get when the server is stopped (default: 30)")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="of the server's log (default: info)")
    add("--replicas", type=int, help="engines that share the requests, by Ray Serve (default: 1, without Ray)")
    add("--check", action="store_true", help="start, print the report, and stop")
