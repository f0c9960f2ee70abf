"""What `molora serve --replicas N` does: start a cluster, say what was started, and serve until it is told to stop."""

from __future__ import annotations

import signal
import sys
import threading
import time

from ..options import ServeOptions


def run_cluster(options: ServeOptions, check: bool = False) -> int:
    """Run a server of several replicas until SIGINT or SIGTERM; returns the exit code.

    Args:
        options: of the server.
        check: start, print the report, and stop.
    """
    from .launch import launch

    began = time.perf_counter()
    with launch(options) as cluster:
        facts = cluster.engines.facts.remote().result(timeout_s=60.0)
        for line in facts["report"]:
            print(line, file=sys.stderr)
        seconds = time.perf_counter() - began
        print(f"replicas: {len(cluster.states())}, with the ingress, ready in {seconds:.1f} s", file=sys.stderr)
        if check:
            return 0
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"serving on {cluster.url}", file=sys.stderr, flush=True)
        stop.wait()
    return 0
