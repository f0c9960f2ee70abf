"""pull and push against a small Hub on 127.0.0.1 and fsspec's file systems: every way in which they can go wrong."""

import json
import shutil
import time
from email.utils import formatdate
from pathlib import Path

import fsspec
import huggingface_hub
import pytest

from molora import ConfigError, LoadError
from molora.cli import main
from molora.hub.address import parse_address
from molora.hub.card import read_card
from molora.hub.limits import Limits
from molora.hub.remote import adapters_at, pull, push
from molora.hub.store import Hub
from molora.hub.web import Web
from tests.adapters import CONFIG, WEIGHTS, change_config
from tests.hub.hub_server import Fault, HubServer, client, git_hash, go_online, sha256
from tests.test_interchange import peft_lora
from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return peft_lora(tmp_path_factory.mktemp("lora") / "news", 1, r=16, target_modules="all-linear")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    go_online(monkeypatch)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def server(lora):
    server = HubServer()
    server.head = server.commit_folder("me/news", lora)
    yield server
    server.close()


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "library")


@pytest.fixture
def web(server):
    return client(server, attempts=3, longest_wait=5.0, timeout=5.0)


@pytest.fixture
def get(hub, web, tmp_path, monkeypatch):
    """pull with a cache of the test's own, and without pauses."""
    monkeypatch.setattr("molora.hub.transfer.PAUSE", 0.0)
    return lambda address="me/news", **options: pull(
        address, hub, **{"web": web, "cache_dir": tmp_path / "cache", **options}
    )


def refused(call, hub, message, error=LoadError):
    """The call raises, and the library has nothing new."""
    before = [str(entry.ref) for entry in hub.list(all_versions=True)] if hub.root.is_dir() else []
    with pytest.raises(error, match=message) as caught:
        call()
    if hub.root.is_dir():
        assert [str(entry.ref) for entry in hub.list(all_versions=True)] == before
        assert not [path for path in hub.root.iterdir() if path.name.startswith(".draft")]
    return str(caught.value)


def same_files(one, two, names=(CONFIG, WEIGHTS)):
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_the_server_speaks_as_huggingface_hub_expects(server, lora, tmp_path):
    """The Hub's own client reads it: otherwise the tests below would prove little."""
    api = huggingface_hub.HfApi(endpoint=server.url, token=False)
    info = api.model_info("me/news", files_metadata=True)
    weights = next(file for file in info.siblings if file.rfilename == WEIGHTS)
    assert info.sha == server.head and weights.lfs.sha256 == sha256((lora / WEIGHTS).read_bytes())
    for name in (CONFIG, WEIGHTS):
        got = huggingface_hub.hf_hub_download(
            "me/news", name, endpoint=server.url, token=False, cache_dir=tmp_path / "hf"
        )
        assert Path(got).read_bytes() == (lora / name).read_bytes()


def test_pull_brings_the_adapter_at_a_commit(server, hub, get, lora):
    got = get()
    assert str(got.entry.ref) == "news@1" and got.revision == server.head and not got.offline
    same_files(got.entry.folder, lora)
    assert hub.verify("news")[got.entry.ref] == []
    newer = server.commit("me/news", {"README.md": b"# newer\n"})
    assert get().revision == newer and str(get().entry.ref) == "news@2"
    pinned = get(revision=server.head, name="first")
    assert pinned.revision == server.head and pinned.entry.digest == got.entry.digest
    assert get(f"me/news@{server.head}", name="second").entry.digest == got.entry.digest
    page = get(f"{server.url}/me/news/tree/{server.head}", name="third")
    assert page.entry.digest == got.entry.digest


def test_only_the_files_of_an_adapter_are_transferred(server, get):
    server.commit("me/news", {"run.py": b"boom", "training_args.bin": b"\x80", "checkpoint-1/optimizer.pt": b"\x80"})
    folder = get().entry.folder
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "card.yaml"]
    assert not server.asked("run.py") and not server.asked(".bin") and not server.asked("checkpoint-1")


