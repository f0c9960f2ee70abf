"""/v1/overview, which a key is shown its own part of, and the files of the page."""

import re

import httpx
import pytest

from tests.serve.adapters import Nothing
from tests.serve.site import guarded, overview, parts, url  # noqa: F401  (fixtures)


def test_parts_come_with_a_policy_that_lets_nothing_else_run(url):  # noqa: F811
    page = httpx.get(url)
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"/page/page.js", "/page/page.css"} <= set(named)
    for path in ["/", *(name for name in named if name.startswith("/")), "/page/common.js", "/page/tables.js"]:
        found = httpx.get(url + path)
        policy = found.headers["content-security-policy"]
        assert found.status_code == 200
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\b", found.text)
    for path in ("/page/page.py", "/page/..%2fpage.py", "/page/index.html", "/page/"):
        assert httpx.get(url + path).status_code == 404
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text)


def test_overview_shows_a_key_what_it_may_see(guarded):  # noqa: F811
    ann, bob = overview(guarded.url, guarded.ann).json(), overview(guarded.url, guarded.bob).json()
    admin = overview(guarded.url, guarded.admin).json()
    assert [one["name"] for one in ann["adapters"]["data"]] == ["a0", "mix"]
    assert ann["adapters"]["total"] == sum(ann["adapters"]["states"].values()) == 2
    assert [one["tenant"] for one in ann["shares"]] == ["ann"] and ann["engine"] is None
    assert [one["tenant"] for one in bob["shares"]] == ["bob"] and bob["engine"] is None
    assert bob["adapters"]["total"] == admin["adapters"]["total"] >= 4
    assert admin["engine"]["healthy"] is True
    assert (admin["caller"]["kind"], ann["caller"]["name"], bob["caller"]["manage"]) == ("admin", "ann", True)
    for key in (None, "wrong", guarded.ann + "x"):
        refused = overview(guarded.url, key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_overview_filters_and_pages(url, parts):  # noqa: F811
    for number in range(7):
        parts.store.register(f"Paged/{number}", Nothing(4))
    try:
        names = [f"Paged/{number}" for number in range(7)]
        pages = [overview(url, contains="pAGED", offset=at, limit=3).json()["adapters"] for at in (0, 3, 6, 9)]
        assert [one["name"] for page in pages for one in page["data"]] == names
        assert {page["found"] for page in pages} == {7}
        assert overview(url, contains="Paged", state="ready").json()["adapters"]["found"] == 0
        assert overview(url, contains="Paged", state="disk").json()["adapters"]["found"] == 7
        wrong = overview(url, limit=1000)
        assert wrong.status_code == 400 and "limit" in wrong.json()["error"]["message"]
    finally:
        for name in names:
            parts.store.unregister(name)


def test_shares_add_up_and_are_by_weight(guarded):  # noqa: F811
    for key, count in ((guarded.ann, 3), (guarded.bob, 9)):
        body = {"model": "tiny", "prompt": "the film", "max_tokens": count, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{guarded.url}/v1/completions", json=body, headers=headers).status_code == 200
    shares = {one["tenant"]: one for one in overview(guarded.url, guarded.admin).json()["shares"]}
    costs = {name: one["input"] + 2 * one["output"] for name, one in shares.items()}
    assert shares["bob"]["output"] - 9 >= 0 and shares["ann"]["output"] >= 3
    assert sum(one["share"] for one in shares.values()) == pytest.approx(1)
    assert sum(one["due"] for one in shares.values()) == pytest.approx(1)
    assert shares["ann"]["due"] == pytest.approx(3 * shares["bob"]["due"])
    assert shares["bob"]["share"] / shares["ann"]["share"] == pytest.approx(costs["bob"] / costs["ann"])
    assert overview(guarded.url, guarded.ann).json()["shares"] == [shares["ann"]]
