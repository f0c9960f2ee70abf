"""A library under fire: killed at every step of a change, and changed by several processes at once."""

import os
import shutil
import signal
import sqlite3
import sys

import pytest

from molora.errors import ConfigError
from molora.hub.store import Hub
from tests.hub.killing import in_memory, run_and_kill
from tests.hub.loras import lora

FIELDS = {"task": "topic", "description": "Sorts headlines.", "licence": "apache-2.0"}


@pytest.fixture
def tmp_path(tmp_path):
    with in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "hub")


@pytest.fixture
def source(tmp_path):
    return lora(tmp_path / "source")


def whole(root, allowed):
    """Check that every version is whole and is one of the allowed libraries; returns which."""
    hub = Hub(root, lock_seconds=5)
    listed = [str(entry.ref) for entry in hub.list(all_versions=True)]
    assert listed in allowed, listed
    assert not any(entry.problems for entry in hub.list(all_versions=True))
    assert all(not problems for problems in hub.verify().values())
    return listed


@pytest.mark.parametrize("first", [True, False], ids=["first", "second version"])
def test_a_kill_at_any_step_of_add(first, tmp_path):
    one, two = lora(tmp_path / "one"), lora(tmp_path / "two", seed=1)
    start = tmp_path / "start"
    Hub(start).add(one, "other")
    if not first:
        Hub(start).add(one, "a", alias="best")
    before = ["other@1"] if first else ["a@1", "other@1"]
    after = ["a@1", "other@1"] if first else ["a@1", "a@2", "other@1"]
    seen, points = [], 0
    for point in range(0, 400):
        root = tmp_path / f"p{point}"
        shutil.copytree(start, root)
        killed = run_and_kill(lambda r=root: Hub(r).add(two, "a", alias="best", **FIELDS), point)
        listed = whole(root, [before, after])
        seen.append(listed == after)
        best = Hub(root).aliases().get("best")
        assert best in ([None, ("a", 1)] if first else [("a", 1), ("a", 2)])
        # the next change works, ends in the same library, and clears what was left behind
        Hub(root, lock_seconds=5).add(two, "a", alias="best", **FIELDS)
        assert whole(root, [after]) and Hub(root).get("best").folder == root / after[-2].replace("@", "/")
        assert not [p.name for p in root.iterdir() if p.name.startswith((".draft", ".trash"))]
        shutil.rmtree(root)
        points += killed
        if not killed:
            break
    else:
        raise AssertionError("it never came to an end")
    assert points > 30
    assert seen == sorted(seen) and not seen[0] and seen[-1]  # before, then after, and never in between


def test_a_kill_at_any_step_of_remove(tmp_path):
    start = tmp_path / "start"
    Hub(start).add(lora(tmp_path / "one"), "a")
    Hub(start).add(lora(tmp_path / "two", seed=1), "a")
    for point in range(0, 400):
        root = tmp_path / f"p{point}"
        shutil.copytree(start, root)
        killed = run_and_kill(lambda r=root: Hub(r).remove("a", all_versions=True), point)
        left = whole(root, [["a@1", "a@2"], ["a@2"], []])
        hub = Hub(root)
        new = hub.add(lora(tmp_path / "three", seed=2), "a")
        assert new.version == 3, left  # no number is given twice
        assert not [p.name for p in root.iterdir() if p.name.startswith((".draft", ".trash"))]
        if not killed:
            break
    assert point > 15 and left == []


def test_two_processes_add_at_once(tmp_path):
    """Six processes, five adds each, half of them under one name: every add is there, and the numbers have no gap."""
    sources = [lora(tmp_path / f"s{i}", seed=i) for i in range(5)]
    root, children = tmp_path / "hub", []
    for worker in range(6):
        child = os.fork()
        if child == 0:
            try:
                for i, one in enumerate(sources):
                    Hub(root).add(one, "shared" if worker % 2 else f"w{worker}", description=f"{worker} {i}")
                    assert len(Hub(root).list(all_versions=True)) >= i + 1
                os._exit(0)
            except BaseException as error:
                print(type(error), error, file=sys.stderr)
                os._exit(1)
        children.append(child)
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    hub = Hub(root)
    assert hub.disk.versions("shared") == list(range(1, 16))
    assert {hub.get(f"shared@{v}").card.description for v in range(1, 16)} == {
        f"{worker} {i}" for worker in (1, 3, 5) for i in range(5)
    }
    assert [hub.disk.versions(f"w{worker}") for worker in (0, 2, 4)] == [[1, 2, 3, 4, 5]] * 3
    rows = sqlite3.connect(root / ".index.sqlite").execute("SELECT name, version FROM versions").fetchall()
    assert set(rows) == set(hub.disk.scan()[0]) and len(rows) == 30
    assert not any(hub.verify().values())


def test_a_lock_that_is_held_is_told(hub, source):
    hub.add(source, "a")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with Hub(hub.root).disk.changing():
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    try:
        with pytest.raises(ConfigError, match="is being changed by another process for more than"):
            Hub(hub.root, lock_seconds=0.2).add(source, "b")
        assert Hub(hub.root).get("a").version == 1  # reading does not wait
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert Hub(hub.root, lock_seconds=2).add(source, "b").version == 1  # the lock of the dead is free


def test_a_draft_of_the_living_stays(hub, source):
    hub.add(source, "a")
    with Hub(hub.root).disk.draft() as draft:
        (draft / "half").write_text("of a long transfer")
        dead = hub.root / ".draft-dead"
        dead.mkdir()
        (hub.root / ".draft-0.yaml").write_text("")
        hub.add(source, "b")
        assert (draft / "half").is_file() and not dead.exists()
    assert not [p.name for p in hub.root.iterdir() if p.name.startswith(".draft")]
