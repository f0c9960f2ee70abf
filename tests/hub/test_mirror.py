"""A library elsewhere: listed at a pinned commit, transferred only as far as is asked for, and never written to."""

import hashlib

import fsspec
import huggingface_hub
import pytest
import torch

from molora import ConfigError, LoadError
from molora.cli import main
from molora.hub.compose import compose, live
from molora.hub.index import INDEX
from molora.hub.names import Ref
from molora.hub.remote import pull, push
from molora.hub.store import Hub
from tests.adapters import CONFIG, WEIGHTS, change_tensors, logits
from tests.hub.hub_server import Fault, HubServer, client, go_online
from tests.hub.loras import lora
from tests.test_interchange import peft_says
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def online(monkeypatch):
    go_online(monkeypatch)
    monkeypatch.setattr("molora.hub.transfer.PAUSE", 0.0)
    yield
    huggingface_hub.close_session()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def here(tmp_path):
    """A library with two versions of `news`, of other ranks, `films`, and an alias."""
    hub = Hub(tmp_path / "here")
    hub.add(lora(tmp_path / "a", seed=1), "news", task="topic", description="Sorts headlines.", licence="mit")
    hub.add(
        lora(tmp_path / "b", seed=2, rank=3), "news", task="topic", description="Sorts more headlines.", alias="best"
    )
    hub.add(lora(tmp_path / "c", seed=3, dtype=torch.bfloat16), "films", task="tone", metrics={"f1": 0.5})
    return hub


@pytest.fixture
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def web(server):
    return client(server, attempts=2, longest_wait=1.0, timeout=5.0)


@pytest.fixture(params=["hub", "folder of a hub", "memory", "file"])
def elsewhere(request, here, server, web, tmp_path):
    """The same library in each kind of place: its address, and what opens it."""
    files = {str(p.relative_to(here.root)): p.read_bytes() for p in here.root.rglob("*") if p.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith(".")}
    if "hub" in request.param:
        prefix = "lib/" if "folder" in request.param else ""
        server.commit("me/library", {prefix + name: content for name, content in files.items()})
        address = f"hf://me/library{'/lib' if prefix else ''}"
    else:
        address = f"file://{tmp_path}/bucket/lib" if request.param == "file" else "memory://bucket/lib"
        fs, root = fsspec.core.url_to_fs(address)
        for name, content in files.items():
            fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            fs.pipe_file(f"{root}/{name}", content)
    return address, lambda text=address, **options: Hub(text, web=web, cache_dir=tmp_path / "cache", **options)


def told(entry):
    return {key: value for key, value in entry.to_dict().items() if key != "folder"}


def test_it_tells_what_the_library_tells(elsewhere, here):
    there = elsewhere[1]()
    for every in (False, True):
        assert [told(e) for e in there.list(all_versions=every)] == [told(e) for e in here.list(all_versions=every)]
    assert there.aliases() == here.aliases() == {"best": Ref("news", 2)}
    for words in ({"text": "headl"}, {"task": "tone"}, {"base": "llama"}, {"text": "more", "all_versions": True}):
        assert [(h.entry.ref, h.by) for h in there.search(**words)] == [
            (h.entry.ref, h.by) for h in here.search(**words)
        ]
    assert [(h.entry.ref, h.score) for h in there.search(like="news")] == [
        (h.entry.ref, h.score) for h in here.search(like="news")
    ]
    assert there.resolve("best") == Ref("news", 2) and str(there.diff("news@1", "news@2")) == str(
        here.diff("news@1", "news@2")
    )


def test_what_is_got_is_the_same_to_the_byte_and_verifies(elsewhere, here):
    there = elsewhere[1]()
    for name in ("news@1", "best", "films"):
        mine, theirs = here.get(name), there.get(name)
        assert told(mine) == told(theirs)
        assert {p.name: p.read_bytes() for p in mine.folder.iterdir()} == {
            p.name: p.read_bytes() for p in theirs.folder.iterdir()
        }
    assert there.verify() == here.verify() == {Ref("films", 1): [], Ref("news", 1): [], Ref("news", 2): []}
    with pytest.raises(ConfigError, match="did you mean 'news'"):
        there.get("nws")
    with pytest.raises(ConfigError, match="has no version 3; it has: 1, 2"):
        there.get("news@3")


def test_nothing_is_changed_there(elsewhere, here, tmp_path):
    address, opened = elsewhere
    there = opened()
    for change in (
        lambda: there.add(tmp_path / "a", "mine"),
        lambda: there.alias("x", "news"),
        lambda: there.remove("news@1"),
        lambda: pull("me/library/news/1", there),
    ):
        with pytest.raises(ConfigError, match=rf"only read from here.*molora hub push NAME {address}/NAME/1"):
            change()
    assert [told(e) for e in opened().list(all_versions=True)] == [told(e) for e in here.list(all_versions=True)]


