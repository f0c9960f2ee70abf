"""Fixtures of the tests of serving."""

import pytest

from tests.serve.databases import KINDS, empty_url, opened, postgres
from tests.serve.served import make_world


@pytest.fixture(scope="session")
def postgres_server():
    """One PostgreSQL for the whole run."""
    with postgres() as database:
        yield database


@pytest.fixture(params=KINDS)
def database_url(request):
    """The URL of an empty database: SQLite and PostgreSQL."""
    with empty_url(request.param, request) as url:
        yield url


@pytest.fixture
def tenants(database_url):
    """Tenants in a new database, on SQLite and on PostgreSQL, with a clock that the test moves."""
    with opened(database_url) as found:
        yield found


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A base model, a library and tenants in a folder, made once; nothing in it changes."""
    return make_world(tmp_path_factory.mktemp("world"))