def test_folders_and_versions_in_a_repository(server, get, lora):
    for prefix in ("lib/news/1/", "lib/news/2/", "lib/tax/1/"):
        server.commit("me/many", {prefix + p.name: p.read_bytes() for p in lora.iterdir()})
    got = get("hf://me/many/lib/news")
    assert got.where.endswith("/lib/news/2") and got.entry.name == "news"
    with pytest.raises(LoadError, match="several adapters: lib/news/1, lib/news/2, lib/tax/1; name the folder of one"):
        get("me/many")


@pytest.mark.parametrize("cut", [0, 1, 1000])
def test_a_broken_connection_is_resumed_with_a_range(server, get, lora, cut):
    server.faults.append(Fault("/cdn/", times=2, cut=cut))
    got = get()
    same_files(got.entry.folder, lora)
    ranges = [headers.get("range") for _, _, headers in server.asked("/cdn/")]
    # the second answer is cut after as many bytes again
    assert ranges == [None, f"bytes={cut}-" if cut else None, f"bytes={2 * cut}-" if cut else None]


def test_a_file_that_stays_truncated_is_refused_and_the_next_pull_goes_on(server, hub, get, lora):
    size = (lora / WEIGHTS).stat().st_size
    server.faults.append(Fault("/cdn/", cut=700, times=1))
    server.faults.append(Fault("/cdn/", cut=0))
    message = refused(get, hub, "truncated: 700 of .* bytes came")
    assert f"{size:,}" in message and "the same command again goes on from there" in message
    server.faults.clear()
    server.log.clear()
    same_files(get().entry.folder, lora)
    assert [headers.get("range") for _, _, headers in server.asked("/cdn/")] == ["bytes=700-"]
    assert not server.asked("/resolve/" + server.head + "/" + CONFIG)  # whole already


def test_a_file_that_is_shorter_than_promised_is_truncated_too(server, hub, get):
    server.faults.append(Fault("/cdn/", content=lambda content: content[:700]))
    refused(get, hub, "adapter_model.safetensors .* is truncated: there are no more than 700 of the .* bytes promised")
    assert [headers.get("range") for _, _, headers in server.asked("/cdn/")] == [None, "bytes=700-"]


def test_short_answers_are_put_together(server, get, lora):
    server.faults.append(Fault("/cdn/", short=2000))
    same_files(get().entry.folder, lora)


def test_a_server_that_always_starts_over_is_given_up(server, hub, get):
    server.faults.append(Fault("/cdn/", cut=700, ignore_range=True))
    refused(get, hub, "truncated: 700 of")


def test_a_server_without_ranges_starts_over(server, get, lora):
    server.faults.append(Fault("/cdn/", times=1, cut=900))
    server.faults.append(Fault("/cdn/", ignore_range=True))
    same_files(get().entry.folder, lora)


def test_a_server_that_sends_another_range_is_refused(server, hub, get):
    server.faults.append(Fault("/cdn/", times=1, cut=900))
    server.faults.append(Fault("/cdn/", status=206, headers={"Content-Range": "bytes 5-9/100"}))
    refused(get, hub, "sends another part of adapter_model.safetensors than was asked for")


