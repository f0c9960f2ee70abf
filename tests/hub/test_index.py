"""The index: always what the folders say, however old, damaged, locked or absent it is."""

import os
import shutil
import sqlite3
import sys
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.errors import ConfigError
from molora.hub import index as index_module
from molora.hub.card import CARD
from molora.hub.disk import Disk
from molora.hub.entry import read_entry
from molora.hub.index import MAX_WORDS, Index, has_fts5, words_of
from molora.hub.names import Ref
from molora.hub.store import Hub
from tests.hub.killing import in_memory, run_and_kill
from tests.hub.loras import lora

TEXTS = {
    "news": ("topic", "Sorts the headlines of newspapers into topics."),
    "films": ("sentiment", "Says whether a film review is kind. Trained on news about films."),
    "cafe": ("topic", "Menüs of a café in Zürich, 你好"),
    "plain": ("", ""),
}


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    for seed, (name, (task, description)) in enumerate(TEXTS.items()):
        hub.add(lora(tmp_path / name, seed=seed), name, task=task, description=description)
    return hub


def truth(hub):
    """What the folders say, read without any index."""
    return [read_entry(ref, hub.disk.folder(ref)) for ref in sorted(hub.disk.scan()[0])]


def rows(hub):
    with closing(sqlite3.connect(hub.index.path)) as db:
        return {Ref(*row) for row in db.execute("SELECT name, version FROM versions")}


def test_the_index_says_what_the_folders_say(hub):
    assert hub.index.entries() == truth(hub)
    assert rows(hub) == set(hub.disk.scan()[0])
    assert hub.index.entries("news") == [entry for entry in truth(hub) if entry.name == "news"]
    assert hub.index.entries("none") == []


def test_a_second_look_reads_no_folder(hub, monkeypatch):
    hub.list()
    monkeypatch.setattr("molora.hub.disk.read_entry", lambda *_: pytest.fail("read again"))
    assert len(Hub(hub.root).list()) == 4
    (hub.root / "news/1" / CARD).touch()
    with pytest.raises(pytest.fail.Exception):
        hub.list()


def change_by_hand(hub):
    shutil.copytree(hub.root / "news/1", hub.root / "news/4")
    shutil.copytree(hub.root / "news/1", hub.root / "new/1")
    shutil.rmtree(hub.root / "films")
    card = hub.root / "cafe/1" / CARD
    card.write_text(card.read_text().replace("Zürich", "Genf"))


def test_a_stale_index_mends_itself(hub):
    hub.list()
    change_by_hand(hub)
    assert hub.index.entries() == truth(hub)
    assert [entry.name for entry in hub.list()] == ["cafe", "new", "news", "plain"]
    assert hub.index.find("genf") and not hub.index.find("Zürich") and not hub.index.find("kind")
    assert len(hub.index.find("headlines")) == 3
    assert rows(hub) == set(hub.disk.scan()[0])