def test_names_of_it_are_ingredients(elsewhere, here):
    model = compose(tiny_llama(), ["news", "films@1"], hub=elsewhere[1]()).eval()
    for name in ("news", "films"):
        with live(model).using(name):
            assert (logits(model) - peft_says(here.get(name).folder)).abs().max() < 1e-5


# --- what is transferred ----------------------------------------------------------------------------------------------


@pytest.fixture
def opened(server, web, here, tmp_path):
    """The library on the Hub server, and what opens it."""
    commit = server.commit("me/library", files_of(here))
    server.head = commit
    return lambda text="hf://me/library", **o: Hub(text, **{"web": web, "cache_dir": tmp_path / "cache", **o})


def files_of(hub):
    found = {str(p.relative_to(hub.root)): p.read_bytes() for p in hub.root.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def test_listing_takes_a_few_bytes_of_each_adapter_once(server, opened, here, tmp_path):
    """An adapter of megabytes: listing reads its header and hangs up, and a second process reads nothing at all."""

    big = here.add(lora(tmp_path / "big", rank=2), "big", description="Large.")
    weights = here.root / "big/1" / WEIGHTS
    change_tensors(
        here.root / "big/1", lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(64, 1 << 17)})
    )
    card = big.card.replace(files=big.card.files | {WEIGHTS: hashlib.sha256(weights.read_bytes()).hexdigest()})
    (here.root / "big/1/card.yaml").write_text(card.to_yaml())
    server.commit("me/library", files_of(here))
    server.faults.append(Fault("/cdn/", pause=0.002))  # 33 MB would take more than a minute
    there = opened()
    assert [e.name for e in there.list()] == ["big", "films", "news"]
    assert there.list()[0].bytes == weights.stat().st_size and not list(tmp_path.glob(f"cache/*/files/{WEIGHTS}"))
    server.log.clear()
    assert len(opened().search("large")) == 1
    assert [path for _, path, _ in server.log] == ["/api/models/me/library/revision/main", "/me/library/resolve/" +
                                                   server.refs["me/library", "main"] + "/library.yaml"]  # fmt: skip
    server.faults.clear()
    server.log.clear()
    opened().get("news@1")
    assert len(server.asked("/cdn/")) == 1


def test_it_stays_at_its_commit(server, opened, here, tmp_path):
    first = opened()
    assert first.where == f"hf://me/library@{server.head}"
    here.remove("news@1")
    here.add(lora(tmp_path / "d", seed=9), "tax")
    files = files_of(here)
    server.repos["me/library"][server.commit("me/library", {})].clear()
    second_commit = server.commit("me/library", files)
    server.repos["me/library"][second_commit].pop("news/1/" + WEIGHTS, None)
    assert [str(e.ref) for e in first.list(all_versions=True)] == ["films@1", "news@1", "news@2"]
    assert first.get("news@1").rank == 2
    assert [str(e.ref) for e in opened().list(all_versions=True)] == ["films@1", "news@2", "tax@1"]
    pinned = opened(f"hf://me/library@{server.head}")
    assert [str(e.ref) for e in pinned.list(all_versions=True)] == ["films@1", "news@1", "news@2"]
    server.log.clear()
    opened().get("films"), pinned.get("films"), first.get("films")
    assert len([p for _, p, _ in server.asked("/cdn/")]) == 1  # the same content is transferred once


def test_without_a_network_the_cache_serves(server, opened, monkeypatch, tmp_path):
    opened().get("news")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = opened()
    assert there.disk.offline and there.where == f"hf://me/library@{server.head}"
    assert [str(e.ref) for e in there.list()] == ["films@1", "news@2"]
    assert there.get("best").rank == 3
    with pytest.raises(LoadError, match="offline mode is on"):
        there.get("films")
    with pytest.raises(LoadError, match=r"offline mode is on.*was not read before"):
        opened("hf://me/other")
    weights = there.get("news").folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")  # a cache that was damaged is not believed
    with pytest.raises(LoadError, match="offline mode is on"):
        opened().get("news")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert opened().get("news").rank == 3
    (there.root / INDEX).write_bytes(b"broken")
    assert len(opened().list()) == 2


def test_content_that_is_not_what_was_promised(server, opened):
    server.faults.append(Fault("/cdn/", change=lambda body: body[:-4] + b"\xff\xff\xff\x7f"))
    there = opened()
    with pytest.raises(LoadError, match="is not what was promised: its sha256"):
        there.get("news")
    assert "is not what was promised" in there.verify("news")[Ref("news", 2)][0]
    server.faults[:] = [Fault("card.yaml", change=lambda body: body.replace(b"Sorts", b"Adds!"))]
    with pytest.raises(LoadError, match=r"card.yaml from .* is not what was promised"):
        opened(cache_dir=there.root.parent / "other").list()


