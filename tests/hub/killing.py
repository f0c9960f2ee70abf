"""SIGKILL for real: a child process that dies at its n-th step on the disk."""

import os
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: a kill does not ask what was flushed, and flushing is slow."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def run_and_kill(work, point):
    """Run `work` in a child process that is killed by SIGKILL at its `point`-th step on the disk; whether it was.

    Steps are what Python reports before it does them (open, rename, mkdir, remove, SQLite connect, ...), each fsync and
    each SQL statement.
    """
    child = os.fork()
    if child == 0:
        left = point

        def step(*_):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        events = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "sqlite3.connect/handle"}
        sys.addaudithook(lambda event, args: step() if event in events else None)
        real_sync, real_connect = os.fsync, sqlite3.connect
        os.fsync = lambda handle: (step(), real_sync(handle))[1]

        def connect(*args, **options):
            db = real_connect(*args, **options)
            db.set_trace_callback(step)
            return db

        sqlite3.connect = connect
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error), error, file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
