"""The page at `/` in a real browser: what it shows of a server with a tiny model, and what can be done with it."""

import json
import re
import time

import httpx
import pytest

from tests import tiny
from tests.serve.adapters import Nothing
from tests.serve.browsing import ask, browser, ended, expect, page, row  # noqa: F401  (fixtures)
from tests.serve.loras import LLAMA, fill, make_loras
from tests.serve.site import WAIT, parts, url  # noqa: F401  (fixtures)


def test_page_loads_alone_and_shows_how_things_stand(page, url):  # noqa: F811
    page.goto(url)
    for name in ("a0", "a1", "a2"):
        expect(row(page, name)).to_contain_text("4")
    expect(row(page, "mix")).to_contain_text("experts")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#engine")).to_contain_text("running")
    assert page.title() == "molora"
    page.guard.check(page)


def test_table_follows_an_adapter_that_is_loaded(page, url, parts):  # noqa: F811
    parts.store.unregister("a2")
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    expect(row(page, "a2")).to_have_count(0)
    kept = row(page, "a0").element_handle()
    fill(parts.store, make_loras(tiny.tiny_llama(), LLAMA, count=3), ["a2"])
    expect(row(page, "a2").locator(".state")).to_have_text("disk")
    row(page, "a2").get_by_role("button", name="Pin a2", exact=True).click()
    expect(row(page, "a2").locator(".state")).to_have_text("ready")
    expect(row(page, "a2")).to_contain_text("ms")
    assert parts.store.entry("a2").pinned
    row(page, "a2").get_by_role("button", name="Unpin a2").click()
    expect(row(page, "a2").get_by_role("button", name="Pin a2", exact=True)).to_be_focused()
    assert not parts.store.entry("a2").pinned
    assert kept.evaluate("row => row.isConnected")  # rows are changed in place
    page.guard.check(page)


def test_failed_load_is_told(page, url, parts):  # noqa: F811
    class Broken(Nothing):
        def load(self):
            raise OSError("the disk is gone")

    parts.store.register("broken", Broken(4))
    try:
        page.goto(url)
        ask(page, "broken")
        expect(page.locator("#ask-error")).to_contain_text("broken")
        page.reload()  # on a busy machine a browser may think itself hidden, and look once a minute
        expect(row(page, "broken").locator(".state")).to_have_text("errored")
        expect(row(page, "broken").locator(".why")).not_to_be_empty()
        page.get_by_role("button", name=re.compile("errored")).click()
        expect(page.locator("#adapters tbody tr")).to_have_count(1)
    finally:
        parts.store.unregister("broken")


def test_mixture_streams_tokens_with_their_routing(page, url, parts):  # noqa: F811
    page.goto(url)
    expect(row(page, "mix")).to_be_visible()
    with parts.gate.shut() as gate:
        ask(page, "mix", tokens=8)
        gate.let(3)
        drawn = page.locator(".token:not(.of-prompt)")
        expect(drawn).to_have_count(3)  # the others are still to come: they are not drawn yet
        expect(page.locator("#progress")).to_have_text("Answering …")
        gate.let(1)
        expect(drawn).to_have_count(4)
        gate.let(100)
        ended(page)
    expect(page.locator(".token.of-prompt")).to_have_count(5)  # with <s>
    body = {"model": "mix", "prompt": "the film was good", "max_tokens": 8, "temperature": 0, "molora": {"trace": True}}
    told = httpx.post(f"{url}/v1/completions", json=body).json()["molora"]
    traces = [*told["prompt_trace"], *told["trace"]]
    assert [int(one) for one in page.locator(".token").evaluate_all("all => all.map(one => one.dataset.label)")] == [
        one["experts"][0][0] for one in traces
    ]
    expect(page.locator("#strip .bar")).to_have_count(len(traces))
    page.locator(".token").nth(2).click()
    facts = page.locator("#token")
    expect(facts).to_contain_text(f"entropy {traces[2]['entropy']:.2f}")
    for number, gate in traces[2]["experts"]:
        expect(facts.get_by_role("listitem").filter(has_text=f"expert {number}")).to_contain_text(f"{gate:.3f}")
    parts_of_all = page.locator("#legend li .number").all_text_contents()
    assert sum(float(text.split()[0]) for text in parts_of_all) == pytest.approx(100, abs=len(parts_of_all))
    page.guard.check(page)


def test_stop_ends_the_request(page, url, parts):  # noqa: F811
    page.goto(url)
    expect(row(page, "mix")).to_be_visible()
    with parts.gate.shut() as gate:
        ask(page, "a0", tokens=50)
        gate.let(2)
        expect(page.locator(".token")).to_have_count(2)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#progress")).to_have_text("Stopped after 2 pieces.")
        gate.let(1)
        end = time.monotonic() + WAIT
        while parts.engine.stats().running and time.monotonic() < end:
            gate.let(1)
            time.sleep(0.01)
        assert parts.engine.stats().running == 0
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()


def test_auto_says_what_it_chose_and_why(page, url):  # noqa: F811
    page.goto(url)
    expect(row(page, "mix")).to_be_visible()
    ask(page, "auto", "a1 a0 the film")
    ended(page)
    expect(page.locator("#chosen")).to_contain_text("auto (words) chose a0 (0.50), a1 (0.50)")
    expect(page.locator("#chosen")).to_contain_text("the prompt names a0 and a1")
    expect(page.locator("#legend")).to_contain_text("0.500")
    ask(page, "auto", "the film")
    expect(page.locator("#chosen")).to_contain_text("no adapter: the base model answers alone")
    page.guard.check(page)


def test_weights_in_the_model_field_make_a_mix(page, url):  # noqa: F811
    page.goto(url)
    expect(row(page, "mix")).to_be_visible()
    with page.expect_request("**/v1/completions") as sent:
        ask(page, "a0:0.7, a1:-0.25")
    body = json.loads(sent.value.post_data)
    assert body["model"] == "tiny" and body["molora"]["adapters"] == {"a0": 0.7, "a1": -0.25}
    ended(page)
    expect(page.locator("#legend")).to_contain_text("0.700")
    ask(page, "a0:much")
    expect(page.locator("#ask-error")).to_contain_text("name:number")
