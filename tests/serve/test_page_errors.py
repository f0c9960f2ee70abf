"""The page at `/` in a real browser: keys and what they may see, refusals, and how often it asks."""

import re

from tests.serve.browsing import ask, browser, ended, enter, expect, page, refuse, row  # noqa: F401  (fixtures)
from tests.serve.site import guarded, overview, parts, url  # noqa: F401  (fixtures)


def test_keys(page, guarded):  # noqa: F811
    page.goto(guarded.url)
    expect(page.locator("#page-error")).to_contain_text("A key is needed")
    enter(page, "molora_wrong")
    expect(page.locator("#page-error")).to_contain_text("Key refused")
    expect(page.locator("#page-error")).to_contain_text("401")
    expect(page.locator("#adapters tbody tr")).to_have_count(0)
    enter(page, guarded.bob)
    expect(page.locator("#who")).to_have_text("Tenant bob.")
    expect(row(page, "a1")).to_be_visible()
    ask(page, "a1")
    ended(page)
    enter(page, guarded.ann)
    expect(page.locator("#who")).to_have_text("Tenant ann.")
    expect(row(page, "a0")).to_be_visible()
    expect(row(page, "a1")).to_have_count(0)  # what bob's key showed is gone
    expect(page.locator("#answer")).to_be_hidden()
    assert "a1" not in page.content() + page.get_by_label("Model").input_value()
    expect(page.locator("#load")).to_be_hidden()
    page.reload()  # the tab remembers
    expect(page.locator("#who")).to_have_text("Tenant ann.")
    kept = page.evaluate("[Object.values({...sessionStorage}), Object.keys(localStorage), document.cookie]")
    assert kept == [[guarded.ann], [], ""]
    assert guarded.ann not in page.content() + page.url
    other = page.context.new_page()
    other.goto(guarded.url)
    expect(other.locator("#page-error")).to_contain_text("A key is needed")  # another tab does not
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#page-error")).to_contain_text("A key is needed")
    assert page.evaluate("sessionStorage.length") == 0
    page.guard.check(page, expected=[401])


def test_admin_sees_all_shares_and_asks_for_nothing(page, guarded):  # noqa: F811
    page.goto(guarded.url)
    enter(page, guarded.admin)
    expect(page.locator("#who")).to_contain_text("Admin")
    expect(row(page, "a1")).to_be_visible()
    expect(page.locator("#engine")).to_contain_text("running")
    told = overview(guarded.url, guarded.admin).json()["shares"]
    expect(page.locator("#shares tbody tr")).to_have_count(len(told))
    for one in told:
        expect(page.get_by_role("row", name=re.compile(f"^{one['tenant']} "))).to_contain_text("due")
    expect(page.get_by_role("button", name="Answer")).to_be_disabled()
    page.guard.check(page, expected=[401])


def test_what_a_tenant_may_not_use_is_not_found(page, guarded):  # noqa: F811
    page.goto(guarded.url)
    enter(page, guarded.ann)
    expect(row(page, "a0")).to_be_visible()
    ask(page, "a1")
    expect(page.locator("#ask-error")).to_contain_text("Not found (404, model_not_found)")
    ask(page, "a0")
    ended(page)
    expect(page.locator("#ask-error")).to_be_hidden()
    expect(page.locator("#shares")).to_contain_text("ann")


def test_too_many_requests_says_when_to_try_again(page, url):  # noqa: F811
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    refuse(page, "**/v1/completions", 429, "rate_limit_exceeded", **{"Retry-After": "2"})
    ask(page, "a0")
    box = page.locator("#ask-error")
    expect(box).to_contain_text("Too many requests (429, rate_limit_exceeded)")
    expect(box.get_by_role("button")).to_have_text(re.compile(r"Try again in \d s"))
    expect(box.get_by_role("button")).to_be_disabled()
    page.unroute("**/v1/completions")
    expect(box.get_by_role("button", name="Try again", exact=True)).to_be_enabled()
    box.get_by_role("button").click()
    ended(page)
    page.guard.check(page, expected=[429])


def test_looking_stops_at_an_error_until_told_to_go_on(page, url):  # noqa: F811
    page.clock.install()
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    asked = []
    page.on("request", lambda request: "/v1/overview" in request.url and asked.append(request.url))
    page.route("**/v1/overview*", lambda route: route.abort())
    page.clock.run_for(2500)
    expect(page.locator("#page-error")).to_contain_text("The server does not answer")
    expect(row(page, "a0")).to_be_visible()  # what is known stays
    asked.clear()
    page.clock.run_for(120_000)
    assert asked == []
    page.unroute("**/v1/overview*")
    page.locator("#page-error").get_by_role("button", name="Try again").click()
    expect(page.locator("#page-error")).to_be_hidden()
    for _ in range(20):  # the clock of the page must not run ahead of the answers
        page.clock.run_for(2500)
        page.evaluate("fetch('/healthz').then((found) => found.text())")
    assert len(asked) >= 3


def test_hidden_page_asks_ever_more_rarely(page, url):  # noqa: F811
    page.clock.install()
    page.goto(url)
    expect(row(page, "a0")).to_be_visible()
    page.evaluate("Object.defineProperty(document, 'hidden', {configurable: true, get: () => window.away})")
    page.evaluate("window.away = true")
    times = []
    page.on("requestfinished", lambda request: "/v1/overview" in request.url and times.append(request.url))
    for _ in range(60):  # ten minutes, second by second of the page's clock
        with_answer = len(times)
        page.clock.run_for(10_000)
        page.evaluate("fetch('/healthz').then((found) => found.text())")  # answers that are due have come by then
        assert len(times) - with_answer <= 4
    assert 8 <= len(times) <= 18  # after 4, 8, 16, 32 and then every 60 seconds; were it seen, 300
    seen = len(times)
    with page.expect_response("**/v1/overview*"):
        page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    assert len(times) - seen <= 1
