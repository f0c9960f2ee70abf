"""Databases to test tenants on: SQLite in a folder, and a PostgreSQL of our own where its programs are installed."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from molora.serve.tenants.store import Tenants


class Clock:
    """Time that stands still until a test moves it; a Wednesday, 2026-01-07 12:00 UTC, at first."""

    def __init__(self, now=1767787200.0):
        self.now = now

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def programs():
    """The folder of PostgreSQL's programs, or None."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places and importlib.util.find_spec("psycopg") else None


@contextmanager
def postgres():
    """A new server on a free port of this machine; yields a function that empties its database and returns the URL."""
    folder = Path(tempfile.mkdtemp(prefix="molora-pg-"))
    # it refuses to run as root
    user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(name, *args):
        subprocess.run([programs() / name, *args], check=True, cwd=folder, timeout=60, capture_output=True,
                       env={"LC_ALL": "C", "HOME": str(folder)}, **user)  # fmt: skip

    data = folder / "data"
    where = {"host": "127.0.0.1", "port": port, "user": "molora", "dbname": "postgres"}

    def database():
        import psycopg

        with psycopg.connect(**where, autocommit=True) as connection:
            others = "FROM pg_stat_activity WHERE usename = 'molora' AND pid <> pg_backend_pid()"
            connection.execute(f"SELECT pg_terminate_backend(pid) {others}")
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return f"postgresql+psycopg://molora@127.0.0.1:{port}/postgres"

    try:
        try:
            run("initdb", "-D", str(data), "-U", "molora", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
            # its messages go to a file: it would keep a pipe of ours open
            run("pg_ctl", "-D", str(data), "-w", "-t", "50", "-l", str(folder / "log"), "-o", options, "start")
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"PostgreSQL is installed, but does not start here: {getattr(error, 'stderr', None) or error}")
        yield database
    finally:
        with suppress(subprocess.SubprocessError):
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def memory():
    """A folder in memory, where SQLite is quick, or an ordinary one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@contextmanager
def empty_url(kind, request):
    """The URL of a database without tables; kind is `sqlite` or `postgresql`."""
    if kind == "postgresql":
        yield request.getfixturevalue("postgres_server")()
        return
    with memory() as folder:
        yield f"sqlite:///{folder / 't.db'}"


@contextmanager
def opened(url=None, **options):
    """Tenants in a new SQLite database, or in that of the URL, closed at the end."""
    with memory() as folder:
        options.setdefault("clock", Clock())
        with Tenants(url or str(folder / "t.db"), **options) as tenants:
            yield tenants


needs_postgres = pytest.mark.skipif(programs() is None, reason="initdb or psycopg is not installed")
KINDS = ["sqlite", pytest.param("postgresql", marks=needs_postgres)]