def test_wrong_content_is_refused_and_not_kept(server, hub, get, lora, tmp_path):
    flip = Fault("/cdn/", change=lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    server.faults.append(flip)
    message = refused(get, hub, "is not what was promised: its sha256 is not [0-9a-f]{64}")
    assert sha256((lora / WEIGHTS).read_bytes()) in message
    assert not list((tmp_path / "cache").glob(f"*/files/{WEIGHTS}*"))
    server.faults[:] = [Fault(CONFIG, change=lambda body: body.replace(b"16", b"61"))]
    message = refused(lambda: get(cache_dir=tmp_path / "other"), hub, "its git hash is not")
    assert git_hash((lora / CONFIG).read_bytes()) in message
    server.faults.clear()
    same_files(get().entry.folder, lora)


def test_a_longer_file_is_stopped_at_the_promised_size(server, hub, get):
    server.faults.append(Fault("/cdn/", change=lambda body: body + bytes(1 << 20)))
    refused(get, hub, "longer than the .* bytes that were promised")


def test_a_hash_that_changes_under_way_is_refused(server, hub, get):
    server.faults.append(Fault(f"/{WEIGHTS}", headers={"X-Linked-Etag": '"' + "0" * 64 + '"'}))
    refused(get, hub, "is now said to have sha256 0000")
    server.faults[:] = [Fault(f"/{WEIGHTS}", headers={"X-Repo-Commit": "f" * 40})]
    refused(get, hub, "comes from commit 'ffff")


def test_sizes_are_refused_before_a_byte_is_asked_for(server, hub, get):
    refused(lambda: get(limits=Limits(weights=100)), hub, "its weights have .* bytes, 100 are allowed")
    server.commit("me/news", {"README.md": bytes(2_000_000)})
    refused(get, hub, r"README.md' has 2,000,000 bytes")
    assert not server.asked("/resolve/") and not server.asked("/cdn/")


def test_the_token_goes_to_the_hub_alone(server, hub, get, lora):
    server.token = "hf_secret"
    message = refused(get, hub, r"may not be read \(401\).*Invalid username.*hf auth login")
    assert "hf_secret" not in message
    refused(lambda: get(web=client(server, "hf_wrong")), hub, "401")
    store = HubServer()
    try:
        store.store = server.store
        content = (lora / WEIGHTS).read_bytes()
        server.faults.append(Fault(f"/{WEIGHTS}", redirect=f"{store.url}/cdn/{sha256(content)}"))
        host = store.url.removeprefix("http://")
        same_files(get(web=client(server, "hf_secret", hosts=[host])).entry.folder, lora)
        assert store.log and not any("authorization" in headers for _, _, headers in store.log)
        asked = [headers.get("authorization") for _, _, headers in server.log[-3:]]
        assert asked == ["Bearer hf_secret"] * 3
    finally:
        store.close()


@pytest.mark.parametrize(
    "status, headers, message",
    [
        (404, {"X-Error-Code": "RepoNotFound"}, r"nothing at .*me/news.* \(404\)"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask first"}, "is gated .*Ask first"),
        (403, {"X-Error-Message": "\x1b[31mred"}, r"\(403\).*x1b\[31mred"),
        (418, {}, "failed with status 418"),
    ],
)
def test_refusals_of_the_hub(server, hub, get, status, headers, message):
    server.faults.append(Fault("/api/models/", status=status, headers=headers))
    text = refused(get, hub, message)
    assert "\x1b" not in text
    assert len(server.log) == 1  # asked once


def test_missing_things(server, hub, get):
    refused(lambda: get("me/nothing"), hub, r"nothing at .*\(404\)")
    refused(lambda: get(revision="v9"), hub, "no such revision")
    server.commit("me/empty", {"README.md": b""})
    refused(lambda: get("me/empty"), hub, f"'me/empty' holds no adapter: there is no {CONFIG}")
    server.commit("me/pickle", {CONFIG: b"{}", "adapter_model.bin": b"\x80\x04."})
    refused(lambda: get("me/pickle"), hub, "only 'adapter_model.bin', a pickle, which can run any code")
    server.faults.append(Fault(f"/{WEIGHTS}", status=404, headers={"X-Error-Code": "EntryNotFound"}))
    refused(get, hub, "no such file")


def test_rate_limits_are_waited_for(server, hub, get, lora, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults.append(Fault("/api/models/", times=1, status=429, headers={"Retry-After": "3"}))
    date = formatdate(time.time() + 4, usegmt=True)
    server.faults.append(Fault("/cdn/", times=1, status=503, headers={"Retry-After": date}))
    same_files(get().entry.folder, lora)
    assert waits[0] == 3.0 and 2.0 < waits[1] <= 4.0
    waits.clear()
    server.faults[:] = [Fault("/api/models/", status=429, headers={"Retry-After": "3600"})]
    refused(get, hub, r"too many requests \(429\); it asks to wait 3600 s: try again later")
    assert waits == []
    server.faults[:] = [Fault("/api/models/", status=429)]
    server.log.clear()
    refused(get, hub, r"\(429\), 3 times: try again later")
    assert len(server.log) == 3 and waits == [1.0, 2.0]


def test_redirects_to_other_hosts_are_refused(server, hub, get):
    other = HubServer()
    try:
        for target in (f"{other.url}/cdn/x", "http://169.254.169.254/latest", "file:///etc/passwd", "ftp://a/b"):
            server.faults[:] = [Fault(f"/{WEIGHTS}", redirect=target)]
            message = refused(get, hub, "redirects to .*not one of the hosts it may use; .*hosts=")
            assert target.split("//")[0] in message
        server.faults[:] = [Fault("/api/models/", redirect=f"{other.url}/api/models/me/news")]
        refused(get, hub, "not one of the hosts")
        assert not other.log
        server.faults[:] = [Fault("/api/models/", redirect=f"{server.url}/api/models/me/news/revision/main")]
        refused(get, hub, "redirects more than 5 times")
    finally:
        other.close()


@pytest.mark.parametrize(
    "url, allowed",
    [
        ("https://cdn-lfs.hf.co/x", True),
        ("https://cas-bridge.xethub.hf.co/x", True),
        ("https://huggingface.co/other/repo", True),
        ("http://cdn-lfs.hf.co/x", False),
        ("https://cdn-lfs.hf.co:8443/x", False),
        ("https://hf.co.evil.org/x", False),
        ("https://evilhf.co/x", False),
        ("https://huggingface.co@evil.org/x", False),
        ("https://127.0.0.1/x", False),
        ("https://cdn-lfs.hf.co:99999/x", False),
        ("https://mine.example.com/x", True),
        ("http://mine.example.com/x", False),
    ],
)
def test_hosts_of_the_public_hub(url, allowed):
    assert Web("https://huggingface.co", False, hosts=["mine.example.com"]).allows(url) is allowed


def test_offline_uses_what_was_pulled_before(server, hub, web, get, monkeypatch, tmp_path):
    first = get()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = get(name="again")
    assert again.offline and again.revision == server.head and again.entry.digest == first.entry.digest
    refused(lambda: get("me/other"), hub, "offline mode is on .*not in the cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.close()
    huggingface_hub.close_session()  # and the connection that was kept
    web.attempts = 1
    assert get(name="third").offline
    weights = next((tmp_path / "cache").glob(f"*/files/{WEIGHTS}"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    refused(lambda: get(name="fourth"), hub, "cannot be reached.*not in the cache")


def test_answers_that_are_no_answers(server, hub, get):
    refuse = ["does not answer with JSON", "does not answer with JSON", "does not answer as a Hub does"]
    for body, message in zip([b"<html>", b"[" * 100_000, b'{"sha": "x"}'], refuse, strict=True):
        server.faults[:] = [Fault("/api/models/", change=lambda old, body=body: body)]
        refused(get, hub, message)
    sizes = {"sha": server.head, "siblings": [{"rfilename": n, "size": -1, "blobId": "x"} for n in (CONFIG, WEIGHTS)]}
    server.faults[:] = [Fault("/api/models/", change=lambda old: json.dumps(sizes).encode())]
    refused(get, hub, "tells no size and hash")
    server.faults[:] = [Fault("/api/models/", change=lambda old: bytes(17_000_000))]
    refused(get, hub, "more than 16,000,000 bytes")


def test_what_is_pulled_is_checked(server, hub, get, lora, tmp_path):
    bad = shutil.copytree(lora, tmp_path / "bad")
    change_config(bad, use_dora=True)
    server.commit_folder("me/bad", bad)
    refused(lambda: get("me/bad"), hub, "cannot be trusted: use_dora=True: DoRA also rescales")
    refused(lambda: get(base=tiny_llama(hidden_size=64)), hub, "needs A")
    refused(lambda: get(limits=Limits(rank=8)), hub, "its rank is 16, 8 is allowed")
    refused(lambda: get(name="../up"), hub, "cannot be used", ConfigError)


# --- pushing ----------------------------------------------------------------------------------------------------------


def test_push_then_pull_is_the_same_adapter(server, hub, web, get, lora):
    entry = hub.add(lora, "news", task="topic", description="Sorts headlines.", licence="mit")
    gone = push(hub, "news", "me/fresh", private=True, web=web)
    assert gone.revision == server.refs["me/fresh", "main"] and set(gone.sent) >= {CONFIG, WEIGHTS, "card.yaml"}
    back = get("me/fresh", name="back")
    assert back.entry.digest == entry.digest and read_card(back.entry.folder) == entry.card
    assert back.revision == gone.revision
    again = push(hub, "news", "me/fresh", web=web)
    assert again.sent == () and again.revision == gone.revision  # nothing to do, so no commit
    folder = push(hub, "news", "hf://me/fresh/adapters/news", web=web)
    assert get("hf://me/fresh/adapters/news", name="deep").entry.digest == entry.digest
    assert folder.where.endswith("/adapters/news") and len(server.repos["me/fresh"]) == 3


def test_an_interrupted_push_goes_on(server, hub, web, lora):
    hub.add(lora, "news")
    server.store.clear()
    server.faults.append(Fault("/commit/", times=1, status=400))
    with pytest.raises(LoadError, match="'news@1' was not sent to 'me/fresh'"):
        push(hub, "news", "me/fresh", web=web)
    assert len([entry for entry in server.log if entry[0] == "PUT"]) == 1
    push(hub, "news", "me/fresh", web=web)
    assert len([entry for entry in server.log if entry[0] == "PUT"]) == 1  # the weights were there


def test_push_refuses_what_is_damaged_and_what_arrives_changed(server, hub, web, lora):
    entry = hub.add(lora, "news")
    server.token = "hf_secret"
    with pytest.raises(LoadError, match=r"was not sent to 'me/fresh'.*401"):
        push(hub, "news", "me/fresh", web=web)
    server.token = None
    old = server.commit
    server.commit = lambda repo, files, branch="main": old(repo, {k: v + b" " for k, v in files.items()}, branch)
    with pytest.raises(LoadError, match="is not there as it was sent"):
        push(hub, "news", "me/fresh", web=web)
    (entry.folder / "README.md").write_text("changed")
    with pytest.raises(LoadError, match=r"damaged and was not sent: README.md has other content"):
        push(hub, "news", "me/other", web=web)
    assert "me/other" not in server.repos


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    yield f"file://{tmp_path}/bucket" if request.param == "file" else "memory://bucket"
    fsspec.filesystem("memory").store.clear()


def test_storage_there_and_back(bucket, hub, get, lora):
    entry = hub.add(lora, "news", task="topic")
    assert push(hub, "news", f"{bucket}/lib/news/3").sent[-1] == "card.yaml"  # without it the rest is no adapter
    assert push(hub, "news", f"{bucket}/lib/news/3").sent == ()
    got = get(f"{bucket}/lib/news", name="back")
    assert got.entry.digest == entry.digest and got.revision == "" and got.where.endswith("news/3")
    assert get(f"{bucket}/lib/news", name="pinned", digest=entry.digest).entry.digest == entry.digest
    refused(lambda: get(f"{bucket}/lib/news", name="x", digest="0" * 64), hub, "has digest .*, 0000")
    refused(lambda: get(f"{bucket}/lib/tax"), hub, "holds no adapter")
    other = hub.add(lora, "other", task="other")
    with pytest.raises(ConfigError, match=r"holds another adapter.*replace=True"):
        push(hub, "other", f"{bucket}/lib/news/3")
    push(hub, "other", f"{bucket}/lib/news/3", replace=True)
    assert read_card(get(f"{bucket}/lib/news", name="swapped").entry.folder) == other.card


def test_an_interrupted_push_to_storage_is_no_adapter(bucket, hub, get, lora, tmp_path, monkeypatch):
    """Neither a first push nor one that replaces another adapter leaves a mixture that anybody would take."""
    hub.add(lora, "old")
    hub.add(peft_lora(tmp_path / "new", 2, r=16, target_modules="all-linear"), "new")
    for name, options in (("old", {}), ("new", {"replace": True})):
        fs = fsspec.filesystem(bucket.partition(":")[0])
        real = type(fs).open

        def broken(self, path, mode="rb", *args, **kwargs):
            if mode == "wb" and path.endswith(WEIGHTS):
                raise OSError("no more")
            return real(self, path, mode, *args, **kwargs)  # noqa: B023

        monkeypatch.setattr(type(fs), "open", broken)
        with pytest.raises(LoadError, match=r"was not sent to .*no more"):
            push(hub, name, f"{bucket}/x", **options)
        monkeypatch.undo()
        refused(lambda: get(f"{bucket}/x", name="taken"), hub, "holds no adapter: there is no adapter_config.json")
        push(hub, name, f"{bucket}/x")  # goes on, and needs no second permission to replace
        assert get(f"{bucket}/x", name=f"{name}-back").entry.digest == hub.get(name).digest


def test_storage_that_changes_or_breaks_is_refused(bucket, hub, get, lora, monkeypatch):
    hub.add(lora, "news")
    push(hub, "news", f"{bucket}/news")
    fs, path = fsspec.core.url_to_fs(f"{bucket}/news/{WEIGHTS}")
    content = fs.cat_file(path)
    fs.pipe_file(path, content[:-1] + b"\0")
    refused(lambda: get(f"{bucket}/news", name="a"), hub, "is not what was promised: its sha256")
    fs.pipe_file(path, content[:-7])
    refused(lambda: get(f"{bucket}/news", name="a"), hub, "is not what was promised|truncated")
    push(hub, "news", f"{bucket}/news")  # mends it
    assert get(f"{bucket}/news", name="a").entry.name == "a"
    fs.rm_file(path.replace(WEIGHTS, "card.yaml"))
    config = path.replace(WEIGHTS, CONFIG)
    fs.pipe_file(config, b"{}")
    refused(lambda: get(f"{bucket}/news", name="b"), hub, "only LORA adapters")


def test_a_link_in_storage_is_refused(hub, get, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "there")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    refused(lambda: get(f"file://{folder}"), hub, "README.md in .* is a link")


@pytest.mark.parametrize(
    "address, message",
    [
        ("a/b/../c", "names the folder"),
        ("s3://bucket/../other", r"holds '\.\.'"),
        ("simplecache::s3://bucket", "simplecache::s3"),
        ("http://127.0.0.1/a/b", "no page of the Hub"),
        ("github://a/b", "addresses of type 'github' are not read; known: hf, https, s3"),
        ("ssh://host/x", "not read"),
        ("a b/c", "no address of an adapter"),
        ("a/b@..", "no branch, tag or commit"),
        ("../../etc", "no address of an adapter"),
        ("", "no address of an adapter"),
    ],
)
def test_addresses_that_are_none(address, message):
    with pytest.raises(ConfigError, match=message):
        parse_address(address, "https://huggingface.co")


def test_addresses():
    read = lambda text: parse_address(text, "https://huggingface.co")  # noqa: E731
    assert (read("a/b").repo, read("a/b").revision, read("a/b").folder, read("a/b").name) == ("a/b", None, "", "b")
    pinned = read("hf://a/b@v1/lib/news/2")
    assert (pinned.repo, pinned.revision, pinned.folder, pinned.name) == ("a/b", "v1", "lib/news/2", "news")
    page = read("https://huggingface.co/a/b/tree/main/lib/news")
    assert (page.repo, page.revision, page.folder) == ("a/b", "main", "lib/news")
    assert read("https://huggingface.co/a/b").repo == "a/b"
    assert (
        read("s3://bucket/lib/news/").text == "s3://bucket/lib/news" and read("s3://bucket/lib/news/2").name == "news"
    )


# --- commands, and kills ----------------------------------------------------------------------------------------------


def test_commands(server, tmp_path, capsys, monkeypatch):
    """The real command line, from arguments to output and exit codes."""

    def run(*words, code=0):
        got = main(["hub", *words])
        out, err = capsys.readouterr()
        assert got == code, err
        return out if code == 0 else err

    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    root, at = tmp_path / "library", ["--root", str(tmp_path / "library"), "--endpoint", server.url]
    here = [*at, "--cache", str(tmp_path / "cache"), "--allow-host", server.cdn.removeprefix("http://")]
    out = run("pull", "me/news", "--quiet", *here)
    assert f"news@1 is in {root}" in out and f"molora hub pull me/news --revision {server.head}" in out
    facts = json.loads(run("pull", "me/news", "--name", "two", "--json", *here))
    assert facts["ref"] == "two@1" and facts["revision"] == server.head
    out = run("push", "news", f"file://{tmp_path}/out/news", *at)
    assert "sent: README.md, adapter_model.safetensors, adapter_config.json, card.yaml" in out
    assert "100 are allowed" in run("pull", "me/news", "--max-bytes", "100", *here, code=2)
    assert "its rank is 16, 8 is allowed" in run("pull", "me/news", "--max-rank", "8", *here, code=2)
    run("push", "two", f"file://{tmp_path}/out/two/7", *at)
    got = json.loads(run("pull", f"file://{tmp_path}/out", "--all", "--json", *here))
    assert [(one["ref"], one["from"].rpartition("/out/")[2]) for one in got] == [("news@1", "news"), ("two@1", "two/7")]
    assert "--name, --alias and --digest are for one" in run("pull", "me/news", "--all", "--name", "x", *here, code=2)


def test_adapters_of_a_library_elsewhere(server, web, bucket, hub, get, lora):
    for prefix in ("lib/news/1/", "lib/news/10/", "lib/news/9/", "lib/tax/1/", "plain/"):
        commit = server.commit("me/many", {prefix + p.name: p.read_bytes() for p in lora.iterdir()})
    base = f"hf://me/many@{commit}"
    expected = [f"{base}/lib/news/10", f"{base}/lib/tax/1", f"{base}/plain"]
    assert adapters_at("me/many", web=web) == expected and adapters_at("hf://me/many/lib", web=web) == expected[:2]
    assert adapters_at("me/news", web=web) == [f"hf://me/news@{server.head}"]
    assert [get(one).entry.name for one in expected] == ["news", "tax", "plain"]
    for entry in hub.list():
        push(hub, str(entry.ref), f"{bucket}/lib/{entry.name}/{entry.version}")
    there = adapters_at(f"{bucket}/lib")
    assert there == [f"{bucket}/lib/{name}/1" for name in ("news", "plain", "tax")]
    other = Hub(hub.root.parent / "other")
    for one in there:
        pull(one, other, cache_dir=hub.root.parent / "cache")
    assert [(e.ref, e.digest, e.card) for e in other.list()] == [(e.ref, e.digest, e.card) for e in hub.list()]


def test_progress_counts_every_byte_once(server, hub, web, lora, tmp_path, monkeypatch):
    from molora.hub import remote
    from molora.hub.sources import HubSource
    from molora.hub.transfer import download

    server.faults.append(Fault("/cdn/", times=1, cut=900))
    server.faults.append(Fault("/cdn/", times=1, cut=1000, ignore_range=True))
    source = HubSource(web, parse_address("me/news", web.endpoint))
    counts = []
    remote.download(source, tmp_path / "place", progress=counts.append)
    total = sum(file.size for file in source.files.values())
    assert sum(counts) == total
    counts.clear()
    download(source, tmp_path / "place", progress=counts.append)
    assert sum(counts) == total