def lose(path):
    path.unlink(missing_ok=True)


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    other = path.with_name(f"other-{os.getpid()}")
    other.write_bytes(os.urandom(5000))
    os.replace(other, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def scramble(path):
    """A good first page, and noise after it."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + os.urandom(len(content) - 4096))


def other_schema(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 999")


def no_tables(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TABLE versions")


def nonsense_rows(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE versions SET entry = '{}' WHERE name = 'news'")
        db.execute("UPDATE versions SET entry = 'x' WHERE name = 'films'")
        db.execute("""UPDATE versions SET entry = '{"card": {"task": 3}, "problems": []}' WHERE name = 'cafe'""")


def stale_journal(path):
    """The journal of a killed writer beside a file that is not its own."""
    path.with_name(path.name + "-journal").write_bytes(os.urandom(3000))
    path.write_bytes(os.urandom(3000))


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = [lose, empty, garbage, cut, scramble, other_schema, no_tables, nonsense_rows, stale_journal]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_built_anew(damage, hub):
    hub.list()
    found = hub.index.find("topic")
    damage(hub.index.path)
    fresh = Hub(hub.root)
    assert fresh.index.entries() == truth(hub)
    assert fresh.index.find("topic") == pytest.approx(found)
    assert rows(hub) == set(hub.disk.scan()[0])
    assert hub.index.entries() == truth(hub)


def test_an_index_that_cannot_be_replaced_is_done_without(hub):
    a_folder(hub.index.path)
    assert Hub(hub.root).index.entries() == truth(hub)
    assert hub.index.find("headlines") != {}


def test_a_library_that_cannot_be_written(hub, monkeypatch):
    """As in an installed package: reading works, leaves no file, and a change says why it does not."""
    hub.index.path.unlink()
    (hub.root / ".lock").unlink(missing_ok=True)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    real = sqlite3.connect

    def connect(path, **options):
        if path != ":memory:":
            raise sqlite3.OperationalError("unable to open database file")
        return real(path, **options)

    monkeypatch.setattr(index_module.sqlite3, "connect", connect)
    monkeypatch.setattr("molora.hub.disk.FileLock.acquire", refused)
    reader = Hub(hub.root)
    assert reader.index.entries() == truth(hub)
    assert next(iter(reader.index.find("films"))) == Ref("films", 1)
    assert not hub.index.path.exists()
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        reader.remove("news")


def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error), error, file=sys.stderr)
            os._exit(1)
    return child


def test_many_processes_rebuild_lose_and_read_at_once(hub):
    """Whatever one process does to the index, every other one sees what the folders say."""
    want = truth(hub)

    def work(number):
        mine = Hub(hub.root)
        for i in range(12):
            if number == 0:
                mine.index.rebuild()
            elif number == 1 and i % 3 == 0:
                (garbage if i % 2 else lose)(mine.index.path)
            assert mine.index.entries() == want

    children = [fork(lambda n=number: work(n)) for number in range(5)]
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    hub.index.rebuild()
    assert rows(hub) == set(hub.disk.scan()[0])


@pytest.mark.parametrize("damaged", [False, True], ids=["asked for", "of a damaged index"])
def test_a_kill_at_any_step_of_a_rebuild(damaged, tmp_path):
    with in_memory(tmp_path) as tmp_path:
        start = tmp_path / "start"
        for seed, name in enumerate(("one", "two")):
            Hub(start).add(lora(tmp_path / name, seed=seed), name, description=f"Number {name}.")
        want = [read_entry(ref, start / ref.name / "1") for ref in (Ref("one", 1), Ref("two", 1))]
        if damaged:
            (start / ".index.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
        work = (lambda: Hub(start).list()) if damaged else (lambda: Hub(start).index.rebuild())
        kept = (start / ".index.sqlite").read_bytes()
        for point in range(200):
            killed = run_and_kill(work, point)
            index = Hub(start, lock_seconds=5).index
            assert index.entries() == want
            assert list(index.find("two")) == [Ref("two", 1)]
            for path in start.glob(".index*"):
                path.unlink()
            (start / ".index.sqlite").write_bytes(kept)
            if not killed:
                break
        assert point > 10 and not killed


def test_the_index_follows_another_process(hub, tmp_path):
    hub.list()
    source = lora(tmp_path / "late", seed=9)
    assert os.waitpid(fork(lambda: Hub(hub.root).add(source, "late", description="Comes late.")), 0)[1] == 0
    assert hub.get("late").rank == 2
    assert list(hub.index.find("late")) == [Ref("late", 1)]


# --- words ------------------------------------------------------------------------------------------------------------


def test_words():
    assert words_of("Café-MENÜ, l'été_2 x²! ﬁn ẞ") == ["cafe", "menu", "l", "ete", "2", "x2", "fin", "ss"]
    assert words_of("你好 мир a\udcff") == ["你好", "мир", "a"]


@pytest.mark.parametrize("fts", [True, False])
def test_find(hub, fts):
    if fts and not has_fts5():
        pytest.skip("this SQLite has no FTS5")
    index = Index(Disk(hub.root), fts=fts)
    find = lambda text: [ref.name for ref in index.find(text)]  # noqa: E731
    assert find("headlines") == ["news"]
    assert find("HEADL") == ["news"]  # the start of a word
    assert find("eadlines") == []
    assert find("cafe menus") == find("CAFÉ") == ["cafe"]
    assert find("你") == ["cafe"]
    assert find("news") == ["news", "films"]  # in a name before in a description
    assert find("sentiment topics")[0] in ("films", "news")
    assert set(find("topic")) == {"news", "cafe"}
    assert find("tiny") and len(find("tiny")) == 4  # their base
    assert find('films" OR *) (NEAR - ^ "') == find("films OR NEAR")  # no syntax, only words
    assert find(" ".join(f"x{i}" for i in range(5000)) + " films") == []  # the first words count
    for text in ("", "  ", "!?", "'\"%_"):
        with pytest.raises(ConfigError, match="holds no word"):
            index.find(text)


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), document=st.text(max_size=30))
@pytest.mark.skipif(not has_fts5(), reason="this SQLite has no FTS5")
def test_with_and_without_fts5_the_same_is_found(text, document):
    """FTS5 splits and folds what words_of has split and folded already, and must find the same rows."""
    if not words_of(text):
        return
    words = f" {' '.join(words_of(document))} {words_of(text)[0][:3] if len(document) % 2 else ''}"
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE versions (name, version, stamp, entry, name_words, task, description, rest)")
        db.execute("CREATE VIRTUAL TABLE texts USING fts5(name_words, task, description, rest)")
        db.execute("INSERT INTO versions VALUES ('a', 1, '', '', ' a', '', ?, '')", (words,))
        db.execute(
            "INSERT INTO texts (rowid, name_words, task, description, rest) VALUES (1, ' a', '', ?, '')", (words,)
        )
        wanted = words_of(text)[:MAX_WORDS]
        found = [bool(one(db, wanted)) for one in (index_module._find_fts, index_module._find_like)]
    assert found[0] == found[1]


def test_changing_between_fts5_and_like_rebuilds(hub):
    for fts in (False, True, False):
        index = Index(Disk(hub.root), fts=fts and has_fts5())
        assert [ref.name for ref in index.find("headlines")] == ["news"]
        assert index.entries() == truth(hub)
