"""What a server has loaded when it begins to answer is no work for the garbage collector any more."""

import gc
import weakref

import pytest
import uvicorn

from molora.serve.command import listen, run_app


class Thing:
    """An object that can refer to itself."""


@pytest.fixture
def thawed():
    """Give the collector back what was taken from it."""
    yield
    gc.unfreeze()
    gc.collect()


def is_looked_through(thing):
    return any(one is thing for one in gc.get_objects())


def test_a_server_that_answers_keeps_what_was_loaded_out_of_collections(monkeypatch, capsys, thawed):
    garbage, loaded, found = Thing(), [Thing()], {}
    garbage.itself = garbage
    gone, free = weakref.ref(garbage), weakref.ref(loaded[0])
    del garbage

    def answer(server, sockets):
        later = Thing()
        later.itself = later
        found["before"], found["later"] = is_looked_through(loaded[0]), is_looked_through(later)
        ended = weakref.ref(later)
        del later
        gc.collect()
        found["ended"] = ended() is None

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    assert is_looked_through(loaded[0])
    with listen("127.0.0.1", 0) as listener:
        run_app(lambda: None, listener, "serving", drain=1.0, log_level="error")
    assert found == {"before": False, "later": True, "ended": True}  # what comes later is collected as ever
    assert gone() is None  # what was garbage at the start did not stay
    loaded.clear()
    assert free() is None  # what nobody refers to is freed
    assert "serving on http://127.0.0.1:" in capsys.readouterr().err
