"""The models and data of small.py, written once for all tests of this folder."""

import pytest

from tests.train.small import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))
