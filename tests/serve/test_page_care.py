"""The page at `/` in a real browser: hostile texts, many adapters, small screens, and no mouse."""

import json
import time

import pytest

from tests.serve.adapters import Nothing
from tests.serve.browsing import (  # noqa: F401  (fixtures)
    CONTRASTS,
    HOSTILE,
    NAME_OF_FOCUS,
    ask,
    browser,
    ended,
    expect,
    page,
    refuse,
    row,
)
from tests.serve.site import guarded, parts, url  # noqa: F401  (fixtures)

# --- what others wrote ----------------------------------------------------------------------------------------------


def test_hostile_names_and_answers_are_text(page, url):  # noqa: F811
    def hostile(route):
        told = route.fetch().json()
        told["model"] = told["caller"]["name"] = HOSTILE
        told["selectors"] = [HOSTILE, "other"]
        for one in told["adapters"]["data"]:
            one.update(name=f"{one['name']}{HOSTILE}", error=HOSTILE, state=HOSTILE, kind="mixture", rank=HOSTILE)
        told["adapters"]["states"][HOSTILE] = 3
        told["shares"] = [{"tenant": HOSTILE, "weight": 1, "input": 1, "output": 1, "waiting": 0, "share": 1, "due": 1}]
        route.fulfill(json=told)

    trace = [{"token": HOSTILE, "experts": [[HOSTILE, 0.5]], "entropy": 0.1}]
    chosen = {"adapters": {HOSTILE: 1}, "why": HOSTILE, "selector": HOSTILE, "scores": {HOSTILE: 1}, "abstained": False}
    events = [
        {"choices": [{"index": 0, "text": HOSTILE}], "molora": {"trace": trace, "prompt_trace": trace}},
        {"choices": [{"index": 0, "text": "", "finish_reason": HOSTILE}], "molora": chosen},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/overview*", hostile)
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": HOSTILE}]}))
    page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    page.goto(url)
    ask(page, HOSTILE.replace(":", ""))
    ended(page)
    page.locator(".token").nth(1).click()
    expect(page.locator("#token")).to_contain_text("<img src=x")
    expect(page.locator("#chosen")).to_contain_text("<script>")
    expect(page.locator("#adapters tbody")).to_contain_text("<img src=x")
    refuse(page, "**/v1/chat/completions", 400, HOSTILE)
    page.get_by_label("As a chat").check()
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("#ask-error")).to_contain_text("<img src=x")
    assert page.locator("img, main script, svg, iframe").count() == 0
    page.guard.check(page, expected=[400])


def test_policy_stops_what_would_slip_through(page, url):  # noqa: F811
    """The second wall: were a text ever to become markup, the browser would refuse it."""
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    assert page.evaluate("(text) => { try { document.body.innerHTML = text } catch (error) { return error.name } }",
                         HOSTILE) == "TypeError"  # fmt: skip
    assert page.evaluate("window.hacked") == 0 and page.evaluate("window.violations.length") > 0


# --- many adapters, small screens, no mouse -------------------------------------------------------------------------


def test_a_thousand_adapters_do_not_stall_it(page, url, parts):  # noqa: F811
    names = [f"team/{number:04d}" for number in range(1000)]
    for name in names:
        parts.store.register(name, Nothing(4))
    try:
        page.add_init_script(
            "window.longest = 0; new PerformanceObserver((list) => { for (const one of list.getEntries()) "
            "window.longest = Math.max(window.longest, one.duration) }).observe({type: 'longtask', buffered: true})"
        )
        began = time.monotonic()
        page.goto(url)
        expect(page.locator("#place")).to_contain_text("of 1,0")
        assert page.locator("#adapters tbody tr").count() == 25
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#place")).to_contain_text("26 to 50")
        page.get_by_label("Filter by name").fill("team/0777")
        expect(page.locator("#adapters tbody tr")).to_have_count(1)
        expect(row(page, "team/0777")).to_be_visible()
        assert time.monotonic() - began < 20
        assert page.evaluate("window.longest") < 2000  # ms for which the page did not react, on a busy machine
        page.guard.check(page)
    finally:
        for name in names:
            parts.store.unregister(name)


def test_keyboard_alone_is_enough(page, guarded):  # noqa: F811
    page.goto(guarded.url)
    press = page.keyboard.press

    def focus(label, most=40):
        """Press Tab until what has this label has the focus."""
        for _ in range(most):
            press("Tab")
            if page.evaluate(NAME_OF_FOCUS) == label:
                return
        raise AssertionError(f"Tab does not reach {label!r}")

    focus("Key")
    page.keyboard.type(guarded.bob)
    press("Enter")
    expect(row(page, "a0")).to_be_visible()
    focus("Model")
    press("ControlOrMeta+a")
    page.keyboard.type("mix")
    press("Escape")
    focus("Prompt")
    page.keyboard.type("the film was good")
    press("ControlOrMeta+Enter")
    ended(page)
    press("Tab")
    assert page.evaluate(NAME_OF_FOCUS) == "Answer"
    press("Tab")  # Stop is disabled; then the tokens, one stop for all
    assert page.evaluate("document.activeElement.getAttribute('role')") == "option"
    press("ArrowRight")
    press("ArrowRight")
    expect(page.locator(".token").nth(2)).to_be_focused()
    expect(page.locator(".token").nth(2)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#token")).to_contain_text("entropy")
    press("End")
    expect(page.locator(".token").last).to_be_focused()
    press("Tab")
    assert page.evaluate(NAME_OF_FOCUS) == "Filter by name"
    page.keyboard.type("a1")
    expect(page.locator("#adapters tbody tr")).to_have_count(1)
    focus("Pin a1")
    press("Enter")
    expect(page.get_by_role("button", name="Unpin a1")).to_be_focused()
    press("Space")
    expect(page.get_by_role("button", name="Pin a1", exact=True)).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_narrow_windows(page, url, scheme):  # noqa: F811
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 320, "height": 700})
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    ask(page, "mix")
    ended(page)
    page.locator(".token").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320  # tables scroll for themselves
    low = page.evaluate(CONTRASTS)
    assert low["seen"] > 30 and low["low"] == []
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length).map((o) => o.id)"
    )
    assert unnamed == []