def test_an_untrusted_adapter_is_listed_as_damaged_or_refused(server, opened, here, tmp_path):
    files = files_of(here)
    files["news/2/" + WEIGHTS] = b"\xff" * 64
    files["films/1/" + CONFIG] = files["films/1/" + CONFIG].replace(b'"bias": "none"', b'"bias": "all"')
    server.commit("me/library", files)
    there = opened()
    assert "header claims" in there.list()[1].problems[0]
    with pytest.raises(LoadError, match=r"'news@2' is damaged"):
        there.get("news")
    with pytest.raises(LoadError, match=r"'films@1' of .* cannot be trusted"):
        there.get("films")
    found = there.verify()
    assert found[Ref("news", 1)] == [] and found[Ref("news", 2)] and any("bias" in p for p in found[Ref("films", 1)])


def test_refusals_of_the_hub_are_told_and_not_indexed(server, opened, web):
    server.token = "hf_secret"
    with pytest.raises(LoadError, match="401"):
        opened()
    server.token = None
    there = opened()
    server.faults.append(Fault("/resolve/", status=403))
    with pytest.raises(LoadError, match="may not be read"):
        there.list()
    server.faults.clear()
    assert all(not entry.problems for entry in there.list())
    with pytest.raises(LoadError, match="no such revision"):
        opened(revision="nope")


# --- other layouts, storage, commands ---------------------------------------------------------------------------------


def test_repositories_that_are_no_library(server, opened, here, tmp_path):
    """One adapter as people publish it, without a card; and folders that are no versions."""
    folder = lora(tmp_path / "plain", seed=4)
    server.commit_folder("me/news-lora", folder)
    there = opened("hf://me/news-lora")
    (entry,) = there.list()
    assert (str(entry.ref), entry.kind, entry.rank, entry.card.base) == ("news-lora@1", "lora", 2, "tiny/llama")
    got = there.get("news-lora")
    assert got.card.digest and (got.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert there.verify() == {Ref("news-lora", 1): []}
    again = opened("hf://me/news-lora")
    assert again.get("news-lora").digest == got.digest
    for prefix in ("one/", "two/3/", "two/", "con/1/", "deep/er/1/", "checkpoint-5/"):
        server.commit_folder("me/many", folder, prefix)
    many = opened("hf://me/many")
    assert [str(e.ref) for e in many.list()] == ["checkpoint-5@1", "one@1", "two@3"]
    problems = many.verify()[Ref("")]
    assert len(problems) == 2 and "'con'" in problems[0] + problems[1] and "folders of folders" in "".join(problems)
    server.commit("me/empty", {"README.md": b"nothing"})
    with pytest.raises(LoadError, match="holds no adapter"):
        opened("hf://me/empty")


def test_storage_that_changes_after_it_was_opened(here, tmp_path):
    push(here, "news@1", "memory://bucket/lib/news/1")
    there = Hub("memory://bucket/lib", cache_dir=tmp_path / "cache")
    assert there.list()[0].rank == 2
    push(here, "news@2", "memory://bucket/lib/news/1", replace=True)
    with pytest.raises(LoadError, match="has changed since the library was opened; open it again"):
        there.get("news")
    assert Hub("memory://bucket/lib", cache_dir=tmp_path / "cache").get("news").rank == 3
    with pytest.raises(ConfigError, match="has no revisions"):
        Hub("memory://bucket/lib", revision="main", cache_dir=tmp_path / "cache")
    with pytest.raises(LoadError, match="holds no adapter"):
        Hub("memory://bucket/none", cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="addresses of type 'ftp' are not read"):
        Hub("ftp://x/y", cache_dir=tmp_path / "cache")


def test_commands(here, tmp_path, capsys, monkeypatch):
    for ref in ("news@1", "news@2", "films"):
        entry = here.get(ref)
        push(here, ref, f"memory://bucket/lib/{entry.name}/{entry.version}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    capsys.readouterr()

    def run(*words, code=0):
        assert main(["hub", *words, "--root", "memory://bucket/lib"]) == code
        out, err = capsys.readouterr()
        return out + err

    assert run("list").splitlines()[-1].startswith("2 in memory://bucket/lib, ")
    assert "news@2" in run("search", "headlines") and "3 checked, 0 with problems" in run("verify")
    assert f"copied to {tmp_path}/out" in run("get", "news", "--to", f"{tmp_path}/out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (here.get("news").folder / WEIGHTS).read_bytes()
    assert "films@1" in run("similarity") and "molora hub push NAME" in run("remove", "films", code=2)
